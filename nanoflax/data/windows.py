"""Windows of a token store, with random access: TokenStore --> Windows --> Batches[step]."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from nanoflax.data.store import TokenStore
from nanoflax.errors import UserError


class Windows:
    """The tokens of a TokenStore in windows of T = `length` targets.

    If the last window is shorter, it has padding of weight 0. isolated: batches also contain segments, so that
    attention stays within a document. bos_id: the token before the first one; default: the bos_id of the store.
    """

    def __init__(self, store: TokenStore, length: int, isolated: bool = False, bos_id: int | None = None) -> None:
        if length < 1:
            raise UserError(f"window length {length}: must be at least 1")
        self.store, self.length, self.isolated = store, length, isolated
        self.bos_id = store.meta["bos_id"] if bos_id is None else bos_id

    def __len__(self) -> int:
        return -(-self.store.n_tokens // self.length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: array[0] for name, array in self.batch([index]).items()}

    def documents(self, index: int) -> tuple[int, int]:
        """(the first document, the last document) in a window."""
        last = min((index + 1) * self.length, self.store.n_tokens) - 1
        first, last = map(int, self.store.document([index * self.length, last]))
        return first, last

    def batch(self, indices: Sequence[int] | Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """The windows with these numbers. A number after the last window gives only padding.

        Returns: targets [B, T] int32; first [B] int32, the token before each window; weights [B, T] float32.
        If isolated, also segments [B, T] int32: the number of the document in its window, from 1, or 0 for padding;
        and start [B] int32: the bos_id before each document.
        """
        n, T = self.store.n_tokens, self.length
        starts = np.asarray(indices, np.int64) * T
        rows = np.zeros((len(starts), 1 + T), np.int32)  # the token before the window, and the window
        rows[:, 0] = self.bos_id
        used = np.flatnonzero(starts < n)
        befores = np.minimum(starts[used], 1)  # the first window has no token before it
        spans = [(start - before, min(start + T, n)) for start, before in zip(starts[used], befores, strict=True)]
        for i, before, tokens in zip(used, befores, self.store.read_all(spans), strict=True):
            rows[i, 1 - before : 1 - before + len(tokens)] = tokens
        positions = starts[:, None] + np.arange(T)
        real = positions < n
        batch = {"targets": rows[:, 1:], "first": rows[:, 0], "weights": real.astype(np.float32)}
        if self.isolated:
            document = self.store.document(np.minimum(positions, n - 1))
            batch["segments"] = np.where(real, document - document[:, :1] + 1, 0).astype(np.int32)
            batch["start"] = np.full(len(starts), self.bos_id, np.int32)
            # If a document begins with the window, bos_id is before it, not the last token of another document.
            begins = self.store.begin(document[:, 0]) == starts
            batch["first"] = np.where(begins, self.bos_id, batch["first"]).astype(np.int32)
        return batch
