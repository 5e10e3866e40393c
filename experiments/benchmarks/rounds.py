"""How it is measured: each side in a process of its own, in turns, and the summary of the rounds."""

import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any

from nanoflax import report
from nanoflax.errors import UserError

Results = dict[str, list[dict[str, float]]]  # side -> {"seconds", and the machine's limit} of each round
LIMITS = {"flops": ("matrix-product rate", "GFLOP/s"), "bytes": ("memory bandwidth", "GB/s")}
PYTORCH = {"torch": "eager PyTorch", "compiled": "torch.compile"}
SHARED_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # of a GPU, by all sides
OTHER_LOAD = 0.05  # share of the machine's processor time, above which other work is worth a warning


def serve(side: tuple) -> None:
    """Run in the process of a side: print its facts, then run one round for each line read."""
    facts, run = side
    print(report.to_json(facts), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        found = run() or {}
        print(report.to_json({"seconds": time.perf_counter() - begin} | found), flush=True)


def measure(arguments: list[str], names: list[str], num_rounds: int) -> tuple[dict[str, Any], Results]:
    """(facts about nanoflax, results) of all sides. arguments: of experiments.benchmark.

    facts["other_load"]: the share of the machine's processor time that other processes took; None if not known.
    Raises: UserError if a side ends early, except "compiled", which is left out with a line.
    """
    names = names if compiler() else [name for name in names if name != "compiled"]
    sides = {name: _start(arguments, name) for name in names}
    try:
        facts = {name: found for name, side in sides.items() if (found := _ask(side, name))}  # compiled and warm
        # On an accelerator, the measured limits and a PyTorch that does not see it, which run on the CPU, are left out.
        names = [name for name in names if name in facts and facts[name].get("cpu", True) == facts["nanoflax"]["cpu"]]
        results, before = {name: [] for name in names}, processor_seconds(_running(sides))
        for i in range(num_rounds):
            for name in in_turn(names, i):
                results[name].append(_ask(sides[name], name, "go"))
            seconds = [f"{name} {results[name][-1]['seconds']:.3f} s" for name in names if name != "machine"]
            print(f"round {i + 1}/{num_rounds}: " + "  ".join(seconds), file=sys.stderr, flush=True)
        facts["nanoflax"]["other_load"] = other_load(before, processor_seconds(_running(sides)))
    finally:
        for side in sides.values():
            side.kill()
    return facts["nanoflax"], results


def in_turn(names: list, i: int) -> list:
    """The order of the sides in round i. In every two rounds, each side runs once before and once after each other."""
    return names[::-1] if i % 2 else names


def compiler() -> str | None:
    """The C++ compiler that torch.compile needs on a CPU."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))), None)


def _start(arguments: list[str], name: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.benchmark", *arguments, f"--side={name}"],
        env=os.environ | ({} if name == "nanoflax" else {"JAX_PLATFORMS": "cpu"}) | SHARED_MEMORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(side: subprocess.Popen, name: str, word: str | None = None) -> dict[str, Any]:
    """The next answer of a side, after it has been sent a word; {} for a side that is left out."""
    assert side.stdin and side.stdout
    if word:
        side.stdin.write(word + "\n")
        side.stdin.flush()
    line = side.stdout.readline()
    if not line and name == "compiled" and not word:
        print("torch.compile does not work here (its error is printed above); measured without it", file=sys.stderr)
        return {}
    if not line:
        raise UserError(f"the side {name} of the benchmark ended early; its error is printed above")
    return json.loads(line) | ({} if word else {"side": name})


def _running(sides: dict[str, subprocess.Popen]) -> list[int]:
    return [side.pid for side in sides.values() if side.poll() is None]


def processor_seconds(pids: list[int]) -> tuple[float, float, float] | None:
    """Processor seconds: of the machine (all; not idle), of these processes since their starts. None without /proc."""
    try:
        total = [int(n) for n in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        own = 0
        for pid in pids:
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += sum(map(int, fields[11:15]))  # user and system time, also of ended children
    except (OSError, ValueError):
        return None
    return sum(total), sum(total) - total[3] - total[4], own


def other_load(before: tuple | None, after: tuple | None) -> float | None:
    """The share of the machine's processor time between two `processor_seconds` that other processes took."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    total, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / total)


# The summary.


def summarise(job: str, facts: dict[str, Any], results: Results) -> None:
    """Print medians, the paired ratios, the fraction of the machine's limit, and a warning of other load."""
    print(f"{job}: {facts['what']}, on {facts['device']}")
    for name in ("nanoflax", *PYTORCH):
        if name in results:
            seconds = median(results[name])
            print(f"  {name:9} median {seconds:8.3f} s a round  {facts['tokens'] / seconds:10,.0f} tokens/s")
    for name, title in PYTORCH.items():
        if name in results:
            ratios = paired_ratios(results, name)
            print(
                f"  nanoflax is {statistics.median(ratios):.2f} times as fast as {title} (paired, "
                f"{ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds)"
            )
    if "torch" in results and "compiled" not in results and not compiler():
        print("  torch.compile is not measured: it needs a C++ compiler (g++)")
    if (fraction := share_of_limit(facts, results)) is not None:
        name, unit = LIMITS[facts["limit"]]
        top = facts["peak"] or median(results["machine"], facts["limit"])
        print(
            f"  {facts['work'] / median(results['nanoflax']) / 1e9:,.1f} {unit}: {fraction:.0%} of the "
            f"{'stated' if facts['peak'] else 'measured'} {name}, {top / 1e9:,.1f} {unit}\n  ({facts['formula']})"
        )
    else:
        print("  the limit of this device is not known")
    if warning := load_warning(facts):
        print(f"  {warning}")


def paired_ratios(results: Results, name: str) -> list[float]:
    """Seconds of a side / seconds of nanoflax in each round, ascending."""
    pairs = zip(results[name], results["nanoflax"], strict=True)
    return sorted(other["seconds"] / ours["seconds"] for other, ours in pairs)


def share_of_limit(facts: dict[str, Any], results: Results) -> float | None:
    """The speed of nanoflax as a fraction of the vendor's figure, or of the limit measured in the same round."""
    limits = [facts["peak"]] * len(results["nanoflax"]) if facts["peak"] else []
    limits = limits or [machine[facts["limit"]] for machine in results.get("machine", [])]
    pairs = list(itertools.zip_longest(results["nanoflax"], limits))
    return statistics.median(facts["work"] / ours["seconds"] / limit for ours, limit in pairs) if limits else None


def load_warning(facts: dict[str, Any]) -> str:
    """A warning if other processes took much of the processor time during the rounds, else ""."""
    share = facts["other_load"]
    if share is None or share <= OTHER_LOAD:
        return ""
    return f"warning: other work took {share:.0%} of the machine's processor time; measure again on a quiet machine"


def median(rounds: list[dict[str, float]], key: str = "seconds") -> float:
    return statistics.median(r[key] for r in rounds)
