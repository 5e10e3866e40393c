"""SIGTERM at random times, inside compilations, evaluations and saves, and two in a row.

A program that is asked to end must end with status 143 (as the shell sees it), having saved its state if it was
training, and the same command must go on to the results of an undisturbed run.
"""

import random
import re
import signal
import time

from nanoflax.runs import checkpoint
from tests.campaign import Outcome, outcomes_of
from tests.campaign.lab import EVERY, NEVER, STEPS, Lab, contents, difference, last_lines

MOMENTS = {  # functions in which the signal comes, and their calls in a run
    "during a compilation": ("jax._src.compiler:compile_or_get_cached", 12),
    "during an evaluation": ("nanoflax.train.loop:_Run.evaluate", STEPS // (2 * EVERY)),
    "during a save": ("nanoflax.runs.checkpoint:Checkpoints.save", STEPS // EVERY),
    "between steps": ("nanoflax.parallel:put_batch", STEPS),
}
NAMES = ["at a random time", *MOMENTS, "two in a row", "two in a row"]


def trial(lab, kind, name, rng):
    output = lab.new()
    lab.reference(kind)
    accident, after = NEVER, None
    if name == "at a random time":
        after = rng.uniform(0, lab.seconds[kind])
    else:
        function, calls = MOMENTS.get(name) or rng.choice(list(MOMENTS.values()))
        delay = rng.choice([0.0, rng.uniform(0, 0.1)])
        accident = {"at": "call", "of": function, "n": rng.randint(1, calls), "delay": delay, "signal": signal.SIGTERM}
        if name == "two in a row":
            accident["again"] = rng.choice([0.0, rng.uniform(0, 0.5)])
    victim = lab.start(kind, output, accident=accident)
    if after is not None:
        time.sleep(after)
        victim.child.send_signal(signal.SIGTERM)
    done = victim.done()
    if done.returncode not in (0, 143, -signal.SIGTERM) or "Traceback" in done.stderr:
        return f"{accident} {after}: {last_lines(done)}"
    saved = re.search(r"saved at step (\d+)", done.stdout)
    if done.returncode == 143:
        if not saved or int(saved[1]) != max(checkpoint.list_steps(output / "checkpoints")):
            return f"{accident} {after}: the last step was not saved: {done.stdout[-300:]}"
    elif done.returncode and "step 1/" in done.stderr and f"step {STEPS}/{STEPS}" not in done.stderr:  # noqa: SIM102
        # The second of two signals may come after the save. It ends a program as any signal does.
        if not any(step % EVERY for step in checkpoint.list_steps(output / "checkpoints")):
            return f"{accident} {after}: the signal was not caught during training"
    done = lab.run(kind, output)
    if done.returncode:
        return f"{accident} {after}, and then {last_lines(done)}"
    expected, found = lab.reference(kind), contents(output)
    if saved:
        # Its metadata may say that an evaluation was pending; after 25 it is one of the two newest steps at the end.
        at = int(saved[1])
        for step in {at, STEPS - EVERY if at > STEPS - EVERY else at} - {STEPS}:
            expected, found = ({k: x for k, x in c.items() if k != f"checkpoints/{step}"} for c in (expected, found))
    return (problem := difference(expected, found)) and f"{accident} {after}: {problem}"


def run(budget_seconds: float, rng: random.Random) -> list[Outcome]:
    end, found, i = time.monotonic() + budget_seconds, {name: [] for name in NAMES}, 0
    with Lab() as lab:
        while time.monotonic() < end:
            name, kind = NAMES[i % len(NAMES)], ("pretrain", "pretrain", "finetune", "lora")[i % 4]
            i += 1
            found[name].append((problem := trial(lab, kind, name, rng)) and f"{kind}: {problem}")
    return outcomes_of({f"SIGTERM {name}": problems for name, problems in found.items()})
