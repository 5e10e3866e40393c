"""Tokenizers by name: bytes, SentencePiece models, and those of Hugging Face directories."""

import json
import pathlib
import re
from typing import Any

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
    try:
        if not path.is_dir():
            return SentencePieceTokenizer(path.read_bytes(), name=str(path))
        saved = path / "tokenizer.json"
        saved = saved.read_bytes() if saved.exists() else b""
        if not re.match(rb'\s*{\s*"kind"', saved):  # `save` writes this key first
            return load_huggingface(path)
        saved = json.loads(saved)
        if saved["kind"] == "bytes":
            return ByteTokenizer()
        model = path / "tokenizer.model"
        tokenizer = SentencePieceTokenizer(model.read_bytes(), name=str(model))
    except OSError as error:
        raise UserError(f"tokenizer {path}: {error.strerror}: {error.filename}") from error
    except (ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"tokenizer {path}: its tokenizer.json is damaged: {error}") from error
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
