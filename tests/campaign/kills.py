"""SIGKILL at random times, and inside saves, compilations, restores, the removal of old steps and the final export.

A trial starts a program, kills it a few times and then lets it finish. What it leaves must equal what an undisturbed
run leaves: checkpoints, metrics, exports, caches, and nothing else.
"""

import collections
import random
import signal
import time

from tests.campaign import Outcome
from tests.campaign.lab import EVERY, NEVER, STEPS, Lab, last_lines

RUNS = "nanoflax.runs"
COMPILE = ("compile", "jax._src.compiler:compile_or_get_cached", 12, 0.1)
# (name, function in which the program is killed, its calls in a run, the longest delay in seconds after its begin)
TRAINING = [
    COMPILE,
    ("save", f"{RUNS}.checkpoint:Checkpoints.save", STEPS // EVERY, 0.2),
    ("save", f"{RUNS}.manifest:write", STEPS // EVERY, 0.05),
    ("restore", f"{RUNS}.checkpoint:Checkpoints.restore", 1, 0.2),
    ("retention", f"{RUNS}.checkpoint:Checkpoints.should_preserve", STEPS // EVERY, 0.05),
]
EXPORT = [
    ("export", f"{RUNS}.finetune:Finetuning.{name}", 1, 0.3)
    for name in ("finish", "measure", "write_final", "write_adapter")
]
AIMS = {
    "pretrain": TRAINING,
    "finetune": [*TRAINING, *EXPORT],
    "lora": [*TRAINING, *EXPORT, *EXPORT],
    "tokenize": [
        ("tokenize", f"nanoflax.data.{name}", 1, 1.0)
        for name in ("cache:prepare", "processes:tokenize_parts", "tokenizing:tokenize_part", "tokenizing:write_index")
    ],
    "sweep": [("sweep", f"{RUNS}.sweep:{name}", 2, 3.0) for name in ("run_program", "read_figures", "_write_json")],
    "export": [COMPILE, ("export", "nanoflax.hf.models:save", 1, 0.05)],
    "import": [COMPILE, ("save", f"{RUNS}.checkpoint:Checkpoints.save", 1, 0.1)],
}
CHANGES = {"pretrain": 150, "finetune": 250, "lora": 300, "tokenize": 60, "sweep": 12, "export": 12, "import": 40}
# The order of the trials: kinds that are quick occur more often.
ORDER = [
    "pretrain",
    "lora",
    "export",
    "finetune",
    "import",
    "pretrain",
    "tokenize",
    "lora",
    "export",
    "finetune",
    "sweep",
]


def draw(kind: str, output, seconds: float, rng: random.Random) -> tuple[str, dict, float | None]:
    """(name, accident, seconds after which the program is killed from outside, or None)."""
    if (chance := rng.random()) < 0.3:
        return "random time", NEVER, rng.uniform(0, seconds)
    if chance < 0.6:  # before a change of a file
        return "file change", {"at": "write", "inside": str(output.parent), "n": rng.randint(1, CHANGES[kind])}, None
    name, function, calls, delay = rng.choice(AIMS[kind])
    delay = rng.choice([0.0, rng.uniform(0, delay)])
    return name, {"at": "call", "of": function, "n": rng.randint(1, calls), "delay": delay}, None


def trial(lab: Lab, kind: str, rng: random.Random, count: collections.Counter) -> str:
    """Kill until two or three programs have died. Returns the problem, or ""."""
    lab.reference(kind)
    output, history = lab.new(), []
    for _ in range(rng.randint(2, 3)):
        name, accident, after = draw(kind, output, lab.seconds[kind], rng)
        victim = lab.start(kind, output, accident=accident)
        if after is not None:
            time.sleep(after)
            victim.child.kill()
        done = victim.done()
        history.append(f"{name} {accident} {after or ''}")
        if done.returncode == -signal.SIGKILL:
            count[name] += 1
        if kind in ("export", "import") and output.exists():  # complete: the same command would be refused
            break
        if done.returncode == 0:  # too late, or never so many calls
            continue
        if done.returncode != -signal.SIGKILL:
            return f"{history}: {last_lines(done)}"
    else:
        done = lab.run(kind, output)
        if done.returncode or "Traceback" in done.stderr:
            return f"{history}, and then {last_lines(done)}"
    return problem and f"{history}: {problem}" if (problem := lab.difference(kind, output)) else ""


def run(budget_seconds: float, rng: random.Random) -> list[Outcome]:
    end, i = time.monotonic() + budget_seconds, 0
    counts, problems = collections.defaultdict(collections.Counter), collections.defaultdict(list)
    with Lab() as lab:
        while time.monotonic() < end:
            kind, i = ORDER[i % len(ORDER)], i + 1
            if problem := trial(lab, kind, rng, counts[kind]):
                problems[kind].append(problem)
    return [
        Outcome(
            f"{kind}: " + ", ".join(f"{n} {name}" for name, n in count.most_common()), count.total(), problems[kind]
        )
        for kind, count in counts.items()
    ]
