"""What a person follows a run by: metrics files and progress.

Nothing here touches the training state. The libraries that log and draw are imported where they
are used: tensorboardX alone takes seconds, and the first loss should not wait for it.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import queue
import re
import sys
import threading
import time

from nanoflax.errors import UserError

# ---------------------------------------------------------------------------------- metrics files

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """Writes metrics to `workdir/metrics.jsonl`, TensorBoard and, if asked, Weights & Biases.

    `metrics.jsonl` is the record of the run: one strict JSON object a line, flushed line by line,
    floats exact, a non-finite one as the string "nan", "inf" or "-inf". `resume_step` is the step
    of the checkpoint that the run goes on from: later lines, which a killed run left, are removed,
    so each step stands once. At 0 the run starts anew and no line is kept.
    """

    def __init__(self, workdir, tensorboard=True, wandb=None, resume_step=0, config=None):
        workdir = pathlib.Path(workdir)
        self.path = workdir / "metrics.jsonl"
        self._wandb = _start_wandb(workdir, wandb, config) if wandb else None
        self._tensorboard = None
        if tensorboard:
            self._tensorboard = _TensorBoard(workdir / "tensorboard", resume_step)
        try:
            _truncate(self.path, resume_step)
            self._file = open(self.path, "a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def log(self, step, **values):
        """Adds one line. Values are numbers, arrays of one number, or strings."""
        step = int(step)
        values = {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}
        try:
            self._file.write(json.dumps({"step": step} | strict(values), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        if self._tensorboard:
            self._tensorboard.add(step, values)
        if self._wandb:
            self._wandb.log({"step": step} | values)

    def close(self):
        with contextlib.suppress(OSError):  # of a full disk: log() has already said so
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _unwritable(self, error):
        return UserError(f"cannot write {self.path}: {error.strerror}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_metrics(path):
    """The records of a metrics.jsonl as dicts, without the partial last line that a kill leaves."""
    return [record for record, _ in _records(pathlib.Path(path))]


def _records(path):
    """Yields (record, line as it stands) for every whole line."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                return
            raise UserError(f"{path}, line {number}: not a metrics record") from error
        yield {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v
               for k, v in record.items()}, line


def _truncate(path, resume_step):
    """Keeps the whole lines up to `resume_step`, in one atomic replacement."""
    if not path.exists():
        return
    kept = b""
    if resume_step > 0:
        kept = b"".join(line.rstrip(b"\n") + b"\n" for record, line in _records(path)
                        if record["step"] <= resume_step)
    if kept != path.read_bytes():
        write_whole(path, kept)


def write_whole(path, data):
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def strict(value):
    """A value for JSON, each number in it that JSON does not have as its name: "nan", "inf"."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return list(map(strict, value))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class _TensorBoard:
    """Event files, written by a thread that starts (and imports the library) with the first line.

    A failure here is told once and never stops the run.
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
            # TensorBoard hides what earlier files hold at purge_step and after. The suffix keeps
            # two starts within a second from writing the same file.
            with SummaryWriter(str(self._directory), purge_step=self._resume_step + 1,
                               flush_secs=10, filename_suffix=f".{time.time_ns()}") as writer:
                for step, when, values in iter(self._queue.get, None):
                    for name, value in values.items():
                        if not isinstance(value, str) and math.isfinite(value):
                            writer.add_scalar(name, value, step, walltime=when)
        except Exception as error:
            print(f"TensorBoard events stop here: {error!r}", file=sys.stderr)


def _start_wandb(workdir, project, config):
    """A Weights & Biases run, the same one after a resume: its id is kept in the workdir."""
    try:
        from wandb import Error, Settings, init
    except ImportError as error:
        raise UserError("Weights & Biases is not installed: pip install nanoflax[wandb]") from error
    id_file = workdir / "wandb" / "run_id"
    try:
        if not id_file.exists():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(id_file, os.urandom(8).hex().encode())
        run = init(project=project, dir=workdir, id=id_file.read_text(), resume="allow",
                   config=config, settings=Settings(console="off", silent=True))
    except (Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Weights & Biases did not start ({reason}); "
                        "WANDB_MODE=offline needs no account") from error
    run.define_metric("*", step_metric="step")  # its own counter cannot go back on a resume
    return run


# --------------------------------------------------------------------------------------- progress


class Bar:
    """A live bar on a terminal, plain lines now and then elsewhere. Use as a context manager.

    A subclass has `title()`, the text before the bar, and `status()`, the one after it, and calls
    `advance`. The bar never hides the cursor, so that even SIGKILL leaves a sane terminal.
    """

    quiet = 0.0         # seconds before the first plain line
    line_every = 10.0   # seconds between plain lines
    draw_every = 0.2    # seconds between frames of the bar

    def __init__(self, total, done=0, stream=None, clock=time.monotonic):
        self.total, self.done = total, done
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._begin = clock, clock()
        self._drawn_at, self._undrawn = -math.inf, False
        self._bar = _bar(self._stream, total, done) if _terminal(self._stream) else None

    def __enter__(self):
        if self._bar:
            self._bar.start()
            self._draw()
        return self

    def __exit__(self, *_):
        if self._bar or self._undrawn:
            self._draw()
        with contextlib.suppress(OSError):
            if self._bar:
                self._bar.stop()

    def advance(self, done):
        """Reports that `done` of `total` are done."""
        self.done, self._undrawn = done, True
        due = self._drawn_at + (self.draw_every if self._bar else self.line_every)
        if self._clock() >= due or done >= self.total:
            self._draw()

    def write(self, text):
        """Prints lines above the bar; on a terminal without control characters."""
        with contextlib.suppress(OSError):
            if self._bar:
                from rich.text import Text
                self._bar.console.print(Text(printable(text)), soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)

    def _draw(self):
        with contextlib.suppress(OSError):  # a terminal that has gone away does not end the run
            if self._bar:
                self._bar.update(self._bar.task_ids[0], completed=self.done, title=self.title(),
                                 status=self.status())
                self._bar.refresh()
            elif self._clock() - self._begin >= self.quiet:
                print(f"{self.title()}  {self.status()}", file=self._stream, flush=True)
        self._drawn_at, self._undrawn = self._clock(), False


