"""Batches of rows of similar lengths, with random access."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanoflax.config import Config, PackedTask, PromptTuning, ShiftTask
from nanoflax.data import Batches
from nanoflax.errors import UserError
from nanoflax.tasks.packing import PackedBatches
from nanoflax.tasks.rows import Rows

POOL = 16  # batches whose rows are sorted by length together


def is_packed(task: Any) -> bool:
    """Whether the batches of a task configuration hold several examples in a row."""
    return isinstance(task, PackedTask) and task.packing != "none"


def training_batches(
    rows: Rows, config: Config, host_rows: Sequence[int] | None = None
) -> "ExampleBatches | PackedBatches":
    """The batches that a run trains on: packed, shifted, or only sorted by length, as config.task says.

    Raises: UserError if the model cannot read packed examples.
    """
    task, t, shift = config.task, config.train, None
    if is_packed(task):
        if isinstance(config.peft, PromptTuning) and config.model.positions == "relative":
            raise UserError(
                f"task.packing={task.packing!r} does not work with peft.kind='prompt' in a model of "
                "model.positions='relative': only the first example of a row would be near the virtual tokens"
            )
        return PackedBatches(rows, t.batch_size, t.seed, host_rows)
    if isinstance(task, ShiftTask) and task.shift_probability:
        shift = (task.max_shift, task.shift_probability)
    return ExampleBatches(rows, t.batch_size, t.seed, True, host_rows, shift)


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

    @property
    def tokens_per_step(self) -> float:
        """The mean number of tokens in a batch, without padding."""
        return self.batch_size * self.rows.mean_tokens

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
