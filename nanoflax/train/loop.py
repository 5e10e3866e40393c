"""The training loop: step, evaluate, checkpoint, stop."""

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from nanoflax import parallel
from nanoflax.config import METRICS, Config
from nanoflax.data import prefetch
from nanoflax.errors import UserError
from nanoflax.train.state import TrainState


class Outcome(NamedTuple):
    """How a run ended."""

    reason: str  # "finished", "early stop", or the name of a signal
    step: int
    signal: int = 0


class Tracking(NamedTuple):
    """The evaluations of a run so far. It is saved with every checkpoint."""

    best: float = float("inf")  # the best train.metric, negated where more is better
    best_step: int = 0
    waited: int = 0  # evaluations since the best
    evaluation_pending: bool = False  # a signal arrived before this step was evaluated

    @classmethod
    def read(cls, saved: dict[str, Any], step: int = 0, metric: float | None = None) -> "Tracking":
        """The Tracking of a checkpoint. metric: the result, if the pending evaluation of `step` was made later."""
        tracking = cls(**saved)
        tracking = tracking._replace(best=float(tracking.best))  # strict JSON holds infinity as the text "inf"
        return tracking.after(metric, step) if tracking.evaluation_pending and metric is not None else tracking

    def after(self, metric: float, step: int) -> "Tracking":
        """The Tracking after the evaluation of a step. NaN and infinity are never the best."""
        if math.isfinite(metric) and metric < self.best:
            return Tracking(metric, step)
        return self._replace(waited=self.waited + 1, evaluation_pending=False)


def fit(
    state: TrainState,
    step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    batches: Any,
    config: Config,
    mesh: Mesh,
    *,
    evaluate: Callable[[Any, int], tuple[dict, str]],
    checkpoints: Any,
    log: Any,
    progress: Any,
    meta: dict[str, Any],
    tracking: Tracking = Tracking(),  # noqa: B008  # a constant
    schedule: Callable[[int], Any] | None = None,
) -> tuple[TrainState, Tracking, Outcome]:
    """Run the compiled `step` from state.step to config.train.steps, with evaluations and checkpoints.

    batches[i]: this process's rows of the batch of step i; batches.describe(i): the source of the rows;
    evaluate(params, step): (metrics with config.train.metric, text to print); checkpoints: a
    Checkpoints; log, progress: of `report`; meta: saved with every checkpoint. A pending evaluation is
    done first. SIGTERM and SIGINT save and return; a second SIGINT interrupts. All processes stop and
    save at the same step: after a signal to any process, and by the clock and metrics of process 0.
    Raises: UserError after config.train.max_skipped non-finite steps in a row, naming the batch.
    """
    run = _Run(config, batches, evaluate, checkpoints, log, progress, meta, schedule, state, tracking)
    steps, first = config.train.steps, run.done
    # With few cores, queued steps of virtual CPU devices can deadlock: wait for each step.
    eager = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    reason, caught = "finished", 0
    parallel.gather_from_processes("compiled")
    with parallel.Signals() as signals:
        with (
            parallel.watchdog(config.train.watchdog_seconds),
            contextlib.closing(prefetch(batches[i] for i in range(first, steps))) as queue,
        ):
            poll = parallel.HostPoll(first)
            for batch in itertools.chain([None] * tracking.evaluation_pending, queue):
                if batch is not None:
                    with run.saved_after_mistake(first):
                        run.state, metrics = step(run.state, parallel.put_batch(batch, mesh))
                    run.add(metrics, wait=eager or run.done == first)
                # answers: of each process; [] between polls. last: the run ends after this step.
                answers = poll(run.done, [int(signals.caught), run.save_is_due()])
                caught = next((number for number, _ in answers if number), 0)
                save = run.done % config.train.checkpoint_every == 0 or bool(answers) and answers[0][1]
                metric, last = None, run.done == steps or caught
                evaluates = run.done % config.train.evaluate_every == 0 or run.done == steps
                run.tracking = run.tracking._replace(evaluation_pending=bool(evaluates and caught))
                if evaluates and not caught:
                    with run.saved_after_mistake(first, evaluation_pending=True):
                        metric = run.evaluate()
                    save |= metric is not None and run.tracking.best_step == run.done
                    if 0 < config.train.patience <= run.tracking.waited:
                        reason, last = "early stop", True
                if save or last:
                    run.save(metric)
                if last:
                    break
        checkpoints.wait()
        late = parallel.gather_from_processes(int(signals.caught))  # during the last evaluation or save
        caught = caught or next(filter(None, late), 0)
    return run.state, run.tracking, Outcome(signal.Signals(caught).name if caught else reason, run.done, caught)


