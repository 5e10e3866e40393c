"""Tokenizers in the file formats of Hugging Face.

HFTokenizer reads tokenizer.json, GPT-2's vocab.json with merges.txt, BERT's vocab.txt, SentencePiece
models and the vocabulary of a GGUF file: `vocabularies` converts each to a tokenizer.json, which the
`tokenizers` library runs. MarianTokenizer reads the two SentencePiece models of Marian.

"</s>" in a user's text is never read as a special token. The library alone does not guarantee this: a
Unigram model, or WordPiece over words, finds "</s>" in its vocabulary. So each special token is renamed
to an alias, a random string that no text can contain. To read the special tokens in a text, HFTokenizer
first replaces them by their aliases.

In a source or target of an encoder-decoder, a person must write some special tokens: T5's <extra_id_0>, BART's
<mask>, the code of a language. So `encode_source` and `encode_target` read those that are not the tokenizer's own:
all except bos, eos, pad, unk, sep, cls and what ends an answer.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from nanoflax import untrusted
from nanoflax.errors import UserError
from nanoflax.tokenizers import chat_template, specs, vocabularies
from nanoflax.tokenizers.base import Framing, check_ids, well_formed
from nanoflax.tokenizers.file_tokenizer import (
    FIELDS,
    ROLES,
    VOCABULARIES,
    Files,
    FileTokenizer,
    any_of,
    library_errors,
    read_json,
    without_spaces_before_marks,
)
from nanoflax.tokenizers.marian import MarianTokenizer

FILES = (*VOCABULARIES, "target.spm", "merges.txt", "added_tokens.json", "tokenizer_config.json",
         "special_tokens_map.json", "generation_config.json", "chat_template.jinja")  # fmt: skip
CLASSES_OF_MODELS = {"gpt2": "GPT2Tokenizer", "bert": "BertTokenizer", "distilbert": "DistilBertTokenizer",
                     "electra": "ElectraTokenizer", "roberta": "RobertaTokenizer", "bart": "BartTokenizer",
                     "xlm-roberta": "XLMRobertaTokenizer", "t5": "T5Tokenizer"}  # fmt: skip
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # run a tokenizer.json as it is, with named tokens


def load_huggingface(directory: str | os.PathLike) -> "HFTokenizer | MarianTokenizer":
    """The tokenizer of a Hugging Face directory. Raises: UserError (missing or damaged files)."""
    directory = pathlib.Path(directory)
    files = {name: untrusted.read_bytes(directory, name) for name in FILES if (directory / name).exists()}
    return from_files(_with_class_of_model(files, directory), str(directory))


def _with_class_of_model(files: Files, directory: pathlib.Path) -> Files:
    """The files. If they name neither a class nor ends, as in the first models on the hub, config.json tells the class,
    which then is in tokenizer_config.json."""
    settings = [read_json(files, name, str(directory)) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    if "tokenizer.json" not in files or {"tokenizer_class", "eos_token", "sep_token"} & {*settings[0], *settings[1]}:
        return files
    with contextlib.suppress(UserError, LookupError):  # the reader of the model names what is wrong
        described = untrusted.json_object(untrusted.read_bytes(directory, "config.json"), "config.json")
        config = settings[0] | {"tokenizer_class": CLASSES_OF_MODELS[described["model_type"]]}
        files = files | {"tokenizer_config.json": json.dumps(config).encode()}
    return files


def from_files(files: Files, name: str) -> "HFTokenizer | MarianTokenizer":
    """The tokenizer in files (name -> content); `name` is used in messages. Raises: UserError."""
    kind = next((v for v in VOCABULARIES if v in files), None)
    if kind is None:
        raise UserError(f"tokenizer {name} holds none of {', '.join(VOCABULARIES)}")
    partner = {"source.spm": "target.spm", "vocab.json": "merges.txt"}.get(kind)
    if partner and partner not in files:
        raise UserError(f"tokenizer {name} holds {kind} but no {partner}")
    try:
        return (MarianTokenizer if kind == "source.spm" else HFTokenizer)(files, name)
    except UserError:
        raise
    except BaseException as error:  # a panic of the library (in Rust) is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"it lacks {reason}" if isinstance(error, KeyError) else reason
        raise UserError(f"tokenizer {name}: {kind} or a file beside it is damaged: {reason[:200]}") from error


def from_gguf(metadata: dict[str, Any], name: str = "GGUF") -> "HFTokenizer":
    """The tokenizer of a GGUF file's metadata (the keys "tokenizer...").

    tokenizer.ggml.model "gpt2" is byte-level BPE, and tokenizer.ggml.pre names the patterns that split text into
    words; "llama" is SentencePiece BPE. Control tokens become special tokens, and the ids of the ends of a turn, a
    message and an infilled part become stop ids.
    Raises: UserError (an unsupported model or pre, missing or damaged lists).
    """
    return from_spec(*vocabularies.from_gguf(metadata, name), name=name)


def from_spec(spec: dict[str, Any], config: dict[str, Any], generation: dict[str, Any], name: str) -> "HFTokenizer":
    """The tokenizer of the contents of a tokenizer.json, tokenizer_config.json and generation_config.json."""
    files = {"tokenizer.json": spec, "tokenizer_config.json": config, "generation_config.json": generation}
    files = {file: json.dumps(content).encode() for file, content in files.items() if content}
    tokenizer = from_files(files, name)
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


class HFTokenizer(FileTokenizer):
    """A tokenizer that the `tokenizers` library runs; made by `from_files` and `from_gguf`."""

    def __init__(self, files: Files, name: str):
        from tokenizers import Tokenizer

        super().__init__(files, name)
        spec = self._spec_with_special_tokens()
        if self._config != read_json(files, "tokenizer_config.json", name):  # add_bos_token, not everyone's default
            self.files = files | {"tokenizer_config.json": json.dumps(self._config).encode()}
        nonce = secrets.token_hex(16)
        specials = [token["content"] for token in spec["added_tokens"] if token["special"]]
        # All aliases have the same length, so none is a prefix of another. Beside "|" a word can begin or end.
        self._aliases = {token: f"|{nonce}{i:06d}|" for i, token in enumerate(specials)}
        words = {token["content"] for token in spec["added_tokens"] if token.get("single_word")}
        self._special_pattern = any_of(specials, words)
        self._tokenizer = Tokenizer.from_str(json.dumps(specs.rename_special(spec, self._aliases)))
        wrong = [t["content"] for t in spec["added_tokens"] if t["id"] != self._id(t["content"])]
        if wrong:
            raise UserError(
                f"tokenizer {name}: the ids of {', '.join(wrong[:5])} belong to "
                "other tokens, or there is a gap between the vocabulary and these ids"
            )
        self.special = {token: i for token in specials if (i := self._id(token)) is not None}
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        has_bytes = '"ByteFallback"' in json.dumps(spec.get("decoder"))
        self._bytes = {f"<0x{byte:02X}>": byte for byte in range(256)} if has_bytes else {}
        # Transformers ignores this setting for BPE.
        self.cleans_up = bool(self._config.get("clean_up_tokenization_spaces")) and spec["model"].get("type") != "BPE"
        self._set_ids(self._id)
        before, after = self._template()
        self.framing = Framing(before, after, before, self.bos_id, self.eos_id)
        self.chat_template = self._chat_template()
        own = {getattr(self, f"{role}_id") for role in ROLES if role != "mask"} | {*self.stop_ids}
        self._writable = any_of([token for token, i in self.special.items() if i not in own], words)

    def _template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor adds before and after a text of one token."""
        from tokenizers import Tokenizer, models

        probe = Tokenizer(models.WordLevel({"x": 0}, "x"))
        if (processor := self._tokenizer.post_processor) is None:
            return (), ()
        probe.post_processor = processor
        framed = probe.encode("x")
        if framed.sequence_ids.count(0) != 1:
            raise UserError(f"tokenizer {self.name}: the template of its post-processor must contain the text once")
        at = framed.sequence_ids.index(0)
        return tuple(framed.ids[:at]), tuple(framed.ids[at + 1 :])

    def contents(self) -> tuple[specs.Spec, specs.Roles]:
        """A tokenizer.json with all special tokens, and {role: special token}."""
        return self._spec_with_special_tokens(), self._roles

    def token_ids(self) -> dict[str, int]:
        """{token: id} of the vocabulary, with special tokens."""
        names = {alias: token for token, alias in self._aliases.items()}
        return {names.get(token, token): i for token, i in self._tokenizer.get_vocab().items()}

    def _id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(self._aliases.get(token, token))

    def for_transformers(self) -> "HFTokenizer":
        """The tokenizer with a tokenizer.json, and with a class of Transformers that follows all of it.

        Of the other classes, Transformers 5 takes only the vocabulary and decides the rest by the name of the class:
        the normalization, the words, and whether a text begins with a space.
        """
        own = self._config.get("tokenizer_class")
        # Transformers 5 reads every tokenizer of the model_type qwen2 by this class.
        if "tokenizer.json" in self.files and own in (*PLAIN_CLASSES, "Qwen2Tokenizer", "Qwen2TokenizerFast"):
            return self
        is_bert = re.fullmatch("(Bert|Electra)Tokenizer(Fast)?", own or "") or not own and "vocab.txt" in self.files
        names = ["input_ids", *(["token_type_ids"] if is_bert else []), "attention_mask"]
        config = {f"{role}_token": token for role, token in self._roles.items()} | {"model_input_names": names}
        new = {"tokenizer_config.json": config | self._config | {"tokenizer_class": PLAIN_CLASSES[0]}}
        if "tokenizer.json" not in self.files:
            new["tokenizer.json"] = self._spec_with_special_tokens()
        return HFTokenizer(self.files | {file: json.dumps(x).encode() for file, x in new.items()}, self.name)

    def _spec_with_special_tokens(self) -> dict[str, Any]:
        spec, added = self._spec(), read_json(self.files, "added_tokens.json", self.name)
        _add_special_tokens(spec, self._config, added, self._named, self._roles)
        if "tokenizer.json" not in self.files:  # a tokenizer.json has its own post-processor
            specs.set_ends(spec, self._config, self._roles)
        return spec

    def _spec(self) -> dict[str, Any]:
        files, config = self.files, self._config
        kind = next(v for v in VOCABULARIES if v in files)
        name = config.get("tokenizer_class") or ""
        if kind == "tokenizer.json":
            spec = read_json(files, kind, self.name)
            if not isinstance(spec.get("model"), dict):
                raise UserError(f"tokenizer {self.name}: tokenizer.json holds no model")
            specs.check_normalizer(spec.get("normalizer"), f"tokenizer {self.name}: {kind}")
            if not isinstance(spec["model"].get("vocab"), list):  # Unigram's is a list without ids
                specs.check_vocabulary(spec["model"].get("vocab"), f"tokenizer {self.name}: {kind}")
            if name and name not in PLAIN_CLASSES and not {"eos", "sep"} & self._roles.keys():
                self._roles = (
                    vocabularies.usual_roles(t["content"] for t in spec.get("added_tokens") or []) | self._roles
                )
            return spec | {"truncation": None, "padding": None}
        known = {
            "vocab.json": "GPT2|Roberta|Bart|Qwen2",
            "vocab.txt": "Bert|DistilBert|Electra",
            "tokenizer.model": "Llama|Gemma|T5",
            "spiece.model": "T5",
        }[kind]
        if name and not re.fullmatch(rf"({known})Tokenizer(Fast)?|PreTrainedTokenizerFast", name):
            raise UserError(
                f"tokenizer {self.name}: {name} from {kind} is not supported "
                f"({known.replace('|', ', ')} are); save it as tokenizer.json with "
                "Transformers first"
            )
        if kind == "vocab.json":
            vocabulary = read_json(files, kind, self.name)
            specs.check_vocabulary(vocabulary, f"tokenizer {self.name}: {kind}")
            return vocabularies.from_merges(vocabulary, files["merges.txt"].decode("utf-8-sig"), self._roles, config)
        if kind == "vocab.txt":
            return vocabularies.from_wordpieces(files[kind].decode("utf-8-sig"), self._roles, config)
        return vocabularies.from_sentencepiece(files[kind], self._roles, config)

    def _chat_template(self) -> str | None:
        template = self._config.get("chat_template")
        if "chat_template.jinja" in self.files:
            template = self.files["chat_template.jinja"].decode("utf-8-sig")
        if isinstance(template, list):  # several named templates
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not isinstance(template, str | None):
            raise UserError(f"tokenizer {self.name}: its chat template must be text")
        return template

    def with_chat_template(self, template: str) -> "HFTokenizer":
        """The tokenizer with another chat template, also in its files. The fingerprint does not change."""
        files, config = dict(self.files), dict(self._config)
        if "chat_template.jinja" in files:
            files["chat_template.jinja"] = template.encode()
        else:
            new: Any = template
            if isinstance(named := config.get("chat_template"), list):
                new = [t | {"template": template} if t["name"] == "default" else t for t in named]
            files["tokenizer_config.json"] = json.dumps(config | {"chat_template": new}, indent=2).encode()
        return HFTokenizer(files, self.name)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text, without added tokens. special: read special tokens in the text."""
        return self._encode(self._with_aliases(text) if special else text)

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """`encode` of each text."""
        with library_errors(f"tokenizer {self.name} cannot encode"):  # see `_encoding`
            found = self._tokenizer.encode_batch_fast([well_formed(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_source(self, text: str) -> list[int]:
        """The ids of a source, in which a person writes the special tokens that are not the tokenizer's own."""
        return self._encode(self._with_aliases(text, self._writable))

    encode_target = encode_source

    def encode_with_template(self, text: str, pair: str | None = None, special: bool = False) -> list[int]:
        """The ids of one or two texts, with the special tokens that the model expects: [CLS] x [SEP], or x </s>."""
        if special:
            text, pair = self._with_aliases(text), None if pair is None else self._with_aliases(pair)
        return self._encode(text, pair, add_special_tokens=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens give no text; bytes that are not UTF-8 give U+FFFD."""
        ids = [int(i) for i in ids]
        check_ids(ids, self.vocab_size)
        if not self._bytes:
            text = self._tokenizer.decode(ids)
        else:
            special = set(self.special.values())
            tokens = [self._tokenizer.id_to_token(i) or "" for i in ids if i not in special]
            text = self._tokenizer.decoder.decode(_replace_invalid_bytes(tokens, self._bytes))
        return without_spaces_before_marks(text) if self.cleans_up else text

    def apply_chat(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of a conversation, as the tokenizer's chat template writes it.

        Args:
          messages: list of {"role": str, "content": str, ...}.
          add_generation_prompt: end with the beginning of the assistant's answer.
          variables: other values that the template reads (tools, enable_thinking, ...).
        Special tokens in a content stay text. For contents without special tokens, the ids are those of
        Transformers. See `chat_template.render` for the limits.
        Raises: UserError if there is no template, or if the template fails.
        """
        return self._encode(self.render_chat(messages, add_generation_prompt, **variables).text)

    def render_chat(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, **variables: Any
    ) -> chat_template.Rendering:
        """The text of a conversation, for `encode_parts`. Arguments and errors: see `apply_chat`."""
        if self.chat_template is None:
            raise UserError(f"tokenizer {self.name} has no chat template; use plain text instead of messages")
        named = self._config.get("chat_template")
        if variables.get("tools") and isinstance(named, list) and "tool_use" in {t["name"] for t in named}:
            raise UserError(
                f"tokenizer {self.name} has a chat template of its own for tools, tool_use, which is not read"
            )
        names = {f"{role}_token": token for role, token in self._roles.items()}
        names |= {"tools": None, "documents": None} | variables
        names["add_generation_prompt"] = add_generation_prompt
        return chat_template.render(self.chat_template, list(messages), names, self._aliases)

    def encode_parts(self, text: str, parts: Sequence[tuple[int, int]]) -> tuple[list[int], list[float]]:
        """The ids of a text of `render_chat`; 1.0 for ids with a character of a part (start, end), else 0.0."""
        encoding = self._encoding(text)
        weights = [0.0] * len(encoding.ids)
        for i, (start, end) in enumerate(encoding.offsets):
            start = min(start, end - 1)  # the library leaves spaces out, so a token of spaces is empty
            weights[i] = float(any(start < last and end > first for first, last in parts))
        return encoding.ids, weights

    def _with_aliases(self, text: str, pattern: re.Pattern[str] | None = None) -> str:
        return (pattern or self._special_pattern).sub(lambda match: self._aliases[match[0]], text)

    def _encode(self, text, pair=None, add_special_tokens=False):
        return self._encoding(text, pair, add_special_tokens).ids

    def _encoding(self, text, pair=None, add_special_tokens=False):
        # An error is a WordPiece model without its unknown token, or a damaged table of characters.
        with library_errors(f"tokenizer {self.name} cannot encode"):
            return self._tokenizer.encode(
                well_formed(text), None if pair is None else well_formed(pair), add_special_tokens=add_special_tokens
            )


def _replace_invalid_bytes(tokens: list[str], values: dict[str, int]) -> list[str]:
    """The tokens, with U+FFFD for each byte that is not part of a character in UTF-8, as SentencePiece decodes.

    The library would replace all neighbouring bytes. values: byte token -> byte.
    """
    found = []
    for is_byte, run in itertools.groupby(tokens, values.__contains__):
        run = list(run)
        if not is_byte:
            found += run
            continue
        at = 0
        for character in bytes(values[token] for token in run).decode("utf-8", "surrogateescape"):
            is_invalid = "\udc80" <= character <= "\udcff"
            size = 1 if is_invalid else len(character.encode())
            found += ["\ufffd"] if is_invalid else run[at : at + size]
            at += size
    return found


def _add_special_tokens(spec, config, added, named, roles):
    """Add the special tokens of the settings files to spec["added_tokens"], as Transformers does."""
    tokens = {token["content"]: token for token in spec.get("added_tokens") or []}
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    free = max([*vocabulary.values(), *(token["id"] for token in tokens.values())], default=-1) + 1

    def add(i, content, **more):
        nonlocal free
        if content not in tokens:
            i = vocabulary.get(content, free if i is None else i)
            tokens[content] = specs.added_token(content, i, **more)
            free = max(free, i + 1)

    decoder = config.get("added_tokens_decoder") or {}
    for i in sorted(decoder, key=int):
        add(int(i), **{key: decoder[i][key] for key in FIELDS if key in decoder[i]})
    for content in sorted(added, key=added.get):
        add(added[content], content, special=False)
    for token in [*named, *({"content": content} for content in roles.values())]:
        add(None, **token)
        tokens[token["content"]]["special"] = True
    specs.check_vocabulary({token["content"]: token["id"] for token in tokens.values()}, "added tokens")
    spec["added_tokens"] = sorted(tokens.values(), key=lambda token: token["id"])
