"""Two processes of one run: one is killed, stopped or cut off the network, at a random time.

The other must end by itself within the deadline of its flags, and two new processes must go on to the results of an
undisturbed pair. A network that can be cut is two network namespaces and a cable between them (root, and `ip`).
"""

import contextlib
import os
import random
import signal
import subprocess
import time

from nanoflax.parallel.hosts import SHUTDOWN_SECONDS
from tests import processes
from tests.campaign import Outcome, outcomes_of
from tests.campaign.lab import HUNG, NEVER, Lab, contents, difference, last_lines

HEARTBEAT, WATCHDOG, JOIN = 10, 20, 25
DEADLINE = max(HEARTBEAT, WATCHDOG, JOIN) + SHUTDOWN_SECONDS + 15  # 15 s for a busy machine
FLAGS = [f"--heartbeat_seconds={HEARTBEAT}", f"--join_seconds={JOIN}"]
ADDRESSES = ["10.213.77.1", "10.213.77.2"]


PATIENT = ["--heartbeat_seconds=300"]  # of pairs that nobody disturbs


def start(lab, workdir, flags=PATIENT, networks=None):
    host = ADDRESSES[0] if networks else "localhost"
    common = [*flags, f"--coordinator={host}:{processes.free_port()}", "--processes=2"]
    common += ["--config.train.mesh=2,1,1", f"--config.train.watchdog_seconds={WATCHDOG}"]
    accidents = [NEVER | ({"network": [networks[i], ADDRESSES[i]]} if networks else {}) for i in range(2)]
    return [lab.start("pretrain", workdir, *common, f"--process_id={i}", accident=accidents[i]) for i in range(2)]


def finish(pair):
    """The last lines of a process that did not end well, or ""."""
    ended = [process.done() for process in pair]
    return next((last_lines(done) for done in ended if done.returncode), "")


def ip(*words, check=True):
    subprocess.run(["ip", *words], check=check, capture_output=True)


@contextlib.contextmanager
def cable():
    """Two network namespaces with a cable between them; gives their paths and a function that cuts (or joins) it."""
    names = [f"nanoflax-{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield [f"/run/netns/{name}" for name in names], lambda state: ip("-n", names[0], "link", "set", "cable", state)
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def trial(lab, what, seconds, rng):
    workdir, number, after = lab.new(), rng.randrange(2), rng.uniform(0.2, seconds)
    with cable() if what == "cut off the network" else contextlib.nullcontext((None, None)) as (networks, set_cable):
        pair = start(lab, workdir, FLAGS, networks)
        time.sleep(after)
        if what == "cut off the network":
            set_cable("down")
            others = pair
        else:
            pair[number].child.send_signal(signal.SIGKILL if what == "killed" else signal.SIGSTOP)
            others = [pair[1 - number]]
        begin, problem = time.monotonic(), ""
        for process in others:
            ended = process.done(max(begin + DEADLINE - time.monotonic(), 1))
            if ended.returncode == HUNG:
                problem = f"process {pair.index(process)} was still there after {DEADLINE} s: {last_lines(ended)}"
            elif ended.returncode == 2 and "Traceback" in ended.stderr:
                problem = last_lines(ended)
        pair[number].child.kill()
        pair[number].child.wait()
    if problem := problem or finish(start(lab, workdir)):
        return f"process {number} after {after:.1f} s: {problem}"
    return (problem := difference(lab.references["hosts"], contents(workdir))) and f"after {after:.1f} s: {problem}"


def run(budget_seconds: float, rng: random.Random) -> list[Outcome]:
    end, found, i = time.monotonic() + budget_seconds, {"killed": [], "stopped": [], "cut off the network": []}, 0
    with Lab() as lab:
        begin = time.monotonic()
        assert not (problem := finish(start(lab, lab.home / "whole"))), problem
        seconds, lab.references["hosts"] = time.monotonic() - begin, contents(lab.home / "whole")
        while time.monotonic() < end:
            what = [*found][i % 3]
            found[what].append(trial(lab, what, seconds, rng))
            i += 1
    return outcomes_of({f"one of two {what}": problems for what, problems in found.items()})
