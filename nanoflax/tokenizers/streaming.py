"""The text of token ids that arrive in parts: each part is decoded together with the ids before it."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # stands for bytes that are not UTF-8
MAX_PENDING = 64  # ids that are decoded again for each new id
CLEANED_UP = 4  # characters that a tokenizer may still change if it removes spaces before punctuation
MIN_CONTEXT = 16  # their text always begins with a complete character


class StreamingDecoder:
    """Decodes ids that follow `prompt_ids`; the joined pieces are the new part of tokenizer.decode(prompt_ids + ids).

    A tokenizer decodes an id differently at the beginning of a text (SentencePiece drops the first space), so a few
    ids before the new ones are decoded with them. A piece ends with a complete character, and before text that may
    become a stop string. The work for an id does not grow with the number of ids.

    Attributes: stopped, whether a stop string was found. The text ends before it, and the decoder ignores more ids.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), stops: Iterable[str] = ()) -> None:
        self._tokenizer, self._stops, self.stopped = tokenizer, [stop for stop in stops if stop], False
        self._tail = CLEANED_UP if getattr(tokenizer, "cleans_up", False) else 0
        size = MIN_CONTEXT
        while size < len(prompt_ids) and not tokenizer.decode(prompt_ids[-size:]).strip():
            size *= 2
        self._ids = [int(i) for i in prompt_ids[-size:]]  # the context, then ids whose characters may be incomplete
        self._before = tokenizer.decode(self._ids)  # the part of the text of `_ids` that needs no more work
        is_context = self._before.strip() and not self._before.endswith(REPLACEMENT)
        self._context = self._ids if is_context else []  # the last ids with visible text
        self._held = ""  # decoded text that may be the beginning of a stop string

    def add(self, ids: Iterable[int]) -> str:
        """The text that the next ids complete."""
        self._ids = [*self._ids, *map(int, ids)]
        text = self._tokenizer.decode(self._ids)
        complete = self._complete(text)
        piece = complete[len(os.path.commonprefix([self._before, complete])) :]
        if piece:
            self._before = complete
        if complete == text and piece.strip():
            self._ids = self._context = self._ids[len(self._context) :]
            self._before = self._tokenizer.decode(self._ids)
        elif len(self._ids) > MAX_PENDING + len(self._context):  # a long run of spaces, or of bytes that are not UTF-8
            fewer = self._context + self._ids[-MIN_CONTEXT:]
            shorter, pending = self._tokenizer.decode(fewer), text[len(self._before) :]
            if text.startswith(self._before) and shorter.endswith(pending):
                self._ids, self._before = fewer, shorter[: len(shorter) - len(pending)]
        return self._up_to_stop(piece)

    def finish(self) -> str:
        """The rest of the text: U+FFFD for an incomplete character, and what may have become a stop string."""
        text = self._tokenizer.decode(self._ids)
        piece = self._up_to_stop(text[len(os.path.commonprefix([self._before, text])) :])
        rest, self._held, self._before = self._held, "", text
        return piece + rest

    def _complete(self, text: str) -> str:
        """The part of a text that more ids do not change: the bytes of the last character, at most three, may be
        incomplete, and each may be U+FFFD."""
        text = text[:-3] + text[-3:].rstrip(REPLACEMENT)
        return text[: max(len(text) - self._tail, 0)]

    def _up_to_stop(self, piece: str) -> str:
        """The text before the stop string that is complete first, or before what may become a stop string."""
        if self.stopped:
            return ""
        text, self._held = self._held + piece, ""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        sizes = (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        shown = len(text) - max(sizes, default=0)
        self._held = text[shown:]
        return text[:shown]


def decode_parts(tokenizer: Any, parts: Iterable[Sequence[int]]) -> Iterator[str]:
    """The text of each of consecutive parts of ids, decoded with the parts before it."""
    before: list[int] = []
    for part in parts:
        decoder = StreamingDecoder(tokenizer, before)
        yield decoder.add(part) + decoder.finish()
        before += map(int, part)
