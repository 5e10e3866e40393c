"""The log of a run: metrics.jsonl, TensorBoard and Weights & Biases."""

import math
import os
import pathlib
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from nanoflax import untrusted
from nanoflax.errors import FULL, UserError
from nanoflax.report.strict_json import number_of, to_json


class MetricsLog:
    """Writes metrics to `workdir/metrics.jsonl` (or another `name`), TensorBoard and, if asked, Weights & Biases.

    Each line of the file is a strict JSON object. Floats are exact; non-finite ones are the strings
    "nan", "inf" and "-inf". resume_step: the step of the restored checkpoint, or 0 for a new run; lines of
    later steps (from a killed run) are removed, so no step is written again. wandb: the name of a project, or None.
    Raises: UserError if the file cannot be written or Weights & Biases does not start.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        tensorboard: bool = True,
        wandb: str | None = None,
        resume_step: int = 0,
        config: dict[str, Any] | None = None,
        name: str = "metrics.jsonl",
    ):
        workdir = pathlib.Path(workdir)
        self.path = workdir / name
        self._wandb = _start_wandb(workdir, wandb, config) if wandb else None
        self._tensorboard, self._unwritten = None, b""
        if tensorboard:
            self._tensorboard = _TensorBoard(workdir / "tensorboard", resume_step)
        try:
            _truncate(self.path, resume_step)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (until close())
        except OSError as error:
            raise self._unwritable(error) from error

    def log(self, step: int, **values: Any) -> None:
        """Adds one line. Values are numbers, arrays of one number, or strings. While the disk is full, lines are kept
        in memory, and the next call tries again. Raises: UserError for other errors of the disk."""
        step = int(step)
        values = {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}
        self._unwritten += to_json({"step": step} | values).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if error.errno not in FULL:
                raise self._unwritable(error) from error
        if self._tensorboard:
            self._tensorboard.add(step, values)
        if self._wandb:
            self._wandb.log({"step": step} | values)

    def _write(self):
        while self._unwritten:  # a disk that becomes full takes a part of a line
            self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]

    def close(self) -> None:
        """Raises: UserError if lines are left that cannot be written."""
        try:
            self._write()
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._file.close()
            if self._tensorboard:
                self._tensorboard.close()
            if self._wandb:
                self._wandb.finish()

    def _unwritable(self, error):
        return UserError(f"cannot write {self.path}: {error.strerror}")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that a killed run has not completed is ignored.

    Raises: UserError that names a damaged line.
    """
    return [record for record, _ in _records(pathlib.Path(path))]


def _records(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields (record, line as bytes) for every complete line."""
    lines = _read(path).splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = untrusted.json_object(line, path)
            int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                return
            raise UserError(f"{path}, line {number}: not a metrics record") from error
        yield {k: number_of(v) for k, v in record.items()}, line


def _read(path: pathlib.Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would be read for ever
        raise UserError(f"{path} is no file")
    return path.read_bytes()


def _truncate(path: pathlib.Path, resume_step: int) -> None:
    """Keeps the complete lines up to `resume_step`, in one atomic replacement."""
    if not path.exists():
        return
    kept = b""
    if resume_step > 0:
        kept = b"".join(line.rstrip(b"\n") + b"\n" for record, line in _records(path) if record["step"] <= resume_step)
    if kept != _read(path):
        write_atomically(path, kept)


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Writes a file completely or not at all. A link stays, and its target is written."""
    path = pathlib.Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _TensorBoard:
    """Event files. A thread writes them; it starts, and imports the library, at the first call of `add`.

    A failure is printed once and does not stop the run.
    """

    def __init__(self, directory, resume_step):
        self._directory, self._resume_step = directory, resume_step
        self._queue = queue.SimpleQueue()
        self._thread = None

    def add(self, step, values):
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        if self._thread.is_alive():
            self._queue.put((step, time.time(), values))

    def close(self):
        if self._thread:
            self._queue.put(None)
            self._thread.join()

    def _run(self):
        try:
            from tensorboardX import SummaryWriter

            # TensorBoard hides events of older files from purge_step on. Without the suffix, two starts
            # within one second would write the same file.
            with SummaryWriter(
                str(self._directory),
                purge_step=self._resume_step + 1,
                flush_secs=10,
                filename_suffix=f".{time.time_ns()}",
            ) as writer:
                for step, when, values in iter(self._queue.get, None):
                    for name, value in values.items():
                        if not isinstance(value, str) and math.isfinite(value):
                            writer.add_scalar(name, value, step, walltime=when)
        except Exception as error:
            print(f"no more TensorBoard events are written: {error!r}", file=sys.stderr)


def _start_wandb(workdir, project, config):
    """A Weights & Biases run. Its id is saved in the workdir, so that a resumed run continues it."""
    try:
        from wandb import Error, Settings, init
    except ImportError as error:
        raise UserError("Weights & Biases is not installed: pip install nanoflax[wandb]") from error
    id_file = workdir / "wandb" / "run_id"
    try:
        if not id_file.exists():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(id_file, os.urandom(8).hex().encode())
        run = init(
            project=project,
            dir=workdir,
            id=id_file.read_text(),
            resume="allow",
            config=config,
            settings=Settings(console="off", silent=True),
        )
    except (Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Weights & Biases did not start ({reason}); WANDB_MODE=offline needs no account") from error
    run.define_metric("*", step_metric="step")  # the counter of wandb cannot go back when a run resumes
    return run
