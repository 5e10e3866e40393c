"""Text to token ids and back: bytes, SentencePiece models, and those of Hugging Face directories.

A tokenizer has `vocab_size`, `pad_id`, `eos_id`, `bos_id` (the id that a document starts from),
`fingerprint`, `encode(text) -> list[int]`, `decode(ids) -> str` and `save(directory)`. `encode`
adds no special token and never reads one in the text: "<eos>" in a text is five characters.
Bytes and the models trained here give every string back exactly.
"""

import json
import pathlib
import re

from nanoflax.errors import UserError
from nanoflax.tokenizers.trained import ByteTokenizer, SentencePieceTokenizer

CHOICES = "bytes, bpe:SIZE, unigram:SIZE, a SentencePiece .model file or a tokenizer's directory"


def parse(spec):
    """ "bytes", "bpe:2048", "unigram:8192" or a path -> (kind, vocabulary size or path or None).

    kind is "bytes", "bpe", "unigram" or "path". Raises UserError for anything else.
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
    raise UserError(f"tokenizer {spec!r} is neither known nor a file here; choose {CHOICES}")


def load(name_or_path):
    """The tokenizer "bytes", a `.model` file, one that `save` wrote into a directory, or one of a
    Hugging Face directory (see nanoflax.hf_tokenizers).

    Raises: UserError if files are missing or damaged.
    """
    kind, path = parse(name_or_path)
    if kind == "bytes":
        return ByteTokenizer()
    if kind != "path":
        raise UserError(f"tokenizer {name_or_path!r} must first be trained on a corpus")
    try:
        if not path.is_dir():
            return SentencePieceTokenizer(path.read_bytes(), name=str(path))
        saved = path / "tokenizer.json"
        saved = saved.read_bytes() if saved.exists() else b""
        if not re.match(rb'\s*{\s*"kind"', saved):  # which save writes first
            from nanoflax.tokenizers import huggingface

            return huggingface.load_huggingface(path)
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
        raise UserError(f"tokenizer {path}: tokenizer.model is damaged: it is not the one saved")
    return tokenizer


def check_fits(tokenizer, vocab_size):
    """Raises: UserError if a model of vocab_size embeddings has none for some of the tokens."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the model "
            f"embeddings for {vocab_size} alone; it is another model's tokenizer"
        )
