"""The reference of a preference loss: the log-probabilities of all answers under the model before training.

They are computed once, by the parameters that training begins with, without their adapters: no second model is in
memory, and a step needs no second forward pass. workdir/reference.npz keeps them, so that a resumed run reads the same
numbers, also if its source is gone.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from nanoflax import alignment, parallel, peft, report, tasks
from nanoflax import config as configs
from nanoflax.config import Config
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint
from nanoflax.runs.opening import Params, initial_parameters, open_source

FILE = "reference.npz"
SAVE_EVERY = 60.0  # seconds
Values = dict[str, Float[np.ndarray, "rows 2"]]  # NaN where not computed


def is_needed(task: Any) -> bool:
    """Whether the loss of a task compares with the model before training."""
    return isinstance(task, configs.Prefer) and task.needs_reference


class Reference:
    """The log-probabilities of a run's rows. `measure` computes the missing ones, `fill` writes them into the rows.

    parts: {name: rows of tasks.with_reference}. needed: {name: the numbers of the rows to compute}.
    """

    def __init__(
        self,
        workdir: str | None,
        model: Any,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        parts: dict[str, tasks.PairRows],
        needed: Mapping[str, Iterable[int]],
    ):
        self.path = pathlib.Path(workdir, FILE) if workdir else None
        self.model, self.mesh, self.parts = model, mesh, parts
        self.batch_size = parallel.divisible_batch_size(batch_size, mesh)
        self.needed = {name: sorted(set(rows)) for name, rows in needed.items()}
        self.values = self._read()  # in every process: all share the file system, and write after the first batch
        # Without a checkpoint, the file may be of another source: see `measure`.
        saved = workdir and parallel.run_on_main_process(lambda: checkpoint.list_steps(f"{workdir}/checkpoints"))
        self.is_trusted = bool(saved)

    @property
    def is_complete(self) -> bool:
        return all(np.isfinite(self.values[name][rows]).all() for name, rows in self.needed.items())

    def measure(self, params: Params) -> None:
        """Compute what is missing and save it. params: of the model before training, perhaps with adapters, on the
        mesh. The values of an earlier start that saved no checkpoint are used if the first batch has the same bits."""
        if self.is_trusted and self.is_complete:
            return
        bare, compute = peft.without_adapters(params), self._compiled()
        chunks = [(name, chunk) for name in self.parts for chunk in self._chunks(name)]
        if not self.is_trusted and chunks:
            name, chunk = chunks[0]
            if not np.array_equal(self._of(name, chunk, bare, compute), self.values[name][chunk]):
                self.values = self._unknown()
        missing = [(name, chunk) for name, chunk in chunks if not np.isfinite(self.values[name][chunk]).all()]
        saved_at = time.monotonic()
        with _Progress(len(missing)) if parallel.is_main_process() else contextlib.nullcontext() as progress:
            for done, (name, chunk) in enumerate(missing, 1):
                values, found = self.values[name], self._of(name, chunk, bare, compute)
                values[chunk] = np.where(np.isfinite(values[chunk]), values[chunk], found)
                parallel.reset_watchdog()
                if progress:
                    progress.advance(done)
                if time.monotonic() - saved_at > SAVE_EVERY:
                    self._save()
                    saved_at = time.monotonic()
        self._check()
        if missing:
            self._save()
        self.is_trusted = True

    def fill(self) -> None:
        """Write the values into the rows, which batches and evaluator share."""
        for name, rows in self.parts.items():
            for row, pair in zip(rows.rows, self.values[name], strict=True):
                row |= {f"reference_{side}": value for side, value in zip(tasks.SIDES, pair, strict=True)}

    def _chunks(self, name: str) -> list[list[int]]:
        """The needed rows in batches of similar lengths; a later start makes the same."""
        rows = sorted(self.needed[name], key=self.parts[name].n_tokens)
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def _compiled(self) -> Callable:
        def compute(params, batch):
            return alignment.answer_log_probabilities(self.model, params, batch)[0]

        return jax.jit(parallel.with_mesh(self.mesh, compute))

    def _of(self, name: str, chunk: Sequence[int], params: Params, compute: Callable) -> Float[np.ndarray, "rows 2"]:
        rows = self.parts[name]
        padded = [*chunk, *[len(rows)] * (self.batch_size - len(chunk))]
        own = [padded[i] for i in parallel.own_rows(self.mesh, self.batch_size)]
        batch = parallel.put_batch(rows.batch(own, rows.lengths(padded)), self.mesh)
        return parallel.fetch(compute(params, batch))[: len(chunk)]

    def _check(self) -> None:
        for name, rows in self.needed.items():
            bad = [i for i in rows if not np.isfinite(self.values[name][i]).all()]
            if bad:
                raise UserError(
                    f"the model before training gives {len(bad)} of the pairs no finite log-probability, the first is "
                    f"{self.parts[name].examples[bad[0]].place}; check model.init_from"
                )

    # The file.

    def _unknown(self) -> Values:
        return {name: np.full((len(rows), 2), np.nan, np.float32) for name, rows in self.parts.items()}

    def _fingerprint(self, name: str) -> str:
        total = hashlib.blake2b(digest_size=16)
        for row in self.parts[name].rows:
            for key in ("first", "chosen", "rejected", "chosen_weights", "rejected_weights"):
                total.update(f"{row[key].shape}".encode() + row[key].tobytes())
        return total.hexdigest()

    def _read(self) -> Values:
        """The values of the file that belong to the same rows."""
        values = self._unknown()
        if not self.path or not self.path.exists():
            return values
        try:
            with np.load(self.path, allow_pickle=False) as file:
                for name in values:
                    if f"{name}-{self._fingerprint(name)}" in file:
                        values[name] = file[f"{name}-{self._fingerprint(name)}"]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            print(f"{self.path} cannot be read and is computed again: {error}")
            return self._unknown()
        return values

    def _save(self) -> None:
        if self.path and parallel.is_main_process():
            content, arrays = io.BytesIO(), {f"{name}-{self._fingerprint(name)}": x for name, x in self.values.items()}
            np.savez(content, **arrays)  # type: ignore  # none is called allow_pickle
            os.makedirs(self.path.parent, exist_ok=True)
            report.write_atomically(self.path, content.getvalue())


class _Progress(report.ProgressBar):
    quiet = 5.0

    def title(self) -> str:
        return f"log-probabilities of the reference {self.done}/{self.total}"

    def status(self) -> str:
        return "batches"


def drawn_rows(batches: tasks.ExampleBatches, steps: int) -> Iterable[int]:
    """The rows that the batches of the first `steps` steps hold."""
    if steps * batches.batch_size >= len(batches.rows) + tasks.POOL * batches.batch_size:
        return range(len(batches.rows))
    return {i for step in range(steps) for i in batches.indices(step)}


def of_run(workdir: str, config: Config, model: Any, mesh: Any, batches: Any, held_out: Any) -> Reference | None:
    """The Reference of a run: for the rows that it draws, and all of validation. None if its loss needs none."""
    if not is_needed(config.task):
        return None
    parts = {"train": batches.rows, "validation": held_out}
    needed = {"train": drawn_rows(batches, config.train.steps), "validation": range(len(held_out))}
    return Reference(workdir, model, mesh, config.train.batch_size, parts, needed)


def rows_to_evaluate(rows: Any, workdir: str | None, config: Config, model: Any, mesh: Any) -> Any:
    """Rows with the log-probabilities of the reference, if the task needs them: from the run's file, or else computed
    by model.init_from. Raises: UserError if that is gone."""
    task: Any = config.task
    if not is_needed(task):
        return rows
    rows = tasks.with_reference(rows)
    everything = {"validation": range(len(rows))}
    reference = Reference(workdir, model, mesh, config.train.batch_size, {"validation": rows}, everything)
    if not (reference.is_trusted and reference.is_complete):
        reference.path = None  # the file stays that of the run
        try:
            load = open_source(config.model.init_from, merged=False).load
            reference.measure(initial_parameters(model, load, config, mesh)[0])
        except UserError as error:
            raise UserError(
                f"task.loss={task.loss!r} is measured against the model before training, "
                f"model.init_from={config.model.init_from}: {error}"
            ) from error
    reference.fill()
    return rows
