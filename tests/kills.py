"""Kill a training run again and again, at random moments, and show that nothing changes.

    python -m tests.kills --kills=20

One run is left alone; another of the same configuration is killed by SIGKILL and started again
until it has been killed so many times and has finished. Dropout, accumulation, a moving average
and asynchronous checkpoints are on. Every line of both metrics.jsonl must then hold the same step
and the same loss, to the last bit. Exit status 1 and the first difference otherwise.
"""

import argparse
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

from tests import processes

WORDS = "the model reads a token and then it writes another one after that until the end".split()


def command(directory, workdir, steps):
    """A small run with everything on that could make a resumed one differ."""
    model = ["layers=2", "dim=32", "heads=2", "context=32", "dropout=0.1"]
    data = [f"train=text:{directory}/*.txt", "tokenizer=bytes", "packing=isolated", f"cache={directory}/cache"]
    optim = ["name=adamw", "learning_rate=0.003", "warmup_steps=5", "ema=0.9"]
    train = [
        f"steps={steps}",
        "batch_size=8",
        "accumulate=2",
        "evaluate_every=25",
        "checkpoint_every=7",
        "sample_tokens=8",
        "tensorboard=false",
    ]
    flags = [
        f"--config.{section}.{flag}"
        for section, given in [("model", model), ("data", data), ("optim", optim), ("train", train)]
        for flag in given
    ]
    return ["-m", "experiments.pretrain", f"--workdir={workdir}", *flags]


def write_corpus(directory, rng):
    for i in range(120):
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 80)))
        (directory / f"{i}.txt").write_text(text + ".\n")


def run_with_kills(arguments, workdir, kills, rng, log):
    """Run until the command ends by itself, having killed it `kills` times while it could be."""
    metrics, done = workdir / "metrics.jsonl", 0
    while True:
        lines = count_lines(metrics)
        process = processes.start(arguments, env=os.environ | processes.AS_USERS)
        if done < kills:
            if rng.random() < 0.75:  # else die while starting, restoring or compiling
                while count_lines(metrics) <= lines and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.8))
            else:
                time.sleep(rng.uniform(0, 6))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                done += 1
                log(f"kill {done}/{kills} at step {count_lines(metrics)} or so")
        error = process.communicate()[1]
        if process.returncode == 0:
            return done
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"the run ended with {process.returncode}: {error[-2000:]}")


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def compare(a, b):
    """The first difference between two metrics files in anything but speed, or None."""
    import json

    def records(path):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]

    one, other = records(a), records(b)
    for x, y in zip(one, other, strict=False):
        if x != y:
            return f"{x} is not {y}"
    return None if len(one) == len(other) else f"{len(one)} lines, not {len(other)}"


def main(kills, steps, seed, log=print):
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        write_corpus(directory, rng)
        env = os.environ | processes.AS_USERS
        undisturbed = processes.run(command(directory, directory / "whole", steps), env=env)
        assert undisturbed.returncode == 0, undisturbed.stderr
        done = run_with_kills(command(directory, directory / "killed", steps), directory / "killed", kills, rng, log)
        difference = compare(directory / "whole" / "metrics.jsonl", directory / "killed" / "metrics.jsonl")
        left = [p.name for p in (directory / "killed" / "checkpoints").iterdir() if not p.name.isdigit()]
    log(
        f"{done} kills, {steps} steps: "
        + (f"DIFFERENT: {difference}" if difference else "the same losses to the last bit")
        + (f"; left behind: {left}" if left else "")
    )
    return done, difference, left


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    done, difference, left = main(options.kills, options.steps, options.seed)
    sys.exit(1 if done < options.kills or difference or left else 0)
