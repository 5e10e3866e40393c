"""Any tokenizer as the metadata of a GGUF file: the reverse of `vocabularies.from_gguf`."""

import logging
import re
from typing import Any

from nanoflax.errors import UserError
from nanoflax.report import printable
from nanoflax.tokenizers import specs
from nanoflax.tokenizers.base import SPACE
from nanoflax.tokenizers.export import to_huggingface
from nanoflax.tokenizers.huggingface import HFTokenizer, from_gguf
from nanoflax.tokenizers.vocabularies import GGUF_PATTERNS, GGUF_ROLES, GPT2, WHOLE_WORDS

_UNUSED = 5
# Texts on which a tokenizer must agree with what is read back from its metadata.
_PROBES = (
    "Hello, world! It's 2024; don't pay 12345.67 DOLLARS.\n\n  x = [1, 2]\t\tend  ",
    "naïve café — 東京 😀 über Straße ½ 3²",
    "a  b   c\r\nÀÉÎ def f(self):\n    return 0x1F  # fmt",
)
_log = logging.getLogger(__name__)


def to_gguf(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The metadata (the keys "tokenizer...") of a GGUF file with this tokenizer.

    Byte-level BPE becomes tokenizer.ggml.model "gpt2" with its merges, and SentencePiece BPE "llama" with scores from
    the order of its merges. Ids from the tokenizer's to vocab_size, the rows of the model's table, become unused
    tokens.
    Raises: UserError for a tokenizer that GGUF cannot express.
    """
    exported = to_huggingface(tokenizer, for_prompts=True)
    if not isinstance(exported, HFTokenizer):
        raise _refusal("it has two vocabularies")
    spec, roles = exported.contents()
    if exported.vocab_size > vocab_size:
        raise _refusal(f"it has {exported.vocab_size} tokens and the model {vocab_size}")
    model, added = spec["model"], spec["added_tokens"]
    if model.get("type") not in ("BPE", None) or not isinstance(model.get("vocab"), dict):
        raise _refusal(f"a vocabulary of the kind {model.get('type')} divides texts in another way than BPE")
    for flag in ("lstrip", "rstrip", "single_word"):
        if wrong := [token["content"] for token in added if token.get(flag)]:
            raise _refusal(f"{wrong[0]} has the setting {flag}")
    ids = model["vocab"] | {token["content"]: token["id"] for token in added}
    names = {i: token for token, i in ids.items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [specs.NORMAL if i in names else _UNUSED for i in range(vocab_size)]
    for token in added:
        types[token["id"]] = specs.CONTROL if token["special"] else specs.USER_DEFINED
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []]
    if "ByteLevel" in str(spec.get("decoder")):
        found = _byte_level(spec, pairs)
    else:
        found = _sentencepiece(spec, pairs, tokens, types)
    metadata: dict[str, Any] = found | {"tokens": tokens, "token_type": types}
    metadata |= {key: ids[roles[role]] for role, key in GGUF_ROLES.items() if roles.get(role) in ids}
    metadata["eos_token_id"] = exported.eos_id
    others = [i for i in exported.stop_ids if i != exported.eos_id]
    metadata |= dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))
    if len(others) > 2:
        unwritten = printable(", ".join(names[i] for i in others[2:]))
        _log.warning("GGUF names three ends of an answer; not written: %s", unwritten)
    framing = exported.framing
    for role, around in (("bos", framing.before), ("eos", framing.after)):
        if around not in ((), (metadata.get(f"{role}_token_id"),)):
            raise _refusal(f"it puts {' '.join(names[i] for i in around)} around a text")
        metadata[f"add_{role}_token"] = bool(around)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    if exported.chat_template is not None:
        metadata["tokenizer.chat_template"] = exported.chat_template
    back = from_gguf(metadata)
    for text in _PROBES:
        if back.encode(text) != exported.encode(text):
            raise _refusal(f"it divides {text[:20]!r}... in another way than any vocabulary of GGUF")
    return metadata


def _refusal(reason: str) -> UserError:
    return UserError(f"GGUF cannot express this tokenizer: {reason}")


def _byte_level(spec: specs.Spec, merges: list[tuple[str, ...]]) -> dict[str, Any]:
    """Raises: UserError for words that no tokenizer.ggml.pre describes."""
    if normalizers := _kinds(spec.get("normalizer"), "normalizers"):
        if normalizers != [{"type": "NFC"}]:
            raise _refusal(f"its normalizer {str(normalizers)[:80]} changes texts")
        _log.warning("GGUF has no normalizer: texts must be in Unicode's form NFC, as almost all are")
    patterns = []
    for step in _kinds(spec.get("pre_tokenizer"), "pretokenizers"):
        pattern = step.get("pattern") or {}
        match step["type"]:
            case "Split" if step["behavior"] == "Isolated" and not step.get("invert") and "Regex" in pattern:
                patterns.append(pattern["Regex"])
            case "Digits" if step["individual_digits"]:
                patterns.append(r"\p{N}")
            case "ByteLevel" if not step["add_prefix_space"]:
                patterns += [GPT2] if step.get("use_regex", True) else []
            case kind:
                raise _refusal(f"its division into words by {kind} has no name there")
    whole = bool(spec["model"].get("ignore_merges"))
    known = [name for name, parts in GGUF_PATTERNS.items() if name not in (None, "default") and parts == patterns]
    if not (fitting := [name for name in known if (name in WHOLE_WORDS) == whole]):
        raise _refusal(f"its division into words by {str(patterns)[:80]} has no name there")
    return {"model": "gpt2", "pre": fitting[0], "merges": [" ".join(pair) for pair in merges]}


def _sentencepiece(
    spec: specs.Spec, merges: list[tuple[str, ...]], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    """Sets the types of unknown and of bytes. Raises: UserError for another tokenizer than SentencePiece's BPE."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prefix = {"type": "Prepend", "prepend": SPACE}
    steps = _kinds(spec.get("normalizer"), "normalizers")
    words = _kinds(spec.get("pre_tokenizer"), "pretokenizers")
    if [w.get("type") for w in words] == ["Split"] and words[0].get("pattern") == {"String": " "}:
        words = []  # Gemma's: after the normalizer no text has a space
    if not steps and [w.get("type") for w in words] == ["Metaspace"] and not words[0].get("split", True):
        steps = [replace] if words[0]["prepend_scheme"] == "never" else [prefix, replace]
        if words[0]["prepend_scheme"] == "first":
            _log.warning("GGUF adds a space after each special token too, not only at the beginning of a text")
        words = []
    if words or steps not in ([replace], [prefix, replace]):
        raise _refusal(f"it changes texts by {str(steps + words)[:80]}")
    model = spec["model"]
    for i, token in enumerate(tokens):
        if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = specs.BYTE
        elif token == model.get("unk_token"):
            types[i] = specs.UNKNOWN
    plain = {token for token, kind in zip(tokens, types, strict=True) if kind == specs.NORMAL}
    ranks: dict[str, int] = {}
    for pair in merges:
        ranks.setdefault("".join(pair), len(ranks))
    possible = {
        (token[:i], token[i:]) for token in ranks.keys() & plain for i in range(1, len(token))
        if token[:i] in plain and token[i:] in plain
    }  # fmt: skip
    order = [rank for pair in merges if (rank := ranks["".join(pair)]) is not None and {*pair, "".join(pair)} <= plain]
    if order != sorted(order) or possible != {pair for pair in merges if {*pair, "".join(pair)} <= plain}:
        raise _refusal("its merges do not follow from scores of its tokens")
    scores = [-float(ranks.get(token, len(ranks) + i)) for i, token in enumerate(tokens)]
    return {"model": "llama", "scores": scores, "add_space_prefix": prefix in steps}


def _kinds(part: Any, many: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer of a tokenizer.json, also of a sequence of them."""
    if not part:
        return []
    return [step for inner in part[many] for step in _kinds(inner, many)] if part["type"] == "Sequence" else [part]