class Progress(Bar):
    """The bar of a training run.

    `flops_per_token` and `peak_flops` (of all devices together) give the MFU; either may be None.
    Rates are over the last `window` seconds of training: neither the first update, which compiles,
    nor what happens inside `pause()` counts.
    """

    window = 20.0       # seconds that rates look back

    def __init__(self, total_steps, start_step=0, tokens_per_step=1, flops_per_token=None,
                 peak_flops=None, stream=None, clock=time.monotonic):
        super().__init__(total_steps, start_step, stream, clock)
        self.loss, self.tokens_per_step = None, tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._paused, self._note = 0.0, "compiling"
        self._first = None                    # (time, training time) at the end of the first update
        self._marks = collections.deque()     # (training time, step), the last `window` seconds

    def update(self, step, loss):
        """Reports that `step` steps are done and the loss of the last."""
        now = self._clock()
        self.loss, self._note = float(loss), None
        self._marks.append((now - self._paused, int(step)))
        self._first = self._first or (now, now - self._paused)
        while len(self._marks) > 2 and self._marks[1][0] <= now - self._paused - self.window:
            self._marks.popleft()
        self.advance(int(step))

    @contextlib.contextmanager
    def pause(self, note="evaluating"):
        """Around what is not training: its time stays out of the rates."""
        begin, before, self._note = self._clock(), self._note, note
        if self._bar:
            self._draw()
        try:
            yield
        finally:
            self._note = before
            self._paused += self._clock() - begin

    @property
    def tokens_per_second(self):
        """Over the window; None until two updates have come."""
        seconds = self._marks[-1][0] - self._marks[0][0] if self._marks else 0.0
        steps = self._marks[-1][1] - self._marks[0][1] if self._marks else 0
        return steps * self.tokens_per_step / seconds if seconds > 0 and steps > 0 else None

    @property
    def mfu(self):
        """Model FLOPs utilisation, between 0 and 1; None when not known."""
        if None in (self.tokens_per_second, self.flops_per_token, self.peak_flops):
            return None
        return self.tokens_per_second * self.flops_per_token / self.peak_flops

    def seconds_left(self):
        """Until the last step, pauses included at the rate seen so far; None when not known."""
        if self.tokens_per_second is None:
            return None
        wall, training = (a - b for a, b in zip((self._clock(), self._marks[-1][0]), self._first))
        steps_per_second = self.tokens_per_second / self.tokens_per_step
        return (self.total - self.done) / steps_per_second * max(1.0, wall / training)

    def title(self):
        return f"step {self.done}/{self.total}"

    def status(self):
        """Such as `loss 2.3456  12.3k tokens/s  MFU 41%  3:21 left`."""
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        if self.tokens_per_second is not None:
            parts.append(f"{count(self.tokens_per_second)} tokens/s")
        if self.mfu is not None:
            parts.append(f"MFU {100 * self.mfu:.0f}%")
        if self._note:
            parts.append(self._note)
        elif self.done >= self.total:
            parts.append(f"in {duration(self._clock() - self._begin)}")
        elif self.seconds_left() is not None:
            parts.append(f"{duration(self.seconds_left())} left")
        return "  ".join(parts)


class Silent:
    """Stands for a MetricsLog and a Progress where nothing is to be written."""

    tokens_per_second = None

    def _nothing(self, *_, **__):
        return contextlib.nullcontext()

    log = update = write = pause = _nothing


def _terminal(stream):
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _bar(stream, total, done):
    from rich.console import Console
    from rich.progress import BarColumn, Progress as RichProgress, TextColumn

    class VisibleCursor(Console):
        def show_cursor(self, show=True):
            return False

    # No refreshing thread: frames are drawn by advance(), never against the training loop.
    bar = RichProgress(TextColumn("{task.fields[title]}", markup=False), BarColumn(bar_width=None),
                       TextColumn("{task.fields[status]}", markup=False), auto_refresh=False,
                       expand=True, console=VisibleCursor(file=stream, force_terminal=True),
                       redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty())
    bar.add_task("", total=total, completed=done, title="", status="")
    return bar


# ----------------------------------------------------------------------------------- text helpers


def count(n):
    """Three significant digits: 950, 4.5k, 1.23M, 124M, 1.1B, 2T."""
    for unit in ("", "k", "M", "B"):
        if not abs(float(f"{n:.3g}")) >= 1000 or math.isinf(n):
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:,.4g}T"


def duration(seconds):
    """As 0:07, 3:21 or 1:02:03."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# C0 but newline and tab, DEL, C1, bidirectional controls, line separators, lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f"
                          "\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """Text with control characters escaped, so that what a model writes cannot drive a terminal."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
