"""The interface of every tokenizer, and checks of texts and ids."""

import os
from collections.abc import Iterable
from typing import Protocol

from nanoflax.errors import UserError

SPACE = "\u2581"  # SentencePiece writes a space as this character


class Tokenizer(Protocol):
    """Text to token ids and back.

    `encode` adds no special token and never reads one in the text: "<eos>" in a text is five characters. For bytes
    and the SentencePiece models trained here, decode(encode(text)) == text for every well-formed text.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    bos_id: int  # the id that a document starts with
    fingerprint: str  # equal for tokenizers that encode alike
    chat_template: str | None  # Jinja source

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens give no text; bytes that are not UTF-8 give U+FFFD."""
        ...

    def save(self, directory: str | os.PathLike) -> None: ...


def well_formed(text: str) -> str:
    """The text; each unpaired surrogate, which UTF-8 cannot encode, is replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def check_ids(ids: Iterable[int], vocab_size: int) -> None:
    """Raises: UserError for an id outside the vocabulary."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UserError(f"token id {i} is not in the vocabulary of {vocab_size}")
