"""A sweep: trials of one program with different settings, each in its own directory.

The directory of a sweep contains trial-NNN/ (the run, trial.json with its settings and result, and
log.txt with its output), results.jsonl with a line for each trial, and sweep.png. The same sweep
started again continues: finished trials are not run again, an interrupted trial resumes.
"""

import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nanoflax import report, untrusted
from nanoflax.config import MAX_SEED
from nanoflax.errors import UserError
from nanoflax.runs.lock import wait_until_free
from nanoflax.storage import IN_USE

SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")  # parts of the names of such metrics
Space = list[str] | tuple[str, float, float]  # choices, or ("log" | "uniform" | "int", low, high)
Values = dict[str, str]  # {name of a flag, such as config.optim.learning_rate: its value as text}
Result = dict[str, Any]  # {"trial", "values", "status"}, and the metrics or the error of the trial


def parse_setting(text: str, random: bool, check: Callable[[str, str], None]) -> tuple[str, Space]:
    """(key, space) from KEY=VALUE,VALUE,... (";" between values that contain commas). If `random`, also
    from KEY=log:LOW:HIGH, uniform:LOW:HIGH or int:LOW:HIGH.

    check(key, text) raises ValueError for a wrong value, and LookupError for an unknown key.
    Raises: UserError.
    """
    flag = f"--{'random' if random else 'grid'} {text}"
    key, _, value = text.partition("=")
    kind, *ends = value.split(":")
    space: Space = value.split(";" if ";" in value else ",")
    tested = space
    if random and kind in ("log", "uniform", "int"):
        try:
            low, high = (int(end) if kind == "int" else float(end) for end in ends)
        except ValueError:
            raise UserError(f"{flag}: must be {kind}:LOW:HIGH, two numbers") from None
        if not low < high or kind == "log" and low <= 0:
            raise UserError(f"{flag}: LOW must be less than HIGH" + ", and above 0" * (kind == "log"))
        space, tested = (kind, low, high), [str(low), str(high)]
    for end in tested:
        try:
            check(key, end)
        except LookupError:
            raise UserError(
                f"{flag}: {key!r} is no field of the configuration; write config.SECTION.FIELD=..."
            ) from None
        except ValueError as error:
            raise UserError(f"{flag}: {end!r} is no value of {key}: {error}") from error
    return key, space


def draw_settings(spaces: Sequence[tuple[str, Space]], seed: int, trial: int) -> Values:
    """Random values for a trial; deterministic in (seed, trial)."""
    rng, values = np.random.default_rng((seed, trial)), {}
    for key, space in spaces:
        if isinstance(space, list):
            values[key] = space[rng.integers(len(space))]
            continue
        kind, low, high = space
        if kind == "int":
            values[key] = str(rng.integers(int(low), int(high) + 1))
        elif kind == "uniform":
            values[key] = str(rng.uniform(low, high))
        else:
            values[key] = str(np.exp(rng.uniform(np.log(low), np.log(high))))
    return values


