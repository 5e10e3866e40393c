"""Batches of windows with random access, shuffled by (seed, epoch); a thread that reads ahead."""

import contextlib
import functools
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nanoflax.errors import UserError

SMALL_EPOCH = 1 << 13  # largest number of windows whose permutation is kept in memory
Item = TypeVar("Item")


def shuffled(i: int, n: int, seed: int, epoch: int) -> int:
    """Item i of the permutation of range(n) that belongs to (seed, epoch), in O(1)."""
    if n <= SMALL_EPOCH:  # index_shuffle is slow for small n: it permutes at least 2^16 indices
        return _small_permutation(n, seed, epoch)[i]
    from grain.python.experimental import index_shuffle

    return index_shuffle(i, n - 1, _epoch_seed(seed, epoch), 4)


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


@functools.lru_cache(maxsize=8)
def _small_permutation(n: int, seed: int, epoch: int) -> list[int]:
    keys = np.random.SeedSequence((seed, epoch)).generate_state(n, np.uint64)
    return np.argsort(keys, kind="stable").tolist()


class Batches:
    """batches[step] is the batch of a step: the rows that this process reads.

    The step alone gives the position in the data: step * batch_size windows were read before. Each epoch is a
    permutation of all windows, seeded by (seed, epoch); a batch may contain windows of two epochs.
    windows: a Windows, or any object with a length and `batch`. host_rows: which rows of a batch this process reads
    (parallel.own_rows); None: all. The rows of all processes together do not depend on the number of processes.
    ranges: {step, one of them 0: the windows read from this step on, in epochs of their own}; None: all windows.
    """

    def __init__(
        self,
        windows: Any,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        host_rows: Sequence[int] | None = None,
        ranges: Mapping[int, range] | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        if seed < 0:
            raise UserError(f"seed {seed}: must not be negative")
        self.windows, self.batch_size, self.seed, self.shuffle = windows, batch_size, seed, shuffle
        self.host_rows = range(batch_size) if host_rows is None else host_rows
        self.ranges = {0: range(len(windows))} if ranges is None else ranges

    def indices(self, step: int) -> list[int]:
        """The numbers of the windows of batches[step], in the order of `host_rows`."""
        return [i for _, i in self.places(step)]

    def places(self, step: int) -> list[tuple[int, int]]:
        """As `indices`, with the epoch: (how often the windows of the range were read before, number of the window)."""
        begin = max(begin for begin in self.ranges if begin <= step)
        first, chosen = (step - begin) * self.batch_size, self.ranges[begin]
        n = len(chosen)
        positions = [divmod(first + row, n) for row in self.host_rows]
        if self.shuffle:
            positions = [(epoch, shuffled(i, n, self.seed, epoch)) for epoch, i in positions]
        return [(epoch, chosen[i]) for epoch, i in positions]

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.windows.batch(self.indices(step))

    def describe(self, step: int) -> list[tuple[int, int, int]]:
        """The (window, first document, last document) of each row of a step, to report a bad batch."""
        whole = Batches(self.windows, self.batch_size, self.seed, self.shuffle, ranges=self.ranges)
        return [(i, *self.windows.documents(i)) for i in whole.indices(step)]


def evaluation_batches(
    windows: Any, batch_size: int, host_rows: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches with every window once, in order. Windows of weight 0 fill the last batch.

    host_rows: see Batches.
    """
    rows = np.arange(batch_size) if host_rows is None else np.asarray(host_rows)
    for start in range(0, len(windows), batch_size):
        yield windows.batch(start + rows)


def prefetch(iterator: Iterable[Item], n: int = 2) -> Generator[Item, None, None]:
    """Yields the items of `iterator`. A thread reads up to n items ahead; its exceptions are raised here."""
    items, closed = queue.Queue(n), threading.Event()  # of (item, exception)

    def put(item):
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=0.1)

    def read_ahead():
        try:
            for item in iterator:
                put((item, None))
                if closed.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=read_ahead, daemon=True)
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
