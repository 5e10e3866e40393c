"""Windows of a token store, and their batches: Windows --> Batches[step].

Every step is a value that its inputs determine: the same seed and step give the same batch whatever
the number of hosts.
"""

import contextlib
import functools
import queue
import threading

import numpy as np

from nanoflax.errors import UserError

SMALL_EPOCH = 1 << 13  # windows


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
        batch = {"targets": np.where(real, tokens[positions], 0).astype(np.int32),
                 "first": np.where(starts == 0, self.bos_id, before).astype(np.int32),
                 "weights": real.astype(np.float32)}
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
        return tokenizer.decode(self.store.tokens[start:start + self.length].tolist())


def _shuffled(i, n, seed, epoch):
    """Where a permutation of range(n), of its own for each seed and epoch, sends i: O(1)."""
    if n <= SMALL_EPOCH:  # index_shuffle walks a domain of 2^16 at least: slow for a small n
        return _small_permutation(n, seed, epoch)[i]
    from grain.python.experimental import index_shuffle

    return index_shuffle(i, n - 1, _epoch_seed(seed, epoch), 4)


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed, epoch):
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


@functools.lru_cache(maxsize=8)
def _small_permutation(n, seed, epoch):
    keys = np.random.SeedSequence((seed, epoch)).generate_state(n, np.uint64)
    return np.argsort(keys, kind="stable").tolist()


class Batches:
    """batches[step] -> Windows.batch of a step, or this process's rows of it.

    The position in the data is one integer, step * batch_size windows. Each epoch is a permutation
    of all windows, seeded by (seed, epoch); a batch may straddle two epochs. rows: those of every
    batch that this process reads (sharding.rows), None for all [batch_size]; the batch that all
    processes have together is the same for any number of them.
    """

    def __init__(self, windows, batch_size, seed=0, shuffle=True, rows=None):
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        if seed < 0:
            raise UserError(f"seed {seed}: must not be negative")
        self.windows, self.batch_size, self.seed, self.shuffle = windows, batch_size, seed, shuffle
        self.rows = range(batch_size) if rows is None else rows

    def indices(self, step):
        """The numbers of the windows of batches[step], in the order of `rows`."""
        position, n = step * self.batch_size, len(self.windows)
        places = [divmod(position + row, n) for row in self.rows]
        if not self.shuffle:
            return [i for _, i in places]
        return [_shuffled(i, n, self.seed, epoch) for epoch, i in places]

    def __getitem__(self, step):
        return self.windows.batch(self.indices(step))

    def where(self, step):
        """What all processes read at a step, to name a bad batch: [(window, first document, last
        one)]."""
        result, whole = [], Batches(self.windows, self.batch_size, self.seed, self.shuffle)
        for i in whole.indices(step):
            last = min((i + 1) * self.windows.length, self.windows.store.n_tokens) - 1
            ends = self.windows.document([i * self.windows.length, last])
            result.append((i, *map(int, ends)))
        return result


def evaluation_batches(windows, batch_size, rows=None):
    """Yields batches of every window once, in order; the last is filled up with weight 0.

    rows: as in Batches.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    for start in range(0, len(windows), batch_size):
        yield windows.batch(start + rows)


def prefetch(iterator, n=2):
    """Yields the items of `iterator`, which a thread takes up to n ahead; its errors come too."""
    items, closed = queue.Queue(n), threading.Event()

    def put(item):
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=0.1)

    def work():
        try:
            for item in iterator:
                put((item, None))
                if closed.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