def suggest_settings(
    spaces: Sequence[tuple[str, Space]], seed: int, trial: int, results: Sequence[Result], metric: str
) -> Values:
    """Values for a trial from Optuna's tree-structured Parzen estimator; deterministic in (seed, trial,
    results so far)."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions, types = {}, {}
    for key, space in spaces:
        types[key] = str if isinstance(space, list) else int if space[0] == "int" else float
        if isinstance(space, list):
            distributions[key] = optuna.distributions.CategoricalDistribution(space)
        elif space[0] == "int":
            distributions[key] = optuna.distributions.IntDistribution(int(space[1]), int(space[2]))
        else:
            distributions[key] = optuna.distributions.FloatDistribution(*space[1:], log=space[0] == "log")
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=(seed + trial) % (MAX_SEED + 1)),
        direction="minimize" if smaller_is_better(metric) else "maximize",
    )
    for result in results:
        if result["status"] == "finished":
            params = {key: types[key](result["values"][key]) for key, _ in spaces}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=result[metric]))
    return {key: str(value) for key, value in study.ask(distributions).params.items()}


@dataclasses.dataclass
class Sweep:
    """The trials of `python -m PROGRAM`, with shared flags, in one directory."""

    workdir: str
    program: str  # such as experiments.finetune
    flags: list[str]  # shared by all trials
    metric: str  # a figure of result.json, or of metrics.jsonl
    keys: list[str]  # the names of the settings, in the order of the table

    def trial(self, number: int, title: str, expected: Values | None, suggest: Callable[[], Values]) -> Result:
        """Start or continue a trial, unless it has finished; returns its line of results.jsonl.

        expected: the values of this trial; None if they depend on results. suggest: makes the values of a
        new trial. Raises: UserError if the directory contains another sweep, or the metric is not
        measured.
        """
        workdir = os.path.join(self.workdir, f"trial-{number:03d}")
        path = pathlib.Path(workdir, "trial.json")
        known = self._read_trial(path, expected)
        if known is None:
            os.makedirs(workdir, exist_ok=True)
            known = {"values": suggest(), "flags": self.flags}
            _write_json(path, known)
        elif self.metric in known.get("result", {}):
            return self._judged(known["result"])
        settings = [f"{key}={value}" for key, value in known["values"].items()]
        print(f"{title}: {', '.join(settings)}", flush=True)
        arguments = [*self.flags, *(f"--{setting}" for setting in settings), f"--workdir={workdir}"]
        status, last_line = 2, IN_USE
        while status == 2 and IN_USE in last_line:  # after SIGKILL of the sweep, its trial still runs, or still starts
            wait_until_free(workdir)
            status, last_line = run_program(self.program, arguments, os.path.join(workdir, "log.txt"))
        result = {"trial": number, "values": known["values"]}
        if status < 0:
            last_line = f"killed by {signal.Signals(-status).name}" + "; the memory may be too small" * (status == -9)
        if status != 0:
            result |= {"status": "failed", "error": last_line or f"exit status {status}"}
            print(f"  failed with status {status}: {result['error']}", flush=True)
            return result
        try:
            figures = read_figures(workdir)
        except (OSError, ValueError, UserError) as error:
            return result | {"status": "failed", "error": f"its results cannot be read: {error}"}
        if self.metric not in figures:
            raise UserError(
                f"--metric={self.metric} is not measured by trial {number}; it measures " + ", ".join(figures)
            )
        result = self._judged(result | {"status": "finished"} | figures)
        _write_json(path, known | {"result": result})
        print(f"  {result.get('error') or f'{self.metric} {result[self.metric]:.4f}'}", flush=True)
        return result

    def _judged(self, result: Result) -> Result:
        """The result of a trial that ended, as failed if its metric is no finite number: such a trial cannot win."""
        result = {name: report.number_of(value) for name, value in result.items()}
        value = result[self.metric]
        if math.isfinite(value):
            return result
        return result | {"status": "failed", "error": f"{self.metric} is {value}: the training diverged"}

    def _read_trial(self, path: pathlib.Path, expected: Values | None) -> dict[str, Any] | None:
        """{"values", "flags"} and perhaps "result" from a trial.json; None if the file does not exist."""
        if not path.exists():
            return None
        try:
            known = untrusted.json_object(path.read_bytes(), path)
            values, flags = known["values"], known["flags"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read: {error!r}") from error
        same = values == expected if expected is not None else list(values) == self.keys
        if not same or flags != self.flags:
            raise UserError(
                f"--workdir={self.workdir} holds another sweep ({path}: {values}, "
                f"{' '.join(flags)}); choose another --workdir"
            )
        return known

    def summarise(self, results: Sequence[Result]) -> int:
        """Print the table, best first, and draw sweep.png; returns the number of failed trials."""
        sign = 1 if smaller_is_better(self.metric) else -1
        finished = [r for r in results if r["status"] == "finished"]
        failed = [r for r in results if r["status"] == "failed"]
        finished.sort(key=lambda r: sign * r[self.metric])
        rows = [("trial", *self.keys, self.metric)]
        for r in [*finished, *failed]:
            figure = f"{r[self.metric]:.4f}" if r["status"] == "finished" else "failed"
            rows.append((str(r["trial"]), *(r["values"][key] for key in self.keys), figure))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
        for r in failed:
            print(f"trial {r['trial']} failed: {r['error']}", file=sys.stderr)
        if finished:
            points = [(r["values"], r[self.metric]) for r in finished]
            print(report.plot_sweep(os.path.join(self.workdir, "sweep.png"), points, self.metric))
        return len(failed)


def run_program(program: str, arguments: Sequence[str], log: str) -> tuple[int, str]:
    """Run a program and append its output to the file `log`; returns (exit status, last line of the output).

    SIGINT and SIGTERM are forwarded to the program, which saves its state; then this process exits too.
    """
    with open(log, "a+") as f:
        process = subprocess.Popen(
            [sys.executable, "-m", program, *arguments],
            stdout=f,
            stderr=f,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # so that an error is the last line
            start_new_session=True,  # otherwise the program would get Ctrl-C twice
        )
        caught = []

        def forward(number, _):
            caught.append(number)
            process.send_signal(number)

        old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        if caught or status in (130, 143):
            print("interrupted: run the same command again to continue")
            sys.exit(128 + caught[0] if caught else status)
        f.seek(0)
        lines = [line.strip() for line in f if line.strip()]
    return status, lines[-1] if lines else ""


def read_figures(workdir: str) -> dict[str, float]:
    """The metrics of a run: from result.json (finetune), else from its best evaluation (pretrain)."""
    path = pathlib.Path(workdir, "result.json")
    if path.exists():
        found = {
            name: report.number_of(value) for name, value in untrusted.json_object(path.read_bytes(), path).items()
        }
    else:
        records = report.read_metrics(pathlib.Path(workdir, "metrics.jsonl"))
        order = lambda loss: (math.isnan(loss), loss)  # min() would keep a NaN that comes first
        evaluations = [r for r in records if "validation_loss" in r]
        found = min(evaluations, key=lambda r: order(r["validation_loss"]), default={})
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def smaller_is_better(metric: str) -> bool:
    """Whether the best trial has the smallest value of this metric."""
    return any(word in metric for word in SMALLER_IS_BETTER)


def _write_json(path: pathlib.Path, value: Any) -> None:
    report.write_atomically(path, report.to_json(value, indent=1).encode())
