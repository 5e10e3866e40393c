"""Tokenizers of the Hugging Face world, with the interface of nanoflax.tokenizers.

One class, HFTokenizer, serves tokenizer.json, GPT-2's vocab.json with merges.txt, BERT's vocab.txt,
SentencePiece models and the vocabulary of a GGUF file: each is put into the form of tokenizer.json
and run by the `tokenizers` library. Marian, with its two SentencePiece models, has its own.

A user's text is never read as a special token. The library alone does not promise that: a Unigram
model, or WordPiece over words, finds "</s>" in its vocabulary. So each special token is respelled
as a random string, which no text can hold; to read special tokens is to put that spelling in.
"""

import hashlib
import json
import pathlib
import re
import secrets

from nanoflax import chat
from nanoflax.errors import UserError
from nanoflax.tokenizers import SPACE, check_ids, well_formed

VOCABULARIES = ("tokenizer.json", "source.spm", "tokenizer.model", "spiece.model", "vocab.json",
                "vocab.txt")
FILES = (*VOCABULARIES, "target.spm", "merges.txt", "added_tokens.json", "tokenizer_config.json",
         "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")

# How byte-level vocabularies cut text into words before merging; facts of their makers.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GGUF_WORDS = {  # tokenizer.ggml.pre -> the expressions, applied in turn
    None: [GPT2], "default": [GPT2], "gpt-2": [GPT2], "olmo": [GPT2],
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r"], [r"\p{N}", GPT2]),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3"], [LLAMA3]),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen"], [QWEN2]),
    "tekken": [TEKKEN],
}
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # piece types, SentencePiece and GGUF


def load(directory):
    """The tokenizer of a Hugging Face directory. Raises: UserError (missing or damaged files)."""
    directory = pathlib.Path(directory)
    try:
        files = {name: (directory / name).read_bytes() for name in FILES
                 if (directory / name).is_file()}
    except OSError as error:
        raise UserError(f"tokenizer {directory}: {error.strerror}: {error.filename}") from error
    return from_files(files, str(directory))


def from_files(files, name):
    """An HFTokenizer or MarianTokenizer from {file name: bytes}; `name` is for messages."""
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
    except BaseException as error:  # the library's own errors are plain, and its panics not even
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"it lacks {reason}" if isinstance(error, KeyError) else reason
        raise UserError(f"tokenizer {name}: {kind} or a file beside it is damaged: "
                        f"{reason[:200]}") from error


def from_gguf(metadata, name="GGUF"):
    """The HFTokenizer of a GGUF file's metadata (its keys "tokenizer...").

    tokenizer.ggml.model "gpt2" is byte-level BPE, cut into words as tokenizer.ggml.pre says;
    "llama" is SentencePiece BPE. Control tokens are the special ones.
    Raises: UserError (another model or pre, missing or damaged lists).
    """
    def get(key, default=None):
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, words, tokens = get("model"), get("pre"), get("tokens")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{name}: tokenizer.ggml.model is {kind!r}; gpt2 and llama are supported")
    if kind == "gpt2" and words not in GGUF_WORDS:
        raise UserError(f"{name}: tokenizer.ggml.pre is {words!r}; supported: "
                        f"{', '.join(sorted(filter(None, GGUF_WORDS)))}")
    wanted = {"tokens": str, "token_type": int}
    wanted |= {"merges": str} if kind == "gpt2" else {"scores": (int, float)}
    for key, types in wanted.items():
        values = get(key)
        if not isinstance(values, list) or not all(isinstance(v, types) for v in values):
            raise UserError(f"{name}: tokenizer.ggml.{key} is missing or not a list of "
                            f"{'text' if types is str else 'numbers'}")
        if key != "merges" and len(values) != len(tokens):
            raise UserError(f"{name}: tokenizer.ggml.{key} has {len(values)} entries for "
                            f"{len(tokens)} tokens")
    ids = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id",
           "unk": "unknown_token_id", "sep": "seperator_token_id", "mask": "mask_token_id"}
    roles = {}
    for role, key in ids.items():
        if (i := get(key)) is not None:
            if not isinstance(i, int) or not 0 <= i < len(tokens):
                raise UserError(f"{name}: tokenizer.ggml.{key} is {i!r}, with {len(tokens)} tokens")
            roles[role] = tokens[i]
    config = {f"{role}_token": token for role, token in roles.items()}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    try:
        if kind == "gpt2":
            spec = _byte_level(dict(zip(tokens, range(len(tokens)))),
                               [tuple(merge.split(" ")) for merge in get("merges")],
                               GGUF_WORDS[words])
        else:
            unknown = get("unknown_token_id", 0)
            spec = _sentencepiece_bpe(tokens, get("scores"), get("token_type"), tokens[unknown],
                                      get("add_space_prefix", True))
    except Exception as error:
        raise UserError(f"{name}: its vocabulary is damaged: {' '.join(str(error).split())}"
                        ) from error
    spec["added_tokens"] = _typed_tokens(tokens, get("token_type"))
    _set_ends(spec, {"add_bos_token": get("add_bos_token", kind == "llama"),
                     "add_eos_token": get("add_eos_token", False)}, roles)
    files = {"tokenizer.json": spec, "tokenizer_config.json": config}
    return from_files({file: json.dumps(value, ensure_ascii=False).encode()
                       for file, value in files.items()}, name)


