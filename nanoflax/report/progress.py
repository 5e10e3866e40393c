"""Progress: a live bar on a terminal, plain lines elsewhere. The package rich is imported only for a terminal."""

import abc
import collections
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from nanoflax.report.text import format_count, format_duration, printable

SHOWN = {"rollout_reward": "reward"}  # metrics of a step that a bar shows beside the loss, and their names there


class ProgressBar(abc.ABC):
    """A live bar on a terminal, a plain line every few seconds elsewhere. Use as a context manager.

    A subclass defines `title()`, the text before the bar, and `status()`, the text after the bar, and
    calls `advance`. The bar never hides the cursor, so a terminal is usable even after SIGKILL.
    """

    quiet = 0.0  # seconds before the first plain line
    line_every = 10.0  # seconds between plain lines
    draw_every = 0.2  # seconds between frames of the bar

    def __init__(
        self, total: float, done: float = 0, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self.total, self.done = total, done
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._begin = clock, clock()
        self._drawn_at, self._undrawn = -math.inf, False
        self._bar = _bar(self._stream, total, done) if _terminal(self._stream) else None

    @abc.abstractmethod
    def title(self) -> str: ...

    @abc.abstractmethod
    def status(self) -> str: ...

    def __enter__(self):
        if self._bar:
            self._bar.start()
            self._draw()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar or self._undrawn:
            self._draw()
        with contextlib.suppress(OSError):
            if self._bar:
                self._bar.stop()

    def advance(self, done: float) -> None:
        """Shows the progress: `done` of `total`."""
        self.done, self._undrawn = done, True
        due = self._drawn_at + (self.draw_every if self._bar else self.line_every)
        if self._clock() >= due or done >= self.total:
            self._draw()

    def write(self, text: str) -> None:
        """Prints text above the bar. On a terminal, control characters are escaped."""
        with contextlib.suppress(OSError):
            if self._bar:
                from rich.text import Text

                self._bar.console.print(Text(printable(text)), soft_wrap=True)
            else:
                print(text, file=self._stream, flush=True)

    def _draw(self):
        with contextlib.suppress(OSError):  # a closed terminal must not end the run
            if self._bar:
                self._bar.update(self._bar.task_ids[0], completed=self.done, title=self.title(), status=self.status())
                self._bar.refresh()
            elif self._clock() - self._begin >= self.quiet:
                print(f"{self.title()}  {self.status()}", file=self._stream, flush=True)
        self._drawn_at, self._undrawn = self._clock(), False


class TrainingProgress(ProgressBar):
    """The bar of a training run.

    flops_per_token and peak_flops (FLOP/s of all devices together) are for the MFU; both may be None. An MFU
    above 100% shows that peak_flops was measured too low, so no MFU is shown from then on.
    ignored() gives the seconds that compilations have taken so far. Rates cover the last `window` seconds of
    training, without the first update, the time inside `pause()`, and ignored().
    """

    window = 20.0  # seconds over which rates are measured

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        tokens_per_step: float = 1,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        ignored: Callable[[], float] = lambda: 0.0,
    ):
        super().__init__(total_steps, start_step, stream, clock)
        self._counted = lambda: clock() - ignored()
        self.loss, self.shown, self.tokens_per_step = None, [], tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._paused, self._note = 0.0, "compiling"
        self._first: tuple[float, float] | None = None  # (time, training time) at the end of the first update
        self._marks = collections.deque()  # (training time, step), the last `window` seconds

    def update(self, step: int, loss: float, **metrics: float) -> None:
        """Shows the number of finished steps, and of the last step the loss and those of its metrics in SHOWN."""
        now = self._counted()
        self.loss, self._note = float(loss), None
        self.shown = [f"{shown} {metrics[name]:.3f}" for name, shown in SHOWN.items() if name in metrics]
        self._marks.append((now - self._paused, int(step)))
        self._first = self._first or (now, now - self._paused)
        while len(self._marks) > 2 and self._marks[1][0] <= now - self._paused - self.window:
            self._marks.popleft()
        if (self.mfu or 0) > 1:
            self.peak_flops = None
        self.advance(int(step))

    @contextlib.contextmanager
    def pause(self, note: str = "evaluating or saving") -> Iterator[None]:
        """A context for work that is not training. Its time does not count in the rates."""
        begin, before, self._note = self._counted(), self._note, note
        if self._bar:
            self._draw()
        try:
            yield
        finally:
            self._note = before
            self._paused += self._counted() - begin

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second in the last `window` seconds; None before the second update."""
        seconds = self._marks[-1][0] - self._marks[0][0] if self._marks else 0.0
        steps = self._marks[-1][1] - self._marks[0][1] if self._marks else 0
        return steps * self.tokens_per_step / seconds if seconds > 0 and steps > 0 else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation, from 0 to 1; None if unknown."""
        rate = self.tokens_per_second
        if rate is None or self.flops_per_token is None or self.peak_flops is None:
            return None
        return rate * self.flops_per_token / self.peak_flops

    def seconds_left(self) -> float | None:
        """Seconds until the last step, if pauses stay as frequent as now; None if unknown."""
        rate = self.tokens_per_second
        if rate is None or self._first is None:
            return None
        wall, training = self._counted() - self._first[0], self._marks[-1][0] - self._first[1]
        steps_per_second = rate / self.tokens_per_step
        return (self.total - self.done) / steps_per_second * max(1.0, wall / training)

    def title(self) -> str:
        return f"step {self.done}/{self.total}"

    def status(self) -> str:
        """A text such as `loss 2.3456  12.3k tokens/s  MFU 41%  3:21 left`."""
        parts = ([] if self.loss is None else [f"loss {self.loss:.4f}"]) + self.shown
        if self.tokens_per_second is not None:
            parts.append(f"{format_count(self.tokens_per_second)} tokens/s")
        if self.mfu is not None:
            parts.append(f"MFU {100 * self.mfu:.0f}%")
        if self._note:
            parts.append(self._note)
        elif self.done >= self.total:
            parts.append(f"in {format_duration(self._clock() - self._begin)}")
        elif (seconds := self.seconds_left()) is not None:
            parts.append(f"{format_duration(seconds)} left")
        return "  ".join(parts)


class NoDisplay:
    """Replaces a MetricsLog or a TrainingProgress and writes nothing."""

    tokens_per_second = None

    def _nothing(self, *_, **__):
        return contextlib.nullcontext()

    log = update = write = pause = _nothing


def _terminal(stream):
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _bar(stream, total, done):
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    class VisibleCursor(Console):
        def show_cursor(self, show=True):
            return False

    # No refresh thread, because it would compete with the training loop: advance() draws the bar.
    bar = RichProgress(
        TextColumn("{task.fields[title]}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[status]}", markup=False),
        auto_refresh=False,
        expand=True,
        console=VisibleCursor(file=stream, force_terminal=True),
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )
    bar.add_task("", total=total, completed=done, title="", status="")
    return bar
