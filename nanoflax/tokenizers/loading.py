"""Tokenizers by name: bytes, SentencePiece models, and those of Hugging Face directories."""

import pathlib
import re
from typing import Any

from nanoflax import untrusted
from nanoflax.errors import UserError
from nanoflax.tokenizers.base import Tokenizer
from nanoflax.tokenizers.huggingface import load_huggingface
from nanoflax.tokenizers.trained import ByteTokenizer, SentencePieceTokenizer

CHOICES = "bytes, bpe:SIZE, unigram:SIZE, a SentencePiece .model file or a tokenizer's directory"


def parse(spec: str | pathlib.Path) -> tuple[str, Any]:
    """The kind ("bytes", "bpe", "unigram" or "path") and its vocabulary size or path.

    Examples: "bytes", "bpe:2048", "unigram:8192", a path. Raises: UserError for anything else.
    """
    kind, _, size = str(spec).partition(":")
    if spec == "bytes":
        return "bytes", None
    if kind in ("bpe", "unigram"):
        if size.isascii() and size.isdigit() and int(size) > 0:
            return kind, int(size)
        raise UserError(f"tokenizer {spec!r}: write the vocabulary size, as in {kind}:2048")
    path = pathlib.Path(spec).expanduser()
    if str(spec) and (path.is_dir() or path.suffix == ".model"):
        return "path", path
    raise UserError(f"tokenizer {spec!r} is no known kind and no .model file or directory; choose {CHOICES}")


def load(name_or_path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of "bytes", a `.model` file, a directory that `save` wrote, or a Hugging Face directory.

    Raises: UserError if files are missing or damaged.
    """
    kind, path = parse(name_or_path)
    if kind == "bytes":
        return ByteTokenizer()
    if not isinstance(path, pathlib.Path):
        raise UserError(f"tokenizer {name_or_path!r} must first be trained on a corpus")
    if not path.is_dir():  # a file that the user names may be a link
        if not path.exists():
            raise UserError(f"tokenizer {path}: No such file")
        return SentencePieceTokenizer(untrusted.read_bytes(path.resolve().parent, path.resolve().name), name=str(path))
    saved = path / "tokenizer.json"
    content = untrusted.read_bytes(path, saved.name) if saved.exists() else b""
    if not re.match(rb'\s*{\s*"kind"', content):  # `save` writes this key first
        return load_huggingface(path)
    saved = untrusted.json_object(content, f"tokenizer {path} is damaged: tokenizer.json")
    if saved["kind"] == "bytes":
        return ByteTokenizer()
    tokenizer = SentencePieceTokenizer(untrusted.read_bytes(path, "tokenizer.model"), name=f"{path}/tokenizer.model")
    if tokenizer.fingerprint != saved.get("fingerprint"):
        raise UserError(f"tokenizer {path}: tokenizer.model is damaged: it does not match the saved fingerprint")
    return tokenizer


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises: UserError if the tokenizer has more tokens than the model has embeddings."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has "
            f"only {vocab_size} embeddings; use the model's own tokenizer"
        )
