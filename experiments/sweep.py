"""Try settings of pretrain or finetune: all points of a grid, random draws, or suggestions of Optuna.

    python -m experiments.sweep --config=classify --workdir=runs/sweep \\
        --grid config.optim.learning_rate=1e-3,3e-3 --grid config.model.layers=1,2
    python -m experiments.sweep --program=pretrain --config=pydocs_tiny --workdir=runs/sweep \\
        --random config.optim.learning_rate=log:1e-4:1e-2 --random config.model.layers=int:2:6 \\
        --trials=10 --config.train.steps=200

--grid KEY=VALUE,VALUE,... (";" between values that contain commas); --random KEY=log:LOW:HIGH, uniform:LOW:HIGH,
int:LOW:HIGH or VALUE,VALUE,... With both, each point of the grid gets --trials draws. With --optuna
(pip install -e '.[sweep]') each draw follows from the results so far. All other --config flags hold for every trial.

Each trial is a run in trial-NNN/ of the workdir, with its output in log.txt. The same command continues an
interrupted sweep: finished trials are kept, others resume. At the end: a table, best first, and sweep.png;
results.jsonl has a line for each trial. If a trial failed, the exit status is 1.
"""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

from absl import flags

from experiments.flags import HERE, launch
from nanoflax import runs
from nanoflax.config import MAX_SEED
from nanoflax.errors import UserError

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Directory of the sweep.", required=True)
flags.DEFINE_enum("program", "finetune", ["finetune", "pretrain"], "Program of each trial.")
flags.DEFINE_multi_string("grid", [], "KEY=VALUE,VALUE,...: values to try.")
flags.DEFINE_multi_string(
    "random", [], "KEY=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or VALUE,VALUE,...: values to draw."
)
flags.DEFINE_integer("trials", 0, "Draws of --random, for each point of the grid.", 0)
flags.DEFINE_string("metric", "validation_loss", "Metric of result.json or metrics.jsonl that ranks the trials.")
flags.DEFINE_bool("optuna", False, "Draw with Optuna's tree-structured Parzen estimator.")
flags.DEFINE_integer("seed", 0, "Seed of the draws.", 0, MAX_SEED)

DEFAULT_CONFIG = os.path.join(HERE, "configs", "classify.py")
LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte")


