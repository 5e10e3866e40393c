"""Vocabularies of several formats, converted to the contents of a tokenizer.json ("spec", a dict).

The `tokenizers` library runs a spec; see `huggingface`. If a format has no names of special tokens, its from_
function adds the usual names to roles ({"bos": "<s>", "eos": "</s>", ...}).
"""

import re
from collections.abc import Iterable
from typing import Any

from nanoflax.errors import UserError
from nanoflax.tokenizers.base import SPACE
from nanoflax.tokenizers.sentencepiece_schema import model_class
from nanoflax.tokenizers.specs import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Config,
    Roles,
    Spec,
    added_token,
    check_characters,
    set_ends,
    set_template,
    spec_of,
    typed_tokens,
)

# Patterns that split text into words, before byte-level BPE merges the bytes of each word; from their authors.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT4O = TEKKEN.replace("+|[^", f"+{_CONTRACTIONS}?|[^").replace(r"*|\p{N}|", rf"*{_CONTRACTIONS}?|\p{{N}}{{1,3}}|")
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
GGUF_PATTERNS = {  # tokenizer.ggml.pre -> the patterns, applied one after another
    **dict.fromkeys([None, "default", "gpt-2", "olmo", "mpt", "jais", "phi-2", "jina-es", "jina-de", "jina-v2-es",
                     "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion", "granite-docling"], [GPT2]),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
                    [r"\p{N}", GPT2]),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx",
                     "smaug-bpe", "glm4", "chatglm-bpe"], [LLAMA3]),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "kormo", "hunyuan"], [QWEN2]),
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2"], [GPT4O]),
    **dict.fromkeys(["bloom", "poro-chat", "gpt3-finnish"], [BLOOM]),
    "tekken": [TEKKEN],
    "viking": [BLOOM, r"\p{N}"],
    "falcon": [r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense"], [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3]),
    **dict.fromkeys(["bailingmoe", "bailingmoe2", "llada-moe"], [QWEN2.replace(r"\s*[\r\n]+", r"\s*[\r\n]")]),
    "seed-coder": [QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")],
}  # fmt: skip
# A word of the vocabulary is one token, even if no merges make it, and bos is added by default.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
MAX_EXTRA = 10_000  # sentinels; T5 has 100
MAX_PIECE = 1_000  # characters of a piece of SentencePiece, which has 16 by default; merges take time in their square


GGUF_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id",
               "sep": "seperator_token_id", "mask": "mask_token_id"}  # fmt: skip
# Tokens that end a reply besides eos: of a turn, of a message, and of an infilled part.
_GGUF_ENDS = ("eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")


