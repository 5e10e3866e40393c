"""Batches of rows that hold several examples each, with random access.

A row is filled with examples (best fit). Each example is a segment: its tokens attend only to each other and its
positions begin at 0, so its loss is the loss of the example alone. All batches have the same shape.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from nanoflax.data import Batches
from nanoflax.errors import UserError
from nanoflax.tasks.rows import Rows


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items in order: each goes to the row with the least room that is enough for it, or else to a new row.

    lengths: at least 1, at most `capacity`. Returns: for each row the positions of its items in `lengths`. With
    decreasing lengths there are at most 11/9 of the fewest possible rows, and 4 (Johnson et al. 1974, SIAM J. Comput.).
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # the numbers of the rows that have this much room
    some = 0  # bit r is 1 if a row has room r
    for item, length in enumerate(lengths):
        if fitting := some >> length:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit
            row = with_room[room].pop()
            if not with_room[room]:
                some ^= 1 << room
        else:
            row, room = len(rows), capacity
            rows.append([])
        rows[row].append(item)
        with_room[room - length].append(row)
        some |= 1 << (room - length)
    return rows


class PackedBatches:
    """batches[step] is the batch of a step: the rows that this process reads.

    As in data.Batches, each epoch is a permutation of the packed rows seeded by (seed, epoch), a batch may contain rows
    of two epochs, steps have random access, and the rows of all processes together do not depend on the number of
    processes. Which lengths share a row is the same in every epoch, so all epochs have equally many rows; which of
    the examples of a length is in which row depends on (seed, epoch).
    rows: of Chats or Texts, which have targets without a source. host_rows: see data.Batches.
    """

    def __init__(self, rows: Rows, batch_size: int, seed: int = 0, host_rows: Sequence[int] | None = None) -> None:
        self._lengths = np.array([len(row["targets"]) for row in rows.rows])
        if (longest := self._lengths.max()) > rows.length:
            raise UserError(f"an example of {longest} tokens does not fit into a row of {rows.length}")
        self._packed = best_fit(np.sort(self._lengths)[::-1].tolist(), rows.length)
        self._order = Batches(self._packed, batch_size, seed, host_rows=host_rows)
        self._sorted = functools.lru_cache(maxsize=2)(self._sort)
        self.rows, self.batch_size, self.seed = rows, batch_size, seed

    @property
    def num_rows(self) -> int:
        """The number of packed rows in an epoch."""
        return len(self._packed)

    @property
    def tokens_per_step(self) -> float:
        """The mean number of tokens in a batch, without padding."""
        return self.batch_size * self._lengths.sum() / len(self._packed)

    def summary(self, steps: int) -> str:
        """The number and fill of the rows, and how often a run of so many steps reads each example."""
        examples, rows, T = len(self.rows), len(self._packed), self.rows.length
        return (
            f"packed: {examples:,} examples in {rows:,} rows of {T} tokens, {self._lengths.sum() / (rows * T):.1%} of "
            f"them real; {steps:,} steps of {self.batch_size} rows read each example "
            f"{steps * self.batch_size / rows:.3g} times"
        )

    def _sort(self, epoch: int) -> Int[np.ndarray, " examples"]:
        """The numbers of the examples from the longest to the shortest; random for equal lengths."""
        return np.lexsort((np.random.default_rng((self.seed, epoch)).random(len(self._lengths)), -self._lengths))

    def examples(self, step: int, order: Batches | None = None) -> list[list[int]]:
        """The numbers of the examples in each row of batches[step] of this process."""
        order = order or self._order
        epochs = [(step * self.batch_size + row) // len(self._packed) for row in order.host_rows]
        pairs = zip(order.indices(step), epochs, strict=True)
        return [self._sorted(epoch)[self._packed[row]].tolist() for row, epoch in pairs]

    def reads(self, step: int) -> list[tuple[int, list[int]]]:
        """(epoch, the numbers of the examples) of each row of batches[step], in all processes: [batch_size]."""
        rows = self.examples(step, Batches(self._packed, self.batch_size, self.seed))
        return [((step * self.batch_size + k) // len(self._packed), row) for k, row in enumerate(rows)]

    def describe(self, step: int) -> str:
        """The places of examples of batches[step], in the rows of all processes, to report a bad batch."""
        return ", ".join(self.rows.examples[i].place for _, row in self.reads(step)[:4] for i in row[:2])

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return packed_batch(self.rows, self.examples(step))


def packed_batch(rows: Rows, examples: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """A batch of B rows, from the numbers of the examples in each: for train.causal_lm.

    Returns: targets, segments, start [B, T] int32, weights [B, T] float32, first [B] int32. The examples of a row
    follow one another as segments 1, 2, ...; then comes padding, which has segment 0 and weight 0.
    """
    shape = len(examples), rows.length
    targets, weights = np.full(shape, rows.pad_id, np.int32), np.zeros(shape, np.float32)
    segments, start = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for line, numbers in enumerate(examples):
        begin = 0
        for segment, i in enumerate(numbers, 1):
            row = rows.rows[i]
            part = np.s_[line, begin : begin + len(row["targets"])]
            targets[part], weights[part], segments[part] = row["targets"], row["weights"], segment
            start[line, begin] = row["first"]
            begin = part[1].stop
    return {"targets": targets, "weights": weights, "segments": segments, "start": start, "first": start[:, 0]}


def packed_evaluation(
    rows: Rows, number: int, batch_size: int, host_rows: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields packed batches with each of the first `number` examples once. Rows of padding fill the last batch.

    host_rows: see data.Batches.
    """
    longest_first = sorted(range(number), key=lambda i: -len(rows.rows[i]["targets"]))
    packed = best_fit([len(rows.rows[i]["targets"]) for i in longest_first], rows.length)
    examples = [[longest_first[k] for k in row] for row in packed]
    host_rows = range(batch_size) if host_rows is None else host_rows
    for at in range(0, len(examples), batch_size):
        yield packed_batch(rows, [examples[at + i] if at + i < len(examples) else [] for i in host_rows])
