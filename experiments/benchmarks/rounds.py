"""How it is measured: each side in a process of its own, in turns, and the summary of the rounds."""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from nanoflax import report
from nanoflax.errors import UserError

Results = dict[str, list[dict[str, float]]]  # side -> {"seconds", and the machine's limit} of each round


def serve(side: tuple) -> None:
    """Run in the process of a side: print its facts, then run one round for each line read."""
    facts, run = side
    print(report.to_json(facts), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        found = run() or {}
        print(report.to_json({"seconds": time.perf_counter() - begin} | found), flush=True)


def measure(arguments: list[str], names: list[str], num_rounds: int) -> tuple[dict[str, Any], Results]:
    """(facts about nanoflax, results) of all sides. arguments: of experiments.benchmark."""
    sides = {name: _start(arguments, name) for name in names}
    try:
        facts = {name: _ask(side) for name, side in sides.items()}  # compiled and warm
        if not facts["nanoflax"]["cpu"] and "torch" in names:  # PyTorch runs on the CPU here
            names = [name for name in names if name != "torch"]
        results = {name: [] for name in names}
        for i in range(num_rounds):
            for name in names if i % 2 else reversed(names):
                results[name].append(_ask(sides[name], "go"))
            seconds = [f"{name} {results[name][-1]['seconds']:.3f} s" for name in names if name != "machine"]
            print(f"round {i + 1}/{num_rounds}: " + "  ".join(seconds), file=sys.stderr, flush=True)
    finally:
        for side in sides.values():
            side.kill()
    return facts["nanoflax"], results


def _start(arguments: list[str], name: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.benchmark", *arguments, f"--side={name}"],
        env=os.environ | ({} if name == "nanoflax" else {"JAX_PLATFORMS": "cpu"}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(side: subprocess.Popen, word: str | None = None) -> dict[str, Any]:
    """The next answer of a side, after it has been sent a word."""
    if word:
        side.stdin.write(word + "\n")
        side.stdin.flush()
    line = side.stdout.readline()
    if not line:
        raise UserError("a side of the benchmark ended early; its error is printed above")
    return json.loads(line)


def summarise(job: str, facts: dict[str, Any], results: Results) -> None:
    """Print medians, the paired ratio, and the fraction of the machine's limit."""
    print(f"{job}: {facts['what']}, on {facts['device']}")
    for name in ("nanoflax", "torch"):
        if name in results:
            seconds = _median(results[name])
            print(f"  {name:9} median {seconds:8.3f} s a round  {facts['tokens'] / seconds:10,.0f} tokens/s")
    if "torch" in results:
        pairs = zip(results["torch"], results["nanoflax"], strict=True)
        ratios = sorted(torch["seconds"] / ours["seconds"] for torch, ours in pairs)
        print(
            f"  nanoflax is {statistics.median(ratios):.2f} times as fast (paired, "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds)"
        )
    if facts["cpu"] or facts["peak"]:
        _print_limit(facts, results)
    else:
        print("  the limit of this device is not known")


def _print_limit(facts: dict[str, Any], results: Results) -> None:
    """Print the speed of nanoflax as a fraction of the vendor's figure or of the measured limit."""
    limit, work, peak = facts["limit"], facts["work"], facts["peak"]
    name, unit = {"flops": ("matrix-product rate", "GFLOP/s"), "bytes": ("memory bandwidth", "GB/s")}[limit]
    pairs = zip(results["nanoflax"], results["machine"], strict=True)
    fractions = [work / ours["seconds"] / (peak or machine[limit]) for ours, machine in pairs]
    top = peak or _median(results["machine"], limit)
    print(
        f"  {work / _median(results['nanoflax']) / 1e9:,.1f} {unit}: "
        f"{statistics.median(fractions):.0%} of the {'stated' if peak else 'measured'} "
        f"{name}, {top / 1e9:,.1f} {unit}\n  ({facts['formula']})"
    )


def _median(rounds: list[dict[str, float]], key: str = "seconds") -> float:
    return statistics.median(r[key] for r in rounds)
