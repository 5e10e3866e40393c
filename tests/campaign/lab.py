"""What the parts of the campaign share: small runs of every kind, how they are disturbed, and what must be equal."""

import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import tempfile
import time

import jax
import numpy as np

from nanoflax.runs import manifest, orbax_io
from tests import kills, processes

STEPS, EVERY = 30, 5  # of a run; between its checkpoints
PICTURES = {"loss.png", "sweep.png", "attention.png"}
NEVER = {"at": "never"}
HUNG = 124  # as of `timeout`


class Lab:
    """A temporary directory with data, and a reference run of each kind. Use as a context manager."""

    def __init__(self):
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="nanoflax-campaign-"))
        self.references, self.seconds, self.made = {}, {}, 0
        kills.write_corpus(self.home, random.Random(0))
        with open(self.home / "topics.jsonl", "w") as file:
            rng = random.Random(0)
            for _ in range(100):
                words = rng.choices(kills.WORDS, k=5) + [label := rng.choice(["cat", "dog"])]
                file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.home, ignore_errors=True)

    def new(self) -> pathlib.Path:
        """A path for the output of a trial; nothing is there."""
        self.made += 1
        return self.home / f"trial-{self.made}"

    def command(self, kind: str, output: pathlib.Path, *flags: str) -> list[str]:
        """PROGRAM FLAGS... that make `output`."""
        return [*getattr(self, f"_{kind}")(output), *flags]

    def run(self, kind: str, output: pathlib.Path, *flags: str, accident=NEVER) -> subprocess.CompletedProcess:
        return self.start(kind, output, *flags, accident=accident).done()

    def program(self, *command: str, accident=NEVER) -> subprocess.CompletedProcess:
        """Run PROGRAM FLAGS..."""
        return Victim([*command], accident).done()

    def start(self, kind: str, output: pathlib.Path, *flags: str, accident=NEVER) -> "Victim":
        return Victim(self.command(kind, output, *flags), accident)

    def reference(self, kind: str) -> dict[str, str]:
        """`contents` of an undisturbed run of this kind."""
        if kind not in self.references:
            output, begin = self.home / f"whole-{kind}", time.monotonic()
            done = self.run(kind, output)
            assert done.returncode == 0, done.stderr
            self.seconds[kind], self.references[kind] = time.monotonic() - begin, contents(output)
        return self.references[kind]

    def difference(self, kind: str, output: pathlib.Path) -> str:
        """One line with what differs from the reference, or ""."""
        return difference(self.reference(kind), contents(output))

    def _pretrain(self, output, steps=STEPS):
        flags = kills.command(self.home, output, steps)[2:]  # later flags win
        return [
            "experiments.pretrain",
            *flags,
            *_flags(train=[f"evaluate_every={2 * EVERY}", f"checkpoint_every={EVERY}", "max_skipped=3"]),
        ]

    def _finetune(self, output):
        sizes = ["layers=1", "dim=32", "heads=2", "context=32", "dropout=0.1"]
        return self._classify(output, model=sizes)

    def _lora(self, output):
        self.reference("pretrain")
        return self._classify(
            output, model=[f"init_from={self.home}/whole-pretrain"], peft=["kind=lora", "trained=adapters,head"]
        )

    def _classify(self, output, **sections):
        train = [
            f"steps={STEPS}",
            "batch_size=8",
            f"evaluate_every={2 * EVERY}",
            f"checkpoint_every={EVERY}",
            "tensorboard=false",
        ]
        data = [f"train=jsonl:{self.home}/topics.jsonl", "tokenizer=bytes"]
        sections |= {
            "train": train,
            "data": data,
            "task": ["length=32"],
            "optim": ["warmup_steps=2", "learning_rate=0.003"],
        }
        return ["experiments.finetune", "--config=classify", f"--workdir={output}", *_flags(**sections)]

    def _sweep(self, output):
        program, *flags = self._pretrain(output, steps=2 * EVERY)
        grid = "--grid=config.optim.learning_rate=0.001,0.003"
        return ["experiments.sweep", "--program=pretrain", "--config=pydocs_tiny", grid, *flags]

    def _tokenize(self, output):
        """A run that trains a tokenizer and tokenizes five megabytes with two workers; its cache is in `output`."""
        if not (text := self.home / "large" / "text.txt").exists():
            text.parent.mkdir()
            rng = random.Random(0)
            text.write_text("\n\n".join(" ".join(rng.choices(kills.WORDS, k=60)) for _ in range(18_000)))
        data = [f"train=text:{text}", "tokenizer=bpe:280", "workers=2", f"cache={output}/cache"]
        train = ["steps=2", "evaluate_every=1000", "evaluate_batches=1"]
        return [*self._pretrain(output), *_flags(data=data, train=train, optim=["warmup_steps=1"])]

    def _export(self, output):
        self.reference("pretrain")
        return ["experiments.convert", f"--from={self.home}/whole-pretrain", f"--to={output}"]

    def _import(self, output):
        self.reference("export")
        return ["experiments.convert", f"--from={self.home}/whole-export", f"--to={output}"]


