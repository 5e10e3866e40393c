"""Try to break runs and readers: kills, damage, signals, full disks, lost hosts, malformed files.

    python -m tests.campaign --minutes=20
    python -m tests.campaign --minutes=3 --parts=kills,signals --seed=7

Every part is a module of this package with one function, `run(budget_seconds, rng) -> list[Outcome]`. It makes
random trials until its seconds have passed (it may finish the trial that it has begun), and says what each trial
lost. Parts run in processes of their own, --jobs at once. The program prints a table and, below it, every problem.
Exit status 1 if anything was lost or a part made no trial.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import sys

from tests.campaign import Outcome, run_part

# The parts, and their shares of the time: minutes, of 20 minutes and three jobs. The longest parts are first, so that
# no core waits at the end.
PARTS = {
    "fuzz": 17,
    "kills": 10,
    "hosts": 10,
    "disk": 6,
    "surroundings": 5,
    "corruptions": 5,
    "signals": 5,
    "prompts": 2,
}


def print_table(results: dict[str, tuple[list[Outcome], float]]) -> None:
    """One line for each outcome; then the problems."""
    rows = [
        (name, outcome.what, str(outcome.trials), str(len(outcome.problems)), f"{seconds / 60:.1f}" if not i else "")
        for name, (outcomes, seconds) in results.items()
        for i, outcome in enumerate(outcomes)
    ]
    rows.insert(0, ("part", "what", "trials", "lost", "minutes"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if i > 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    for name, (outcomes, _) in results.items():
        for outcome in outcomes:
            for problem in outcome.problems:
                print(f"LOST {name}, {outcome.what}: {problem}")


def main(minutes: float, parts: list[str], seed: int, jobs: int) -> int:
    """Run the parts. Returns the exit status."""
    unit = 60 * minutes * jobs / sum(PARTS[name] for name in parts)
    spawn = multiprocessing.get_context("spawn")  # each part has a fresh Python
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=1) as pool:
        futures = {pool.submit(run_part, name, min(unit * PARTS[name], 60 * minutes), seed): name for name in parts}
        found = {}
        for future in concurrent.futures.as_completed(futures):
            outcomes, seconds = found[futures[future]] = future.result()
            trials, lost = (sum(n) for n in zip(*((o.trials, len(o.problems)) for o in outcomes), strict=True))
            print(f"{futures[future]}: {trials} trials, {lost} lost, {seconds / 60:.1f} minutes", flush=True)
    results = {name: found[name] for name in parts}
    print_table(results)
    outcomes = [outcome for found, _ in results.values() for outcome in found]
    return int(not outcomes or any(outcome.problems or not outcome.trials for outcome in outcomes))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="length of the campaign (20)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() + 1, help="parts at the same time; default: cores + 1"
    )
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not options.minutes > 0 or options.jobs < 1:
        parser.error(f"--minutes={options.minutes:g} must be more than 0, and --jobs={options.jobs} at least 1")
    return options


if __name__ == "__main__":
    options = parse()
    # Set before JAX is imported, and inherited by the parts and the programs that they start.
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "nanoflax", "tests")
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }.items():
        os.environ.setdefault(name, value)
    sys.exit(main(options.minutes, options.parts, options.seed, options.jobs))