class _Run:
    """The state of `fit`: the training state, the tracking, and metrics that are still on the device."""

    def __init__(self, config, batches, evaluate, checkpoints, log, progress, meta, schedule, state, tracking):
        self.config, self.batches, self.evaluator, self.checkpoints = config, batches, evaluate, checkpoints
        self.log, self.progress, self.meta, self.schedule = log, progress, meta, schedule
        self.state, self.tracking, self.done = state, tracking, int(state.step)
        self.unread, self.saved_at = [], time.monotonic()

    def add(self, metrics, wait):
        """Count a step. wait: read its metrics now, not after the next step (which keeps the device busy)."""
        self.done += 1
        self.unread.append((self.done, metrics))
        self.read_metrics(keep=0 if wait else 1)

    def read_metrics(self, keep=0):
        """Report all unread steps except the last `keep`."""
        while len(self.unread) > keep:
            self._report(*self.unread.pop(0))

    def _report(self, at, metrics):
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        if self.schedule is not None:
            values["learning_rate"] = float(self.schedule(at - 1))
        self.progress.update(at, **values)
        if self.progress.tokens_per_second is not None:
            values["tokens_per_second"] = self.progress.tokens_per_second
        self.log.log(at, **values)
        parallel.reset_watchdog()
        if values["skipped"] >= self.config.train.max_skipped:
            raise UserError(
                f"{values['skipped']} steps in a row had a non-finite loss or gradient; the last, step {at}, read "
                f"{self.batches.describe(at - 1)}; lower optim.learning_rate or check these documents"
            )

    def evaluate(self):
        """Evaluate, report and track this step. Returns its metric, or None if the step cannot be the best."""
        self.read_metrics()
        state, name = self.state, self.config.train.metric
        with self.progress.pause():
            metrics, text = self.evaluator(state.params if state.ema is None else state.ema, self.done)
        metrics = parallel.gather_from_processes({k: float(v) for k, v in metrics.items()})[0]
        parallel.reset_watchdog()
        self.log.log(self.done, **metrics)
        self.progress.write(text)
        first = self.config.peft.first_best_step(self.config.train.steps)
        if self.done < first:
            self.progress.write(f"  cannot be the best step: before step {first} there are more ranks than the target")
            return None
        metric = metrics[name] * (-1 if METRICS[name] else 1)
        self.tracking = self.tracking.after(metric, self.done)
        return metric

    @contextlib.contextmanager
    def saved_after_mistake(self, first, evaluation_pending=False):
        """A context that saves the steps since `first` before it raises a UserError, as of a reward that fails."""
        try:
            yield
        except UserError:
            if self.done > first:
                self.tracking = self.tracking._replace(evaluation_pending=evaluation_pending)
                self.save(None)
                self.checkpoints.wait()
            raise

    def save_is_due(self):
        return 0 < self.config.train.checkpoint_seconds < time.monotonic() - self.saved_at

    def save(self, metric):
        self.read_metrics()
        position = self.done * self.config.train.batch_size
        with self.progress.pause():
            self.checkpoints.finish_previous(self.done)
            saved = parallel.run_on_main_process(self.checkpoints.steps)
            if self.tracking.best_step not in (0, self.done, *saved):  # the disk was full then
                found = {step: self.checkpoints.metric(step) for step in saved} | {self.done: metric}
                best = min(((x, step) for step, x in found.items() if x is not None), default=(math.inf, 0))
                self.tracking = self.tracking._replace(best=best[0], best_step=best[1])
            meta = self.meta | {"step": self.done, "position": position, "tracking": self.tracking._asdict()}
            self.checkpoints.save(self.done, self.state._asdict(), meta, metric)
        self.saved_at = time.monotonic()
