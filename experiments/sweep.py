"""Try settings of pretrain or finetune: all points of a grid, random values, or suggestions of Optuna.

    python -m experiments.sweep --config=classify --workdir=runs/sweep \\
        --grid config.optim.learning_rate=1e-3,3e-3 --grid config.model.layers=1,2
    python -m experiments.sweep --program=pretrain --config=pydocs_tiny --workdir=runs/sweep \\
        --random config.optim.learning_rate=log:1e-4:1e-2 --random config.model.layers=int:2:6 \\
        --trials=10 --config.train.steps=200

--grid KEY=VALUE,VALUE,... (";" between values that contain commas); --random KEY=log:LOW:HIGH, uniform:LOW:HIGH,
int:LOW:HIGH or VALUE,VALUE,... With both, there are --trials random trials for each point of the grid. With --optuna
(pip install -e '.[sweep]') Optuna chooses values from the results so far. Other --config flags are for all trials.

Each trial is a run in trial-NNN/ of the workdir, with its output in log.txt. The same command continues an
interrupted sweep: finished trials are kept, others resume. At the end the program prints a table, the best trial
first, and draws sweep.png; results.jsonl has a line for each trial. A trial whose metric is not finite has failed. If a
trial failed, the exit status is 1.
"""

import importlib.util
import itertools
import os

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
flags.DEFINE_integer("trials", 0, "Number of random trials, for each point of the grid.", 0)
flags.DEFINE_string("metric", "validation_loss", "Metric of result.json or metrics.jsonl that ranks the trials.")
flags.DEFINE_bool("optuna", False, "Choose values with Optuna's tree-structured Parzen estimator.")
flags.DEFINE_integer("seed", 0, "Seed of the random values.", 0, MAX_SEED)

DEFAULT_CONFIG = os.path.join(HERE, "configs", "classify.py")


def main() -> int:
    if FLAGS.program == "pretrain" and not FLAGS["config"].present:
        raise UserError("--program=pretrain needs --config, such as pydocs_tiny")
    grid = [runs.parse_setting(text, False, check_value) for text in FLAGS.grid]
    spaces = [runs.parse_setting(text, True, check_value) for text in FLAGS.random]
    check_flags(grid, spaces)
    with runs.locked(FLAGS.workdir):
        return 1 if run_trials(grid, spaces) else 0


def run_trials(grid: list, spaces: list) -> int:
    """Run the trials that are left, and print the table. Returns the number of failed trials."""
    keys = [key for key, _ in grid + spaces]
    sweep = runs.Sweep(FLAGS.workdir, f"experiments.{FLAGS.program}", shared_flags(), FLAGS.metric, keys)
    grid_keys, results = [key for key, _ in grid], []
    values = itertools.product(*(values for _, values in grid))
    points = [dict(zip(grid_keys, point, strict=True)) for point in values]
    points = [point for point in points for _ in range(FLAGS.trials or 1)]
    for i, point in enumerate(points):
        if FLAGS.optuna:  # its values depend on the results before
            expected, suggest = None, lambda i=i: runs.suggest_settings(spaces, FLAGS.seed, i, results, FLAGS.metric)
        else:
            expected = point | runs.draw_settings(spaces, FLAGS.seed, i)
            suggest = lambda expected=expected: expected
        results.append(sweep.trial(i, f"trial {i + 1}/{len(points)}", expected, suggest))
        runs.write_jsonl(os.path.join(FLAGS.workdir, "results.jsonl"), results)
    return sweep.summarise(results)


def check_flags(grid: list, spaces: list) -> None:
    """Raises: UserError for flags that contradict each other."""
    if not grid and not spaces:
        raise UserError("nothing to try: give --grid KEY=VALUE,... or --random KEY=log:LOW:HIGH")
    if bool(spaces) != bool(FLAGS.trials):
        raise UserError(f"--trials={FLAGS.trials} must be at least 1 with --random, and 0 without")
    if FLAGS.optuna and (grid or not spaces):
        raise UserError("--optuna draws from --random, and takes no --grid")
    if FLAGS.optuna and not importlib.util.find_spec("optuna"):
        raise UserError("--optuna needs the package optuna: pip install -e '.[sweep]'")
    keys = [key for key, _ in grid + spaces]
    if len({*keys}) < len(keys):
        raise UserError(f"{max(keys, key=keys.count)} is given twice")


def check_value(key: str, text: str) -> None:
    """Raises: LookupError if the key is no field of the configuration, ValueError for a wrong value."""
    if key not in FLAGS or not key.startswith("config."):
        raise LookupError(key)
    FLAGS[key].parser.parse(text)


def shared_flags() -> list[str]:
    """The flags of all trials: --config and its fields, as given to this command."""

    def text(value):
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    given = [name for name in sorted(FLAGS) if name.startswith("config.") and FLAGS[name].present]
    return [f"--config={FLAGS['config'].value}", *(f"--{name}={text(FLAGS[name].value)}" for name in given)]


if __name__ == "__main__":
    launch(main, DEFAULT_CONFIG)
