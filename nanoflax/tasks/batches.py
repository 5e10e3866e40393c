"""Batches of rows at random access, of like length."""

import numpy as np

from nanoflax.data import Batches

POOL = 16  # batches that are cut together from examples sorted by length


# Rows to batches.


class ExampleBatches:
    """batches[step] -> Rows.batch of a step, or this process's part of it.

    As windows.Batches: each epoch is a permutation by (seed, epoch), any step is found at once, and
    the batch that all processes have together is the same for any number of them. Of every 16
    batches the rows are sorted by length and dealt out, so that a batch holds rows of like length
    and little padding.
    host_rows: the rows of every batch that this process reads (sharding.rows), None for all.
    shift: (max_shift, probability) of Rows.shifted, drawn anew at every step, or None.
    """

    def __init__(self, rows, batch_size, seed=0, shuffle=True, host_rows=None, shift=None):
        self._pools = Batches(rows, POOL * batch_size, seed, shuffle)
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle
        self.host_rows, self.shift = range(batch_size) if host_rows is None else host_rows, shift

    def draws(self, step):
        """(number, epoch) of each row of batches[step], of all processes together, [batch_size]."""
        pool, i = divmod(step, POOL)
        first = pool * POOL * self.batch_size
        draws = [(row, (first + k) // len(self.rows)) for k, row in enumerate(self._pools.indices(pool))]
        if self.shuffle:
            draws.sort(key=lambda draw: self.rows.n_tokens(draw[0]))
            i = np.random.default_rng((self.seed, pool)).permutation(POOL)[i]
        return draws[i * self.batch_size : (i + 1) * self.batch_size]

    def indices(self, step):
        """The numbers of the rows of batches[step], of all processes together, [batch_size]."""
        return [row for row, _ in self.draws(step)]

    def describe(self, step: int) -> str:
        """The places of the first examples of a step, to report a bad batch."""
        return ", ".join(self.rows.examples[i].place for i in self.indices(step)[:4])

    def __getitem__(self, step):
        rows = self.rows.with_noise(self.draws(step), self.seed)
        if self.shift:
            rows = rows.shifted(*self.shift, (self.seed, step))
        return rows.batch(self.host_rows, rows.lengths(range(self.batch_size)))


def evaluation_batches(rows, batch_size, host_rows=None):
    """Yields batches of every row once, in order; the last is filled up with rows of weight 0.

    host_rows: as in ExampleBatches.
    """
    host_rows = range(batch_size) if host_rows is None else host_rows
    for start in range(0, len(rows), batch_size):
        indices = range(start, start + batch_size)
        yield rows.batch([indices[i] for i in host_rows], rows.lengths(indices))
