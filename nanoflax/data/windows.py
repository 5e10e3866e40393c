"""Windows of a token store, with random access: TokenStore --> Windows --> Batches[step]."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from nanoflax.data.token_store import TokenStore
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

    def batch(self, indices: Sequence[int] | Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """The windows with these numbers. A number after the last window gives only padding.

        Returns: targets [B, T] int32; first [B] int32, the token before each window; weights [B, T] float32.
        If isolated, also segments [B, T] int32: the number of the document in its window, from 1, or 0 for padding;
        and start [B] int32: the bos_id before each document.
        """
        tokens, n = self.store.tokens, self.store.n_tokens
        starts = np.asarray(indices, np.int64) * self.length
        positions = starts[:, None] + np.arange(self.length)
        real = positions < n
        positions = np.minimum(positions, n - 1)
        before = tokens[np.clip(starts - 1, 0, n - 1)].astype(np.int32)
        batch = {
            "targets": np.where(real, tokens[positions], 0).astype(np.int32),
            "first": np.where(starts == 0, self.bos_id, before).astype(np.int32),
            "weights": real.astype(np.float32),
        }
        if self.isolated:
            document = self.document(positions)
            batch["segments"] = np.where(real, document - document[:, :1] + 1, 0).astype(np.int32)
            batch["start"] = np.full(len(starts), self.bos_id, np.int32)
            # If a document begins with the window, bos_id is before it, not the last token of another document.
            begins = self.store.offsets[document[:, 0]] == starts
            batch["first"] = np.where(begins, self.bos_id, batch["first"]).astype(np.int32)
        return batch

    def document(self, positions: Int[np.ndarray, "..."] | Sequence[int]) -> Int[np.ndarray, "..."]:
        """The numbers of the documents at these positions of the store. An end token is part of its document."""
        return np.searchsorted(self.store.offsets, positions, side="right") - 1
