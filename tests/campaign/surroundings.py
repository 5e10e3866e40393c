"""What happens around a run: clocks, permissions, data, caches, a second run, a lack of memory.

Each trial disturbs one run in one of the ways below, gives the command again if the run ended, and compares with an
undisturbed run.
"""

import errno
import os
import pathlib
import random
import shutil
import signal
import time

from tests.campaign import Outcome, outcomes_of
from tests.campaign.lab import EVERY, NEVER, STEPS, Lab, contents, difference, last_lines, messages, one_line
from tests.kills import count_lines


def finished(lab, kind, output, *flags):
    """The problem of the same command once more, undisturbed, or ""."""
    done = lab.run(kind, output, *flags)
    return last_lines(done) if done.returncode else lab.difference(kind, output)


def started(lab, kind, output, lines, *flags, accident=NEVER):
    """A run that has written so many lines of metrics."""
    victim = lab.start(kind, output, *flags, accident=accident)
    while victim.child.poll() is None and count_lines(output / "metrics.jsonl") < lines:
        time.sleep(0.005)
    return victim


def clock_that_jumps(lab, rng):
    output = lab.new()
    done = lab.run("pretrain", output, accident=NEVER | {"clock": rng.randrange(1000)})
    return last_lines(done) if done.returncode or messages(done) else lab.difference("pretrain", output)


def workdir_that_turns_read_only(lab, rng):
    """From a random change on, every change that Python makes in the workdir fails."""
    kind, output = rng.choice(["pretrain", "finetune", "lora"]), lab.new()
    lab.reference(kind)
    code = rng.choice([errno.EROFS, errno.EACCES])
    accident = {"at": "write", "inside": str(output), "n": rng.randint(1, 120), "errno": code}
    done = lab.run(kind, output, accident=accident)
    if done.returncode and not one_line(done, os.strerror(code), "cannot be"):
        return f"{kind}, {accident}: {last_lines(done)}"
    return (problem := finished(lab, kind, output)) and f"{kind}, {accident}: {problem}"


def nan_batch(lab, rng):
    """Up to two losses in a row are NaN, and the run is killed: equal to the same run that is not killed."""
    first = rng.randrange(2, STEPS - 2)
    accident = NEVER | {"nan": [first, first + rng.randrange(2)]}
    whole, output = lab.new(), lab.new()
    done = lab.run("pretrain", whole, accident=accident)
    victim = started(lab, "pretrain", output, rng.randrange(STEPS), accident=accident)
    victim.child.kill()
    victim.done()
    again = lab.run("pretrain", output, accident=accident)
    if done.returncode or again.returncode:
        return f"{accident}: {last_lines(done)}, {last_lines(again)}"
    if not difference(lab.reference("pretrain"), contents(whole)):
        return f"{accident}: the batch was not skipped"
    return (problem := difference(contents(whole), contents(output))) and f"{accident}: {problem}"


def always_nan(lab, rng):
    """Too many in a row end the run, which names the batch; nothing is lost."""
    output = lab.new()
    first = EVERY * rng.randrange(3) + rng.randrange(3)  # so that no checkpoint has a skipped step
    done = lab.run("pretrain", output, accident=NEVER | {"nan": [*range(first, 99)]})
    if not one_line(done, f"the last, step {first + 3}, read"):
        return f"from {first}: {last_lines(done)}"
    return finished(lab, "pretrain", output)


