"""Batches of rows of similar lengths, with random access."""

from collections.abc import Iterator, Sequence

import numpy as np

from nanoflax.data import Batches
from nanoflax.tasks.rows import Rows

POOL = 16  # batches whose rows are sorted by length together


class ExampleBatches:
    """batches[step] is the batch of a step: the rows that this process reads.

    As in data.Batches, each epoch is a permutation seeded by (seed, epoch), steps have random access, and the rows of
    all processes together do not depend on the number of processes. The rows of 16 batches are sorted by length
    before they are divided, so that rows of a batch have similar lengths and little padding.
    host_rows: see data.Batches. shift: (max_shift, probability) for Rows.shifted, with new random shifts at each step.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        host_rows: Sequence[int] | None = None,
        shift: tuple[int, float] | None = None,
    ) -> None:
        self._pools = Batches(rows, POOL * batch_size, seed, shuffle)
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle
        self.host_rows, self.shift = range(batch_size) if host_rows is None else host_rows, shift

    def draws(self, step: int) -> list[tuple[int, int]]:
        """(row number, epoch) for each row of batches[step], in all processes: [batch_size]."""
        pool, i = divmod(step, POOL)
        first = pool * POOL * self.batch_size
        draws = [(row, (first + k) // len(self.rows)) for k, row in enumerate(self._pools.indices(pool))]
        if self.shuffle:
            draws.sort(key=lambda draw: self.rows.n_tokens(draw[0]))
            i = np.random.default_rng((self.seed, pool)).permutation(POOL)[i]
        return draws[i * self.batch_size : (i + 1) * self.batch_size]

    def indices(self, step: int) -> list[int]:
        """The row numbers of batches[step], in all processes: [batch_size]."""
        return [row for row, _ in self.draws(step)]

    def describe(self, step: int) -> str:
        """The places of the first rows of batches[step], to report a bad batch."""
        return ", ".join(self.rows.examples[i].place for i in self.indices(step)[:4])

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        rows = self.rows.with_noise(self.draws(step), self.seed)
        if self.shift:
            rows = rows.shifted(*self.shift, (self.seed, step))
        return rows.batch(self.host_rows, rows.lengths(range(self.batch_size)))


def evaluation_batches(
    rows: Rows, batch_size: int, host_rows: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches with every row once, in order. Rows of weight 0 fill the last batch.

    host_rows: see data.Batches.
    """
    host_rows = range(batch_size) if host_rows is None else host_rows
    for start in range(0, len(rows), batch_size):
        indices = range(start, start + batch_size)
        yield rows.batch([indices[i] for i in host_rows], rows.lengths(indices))
