"""The training loop: step, evaluate, checkpoint, stop."""

import contextlib
import itertools
import signal
import time
from typing import NamedTuple

import numpy as np

from nanoflax import parallel
from nanoflax.config import METRICS, AdaLoRA
from nanoflax.data import prefetch
from nanoflax.errors import UserError


class Outcome(NamedTuple):
    """How a run ended."""

    reason: str  # "finished", "early stop", or the name of a signal
    step: int
    signal: int = 0


class Tracking(NamedTuple):
    """What evaluations have shown so far; it is checkpointed beside the state."""

    best: float = float("inf")  # of train.metric; negative where more is better
    best_step: int = 0
    waited: int = 0  # evaluations since the best
    owed: bool = False  # a signal came before the evaluation of this step

    @classmethod
    def read(cls, saved, step=0, metric=None):
        """From the `_asdict` in a checkpoint of a step; at first `best` was called best_loss, and
        nothing owed. metric: that of the step, where what was owed has been done since."""
        found = cls(
            saved.get("best", saved.get("best_loss")), saved["best_step"], saved["waited"], saved.get("owed", False)
        )
        if found.owed and metric is not None:
            found = found.after(metric, step)
        return found

    def after(self, metric, step):
        """With the evaluation of a step."""
        if metric < self.best:
            return Tracking(metric, step)
        return self._replace(waited=self.waited + 1, owed=False)


def fit(
    state,
    step,
    batches,
    config,
    mesh,
    *,
    evaluate,
    checkpoints,
    log,
    progress,
    meta,
    tracking=Tracking(),
    schedule=None,
):
    """Run compiled `step` from state.step to config.train.steps; save, evaluate, stop in time.

    batches[i]: this process's rows of the batch of step i, a dict of numpy arrays;
    evaluate(params, step): -> (metrics dict with config.train.metric, text to show); checkpoints:
    a Checkpoints; log, progress: of `report`; meta: dict saved with every checkpoint. AdaLoRA's
    best step is one of those with no more ranks than its budget: the last final_steps. An evaluation
    that a signal came before is done first when the run goes on.
    Returns (state, tracking, Outcome). SIGTERM and SIGINT save and return; a second one interrupts.
    Of several processes all do the same at the same step: a signal to one is one to all, and the
    clock and the metrics are those of process 0.
    Raises: UserError after config.train.max_skipped non-finite steps in a row, naming the batch.
    """
    t = config.train
    # Queued steps of several fake CPU devices can wait for each other for ever on few cores.
    eager = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    counted = t.steps - config.peft.final_steps if isinstance(config.peft, AdaLoRA) else 0
    begin, saved_at, waiting = int(state.step), time.monotonic(), []
    done = begin

    def settle():
        """Record the oldest step whose numbers have not been read yet."""
        at, metrics = waiting.pop(0)
        values = {k: np.asarray(v).item() for k, v in metrics.items()}
        if schedule is not None:
            values["learning_rate"] = float(schedule(at - 1))
        progress.update(at, values["loss"])
        if progress.tokens_per_second is not None:
            values["tokens_per_second"] = progress.tokens_per_second
        log.log(at, **values)
        parallel.reset_watchdog()
        if values["skipped"] >= t.max_skipped:
            raise UserError(
                f"{values['skipped']} steps in a row had a non-finite loss or "
                f"gradient; the last, step {at}, read {batches.describe(at - 1)}; "
                "lower optim.learning_rate or look at those documents"
            )

    def save(metric=None):
        nonlocal saved_at
        checkpoints.save(
            done,
            state._asdict(),
            meta | {"step": done, "position": done * t.batch_size, "tracking": tracking._asdict()},
            metric,
        )
        saved_at = time.monotonic()

    reason, caught = "finished", 0
    parallel.gather_from_processes("ready")  # compiled
    with (
        Signals() as signals,
        parallel.watchdog(t.watchdog_seconds),
        contextlib.closing(prefetch(batches[i] for i in range(begin, t.steps))) as queue,
    ):
        votes = parallel.HostPoll(begin)
        for batch in itertools.chain([None] * tracking.owed, queue):
            if batch is not None:
                state, metrics = step(state, parallel.put_batch(batch, mesh))
                done += 1
                waiting.append((done, metrics))
                if eager or len(waiting) > 1 or done == begin + 1:
                    settle()
            told = votes(done, [int(signals.caught), 0 < t.checkpoint_seconds < time.monotonic() - saved_at])
            caught = next((number for number, _ in told if number), 0)
            last = done == t.steps or caught
            due = done % t.checkpoint_every == 0 or bool(told) and told[0][1]
            metric, evaluates = None, done % t.evaluate_every == 0 or done == t.steps
            tracking = tracking._replace(owed=bool(evaluates and caught))
            if evaluates and not caught:
                while waiting:
                    settle()
                with progress.pause():
                    found, text = evaluate(state.params if state.ema is None else state.ema, done)
                found = parallel.gather_from_processes({k: float(v) for k, v in found.items()})[0]
                parallel.reset_watchdog()
                log.log(done, **found)
                progress.write(text)
                if done < counted:
                    progress.write(
                        f"  not for the best step: before step {counted} AdaLoRA has more ranks than its budget"
                    )
                else:
                    metric = found[t.metric] * (-1 if METRICS[t.metric] else 1)
                    tracking = tracking.after(metric, done)
                    due |= tracking.best_step == done
                if 0 < t.patience <= tracking.waited:
                    reason, last = "early stop", True
            if due or last:
                while waiting:
                    settle()
                save(metric)
            if last:
                break
    checkpoints.wait()
    return state, tracking, Outcome(signal.Signals(caught).name if caught else reason, done, caught)


class Signals:
    """While entered, the first SIGTERM or SIGINT is remembered in `caught`, not acted on."""

    def __enter__(self):
        self.caught, self._old = 0, {}
        with contextlib.suppress(ValueError):  # not in the main thread: a notebook's worker
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number, frame):
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number

    def __exit__(self, *_):
        for number, old in self._old.items():
            signal.signal(number, old)