def _flags(**sections):
    return [f"--config.{section}.{flag}" for section, flags in sections.items() for flag in flags]


class Victim:
    """A program that has been started, with its accident."""

    def __init__(self, command, accident):
        self.child = processes.start(
            ["-m", "tests.campaign.victim", json.dumps(accident), *command], env=os.environ | processes.AS_USERS
        )

    def done(self, timeout=300) -> subprocess.CompletedProcess:
        """Wait for its end. A program that hangs is killed after `timeout` seconds, and gets the status HUNG."""
        try:
            status = self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            status = HUNG
        out, error = self.child.out.read_text(), self.child.err.read_text()
        self.child.out.unlink()
        self.child.err.unlink()
        return subprocess.CompletedProcess(self.child.args, status, out, error)


def contents(directory: pathlib.Path) -> dict[str, str]:
    """{name: digest} of all that a run leaves. The steps of checkpoints are digests of the arrays and the metadata.

    Not compared: speeds, pictures, the output of trials, and lock files.
    """
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.parent.name == "checkpoints" and path.name.isdigit():
            found[name] = step_digest(path, directory)
        elif path.name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            lines = [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]
            found[name] = hashlib.sha1(repr(lines).encode()).hexdigest()
        elif path.name in PICTURES or not path.is_file():
            found[name] = "there"
        elif not path.name.endswith(".lock") and path.name != "log.txt" and not inside_step(path):
            found[name] = hashlib.sha1(without_path(path, directory)).hexdigest()
    return {name: digest for name, digest in found.items() if not inside_step(directory / name) or digest != "there"}


def inside_step(path: pathlib.Path) -> bool:
    """Whether a file belongs to a step of a checkpoint directory."""
    parts = path.parts
    return any(a == "checkpoints" and b.isdigit() for a, b in zip(parts, parts[1:-1], strict=False))


def without_path(file: pathlib.Path, directory: pathlib.Path) -> bytes:
    """The bytes of a file, without the path of the directory: some flags name it."""
    return file.read_bytes().replace(os.fsencode(directory), b"HERE")


def step_digest(path: pathlib.Path, directory: pathlib.Path) -> str:
    """A hash of all arrays of a step, bit by bit, with the metadata and the metric."""
    if problem := manifest.find_damage(path):
        return f"damaged: {problem}"
    total = hashlib.sha1(
        without_path(path / "meta" / "metadata", directory) + repr(manifest.read_metric(path)).encode()
    )
    target = jax.tree.map(orbax_io.with_sharding, orbax_io.read_shapes(path.parent, int(path.name)))
    state = orbax_io.read_arrays(path.parent, int(path.name), target)
    for where, x in jax.tree_util.tree_leaves_with_path(state):
        x = np.asarray(x)
        total.update(f"{jax.tree_util.keystr(where)} {x.dtype} {x.shape}".encode() + x.tobytes())
    return total.hexdigest()


def difference(expected: dict[str, str], found: dict[str, str]) -> str:
    """One line, or "" if both are equal."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    words = lambda name: "missing" if name not in found else "not expected" if name not in expected else "different"
    return "; ".join(f"{name} is {words(name)}" for name in names[:5])


def messages(done: subprocess.CompletedProcess) -> list[str]:
    """The lines of stderr that are not of the progress display, and do not say which parameters are new."""
    others = ("step ", "  | ", "not in the source", "in the source", "rows of new tokens")
    return [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(others)]


def one_line(done: subprocess.CompletedProcess, *words: str) -> bool:
    """Whether a program ended with status 2 and one line, which has one of these words."""
    lines = messages(done)
    return done.returncode == 2 and len(lines) == 1 and any(word in lines[0] for word in words)


def last_lines(done: subprocess.CompletedProcess) -> str:
    """How a program ended, for the report of a problem."""
    return f"status {done.returncode}: {' | '.join(messages(done)[-3:])[-500:]}"
