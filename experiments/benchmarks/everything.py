"""`benchmark all`: training, decoding, encoding, memory and compile times of nanoflax on this machine, in one table."""

import os
import platform
import subprocess
import sys
import time
from typing import Any

import jax

from experiments.benchmarks import rounds
from experiments.flags import write_json
from nanoflax.errors import UserError

ON_CPU = [
    ("train", {"shape": "small"}),
    ("train", {"shape": "vocabulary"}),
    ("decode", {"batch_size": 1}),
    ("decode", {"batch_size": 8}),
    ("decode", {"batch_size": 1, "quantize": "int8"}),
    ("decode", {"batch_size": 8, "quantize": "int8"}),
    ("encode", {}),
]
ON_ACCELERATOR = [
    ("train", {"shape": "gpt2", "steps": 10, "alone": True}),
    ("decode", {"batch_size": 1, "new_tokens": 256}),
    ("decode", {"batch_size": 64, "new_tokens": 256}),
    ("encode", {"batch_size": 256, "steps": 10}),
]
GIB = 2**30


def measure_all(given: dict[str, Any], num_rounds: int, out: str) -> int:
    """Measure everything in turn, print a table, and write all figures to the file `out` unless it is "".

    given: flags that replace those of each measurement. A measurement that fails is a row that says so.
    Returns the exit status: 1 if a measurement failed.
    """
    write_json("out", out)
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # so that compile times are those of a first start
    found: dict[str, Any] = {"machine": describe_machine(), "measurements": []}
    on_cpu = found["machine"]["platform"] == "cpu"
    jobs, names = (ON_CPU, ["nanoflax", "machine"]) if on_cpu else (ON_ACCELERATOR, ["nanoflax"])
    commands = [(kind, *(f"--{name}={value}" for name, value in (flags | given).items())) for kind, flags in jobs]
    for command in dict.fromkeys(commands):
        print(" ".join(["benchmark", *command]), file=sys.stderr, flush=True)
        found["measurements"].append(_measure([*command], names, num_rounds))
        write_json("out", out, found)  # after each measurement, so that an interruption loses nothing
    print(table(found))
    return int(any("error" in row for row in found["measurements"]))


def describe_machine() -> dict[str, Any]:
    """Devices and versions. Asked in another process: this one must not hold the accelerator's memory."""
    code = "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    name, count, kind = done.stdout.strip().split("\n")[-3:]
    return {
        "platform": name,
        "device": kind,
        "devices": int(count),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _measure(arguments: list[str], names: list[str], num_rounds: int) -> dict[str, Any]:
    begin, row = time.perf_counter(), {"command": " ".join(arguments)}
    try:
        facts, results = rounds.measure(arguments, names, num_rounds)
    except UserError as error:
        return row | {"error": str(error)}
    seconds = rounds.median(results["nanoflax"])
    first = {"compile_seconds": facts["first_round_seconds"] - seconds}  # train measures it
    return row | first | facts | {
        "seconds_a_round": seconds,
        "tokens_per_second": facts["tokens"] / seconds,
        "share_of_limit": rounds.share_of_limit(facts, results),
        "rounds": results,
        "measured_in_seconds": time.perf_counter() - begin,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The measurements, a line each, and the formulas of their shares."""
    machine, rows = found["machine"], found["measurements"]
    width = max(len(row["command"]) for row in rows)
    lines = [
        f"{machine['device']} x {machine['devices']}, jax {machine['jax']}, Python {machine['python']}",
        f"{'':{width}} {'tokens/s':>11} {'of limit':>9} {'GiB used':>9} {'compiler':>9} {'plan':>7} {'compile s':>10}",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['command']:{width}} {row['error']}")
            continue
        share = row["share_of_limit"]
        lines.append(
            f"{row['command']:{width}} {row['tokens_per_second']:11,.0f} {'?' if share is None else f'{share:.1%}':>9} "
            f"{_gib(row['peak_bytes']):>9} {_gib(row.get('compiler_bytes')):>9} {_gib(row.get('planned_bytes')):>7} "
            f"{row['compile_seconds']:10.1f}"
        )
    lines += [
        "of limit: of the vendor's FLOP/s (train: the MFU; encode) or memory bandwidth (decode); on a CPU, of the",
        "  limits measured here. GiB used: the most that the process used on a device; compiler: what the compiled",
        "  step needs; plan: the estimate of experiments.plan. compile s: without a cache.",
    ]
    for row in rows:
        if "error" not in row:
            lines.append(f"{row['command']}: {row['what']}\n  share: {row['formula']}")
            if warning := rounds.load_warning(row):
                lines.append(f"  {warning}")
    return "\n".join(lines)


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"