def from_gguf(metadata: dict[str, Any], name: str) -> tuple[Spec, Config, Config]:
    """The spec, tokenizer_config and generation_config of a GGUF file's metadata; see `huggingface.from_gguf`."""

    def get(key: str, default: Any = None) -> Any:
        value: Any = metadata.get(f"tokenizer.ggml.{key}", default)
        return value.tolist() if hasattr(value, "tolist") else value  # arrays of numbers

    kind, pre, tokens = get("model"), get("pre"), get("tokens")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{name}: tokenizer.ggml.model is {kind!r}; gpt2 and llama are supported")
    if kind == "gpt2" and pre not in [*GGUF_PATTERNS]:  # it can be a list
        raise UserError(
            f"{name}: tokenizer.ggml.pre is {pre!r}; supported: {', '.join(sorted(filter(None, GGUF_PATTERNS)))}"
        )
    for key in ("remove_extra_whitespaces", "escape_whitespaces", "precompiled_charsmap"):
        harmless = {"remove_extra_whitespaces": False, "escape_whitespaces": True}.get(key)
        if (value := get(key, harmless)) != harmless:
            raise UserError(f"{name}: tokenizer.ggml.{key}={str(value)[:20]} is not supported with the model {kind!r}")
    wanted = {"tokens": str, "token_type": int}
    wanted |= {"merges": str} if kind == "gpt2" else {"scores": (int, float)}
    for key, types in wanted.items():
        values = get(key)
        if not isinstance(values, list) or not all(isinstance(v, types) for v in values):
            raise UserError(
                f"{name}: tokenizer.ggml.{key} is missing or not a list of {'text' if types is str else 'numbers'}"
            )
        if key != "merges" and len(values) != len(tokens):
            raise UserError(f"{name}: tokenizer.ggml.{key} has {len(values)} entries for {len(tokens)} tokens")

    def token_id(key: str, default: int | None = None) -> int | None:
        i = get(key, default)
        if i is not None and (not isinstance(i, int) or not 0 <= i < len(tokens)):
            raise UserError(f"{name}: tokenizer.ggml.{key} is {i!r}, with {len(tokens)} tokens")
        return i

    # llama.cpp's defaults for SentencePiece.
    usual = {"unk": 0, "bos": 1, "eos": 2} if kind == "llama" else {}
    usual = {role: i for role, i in usual.items() if get("token_type")[i : i + 1] in ([UNKNOWN], [CONTROL])}
    roles: Roles = {
        role: tokens[i] for role, key in GGUF_ROLES.items() if (i := token_id(key, usual.get(role))) is not None
    }
    ends = [i for key in _GGUF_ENDS if (i := token_id(key)) is not None]
    config: Config = {f"{role}_token": token for role, token in roles.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    adds = {
        "add_bos_token": get("add_bos_token", kind == "llama" or pre in WHOLE_WORDS and "bos" in roles),
        "add_eos_token": get("add_eos_token", False),
    }
    for role in ("bos", "eos"):
        if adds[f"add_{role}_token"] and role not in roles:
            raise UserError(f"{name}: tokenizer.ggml.add_{role}_token is true, but there is no {role}_token_id")
    try:
        if kind == "gpt2":
            spec = _byte_level(
                {token: i for i, token in enumerate(tokens)},
                [tuple(merge.split(" ")) for merge in get("merges")],
                GGUF_PATTERNS[pre],
                ignore_merges=pre in WHOLE_WORDS,
            )
        else:
            prefix = get("add_space_prefix", True)
            spec = _sentencepiece_bpe(tokens, get("scores"), get("token_type"), roles.get("unk"), prefix)
    except Exception as error:
        raise UserError(f"{name}: its vocabulary is damaged: {' '.join(str(error).split())}") from error
    special = {token for role, token in roles.items() if role != "unk"} | {tokens[i] for i in ends}
    pairs = zip(tokens, get("token_type"), strict=True)
    piece_types = [CONTROL if token in special else kind for token, kind in pairs]
    spec["added_tokens"] = typed_tokens(tokens, piece_types)
    set_ends(spec, adds, roles)
    eos = tokens.index(roles["eos"]) if "eos" in roles else None
    stops = list(dict.fromkeys([*([] if eos is None else [eos]), *ends]))
    return spec, config, {"eos_token_id": stops} if ends else {}


def _byte_level(
    vocabulary, merges, patterns, prefix=False, normalizer=None, post_processor=None, ignore_merges=False
) -> Spec:
    from tokenizers import Regex, decoders, models, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    if patterns == [GPT2]:  # built into ByteLevel, which can then add the prefix space before it splits
        splits = []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not splits)
    return spec_of(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges),
        normalizer,
        pre_tokenizers.Sequence([*splits, byte_level]),
        decoders.ByteLevel(),
        post_processor,
    )


