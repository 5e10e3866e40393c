"""Windows of a token store, and their batches: Windows --> Batches[step].

Every step is a value that its inputs determine: the same seed and step give the same batch whatever
the number of hosts.
"""

import numpy as np

from nanoflax.errors import UserError


class Windows:
    """The stream of a TokenStore in windows of T = `length` targets, at random access.

    The last window may be partial: its rest has weight 0. With `isolated`, windows also carry
    segments, so that a document sees no other. bos_id: the token before the first one.
    """

    def __init__(self, store, length, isolated=False, bos_id=None):
        if length < 1:
            raise UserError(f"window length {length}: must be at least 1")
        self.store, self.length, self.isolated = store, length, isolated
        self.bos_id = store.meta["bos_id"] if bos_id is None else bos_id

    def __len__(self):
        return -(-self.store.n_tokens // self.length)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: array[0] for name, array in self.batch([index]).items()}

    def batch(self, indices):
        """[B] window numbers -> targets [B, T] int32; first [B] int32, the token before each
        window; weights [B, T] float32; if isolated, segments [B, T] int32: the window's documents
        from 1, and 0 for padding, and start [B] int32, the bos_id that each begins from. A number
        past the end gives a window of padding alone.
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
            # A document that begins with the window owes nothing to the one before it either.
            begins = self.store.offsets[document[:, 0]] == starts
            batch["first"] = np.where(begins, self.bos_id, batch["first"]).astype(np.int32)
        return batch

    def document(self, positions):
        """Positions in the stream -> numbers of their documents; an end belongs to its own."""
        return np.searchsorted(self.store.offsets, positions, side="right") - 1

    def text(self, index, tokenizer):
        start = index * self.length
        return tokenizer.decode(self.store.tokens[start : start + self.length].tolist())
