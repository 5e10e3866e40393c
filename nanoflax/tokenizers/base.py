"""The interface of every tokenizer, the ids around its texts, and checks of texts and ids."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from nanoflax.errors import UserError

SPACE = "\u2581"  # SentencePiece writes a space as this character


@dataclasses.dataclass(frozen=True)
class Framing:
    """The ids around the texts of a tokenizer, in training, prompts, evaluation and exports.

    before, after: around a text that is read as a whole: an encoder's input, a source, a text to classify.
    start: before a text that a decoder continues.
    bos_id: before a text without a start, if there must be a token. eos_id: after a document and a target.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    start: tuple[int, ...]
    bos_id: int
    eos_id: int

    def whole(self, ids: Sequence[int]) -> list[int]:
        """A text that is read as a whole."""
        return [*self.before, *ids, *self.after]

    def target(self, ids: Sequence[int]) -> list[int]:
        """A text that a model with a source writes. It has an end, so that the model learns to stop."""
        return self.whole(ids) + [self.eos_id] * (self.eos_id not in self.after)

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """The beginning of a text, for a decoder; at least one id."""
        return [*self.start, *ids] or [self.bos_id]

    def text(self, ids: Sequence[int]) -> list[int]:
        """A text that a decoder learns to write: its prompt, and its end."""
        return [*self.start, *ids, self.eos_id]

    @property
    def first_id(self) -> int:
        """The id before the first document of a stream of documents."""
        return self.prompt(())[0]

    def document(self, ids: Sequence[int]) -> list[int]:
        """A document in a stream of documents. Its last id stands before the next document, as first_id does."""
        between = [self.first_id] * (self.first_id != self.eos_id)
        return [*self.start[1:], *ids, self.eos_id, *between]


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
    framing: Framing

    def encode(self, text: str) -> list[int]: ...

    def encode_source(self, text: str) -> list[int]:
        """The ids of a text for an encoder-decoder, in which a person writes language codes and sentinels."""
        ...

    def encode_target(self, text: str) -> list[int]:
        """The same for a target, which may be in another language."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens give no text; bytes that are not UTF-8 give U+FFFD."""
        ...

    def save(self, directory: str | os.PathLike) -> None: ...


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    """`encode` of each text, lists or arrays; by the tokenizer's own `encode_batch`, if it has one, which is faster."""
    own = getattr(tokenizer, "encode_batch", None)
    return own(texts) if own else [tokenizer.encode(text) for text in texts]


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