def data_that_changes_or_vanishes(lab, rng):
    """The run goes on with what it has read; a new start refuses; with the old data it is exact."""
    kind, output, hidden = rng.choice(["pretrain", "finetune"]), lab.new(), lab.home / "hidden"
    lab.reference(kind)
    file = lab.home / ("7.txt" if kind == "pretrain" else "topics.jsonl")
    victim, how = started(lab, kind, output, rng.randrange(1, STEPS)), rng.choice(["changes", "vanishes"])
    shutil.copy2(file, hidden)
    text = file.read_text()
    file.unlink() if how == "vanishes" else file.write_text(text.replace("o", "u"))
    try:
        if rng.random() < 0.5:
            victim.child.send_signal(signal.SIGTERM)
        done = victim.done()
        refused = lab.run(kind, output)
    finally:
        os.replace(hidden, file)
    if done.returncode not in (0, 143, -signal.SIGTERM):
        return f"{kind}, {how}: {last_lines(done)}"
    reasons = ("is not the one that the checkpoint", "with another configuration (model.class_names", "cannot be read")
    if done.returncode == 143 and not one_line(refused, *reasons, "no file"):
        return f"{kind}, {how}: not refused, {last_lines(refused)}"
    return (problem := finished(lab, kind, output)) and f"{kind}, {how}: {problem}"


def cache_removed(lab, rng):
    output = lab.new()
    victim = started(lab, "pretrain", output, rng.randrange(STEPS))
    shutil.rmtree(lab.home / "cache", ignore_errors=True)
    if rng.random() < 0.5:
        victim.child.kill()
    done = victim.done()
    if done.returncode not in (0, -signal.SIGKILL):
        return last_lines(done)
    return finished(lab, "pretrain", output)


def two_at_the_same_instant(lab, rng):
    """One runs, the other is refused and changes nothing."""
    kind, output = rng.choice(["pretrain", "finetune"]), lab.new()
    lab.reference(kind)
    if rng.random() < 0.3:  # in a run that has begun
        victim = started(lab, kind, output, rng.randrange(1, 8))
        victim.child.kill()
        victim.done()
    victims = [lab.start(kind, output) for _ in range(2)]
    ended = sorted((victim.done() for victim in victims), key=lambda done: done.returncode)
    if ended[0].returncode:
        return f"{kind}: {last_lines(ended[0])}"
    if ended[1].returncode and not one_line(ended[1], "is in use by"):
        return f"{kind}: {last_lines(ended[1])}"
    return (problem := lab.difference(kind, output)) and f"{kind}: {problem}"


def tokenizing_worker_out_of_memory(lab, rng):
    """The kernel kills a worker: the program ends with one line, and the same command begins again."""
    lab.reference("tokenize")
    output = lab.new()
    victim, killed = lab.start("tokenize", output), False
    while victim.child.poll() is None and not killed:
        if workers := spawned(victim.child.pid):
            time.sleep(rng.uniform(0, 0.3))
            for worker in rng.sample(workers, rng.randint(1, len(workers))):
                if worker in spawned(victim.child.pid):
                    os.kill(worker, signal.SIGKILL)
                    killed = True
        time.sleep(0.01)
    done = victim.done()
    if done.returncode and not one_line(done, "too little memory"):
        return last_lines(done)
    return finished(lab, "tokenize", output)


def spawned(pid):
    """The tokenizing processes of a program."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"PPid:\t{pid}\n" in (path / "status").read_text() and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:  # it has ended
            continue
    return found


# Two at the same instant is the most frequent: its faults need an unlucky moment.
ACCIDENTS = [two_at_the_same_instant, clock_that_jumps, two_at_the_same_instant, workdir_that_turns_read_only,
             two_at_the_same_instant, nan_batch, two_at_the_same_instant, data_that_changes_or_vanishes,
             two_at_the_same_instant, cache_removed, always_nan, tokenizing_worker_out_of_memory]  # fmt: skip


def run(budget_seconds: float, rng: random.Random) -> list[Outcome]:
    end, found, i = time.monotonic() + budget_seconds, {accident.__name__: [] for accident in ACCIDENTS}, 0
    with Lab() as lab:
        lab.reference("pretrain")
        while time.monotonic() < end:
            accident = ACCIDENTS[i % len(ACCIDENTS)]
            found[accident.__name__].append(accident(lab, rng))
            i += 1
    return outcomes_of({name.replace("_", " "): problems for name, problems in found.items()})
