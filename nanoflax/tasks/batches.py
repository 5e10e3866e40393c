"""Batches of rows of similar lengths, with random access."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nanoflax.config import GRPO, Config, PackedTask, PromptTuning, ShiftTask
from nanoflax.data import Batches
from nanoflax.errors import UserError
from nanoflax.tasks.packing import PackedBatches
from nanoflax.tasks.rows import Rows
from nanoflax.tokenizers import bucket

POOL = 16  # batches whose rows are sorted by length together


def is_packed(task: Any) -> bool:
    """Whether the batches of a task configuration hold several examples in a row."""
    return isinstance(task, PackedTask) and task.packing != "none"


def training_batches(
    rows: Rows, config: Config, host_rows: Sequence[int] | None = None
) -> "ExampleBatches | PackedBatches | PromptBatches":
    """The batches that a run trains on: prompts, packed, shifted, or only sorted by length, as config.task says.

    Raises: UserError if the model cannot read packed examples, or prompts with the completions.
    """
    task: Any = config.task
    t, shift = config.train, None
    if isinstance(task, GRPO):
        return PromptBatches(
            rows, t.batch_size, task.group, task.target_length, config.model.context, t.seed, host_rows
        )
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

    def reads(self, step: int) -> list[tuple[int, list[int]]]:
        """(epoch, the numbers of the examples) of each row of batches[step], in all processes: [batch_size]."""
        return [(epoch, [row]) for row, epoch in self.draws(step)]

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


class PromptBatches:
    """batches[step]: prompts padded on the left [rows, P] int32, their lengths [rows] int32 and the numbers of their
    problems [rows] int32. Each prompt comes `group` times in a row. All steps have the same P.

    Epochs, steps and host_rows: see data.Batches.
    Raises: UserError if a prompt with `new_tokens` tokens exceeds the context of the model.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        group: int,
        new_tokens: int,
        context: int,
        seed: int = 0,
        host_rows: Sequence[int] | None = None,
    ) -> None:
        self._prompts = Batches(rows, batch_size // group, seed)
        self.rows, self.batch_size, self.group, self.new_tokens = rows, batch_size, group, new_tokens
        self.host_rows = range(batch_size) if host_rows is None else host_rows
        longest = max(range(len(rows)), key=rows.n_tokens)
        most = rows.n_tokens(longest)
        if most + new_tokens > context:
            raise UserError(
                f"{rows.examples[longest].place} has a prompt of {most} tokens; with task.target_length={new_tokens} "
                f"this exceeds the model's context of {context}; lower task.target_length, or task.length to leave "
                "long prompts out"
            )
        self.length = min(bucket(most), context - new_tokens)

    @property
    def tokens_per_step(self) -> float:
        """The mean number of tokens in a batch, if all completions have new_tokens."""
        prompts = float(np.mean([self.rows.n_tokens(i) for i in range(len(self.rows))]))
        return self.batch_size * (prompts + self.new_tokens)

    def indices(self, step: int) -> list[int]:
        """The numbers of the problems of batches[step], in all processes: [batch_size]."""
        return [i for i in self._prompts.indices(step) for _ in range(self.group)]

    def reads(self, step: int) -> list[tuple[int, list[int]]]:
        """(epoch, the number of the problem in a list) of each row of batches[step], in all processes: [batch_size]."""
        first = step * self._prompts.batch_size
        return [((first + k // self.group) // len(self.rows), [i]) for k, i in enumerate(self.indices(step))]

    def describe(self, step: int) -> str:
        """The places of the first problems of batches[step], to report a bad batch."""
        return ", ".join(self.rows.examples[i].place for i in self._prompts.indices(step)[:4])

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        indices = self.indices(step)
        numbers = [indices[row] for row in self.host_rows]
        prompts = np.zeros((len(numbers), self.length), np.int32)
        lengths = np.array([self.rows.n_tokens(i) for i in numbers], np.int32)
        for line, i, n in zip(prompts, numbers, lengths, strict=True):
            line[self.length - n :] = self.rows.rows[i]["source"]
        return {"prompts": prompts, "lengths": lengths, "problems": np.asarray(numbers, np.int32)}


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