class _FromFiles:
    """What HFTokenizer and MarianTokenizer share: their files, kept byte for byte."""

    chat_template = None

    def __init__(self, files, name):
        self.files, self.name = files, name
        self._config = _json(files, "tokenizer_config.json", name)
        self._generation = _json(files, "generation_config.json", name)
        maps = _json(files, "special_tokens_map.json", name) | self._config
        # {"eos": "</s>", ...} and the further special tokens
        self._roles = {role: _content(maps[f"{role}_token"]) for role in ROLES
                       if maps.get(f"{role}_token") is not None}
        self._extra = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = maps.get(key) or []
            self._extra += map(_content, tokens.values() if isinstance(tokens, dict) else tokens)

    def _set_ids(self, token_to_id):
        for role in ROLES:
            i = token_to_id(self._roles[role]) if role in self._roles else None
            if i is None:
                i = next(iter(self._generated(role)), None)
            setattr(self, f"{role}_id", i)
        for role, *others in (("eos", "sep"), ("bos", "cls", "eos"), ("pad", "eos")):
            ids = (getattr(self, f"{r}_id") for r in (role, *others))
            setattr(self, f"{role}_id", next((i for i in ids if i is not None), None))
        if self.eos_id is None:
            raise UserError(f"tokenizer {self.name} has no end-of-sequence token")
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *self._generated("eos")]))
        digest = hashlib.blake2b(digest_size=16)
        for file in (*VOCABULARIES, "target.spm", "merges.txt", "added_tokens.json"):
            digest.update(hashlib.blake2b(self.files.get(file, b"")).digest())
        settings = {k: v for k, v in self._config.items() if k != "chat_template"}
        digest.update(json.dumps([settings, self._roles, self._extra, self.stop_ids],
                                 sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()

    def _generated(self, role):
        ids = self._generation.get(f"{role}_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        for i in ids:
            if not isinstance(i, int) or not 0 <= i < self.vocab_size:
                raise UserError(f"tokenizer {self.name}: generation_config.json: {role}_token_id "
                                f"is {i!r}, with {self.vocab_size} tokens")
        return ids

    def __reduce__(self):
        return from_files, (self.files, self.name)

    def save(self, directory):
        """Write the files as they were loaded. Raises: UserError."""
        directory = pathlib.Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, content in self.files.items():
                (directory / name).write_bytes(content)
        except OSError as error:
            raise UserError(f"tokenizer cannot be saved in {directory}: {error.strerror}"
                            ) from error


class HFTokenizer(_FromFiles):
    """A tokenizer that the `tokenizers` library runs; see `load` and `from_gguf`.

    Attributes: vocab_size (largest id + 1), bos_id, eos_id, pad_id (each falls back on another:
    BERT's bos is [CLS]), unk_id, sep_id, cls_id, mask_id (None where there is none), stop_ids (all
    that end an answer), special (the special strings and their ids), chat_template, fingerprint.
    """

    def __init__(self, files, name):
        from tokenizers import Tokenizer

        super().__init__(files, name)
        spec = self._spec()
        _add_special_tokens(spec, self._config, _json(files, "added_tokens.json", name),
                            self._roles, self._extra)
        if "tokenizer.json" not in files:  # which has the ends of its own
            _set_ends(spec, self._config, self._roles)
        nonce = secrets.token_hex(16)
        specials = [token["content"] for token in spec["added_tokens"] if token["special"]]
        # Of one length, so that no spelling followed by text is another.
        self._spelling = {token: f"{nonce}{i:06d}" for i, token in enumerate(specials)}
        self._special = _any_of(specials)
        self._tokenizer = Tokenizer.from_str(json.dumps(_respelled(spec, self._spelling)))
        wrong = [t["content"] for t in spec["added_tokens"] if t["id"] != self._id(t["content"])]
        if wrong:
            raise UserError(f"tokenizer {name}: the ids of {', '.join(wrong[:5])} leave a gap "
                            "after the vocabulary, or belong to another token")
        self.special = {token: self._id(token) for token in specials}
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self._set_ids(self._id)
        self.chat_template = self._chat_template()

    def _id(self, token):
        return self._tokenizer.token_to_id(self._spelling.get(token, token))

    def _spec(self):
        files, config = self.files, self._config
        kind = next(v for v in VOCABULARIES if v in files)
        name = config.get("tokenizer_class") or ""
        if kind == "tokenizer.json":
            spec = _json(files, kind, self.name)
            if not isinstance(spec.get("model"), dict):
                raise UserError(f"tokenizer {self.name}: tokenizer.json holds no model")
            return spec | {"truncation": None, "padding": None}
        supported = {"vocab.json": "GPT2|Roberta|Bart|Qwen2", "vocab.txt": "Bert|DistilBert|Electra",
                     "tokenizer.model": "Llama|Gemma|T5", "spiece.model": "T5"}[kind]
        if name and not re.fullmatch(rf"({supported})Tokenizer(Fast)?|PreTrainedTokenizerFast", name):
            raise UserError(f"tokenizer {self.name}: {name} from {kind} is not supported "
                            f"({supported.replace('|', ', ')} are); save it as tokenizer.json with "
                            "Transformers first")
        if kind == "vocab.json":
            return _from_merges(_json(files, kind, self.name), files["merges.txt"].decode(),
                                self._roles, config)
        if kind == "vocab.txt":
            return _from_wordpieces(files[kind].decode(), self._roles, config)
        return _from_sentencepiece(files[kind], self._roles, config)

    def _chat_template(self):
        template = self._config.get("chat_template")
        if "chat_template.jinja" in self.files:
            template = self.files["chat_template.jinja"].decode()
        if isinstance(template, list):  # several with names
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not isinstance(template, str | None):
            raise UserError(f"tokenizer {self.name}: its chat template must be text")
        return template

    def encode(self, text, special=False):
        """Text to ids, nothing added. special: special tokens written in the text are read."""
        return self._encode(self._spell(text) if special else text)

    def encode_with_template(self, text, pair=None, special=False):
        """Ids with what the model wants around a text or two: [CLS] x [SEP], or x </s>."""
        if special:
            text, pair = self._spell(text), None if pair is None else self._spell(pair)
        return self._encode(text, pair, add_special_tokens=True)

    def decode(self, ids):
        """Special tokens give no text; bytes that are not UTF-8 give U+FFFD."""
        check_ids(ids, self.vocab_size)
        return self._tokenizer.decode([int(i) for i in ids])

    def apply_chat(self, messages, add_generation_prompt=True, **variables):
        """The ids of a conversation, as its chat template writes it.

        Args:
          messages: list of {"role": str, "content": str, ...}.
          add_generation_prompt: end with what begins the assistant's answer.
          variables: what else the template reads (tools, enable_thinking, ...).
        Special tokens in a content stay text; where contents hold none, the ids are those of the
        whole rendering, as in Transformers. See chat.render for what a template can still spoil.
        Raises: UserError if there is no template or it fails.
        """
        if self.chat_template is None:
            raise UserError(f"tokenizer {self.name} has no chat template; give it plain text")
        names = {f"{role}_token": token for role, token in self._roles.items()}
        text, held, pattern = chat.render(
            self.chat_template, messages,
            names | {"tools": None, "documents": None} | variables
            | {"add_generation_prompt": add_generation_prompt}, self._spelling)
        return self._encode(pattern.sub(lambda match: held[int(match[1])], self._spell(text)))

    def _spell(self, text):
        return self._special.sub(lambda match: self._spelling[match[0]], text)

    def _encode(self, text, pair=None, add_special_tokens=False):
        try:
            return self._tokenizer.encode(
                well_formed(text), None if pair is None else well_formed(pair),
                add_special_tokens=add_special_tokens).ids
        except Exception as error:  # such as a WordPiece model without its unknown token
            raise UserError(f"tokenizer {self.name} cannot encode: {error}") from error


class MarianTokenizer(_FromFiles):
    """Marian: SentencePiece for either language (source.spm, target.spm), ids from vocab.json.

    Transformers also normalizes punctuation where sacremoses is installed; this does not.
    """

    def __init__(self, files, name):
        import sentencepiece

        super().__init__(files, name)
        self._ids = _json(files, "vocab.json", name)
        if self._config.get("separate_vocabs"):
            raise UserError(f"tokenizer {name}: separate_vocabs is not supported")
        self._roles = {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"} | self._roles
        missing = [t for t in self._roles.values() if t not in self._ids]
        if missing:
            raise UserError(f"tokenizer {name}: vocab.json lacks {', '.join(missing)}")
        self._source, self._target = (
            sentencepiece.SentencePieceProcessor(model_proto=files[f"{side}.spm"])
            for side in ("source", "target"))
        self._pieces = {i: piece for piece, i in self._ids.items()}
        self.vocab_size = 1 + max(self._pieces)
        self._set_ids(self._ids.get)
        self.special = {t: self._ids[t] for t in self._roles.values()}
        # A language code, such as ">>fr<<", says what to translate into.
        codes = [piece for piece in self._ids if re.fullmatch(r">>.*<<", piece)]
        self._special = _any_of([*self.special, *codes])

    def encode(self, text, special=False):
        """Source text to ids. special: special tokens and language codes in it are read."""
        text, ids, end = well_formed(text), [], 0
        for match in self._special.finditer(text) if special else ():
            ids += [*self._part(text[end:match.start()]), self._ids[match[0]]]
            end = match.end()
        return ids + self._part(text[end:])

    def _part(self, text):
        pieces = self._source.encode(text, out_type=str)
        return [self._ids.get(piece, self.unk_id) for piece in pieces]

    def encode_with_template(self, text, pair=None, special=False):
        """Ids with the end of sequence that the encoder wants."""
        return [*self.encode(text, special), *(self.encode(pair, special) if pair else ()),
                self.eos_id]

    def decode(self, ids):
        """Target ids to text; special tokens give none."""
        check_ids(ids, self.vocab_size)
        pieces = [self._pieces.get(int(i), "") for i in ids if i not in self.special.values()]
        return self._target.decode_pieces(pieces).replace(SPACE, " ").strip()


def _json(files, file, name):
    if file not in files:
        return {}
    try:
        value = json.loads(files[file])
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer {name}: {file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"tokenizer {name}: {file} must hold an object")
    return value


def _content(token):
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or not token:
        raise UserError(f"a special token must be text, not {token!r}")
    return token


def _any_of(strings):
    """A pattern for the longest of the strings at each place."""
    longest = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")


def _added(content, i, special=True, **more):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special} | more


def _typed_tokens(tokens, types):
    return [_added(token, i, special=t == CONTROL) for i, (token, t) in enumerate(zip(tokens, types))
            if t in (CONTROL, USER_DEFINED)]


def _add_special_tokens(spec, config, added, roles, extra):
    """Put into spec["added_tokens"] what the files beside it name, as Transformers does."""
    tokens = {token["content"]: token for token in spec.get("added_tokens") or []}
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    free = max([*vocabulary.values(), *(token["id"] for token in tokens.values())], default=-1) + 1

    def add(content, i=None, **more):
        nonlocal free
        if content not in tokens:
            i = vocabulary.get(content, free if i is None else i)
            tokens[content] = _added(content, i, **more)
            free = max(free, i + 1)

    for i, token in sorted((int(i), t) for i, t in (config.get("added_tokens_decoder") or {}).items()):
        add(i=i, **{k: token[k] for k in ("content", "special", "lstrip", "rstrip", "single_word",
                                          "normalized") if k in token})
    for content, i in sorted(added.items(), key=lambda item: item[1]):
        add(content, i, special=False)
    for content in [*roles.values(), *extra]:
        add(content)
        tokens[content]["special"] = True
    spec["added_tokens"] = sorted(tokens.values(), key=lambda token: token["id"])


def _set_ends(spec, config, roles):
    """Let add_bos_token and add_eos_token, where given, be the post-processor."""
    from tokenizers import processors

    if {"add_bos_token", "add_eos_token"} & config.keys():
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
        bos, eos = ([roles[role]] if config.get(f"add_{role}_token") and roles.get(role) in ids
                    else [] for role in ("bos", "eos"))
        template = processors.TemplateProcessing(
            single=[*bos, "$A", *eos], pair=[*bos, "$A", *eos, *bos, "$B", *eos],
            special_tokens=[(token, ids[token]) for token in {*bos, *eos}])
        spec["post_processor"] = json.loads(template.__getstate__())


def _respelled(spec, spelling):
    """The spec with other names for the special tokens, and no merge that makes one."""
    def new(token):
        return spelling.get(token, token)

    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new(token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[new(token), score] for token, score in model["vocab"]]
    if model.get("merges"):
        pairs = (tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"])
        model["merges"] = [p for p in pairs if not {*p, "".join(p)} & spelling.keys()]
    if model.get("unk_token"):
        model["unk_token"] = new(model["unk_token"])
    added = [token | {"content": new(token["content"])} for token in spec["added_tokens"]]
    return spec | {"model": model, "added_tokens": added}


def _spec_of(model, normalizer=None, pre_tokenizer=None, decoder=None, post_processor=None):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(model)
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder,
             "post_processor": post_processor}
    for part, value in parts.items():
        if value is not None:
            setattr(tokenizer, part, value)
    return json.loads(tokenizer.to_str())


def _byte_level(vocabulary, merges, words, prefix=False, normalizer=None, post_processor=None):
    from tokenizers import Regex, decoders, models, pre_tokenizers

    cut = [pre_tokenizers.Split(Regex(word), "isolated") for word in words]
    if words == [GPT2]:  # known to ByteLevel, which alone can add the prefix before cutting
        cut = []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not cut)
    return _spec_of(models.BPE(vocab=vocabulary, merges=merges), normalizer,
                    pre_tokenizers.Sequence([*cut, byte_level]), decoders.ByteLevel(),
                    post_processor)


def _from_merges(vocabulary, merges, roles, config):
    """vocab.json and merges.txt of GPT-2, OPT, RoBERTa, BART or Qwen2; fills in roles."""
    from tokenizers import normalizers, processors

    merges = [tuple(line.split(" ")) for line in merges.split("\n")
              if line and not line.startswith("#version")]
    name = config.get("tokenizer_class") or ""
    if "Qwen2" in name:
        roles |= {r: "<|endoftext|>" for r in ("eos", "pad", "unk") if r not in roles}
        return _byte_level(vocabulary, merges, [QWEN2], normalizer=normalizers.NFC())
    bert_like = re.match("Roberta|Bart", name) or (not name and "<mask>" in vocabulary)
    if not bert_like:
        roles |= {r: "<|endoftext|>" for r in ("bos", "eos", "unk") if r not in roles}
        return _byte_level(vocabulary, merges, [GPT2], bool(config.get("add_prefix_space")))
    defaults = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>",
                "pad": "<pad>", "mask": "<mask>"}
    roles |= {role: token for role, token in defaults.items() if role not in roles}
    ends = [(roles[role], vocabulary[roles[role]]) for role in ("sep", "cls")]
    return _byte_level(vocabulary, merges, [GPT2], bool(config.get("add_prefix_space")),
                       post_processor=processors.RobertaProcessing(*ends))


def _from_wordpieces(lines, roles, config):
    """BERT's vocab.txt; fills in roles."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {line.rstrip("\r"): i for i, line in enumerate(lines.rstrip("\n").split("\n"))}
    for role in ("unk", "sep", "pad", "cls", "mask"):
        roles.setdefault(role, f"[{role.upper()}]")
    sep, cls = ((roles[role], vocabulary[roles[role]]) for role in ("sep", "cls"))
    return _spec_of(
        models.WordPiece(vocabulary, unk_token=roles["unk"]),
        normalizers.BertNormalizer(lowercase=config.get("do_lower_case", True),
                                   strip_accents=config.get("strip_accents"),
                                   handle_chinese_chars=config.get("tokenize_chinese_chars", True)),
        pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(),
        processors.BertProcessing(sep, cls))


def _from_sentencepiece(model, roles, config):
    """A SentencePiece model: BPE as Llama has it, Unigram as T5; fills in roles and config."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    tokens, scores, types = zip(*((p.piece, p.score, p.type) for p in proto.pieces))
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    ids = {"unk": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id,
           "pad": trainer.pad_id}
    for role, i in ids.items():
        if i >= 0:
            roles.setdefault(role, tokens[i])
    added = _typed_tokens(tokens, types)
    normalize = ([normalizers.Precompiled(normal.precompiled_charsmap)]
                 if normal.precompiled_charsmap else [])
    if normal.remove_extra_whitespaces:
        normalize += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if trainer.model_type == trainer.BPE:
        config.setdefault("add_bos_token", True)  # as Llama
        spec = _sentencepiece_bpe(tokens, scores, types, tokens[trainer.unk_id],
                                  normal.add_dummy_prefix, normalize)
    elif trainer.model_type == trainer.UNIGRAM:
        space = {"replacement": SPACE, "prepend_scheme": "always"}
        eos = (roles["eos"], ids["eos"])
        spec = _spec_of(
            models.Unigram([*zip(tokens, scores)], trainer.unk_id, trainer.byte_fallback),
            normalizers.Sequence(normalize),
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                     pre_tokenizers.Metaspace(**space)]),
            decoders.Metaspace(**space),
            processors.TemplateProcessing(single=["$A", eos[0]], pair=["$A", eos[0], "$B", eos[0]],
                                          special_tokens=[eos]))
        # T5's sentinels follow the vocabulary, the first last.
        end = len(tokens) + config.get("extra_ids", 100)
        added += [_added(f"<extra_id_{end - 1 - i}>", i) for i in range(len(tokens), end)]
    else:
        raise UserError("a SentencePiece model of words or characters is not supported")
    return spec | {"added_tokens": added}


def _sentencepiece_bpe(tokens, scores, types, unknown, prefix, normalize=()):
    """SentencePiece's BPE as merges: of two pieces that make a third, the best score first.

    prefix: a text is read as if a space were before it, and after each special token.
    """
    from tokenizers import decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    plain = {token: score for token, score, t in zip(tokens, scores, types) if t == NORMAL}
    merges = [(-score, i, token) for token, score in plain.items() for i in range(1, len(token))
              if token[:i] in plain and token[i:] in plain]
    merges = [(token[:i], token[i:]) for _, i, token in sorted(merges, key=lambda m: m[:2])]
    normalize = [*normalize, *([normalizers.Prepend(SPACE)] if prefix else []),
                 normalizers.Replace(" ", SPACE)]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    return _spec_of(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True,
                   byte_fallback=BYTE in types), normalizers.Sequence(normalize), None,
        decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(),
                           decoders.Fuse(), *strip]))
