"""Run a program of experiments/ with an accident prepared: python -m tests.campaign.victim ACCIDENT PROGRAM FLAGS...

ACCIDENT is JSON, {"at": moment, ...}. Moments:

    {"at": "never"}
    {"at": "write", "n": 12, "inside": DIRECTORY}   just before Python's 12th change of a file or directory in there
                                                   (open for writing, mkdir, rename, remove, ...)
    {"at": "call", "of": "module:name", "n": 2}     when this function is called for the second time

What happens then, after "delay" seconds: the process sends itself the "signal" (9), and once more after "again"
seconds. Or, if "errno" is given, this and every later change in the directory fails with that error.
Always possible: "clock": SEED makes time.time() jump; "nan": STEPS gives these steps (from 0) a loss of NaN;
"network": [PATH, ADDRESS] is the network namespace to enter.
"""

import ctypes
import importlib
import itertools
import json
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time

CHANGES = {f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "truncate", "link", "symlink", "chmod")}


def strike(accident):
    """Send the signal or signals to this process."""
    time.sleep(accident.get("delay", 0))
    os.kill(os.getpid(), accident.get("signal", signal.SIGKILL))
    if "again" in accident:
        time.sleep(accident["again"])
        os.kill(os.getpid(), accident["signal"])


def at_write(accident):
    """Strike, or fail, at the n-th change in the directory."""
    directory, count = os.path.realpath(accident["inside"]) + "/", itertools.count(1)

    def hook(event, arguments):
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, changes = arguments[0] if arguments else None, event in CHANGES
        if not changes or not isinstance(path, (str, os.PathLike)):
            return
        if not os.path.abspath(path).startswith(directory):
            return
        number = next(count)
        if number >= accident["n"] and "errno" in accident:
            raise OSError(accident["errno"], os.strerror(accident["errno"]), str(path))
        if number == accident["n"]:
            if accident.get("delay") or "again" in accident:
                threading.Thread(target=strike, args=(accident,), daemon=True).start()
            else:
                strike(accident)

    sys.addaudithook(hook)


def at_call(accident):
    """Strike while the n-th call of a function runs."""
    module, _, path = accident["of"].partition(":")
    *parents, name = path.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    real, count = getattr(owner, name), itertools.count(1)
    # A function may also be a name of other modules: of its room's face, and of those that import it.
    modules = [m for m in [*sys.modules.values()] if getattr(m, "__dict__", {}).get(name) is real]
    owners = [owner] if parents else modules

    def called(*args, **options):
        if next(count) == accident["n"]:
            threading.Thread(target=strike, args=(accident,), daemon=True).start()
        return real(*args, **options)

    for owner in owners:
        setattr(owner, name, called)


def with_jumping_clock(seed):
    """Of 100 readings of time.time(), about one finds that the clock has been set, by up to ten years."""
    rng, real, offset = random.Random(seed), time.time, 0.0

    def jumping():
        nonlocal offset
        if rng.random() < 0.01:
            offset = rng.uniform(-3e8, 3e8)
        return real() + offset

    time.time, time.time_ns = jumping, lambda: int(jumping() * 1e9)


def with_nan(steps):
    """The losses of the batches of these steps (from 0) are NaN."""
    import jax.numpy as jnp

    from nanoflax import train

    make = train.make_train_step

    def poisoned(*arguments):
        real = make(*arguments)

        def step(state, batch, frozen=None):
            weights = jnp.where(jnp.isin(state.step, jnp.array(steps)), jnp.nan, batch["weights"])
            return real(state, batch | {"weights": weights}, frozen)

        return step

    train.make_train_step = poisoned


def enter_network(path, address):
    """Enter a network namespace, and take its address as the name of this host: gloo asks for the host's name."""
    libc = ctypes.CDLL(None, use_errno=True)
    file = os.open(path, os.O_RDONLY)
    if libc.setns(file, 0x40000000) or libc.unshare(0x04000000):  # CLONE_NEWNET, CLONE_NEWUTS
        raise OSError(ctypes.get_errno(), f"cannot enter {path}")
    socket.sethostname(address)
    os.close(file)


def prepare(accident):
    if "network" in accident:
        enter_network(*accident["network"])
    if "clock" in accident:
        with_jumping_clock(accident["clock"])
    if "nan" in accident:
        with_nan(accident["nan"])
    {"never": lambda _: None, "write": at_write, "call": at_call}[accident["at"]](accident)


if __name__ == "__main__":
    accident, program, *flags = sys.argv[1:]
    prepare(json.loads(accident))
    sys.argv = [program, *flags]
    runpy.run_module(program, run_name="__main__", alter_sys=True)
