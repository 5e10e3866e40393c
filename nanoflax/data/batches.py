"""Batches of windows at random access, shuffled by (seed, epoch), and read ahead by a thread."""

import contextlib
import functools
import queue
import threading

import numpy as np

from nanoflax.errors import UserError

SMALL_EPOCH = 1 << 13  # windows


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

    def describe(self, step):
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