def usual_roles(names: Iterable[str]) -> Roles:
    """The roles of these special tokens in files that name none, such as those of GPT-2, BERT, RoBERTa and BART."""
    names = {*names}
    if {"[CLS]", "[SEP]"} <= names:
        roles = {role: f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
    elif "</s>" in names:
        roles = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
        if "<mask>" in names:
            roles |= {"sep": "</s>", "cls": "<s>", "mask": "<mask>"}
    else:
        roles = dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>")
    return {role: token for role, token in roles.items() if token in names}


def from_merges(vocabulary: dict[str, int], merges: str, roles: Roles, config: Config) -> Spec:
    """The spec of vocab.json and merges.txt of GPT-2, OPT, RoBERTa, BART or Qwen2; adds to roles."""
    from tokenizers import normalizers, processors

    lines = (line.removesuffix("\r") for line in merges.split("\n"))
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    name, prefix = config.get("tokenizer_class") or "", bool(config.get("add_prefix_space"))
    if "Qwen2" in name:
        roles |= {r: "<|endoftext|>" for r in ("eos", "pad", "unk") if r not in roles}
        return _byte_level(vocabulary, pairs, [QWEN2], prefix, normalizers.NFC())
    bert_like = re.match("Roberta|Bart", name) or (not name and "<mask>" in vocabulary)
    if not bert_like:
        roles |= usual_roles(["<|endoftext|>"]) | roles
        return _byte_level(vocabulary, pairs, [GPT2], prefix)
    roles |= usual_roles(["<s>", "</s>", "<unk>", "<pad>", "<mask>"]) | roles
    sep, cls = ((roles[role], vocabulary[roles[role]]) for role in ("sep", "cls"))
    processor = processors.RobertaProcessing(sep, cls)
    return _byte_level(vocabulary, pairs, [GPT2], prefix, post_processor=processor)


def from_wordpieces(lines: str, roles: Roles, config: Config) -> Spec:
    """The spec of BERT's vocab.txt; adds to roles."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {line.rstrip("\r"): i for i, line in enumerate(lines.rstrip("\n").split("\n"))}
    roles |= usual_roles(["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]) | roles
    sep, cls = ((roles[role], vocabulary[roles[role]]) for role in ("sep", "cls"))
    return spec_of(
        models.WordPiece(vocabulary, unk_token=roles["unk"]),
        normalizers.BertNormalizer(
            lowercase=config.get("do_lower_case", True),
            strip_accents=config.get("strip_accents"),
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        ),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        processors.BertProcessing(sep, cls),
    )


def from_ours(tokenizer: Any) -> Spec:
    """The spec of a ByteTokenizer or SentencePieceTokenizer, with the same ids for every text."""
    from tokenizers import decoders, models, normalizers

    if not hasattr(tokenizer, "model"):
        letters = bytes_to_letters()
        roles = {"<pad>": "pad", "<eos>": "eos", "<mask>": "mask", "<sep>": "sep"}
        names = {getattr(tokenizer, f"{role}_id"): name for name, role in roles.items()}
        vocabulary = {letters[i]: i for i in range(256)} | {n: i for i, n in names.items()}
        spec = _byte_level(vocabulary, [], [GPT2])
        spec["added_tokens"] = [added_token(n, i) for i, n in names.items()]
        return spec
    proto, tokens, scores, types = _sentencepiece_model(tokenizer.model)
    trainer, prefix, normalize = proto.trainer_spec, proto.normalizer_spec.add_dummy_prefix, _normalizers(proto)
    if trainer.model_type == trainer.BPE:
        spec = _sentencepiece_bpe(tokens, scores, types, tokens[trainer.unk_id], prefix, normalize)
    else:
        spaces = [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        spec = spec_of(
            models.Unigram([*zip(tokens, scores, strict=True)], trainer.unk_id, trainer.byte_fallback),
            normalizers.Sequence([*normalize, *spaces]),
            None,
            decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]),
        )
    unknown = added_token(tokens[trainer.unk_id], trainer.unk_id)
    return spec | {"added_tokens": [unknown, *typed_tokens(tokens, types)]}


def bytes_to_letters() -> dict[int, str]:
    """Byte -> its character in byte-level vocabularies.

    A printable byte is its own character; the other bytes, in order, have the characters from U+0100 (GPT-2).
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(letter): letter for letter in alphabet if ord(letter) < 256}
    others = [byte for byte in range(256) if byte not in printable]
    return printable | dict(zip(others, alphabet[len(printable) :], strict=True))


