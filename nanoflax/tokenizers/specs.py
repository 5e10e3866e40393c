"""The contents of a tokenizer.json ("spec", a dict): its parts, added tokens and template, and what is refused."""

import base64
import json
from collections.abc import Iterable
from typing import Any

from nanoflax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of pieces in SentencePiece and GGUF
MAX_ID = 2**24  # the libraries need time and memory for each id below the largest one, used or not
MAX_GROWTH = 1_000_000  # how many characters a normalizer may make of one; ALBERT's makes 360
Spec = dict[str, Any]
Roles = dict[str, str]  # {"bos": "<s>", "eos": "</s>", ...}
Config = dict[str, Any]  # of a tokenizer_config.json


def spec_of(
    model: Any, normalizer: Any = None, pre_tokenizer: Any = None, decoder: Any = None, post_processor: Any = None
) -> Spec:
    """The spec of a tokenizer of these parts, which are objects of the `tokenizers` library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    return json.loads(tokenizer.to_str())


def added_token(content: str, i: int, special: bool = True, **more: Any) -> dict[str, Any]:
    """An entry of "added_tokens" in a tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": special} | more


def typed_tokens(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    """Entries of "added_tokens" for control and user-defined pieces."""
    return [
        added_token(token, i, special=t == CONTROL)
        for i, (token, t) in enumerate(zip(tokens, types, strict=True))
        if t in (CONTROL, USER_DEFINED)
    ]


def set_ends(spec: Spec, config: Config, roles: Roles) -> None:
    """Set the post-processor that adds bos and eos, if config has add_bos_token or add_eos_token.

    A model with a template of its own, such as RoBERTa's, keeps it, as in Transformers.
    """
    if {"add_bos_token", "add_eos_token"} & config.keys() and not spec.get("post_processor"):
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
        bos, eos = (
            [ids[roles[role]]] if config.get(f"add_{role}_token") and roles.get(role) in ids else []
            for role in ("bos", "eos")
        )
        set_template(spec, bos, eos)


def set_template(spec: Spec, before: Iterable[int], after: Iterable[int]) -> None:
    """Set the post-processor that adds these ids of added tokens before and after a text, and each text of a pair."""
    names = {token["id"]: token["content"] for token in spec["added_tokens"]}
    ends = [*before], [*after]

    def framed(text):
        tokens = [[{"SpecialToken": {"id": names[i], "type_id": 0}} for i in ids] for ids in ends]
        return [*tokens[0], {"Sequence": {"id": text, "type_id": 0}}, *tokens[1]]

    # Not the library's TemplateProcessing: it reads "<s:1>" as a token and a type.
    special = {names[i]: {"id": names[i], "ids": [i], "tokens": [names[i]]} for i in {*ends[0], *ends[1]}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": framed("A"), "pair": framed("A") + framed("B"),
                              "special_tokens": special}  # fmt: skip


def check_vocabulary(vocabulary: Any, where: str) -> None:
    """Raises: UserError for a vocabulary {token: id} with an id that is no number from 0 to below MAX_ID."""
    if not isinstance(vocabulary, dict):
        raise UserError(f"{where} is damaged: it must hold a vocabulary, token: id")
    if wrong := [(token, i) for token, i in vocabulary.items() if type(i) is not int or not 0 <= i < MAX_ID]:
        raise UserError(f"{where}: the id of {wrong[0][0]!r} is {wrong[0][1]!r}, not a number from 0 to below {MAX_ID}")


def check_characters(table: bytes, where: str) -> None:
    """Raises: UserError for a table of SentencePiece, of what replaces a character, that is shorter than it says.

    It begins with the size of a tree in bytes; the library takes twice that much memory before it reads the tree.
    """
    if len(table) < 4 or (size := int.from_bytes(table[:4], "little")) > len(table) - 4:
        says = f", but says that {size} follow" if len(table) >= 4 else ""
        raise UserError(f"{where} is damaged: its precompiled_charsmap has {len(table)} bytes{says}")


def check_normalizer(normalizer: Any, where: str) -> None:
    """Raises: UserError for a normalizer of a tokenizer.json that can make a text too long, where each step multiplies,
    or that has a table of characters that is shorter than it says."""
    growth, steps = 1, [normalizer]
    while steps and growth <= MAX_GROWTH:
        step = steps.pop()
        if isinstance(step, dict):
            nested = step.get("normalizers")
            steps += nested if isinstance(nested, list) else []
            if step.get("type") == "Replace":
                growth *= max(1, len(str(step.get("content"))))
            if step.get("type") == "Precompiled" and isinstance(table := step.get("precompiled_charsmap"), str):
                check_characters(_from_base64(table), where)
            growth *= {"NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Precompiled": 20}.get(str(step.get("type")), 1)
    if growth > MAX_GROWTH:
        raise UserError(f"{where}: its normalizer can make more than {MAX_GROWTH} characters of one")


def _from_base64(text):
    try:
        return base64.b64decode(text)
    except ValueError:  # the library says so
        return bytes(4)


def rename_special(spec: Spec, aliases: dict[str, str]) -> Spec:
    """The spec with aliases for the special tokens, and without merges that produce a special token."""

    def new(token):
        return aliases.get(token, token)

    model = dict(spec["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new(token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[new(token), score] for token, score in model["vocab"]]
    if model.get("merges"):
        pairs = (tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"])
        model["merges"] = [p for p in pairs if not {*p, "".join(p)} & aliases.keys()]
    if model.get("unk_token"):
        model["unk_token"] = new(model["unk_token"])
    added = [
        token | ({"content": aliases[token["content"]], "single_word": False} if token["content"] in aliases else {})
        for token in spec["added_tokens"]
    ]
    return spec | {"model": model, "added_tokens": added}
