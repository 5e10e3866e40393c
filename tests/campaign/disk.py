"""A full disk, of random size or number of files: a tmpfs of a few hundred kilobytes holds the workdir and the cache.

A run that has no room must end with one line and status 2, or go on and save later. With room again, the same command
must finish with the results of an undisturbed run. While a run trains, a disk that is full for a moment must not end
it. Needs the right to mount (root); else the part makes no trial, which counts as lost.
"""

import contextlib
import functools
import os
import random
import shutil
import subprocess
import time

from tests.campaign import Outcome, outcomes_of
from tests.campaign.lab import Lab, contents, difference, last_lines, messages, one_line
from tests.kills import count_lines

EVERY = 20  # steps between checkpoints of the run below, which is long enough for several after the moment
LONG = ["--config.train.steps=400", f"--config.train.checkpoint_every={EVERY}", "--config.train.evaluate_every=1000"]
SURE = ("metrics.jsonl", "config.json")  # what a run leaves, whichever step is its best
ROOMY = {"size": "64m", "nr_inodes": 100_000}


def mount(path, *, remount=False, **limits):
    options = ",".join([*["remount"] * remount, *(f"{name}={value}" for name, value in limits.items())])
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(path, **limits):
    path.mkdir()
    mount(path, **(ROOMY | limits))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def used(path):
    """{"size": bytes, "nr_inodes": files} in use on a tmpfs."""
    found = os.statvfs(path)
    return {"size": (found.f_blocks - found.f_bfree) * found.f_frsize, "nr_inodes": found.f_files - found.f_ffree}


@functools.cache
def needs(lab, kind):
    """What a run of this kind uses."""
    lab.reference(kind)
    with small_disk(disk := lab.new()):
        lab.run(kind, disk / "w")
        return used(disk)


def full_from_the_start(lab, kind, limit, rng):
    """A disk that is too small, which becomes larger during the run or after it."""
    disk, most = lab.new(), needs(lab, kind)[limit]
    limits = {limit: rng.randint(most // 50, most * 11 // 10)}
    with small_disk(disk, **limits):
        victim = lab.start(kind, disk / "w")
        if room_comes := rng.random() < 0.3:
            time.sleep(rng.uniform(0, lab.seconds[kind]))
            mount(disk, remount=True, **ROOMY)
        done = victim.done()
        if done.returncode and not one_line(done, "No space left"):
            return f"{limits}: {last_lines(done)}"
        mount(disk, remount=True, **ROOMY)
        again = lab.run(kind, disk / "w")
        if again.returncode:
            return f"{limits}, {room_comes=}, and then with room {last_lines(again)}"
        expected, found = lab.reference(kind), contents(disk / "w")
        if "the training goes on" in done.stdout + done.stderr:  # the best step may not have been saved
            expected, found = ({k: c.get(k) for k in SURE} for c in (expected, found))
        return (problem := difference(expected, found)) and f"{limits}, {room_comes=}: {problem}"


def full_for_a_moment(lab, kind, limit, rng):
    """The disk fills between two steps, and has room again a moment later: the run must go on by itself, and save its
    next checkpoint."""
    disk, whole = lab.new(), lab.home / "long"
    if not whole.exists():
        assert lab.run(kind, whole, *LONG).returncode == 0
    with small_disk(disk):
        victim = lab.start(kind, disk / "w", *LONG)
        metrics, first = disk / "w" / "metrics.jsonl", rng.randint(1, 60)
        while count_lines(metrics) < first and victim.child.poll() is None:
            time.sleep(0.005)
        while victim.child.poll() is None:
            full = used(disk)[limit] + rng.randint(0, 3) * (4096 if limit == "size" else 1)
            with contextlib.suppress(subprocess.CalledProcessError):  # by now more is in use
                mount(disk, remount=True, **(ROOMY | {limit: full}))
                break
        time.sleep(rng.uniform(0, 1))
        early = victim.child.poll() is not None
        mount(disk, remount=True, **ROOMY)
        lines = count_lines(metrics)
        while (room := count_lines(metrics)) == lines and victim.child.poll() is None:
            time.sleep(0.1)  # without room the run keeps its lines, and then writes them together
        while count_lines(metrics) < room + 2 * EVERY + 1 and victim.child.poll() is None:
            time.sleep(0.005)
        names = [path.name for path in (disk / "w" / "checkpoints").iterdir()]
        saved = max((int(name) for name in names if name.isdigit()), default=0)
        done = victim.done()
        if early:  # the last save had no room
            return "" if done.returncode == 0 or one_line(done, "No space left") else last_lines(done)
        if done.returncode or messages(done):
            return f"{limit} full from line {first} on: {last_lines(done)}"
        if saved <= room:
            return f"{limit}: room came at step {room}, and the newest checkpoint later was {saved}"
        return (problem := difference(contents(whole), contents(disk / "w"))) and f"{limit}, line {first}: {problem}"


def run(budget_seconds: float, rng: random.Random) -> list[Outcome]:
    end, found = time.monotonic() + budget_seconds, {}
    with Lab() as lab:
        i = 0
        while time.monotonic() < end:
            kind = ("pretrain", "lora", "pretrain", "tokenize")[i // 2 % 4]
            limit = ("size", "size", "size", "nr_inodes")[i % 4]
            what = full_for_a_moment if i % 5 == 4 else full_from_the_start
            kind = "pretrain" if what == full_for_a_moment else kind
            name = f"{'full disk' if limit == 'size' else 'no inodes'}, {what.__name__.replace('_', ' ')}"
            i += 1
            problem = what(lab, kind, limit, rng)
            found.setdefault(name, []).append(problem and f"{kind}: {problem}")
            shutil.rmtree(lab.home / f"trial-{lab.made}", ignore_errors=True)
    return outcomes_of(found)