def _sentencepiece_model(model: bytes) -> tuple[Any, list[str], list[float], list[int]]:
    """The parsed model, and the texts, scores and types of its pieces."""
    proto = model_class().FromString(model)
    trainer, pieces = proto.trainer_spec, proto.pieces
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM) or trainer.treat_whitespace_as_suffix:
        raise UserError("a SentencePiece model of words, of characters or with spaces after words is not supported")
    return proto, [p.piece for p in pieces], [p.score for p in pieces], [p.type for p in pieces]


def _normalizers(proto: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    normal, found = proto.normalizer_spec, []
    if table := normal.precompiled_charsmap:
        check_characters(table, "the SentencePiece model")
        found.append(normalizers.Precompiled(table))
    if normal.remove_extra_whitespaces:
        found += [normalizers.Replace(Regex(pattern), by) for pattern, by in ((r"\A +| +\z", ""), (" {2,}", " "))]
    return found


def from_sentencepiece(model: bytes, roles: Roles, config: Config) -> Spec:
    """The spec of a SentencePiece model: BPE as in Llama, Unigram as in T5; adds to roles and config."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    proto, tokens, scores, types = _sentencepiece_model(model)
    trainer, normal = proto.trainer_spec, proto.normalizer_spec
    ids = {"unk": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id}
    for role, i in ids.items():
        if i >= 0:
            roles.setdefault(role, tokens[i])
    added = typed_tokens(tokens, types)
    normalize = _normalizers(proto)
    if trainer.model_type == trainer.BPE:
        config.setdefault("add_bos_token", True)  # as in Llama
        prefix = normal.add_dummy_prefix if config.get("add_prefix_space") is None else config["add_prefix_space"]
        once = config.get("legacy") is False
        spec = _sentencepiece_bpe(tokens, scores, types, tokens[trainer.unk_id], prefix, normalize, once)
    else:
        spec = spec_of(
            models.Unigram([*zip(tokens, scores, strict=True)], trainer.unk_id, trainer.byte_fallback),
            normalizers.Sequence(normalize),
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, "always")]),
            decoders.Sequence(
                [*([decoders.ByteFallback()] if trainer.byte_fallback else []), decoders.Metaspace(SPACE, "always")]
            ),
        )
        if (eos := trainer.eos_id) < 0:
            raise UserError("a SentencePiece model as in T5 needs an end of texts, eos_id")
        if eos not in {token["id"] for token in added}:
            added.append(added_token(tokens[eos], eos))
        spec["added_tokens"] = added
        set_template(spec, (), [eos])
        # T5's sentinels follow the vocabulary, in reverse order.
        extra = config.get("extra_ids", 100)
        if type(extra) is not int or not 0 <= extra <= MAX_EXTRA:
            raise UserError(f"extra_ids={extra!r} must be a number from 0 to {MAX_EXTRA}")
        end = len(tokens) + extra
        added += [added_token(f"<extra_id_{end - 1 - i}>", i) for i in range(len(tokens), end)]
    return spec | {"added_tokens": added}


def _sentencepiece_bpe(tokens, scores, types, unknown, prefix, normalize=(), once=False) -> Spec:
    """The spec of SentencePiece's BPE. Its merges are all pairs of pieces that join to a piece, best score first.

    prefix: whether a space is added before the text, and after each special token.
    once: only before the text, if it begins without a space (Transformers' legacy=false).
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(tokens)}
    plain = {token: score for token, score, t in zip(tokens, scores, types, strict=True) if t == NORMAL}
    if longest := [token for token in plain if len(token) > MAX_PIECE]:
        raise UserError(f"the piece {longest[0][:20]!r}... has {len(longest[0])} characters, more than {MAX_PIECE}")
    merges = [
        (-score, i, token)
        for token, score in plain.items()
        for i in range(1, len(token))
        if token[:i] in plain and token[i:] in plain
    ]
    merges = [(token[:i], token[i:]) for _, i, token in sorted(merges, key=lambda m: m[:2])]
    words = None
    if once:
        words = pre_tokenizers.Metaspace(SPACE, "first" if prefix else "never", split=False)
    else:
        normalize = [*normalize, *([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    return spec_of(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types),
        normalizers.Sequence([*normalize]),
        words,
        decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]),
    )
