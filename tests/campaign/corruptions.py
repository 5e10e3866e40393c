"""Damage to each file of a checkpoint: it must be noticed, and the run must go on from the newest sound step.

A trial damages one or more steps of an interrupted run, and gives the command again. With a sound step left, the run
must finish with the results of an undisturbed run. Without one it must refuse, in one line. In both cases every file
that is damaged must still be there.
"""

import functools
import os
import random
import shutil
import signal
import time

from nanoflax.runs import checkpoint, manifest
from tests.campaign import Outcome, outcomes_of
from tests.campaign.lab import EVERY, Lab, contents, last_lines, one_line

COPIES = ("an older copy of the step", "swapped steps")


def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(file, rng):
    os.truncate(file, rng.randrange(file.stat().st_size))


def swap(file, rng):
    """Swap it with another file of the step, of other bytes."""
    step = next(path for path in file.parents if path.name.isdigit())
    others = [path for path in files(step) if path.read_bytes() != file.read_bytes()]
    other, part = rng.choice(others), file.with_name("part")
    file.rename(part)
    other.rename(file)
    part.rename(other)


def older(file, rng):
    """Replace it by the same file of the step before, or a file of the same directory there; False if equal."""
    step = next(path for path in file.parents if path.name.isdigit())
    directory = step.with_name(str(int(step.name) - EVERY)) / file.parent.relative_to(step)
    candidates = [path for path in directory.iterdir() if path.is_file() and path.read_bytes() != file.read_bytes()]
    if candidates:
        shutil.copy(rng.choice(candidates), file)
    else:
        file.unlink()


def delete(file, rng):
    file.unlink()


ACCIDENTS = {"bit flips": flip, "truncations": truncate, "swaps": swap, "deletions": delete, "older copies": older}


def files(step):
    """The files of a step that a restore needs: orbax writes two more, which may be lost."""
    found = [path for path in sorted(step.rglob("*")) if path.is_file() and path.stat().st_size]
    return [path for path in found if path.parent != step or path.name not in manifest.WRITTEN_LATER]


def damage_steps(directory, accident, rng):
    """Damage the newest step, or all. Returns the damaged steps."""
    steps = checkpoint.list_steps(directory)
    newest = directory / str(steps[-1])
    if accident == "an older copy of the step":
        shutil.rmtree(newest)
        shutil.copytree(directory / str(steps[-2]), newest)
        return steps[-1:]
    if accident == "swapped steps":
        newest.rename(directory / "part")
        (directory / str(steps[-2])).rename(newest)
        (directory / "part").rename(directory / str(steps[-2]))
        return steps[-2:]
    damaged = steps[-1:] if accident == "older copies" or rng.random() < 0.75 else steps
    for step in damaged:
        ACCIDENTS[accident](rng.choice(files(directory / str(step))), rng)
    return damaged


@functools.cache
def interrupted(lab, kind):
    """The workdir of a run that was killed after its third checkpoint, and so has two steps."""
    lab.reference(kind)
    accident = {"at": "call", "of": "nanoflax.runs.checkpoint:Checkpoints.save", "n": 4}
    while True:
        done = lab.run(kind, output := lab.home / f"interrupted-{kind}", accident=accident)
        assert done.returncode == -signal.SIGKILL, last_lines(done)
        if len(checkpoint.list_steps(output / "checkpoints")) >= 2:
            return output


def trial(lab, kind, accident, rng):
    output = lab.new()
    shutil.copytree(interrupted(lab, kind), output)
    directory = output / "checkpoints"
    steps, damaged = checkpoint.list_steps(directory), damage_steps(directory, accident, rng)
    before = {step: {p.relative_to(directory / str(step)): p.read_bytes() for p in files(directory / str(step))}
              for step in damaged}  # fmt: skip
    done = lab.run(kind, output)
    for step in damaged:
        kept = directory / f"damaged-{step}"
        if f"step {step} is damaged" not in done.stdout:
            return f"step {step} was not noticed: {last_lines(done)}"
        if any(not (kept / name).exists() or (kept / name).read_bytes() != data for name, data in before[step].items()):
            return f"files of {kept.name} are lost"
        shutil.rmtree(kept)
    if damaged == steps:
        refused = one_line(done, "every checkpoint is damaged") and not contents(directory)
        return "" if refused else f"not refused: {last_lines(done)}"
    return last_lines(done) if done.returncode else lab.difference(kind, output)


def exported(lab, rng):
    """Damage to final/ of a fine-tuned run: convert must refuse it in one line."""
    output, target = lab.new(), lab.new()
    lab.reference("lora")
    shutil.copytree(lab.home / "whole-lora", output)
    file = rng.choice(files(output / "final" / "checkpoints" / "0"))
    rng.choice([flip, truncate, delete])(file, rng)
    done = lab.program("experiments.convert", f"--from={output}", f"--to={target}")
    if not one_line(done, "every checkpoint is damaged") or target.exists():
        return f"{file.name} of final/: {last_lines(done)}"
    return ""


def run(budget_seconds: float, rng: random.Random) -> list[Outcome]:
    end, found = time.monotonic() + budget_seconds, {}
    with Lab() as lab:
        names = [*ACCIDENTS, *ACCIDENTS, *COPIES, "in final/"]
        i = 0
        while time.monotonic() < end:
            name, kind = names[i % len(names)], ("pretrain", "lora")[i % 3 == 2]
            i += 1
            problem = exported(lab, rng) if name == "in final/" else trial(lab, kind, name, rng)
            found.setdefault(name, []).append(problem and f"{kind}: {problem}")
    return outcomes_of(found)
