"""profile=FROM:TO: a trace of some training steps, that TensorBoard and Perfetto open."""

import contextlib
import glob
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from nanoflax.config import Config
from nanoflax.errors import UserError

MAX_STEPS = 100  # the trace of a step has thousands of events


def parse_profile(text: str | None, config: Config) -> tuple[int, int] | None:
    """The first and the last step of a profile such as "10:12"; None for "" and None.

    Raises: UserError for another form, or steps that the run does not have.
    """
    if not text:
        return None
    steps, found = config.train.steps, re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]) <= steps:
        raise UserError(
            f"--profile={text} must be FROM:TO, two steps with 1 <= FROM <= TO <= train.steps={steps}, such as "
            f"{min(10, steps)}:{min(12, steps)}"
        )
    first, last = int(found[1]), int(found[2])
    if last - first >= MAX_STEPS:
        raise UserError(
            f"--profile={text} has {last - first + 1} steps, and a trace can have at most {MAX_STEPS}; a few show all"
        )
    return first, last


@contextlib.contextmanager
def traced(
    step: Callable, profile: tuple[int, int] | None, done: int, workdir: str, say: Callable[[str], None]
) -> Iterator[Callable]:
    """The training step, which writes a trace of the steps from profile[0] to profile[1] to workdir/profile.

    step: a function (state, batch) -> (state, metrics), returned unchanged if there is nothing to trace.
    done: steps before the first call. say: prints a line. If training ends within the steps, the trace ends there.
    """
    if profile is None or done >= profile[1]:
        if profile:
            say(skipped(profile, done))
        yield step
        return
    trace = _Trace(step, *profile, done, os.path.join(workdir, "profile"), say)
    try:
        yield trace
    finally:
        trace.end()


def skipped(profile: tuple[int, int], done: int) -> str:
    """The message if the run has done the steps of a profile."""
    return f"--profile={profile[0]}:{profile[1]}: nothing is traced, because the run is at step {done} already"


class _Trace:
    def __init__(self, step, first, last, done, directory, say):
        self.step, self.first, self.last, self.done, self.directory, self.say = step, first, last, done, directory, say
        self.begun = None  # the first step in the trace, while it is recorded

    def __call__(self, state: Any, batch: Any) -> Any:
        self.done += 1
        if not self.first <= self.done <= self.last:
            return self.step(state, batch)
        if self.begun is None:
            jax.block_until_ready(state)  # the step before is not in the trace
            jax.profiler.start_trace(self.directory, create_perfetto_trace=True)
            self.begun = self.done
        with jax.profiler.StepTraceAnnotation("train_step", step_num=self.done):
            result = self.step(state, batch)
        if self.done == self.last:
            jax.block_until_ready(result)
            self.end()
        return result

    def end(self) -> None:
        """Write the trace, if one is recorded. If it cannot be written, training goes on."""
        if self.begun is None:
            return
        steps, self.begun = f"steps {self.begun} to {self.done}", None
        try:
            jax.profiler.stop_trace()
            files = glob.glob(os.path.join(self.directory, "plugins", "profile", "*", "perfetto_trace.json.gz"))
            path = max(files, key=os.path.getmtime)
        except (OSError, RuntimeError, ValueError) as error:
            self.say(f"--profile: the trace of {steps} cannot be written: {error}")
        else:
            self.say(
                f"trace of {steps}: open {path} at https://ui.perfetto.dev, or run "
                f"tensorboard --logdir={self.directory} (pip install xprof)"
            )
