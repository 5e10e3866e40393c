"""Batches of rows at random access, of similar lengths."""

from collections.abc import Iterator, Sequence

import numpy as np

from nanoflax.data import Batches
from nanoflax.tasks.rows import Rows

POOL = 16  # batches that are made together from rows sorted by length


class ExampleBatches:
    """batches[step] -> Rows.batch of the step, or the rows of it that this process reads.

    As data.Batches: each epoch is a permutation by (seed, epoch), any step is found at once, and the batch of all
    processes together does not depend on their number. The rows of every 16 batches are sorted by length and then
    divided, so that a batch has rows of similar length and little padding.
    host_rows: see data.Batches. shift: (max_shift, probability) of Rows.shifted, drawn anew at every step.
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
        """(number, epoch) of each row of batches[step], of all processes together: [batch_size]."""
        pool, i = divmod(step, POOL)
        first = pool * POOL * self.batch_size
        draws = [(row, (first + k) // len(self.rows)) for k, row in enumerate(self._pools.indices(pool))]
        if self.shuffle:
            draws.sort(key=lambda draw: self.rows.n_tokens(draw[0]))
            i = np.random.default_rng((self.seed, pool)).permutation(POOL)[i]
        return draws[i * self.batch_size : (i + 1) * self.batch_size]

    def indices(self, step: int) -> list[int]:
        """The numbers of the rows of batches[step], of all processes together: [batch_size]."""
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
    """Yields batches of every row once, in order, the last filled with rows of weight 0.

    host_rows: see data.Batches.
    """
    host_rows = range(batch_size) if host_rows is None else host_rows
    for start in range(0, len(rows), batch_size):
        indices = range(start, start + batch_size)
        yield rows.batch([indices[i] for i in host_rows], rows.lengths(indices))
