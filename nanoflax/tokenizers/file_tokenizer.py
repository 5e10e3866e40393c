"""The base of tokenizers in the file formats of Hugging Face: their files, settings and special tokens."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nanoflax import untrusted
from nanoflax.errors import UserError
from nanoflax.tokenizers.base import Framing

VOCABULARIES = ("tokenizer.json", "source.spm", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
Files = dict[str, bytes]  # name -> content
ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
FIELDS = ("content", "special", "lstrip", "rstrip", "single_word", "normalized")


class FileTokenizer:
    """The base of HFTokenizer and MarianTokenizer: their files, kept byte for byte, and the ids of special tokens.

    Attributes: vocab_size (largest id + 1); bos_id, eos_id, pad_id (if absent, the id of another role: BERT's bos is
    [CLS]); unk_id, sep_id, cls_id, mask_id (None if absent); stop_ids (all ids that end an answer); special (special
    string -> id); cleans_up (spaces before punctuation are removed in decoding); chat_template; fingerprint.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int | None
    sep_id: int | None
    cls_id: int | None
    mask_id: int | None
    framing: Framing
    special: dict[str, int]
    chat_template: str | None = None

    def __init__(self, files: Files, name: str):
        self.files, self.name = files, name
        self._config = read_json(files, "tokenizer_config.json", name)
        self._generation = read_json(files, "generation_config.json", name)
        maps = read_json(files, "special_tokens_map.json", name) | self._config
        named = {role: maps[f"{role}_token"] for role in ROLES if maps.get(f"{role}_token") is not None}
        more = []
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = maps.get(key) or []
            more += tokens.values() if isinstance(tokens, dict) else tokens
        self._named = [token_fields(token, name) for token in [*named.values(), *more]]
        # {"eos": "</s>", ...}
        self._roles: dict[str, str] = {role: token["content"] for role, token in zip(named, self._named, strict=False)}

    def _set_ids(self, token_to_id: Callable[[str], int | None]) -> None:
        for role in ROLES:
            i = token_to_id(self._roles[role]) if role in self._roles else None
            if i is None:
                i = next(iter(self._generation_ids(role)), None)
            setattr(self, f"{role}_id", i)
        for role, *others in (("eos", "sep"), ("bos", "cls", "eos"), ("pad", "eos")):
            ids = (getattr(self, f"{r}_id") for r in (role, *others))
            setattr(self, f"{role}_id", next((i for i in ids if i is not None), None))
        if self.eos_id is None:
            raise UserError(f"tokenizer {self.name} has no end-of-sequence token")
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *self._generation_ids("eos")]))
        digest = hashlib.blake2b(digest_size=16)
        for file in (*VOCABULARIES, "target.spm", "merges.txt", "added_tokens.json"):
            digest.update(hashlib.blake2b(self.files.get(file, b"")).digest())
        settings = {k: v for k, v in self._config.items() if k != "chat_template"}
        digest.update(json.dumps([settings, self._roles, self._named, self.stop_ids], sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()

    def _generation_ids(self, role: str) -> list[int]:
        ids = self._generation.get(f"{role}_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        for i in ids:
            if not isinstance(i, int) or not 0 <= i < self.vocab_size:
                raise UserError(
                    f"tokenizer {self.name}: generation_config.json: {role}_token_id "
                    f"is {i!r}, with {self.vocab_size} tokens"
                )
        return ids

    def __reduce__(self):
        return type(self), (self.files, self.name)

    def save(self, directory: str | os.PathLike) -> None:
        """Write the files as they were loaded. Raises: UserError."""
        directory = pathlib.Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, content in self.files.items():
                (directory / name).write_bytes(content)
        except OSError as error:
            raise UserError(f"tokenizer cannot be saved in {directory}: {error.strerror}") from error


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """An error of a library in the block becomes a UserError that begins with `what`; also a panic of one in Rust,
    which is no Exception: a file can be sound until a text reaches its damaged part."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (UserError, KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {reason[:200]}") from error


def read_json(files: Files, file: str, name: str) -> dict[str, Any]:
    return untrusted.json_object(files[file], f"tokenizer {name}: {file}") if file in files else {}


def token_fields(token: Any, name: str) -> dict[str, Any]:
    """A token in a settings file, "</s>" or {"content": "</s>", ...}, as a dict."""
    fields = {"content": token} if isinstance(token, str) else token
    if not isinstance(fields, dict) or not fields.get("content") or not isinstance(fields["content"], str):
        raise UserError(f"tokenizer {name}: a special token must be text, not {token!r}")
    return {key: fields[key] for key in FIELDS if key in fields}


def without_spaces_before_marks(text: str) -> str:
    """What Transformers does with a decoded text if clean_up_tokenization_spaces is true."""
    for mark in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(mark, mark.strip())
    return text


def any_of(strings: Iterable[str], words: Iterable[str] = ()) -> re.Pattern[str]:
    """A pattern that matches the longest of the strings at each position; those in `words` not inside a word."""
    longest = sorted(strings, key=len, reverse=True)
    patterns = (rf"(?<!\w){re.escape(s)}(?!\w)" if s in words else re.escape(s) for s in longest)
    return re.compile("|".join(patterns) or r"(?!)")