def main() -> int:
    if FLAGS.program == "pretrain" and not FLAGS["config"].present:
        raise UserError("--program=pretrain needs --config, such as pydocs_tiny")
    grid = [read(text, False) for text in FLAGS.grid]
    spaces = [read(text, True) for text in FLAGS.random]
    if not grid and not spaces:
        raise UserError("nothing to try: give --grid KEY=VALUE,... or --random KEY=log:LOW:HIGH")
    if bool(spaces) != bool(FLAGS.trials):
        raise UserError(f"--trials={FLAGS.trials} must be at least 1 with --random, and 0 without")
    if FLAGS.optuna and (grid or not spaces):
        raise UserError("--optuna draws from --random, and takes no --grid")
    if FLAGS.optuna:
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise UserError("--optuna needs the package optuna: pip install -e '.[sweep]'") from None
    keys = [key for key, _ in grid + spaces]
    if len({*keys}) < len(keys):
        raise UserError(f"{max(keys, key=keys.count)} is given twice")
    os.makedirs(FLAGS.workdir, exist_ok=True)
    values = itertools.product(*(values for _, values in grid))
    points = [dict(zip([key for key, _ in grid], point, strict=True)) for point in values]
    results, number = [], len(points) * (FLAGS.trials or 1)
    for i in range(number):
        point = points[i // (FLAGS.trials or 1)]
        results.append(trial(i, number, point, spaces, results))
        runs.write_jsonl(os.path.join(FLAGS.workdir, "results.jsonl"), results)
    return finish(results, keys)


def read(text, random):
    """(key, [values]) of a grid or choice, (key, (how, low, high)) of a range, all checked by the type of the field."""
    flag = f"--{'random' if random else 'grid'} {text}"
    key, equals, value = text.partition("=")
    if not equals or key not in FLAGS or not key.startswith("config."):
        raise UserError(f"{flag}: {key!r} is no field of the configuration; write config.SECTION.FIELD=...")
    how, *ends = value.split(":")
    if random and how in ("log", "uniform", "int"):
        try:
            low, high = (int(end) if how == "int" else float(end) for end in ends)
        except ValueError:
            raise UserError(f"{flag}: must be {how}:LOW:HIGH, two numbers") from None
        if not low < high or how == "log" and low <= 0:
            raise UserError(f"{flag}: LOW must be less than HIGH" + ", and above 0" * (how == "log"))
        values, ends = (how, low, high), [str(low), str(high)]
    else:
        values = ends = value.split(";" if ";" in value else ",")
    for end in ends:
        try:
            FLAGS[key].parser.parse(end)
        except ValueError as error:
            raise UserError(f"{flag}: {end!r} is no value of {key}: {error}") from error
    return key, values


def draw(spaces, i):
    """Random values of trial i, which follow from (--seed, i)."""
    import numpy as np

    rng, values = np.random.default_rng((FLAGS.seed, i)), {}
    for key, space in spaces:
        if isinstance(space, list):
            values[key] = space[rng.integers(len(space))]
            continue
        how, low, high = space
        if how == "int":
            values[key] = str(rng.integers(low, high + 1))
        elif how == "uniform":
            values[key] = str(rng.uniform(low, high))
        else:
            values[key] = str(np.exp(rng.uniform(np.log(low), np.log(high))))
    return values


def suggested(spaces, i, results):
    """Values of trial i that Optuna suggests after the results so far. The sampler's seed follows from (--seed, i), so
    a continued sweep draws the values of an uninterrupted one."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {}
    for key, space in spaces:
        if isinstance(space, list):
            distributions[key] = optuna.distributions.CategoricalDistribution(space)
        elif space[0] == "int":
            distributions[key] = optuna.distributions.IntDistribution(*space[1:])
        else:
            distributions[key] = optuna.distributions.FloatDistribution(*space[1:], log=space[0] == "log")
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=(FLAGS.seed + i) % (MAX_SEED + 1)),
        direction="minimize" if less_is_better() else "maximize",
    )
    read = {key: str if isinstance(space, list) else int if space[0] == "int" else float for key, space in spaces}
    for result in results:
        if result["status"] == "finished":
            params = {key: read[key](value) for key, value in result["values"].items()}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=distributions, value=result[FLAGS.metric])
            )
    return {key: str(value) for key, value in study.ask(distributions).params.items()}


def _write_json(path, value):
    from nanoflax.report import write_atomically

    write_atomically(pathlib.Path(path), json.dumps(value, indent=1).encode())


def trial(i, number, point, spaces, results):
    """Run or resume a trial that has not finished. Returns its record for results.jsonl."""
    workdir = os.path.join(FLAGS.workdir, f"trial-{i:03d}")
    path = os.path.join(workdir, "trial.json")
    if os.path.exists(path):
        try:
            with open(path) as f:
                known = json.load(f)
            values, done = known["values"], known.get("result")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read: {error!r}") from error
        same = list(values) == [key for key, _ in spaces] if FLAGS.optuna else values == point | draw(spaces, i)
        if not same or known["flags"] != fixed():
            raise UserError(
                f"--workdir={FLAGS.workdir} holds another sweep ({path}: {values}, "
                f"{' '.join(known['flags'])}); choose another --workdir"
            )
        if done and FLAGS.metric in done:
            return done
    else:
        drawn = suggested(spaces, i, results) if FLAGS.optuna else draw(spaces, i)
        values, known = point | drawn, {}
        os.makedirs(workdir, exist_ok=True)
        known = {"values": values, "flags": fixed()}
        _write_json(path, known)
    words = [f"{key}={value}" for key, value in values.items()]
    print(f"trial {i + 1}/{number}: {', '.join(words)}", flush=True)
    code, said = run(
        [*fixed(), *(f"--{word}" for word in words), f"--workdir={workdir}"], os.path.join(workdir, "log.txt")
    )
    result = {"trial": i, "values": values}
    if code == 0:
        figures = measured(workdir)
        if FLAGS.metric not in figures:
            raise UserError(f"--metric={FLAGS.metric} is not measured by trial {i}; it measures " + ", ".join(figures))
        result |= {"status": "finished"} | figures
        _write_json(path, known | {"result": result})
        print(f"  {FLAGS.metric} {result[FLAGS.metric]:.4f}", flush=True)
    else:
        result |= {"status": "failed", "error": said or f"exit status {code}"}
        print(f"  failed with status {code}: {result['error']}", flush=True)
    return result


def fixed():
    """The flags of every trial."""

    def text(value):
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return [
        f"--config={FLAGS['config'].value}",
        *(
            f"--{name}={text(FLAGS[name].value)}"
            for name in sorted(FLAGS)
            if name.startswith("config.") and FLAGS[name].present
        ),
    ]


def run(arguments, log):
    """(exit status, last line of the log) of a trial. A signal is passed to the trial, which saves; then the sweep
    ends with the trial's status."""
    with open(log, "a+") as f:
        process = subprocess.Popen(
            [sys.executable, "-m", f"experiments.{FLAGS.program}", *arguments],
            stdout=f,
            stderr=f,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # so that an error is the last line
            start_new_session=True,  # so that Ctrl-C reaches it only once
        )
        caught = []

        def forward(number, _):
            caught.append(number)
            process.send_signal(number)

        old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        if caught or code in (130, 143):
            print("interrupted: run the same command again to continue")
            sys.exit(128 + caught[0] if caught else code)
        f.seek(0)
        lines = [line.strip() for line in f if line.strip()]
    return code, lines[-1] if lines else ""


def measured(workdir):
    """The metrics of a run: result.json of finetune, the best evaluation of pretrain."""
    from nanoflax.report import read_metrics

    path = os.path.join(workdir, "result.json")
    if os.path.exists(path):
        with open(path) as f:
            found = json.load(f)
    else:
        found = min(
            (r for r in read_metrics(os.path.join(workdir, "metrics.jsonl")) if "validation_loss" in r),
            key=lambda r: r["validation_loss"],
        )
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def less_is_better():
    return any(word in FLAGS.metric for word in LESS_IS_BETTER)


def finish(results, keys):
    """Print the table and draw the picture. Returns the exit status."""
    from nanoflax import report

    sign = 1 if less_is_better() else -1
    good = sorted((r for r in results if r["status"] == "finished"), key=lambda r: sign * r[FLAGS.metric])
    failed = [r for r in results if r["status"] == "failed"]
    rows = [("trial", *keys, FLAGS.metric)]
    rows += [(str(r["trial"]), *(r["values"][key] for key in keys), f"{r[FLAGS.metric]:.4f}") for r in good]
    rows += [(str(r["trial"]), *(r["values"][key] for key in keys), "failed") for r in failed]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{value:<{width}}" for value, width in zip(row, widths, strict=True)).rstrip())
    for r in failed:
        print(f"trial {r['trial']} failed: {r['error']}", file=sys.stderr)
    if good:
        points = [(r["values"], r[FLAGS.metric]) for r in good]
        print(report.plot_sweep(os.path.join(FLAGS.workdir, "sweep.png"), points, FLAGS.metric))
    return 1 if failed else 0


if __name__ == "__main__":
    launch(main, DEFAULT_CONFIG)
