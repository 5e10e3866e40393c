"""Several processes as one run: real ones, over the loopback network, of four fake devices each.

The oracles are the same run uninterrupted, on one process of eight devices, and on one device.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from nanoflax import hf, nn, parallel, peft, runs, tokenizers
from nanoflax.config import LoRA
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, lock
from tests import kills, processes
from tests.runs.adapter_test import LLAMA

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 10
QUIET = "--heartbeat_seconds=300"  # a test machine may stand still for a minute


# The processes.


class Process:
    """A running child; its output is in files, so that it never waits for a reader."""

    def __init__(self, arguments, home, name, devices, cwd=ROOT, **variables):
        self.paths = [home / f"{name}.{stream}" for stream in ("out", "err")]
        env = processes.quick(devices) | {"PYTHONPATH": str(ROOT)}
        env |= {name: str(value) for name, value in variables.items()}
        self.child = processes.start(arguments, env=env, cwd=cwd, out=self.paths[0], err=self.paths[1])

    def wait(self, seconds=300):
        """Its exit status, stdout and stderr. Seconds in which nothing runs do not count."""
        for _ in range(10 * seconds):
            if self.child.poll() is not None:
                return self.child.returncode, *(path.read_text() for path in self.paths)
            time.sleep(0.1)
        self.child.kill()
        pytest.fail(f"still running: {self.paths[1].read_text()[-3000:]}")


def start(arguments, home, name, each=lambda i: []):
    """The two processes of a run, with the flags that join them, and each(i)."""
    port = processes.free_port()
    return [
        Process(
            [*arguments, f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={i}", QUIET, *each(i)],
            home,
            f"{name}-{i}",
            4,
        )
        for i in range(2)
    ]


def finish(processes):
    """The stdout of process 0; all must have ended well."""
    found = [process.wait() for process in processes]
    for status, _, error in found:
        assert status == 0, error[-3000:]
    return found[0][1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("hosts")
    kills.write_corpus(home, random.Random(0))
    return home


def pretrain(home, workdir, *flags, steps=STEPS):
    model = ["layers=1", "dim=32", "heads=4", "context=32", "dropout=0.1"]
    sources = f"even=text:{home}/*[02468].txt; odd=text:{home}/*[13579].txt"
    mixture = "0: even=0.7,odd=0.3; 6: even=1,odd=2"
    data = [f"train={sources}", f"mixture={mixture}", "tokenizer=bpe:280", f"cache={home}/cache"]
    train = [
        f"steps={steps}",
        "batch_size=16",
        "accumulate=2",
        "evaluate_every=5",
        "keep=9",
        "checkpoint_every=4",
        "sample_tokens=8",
        "tensorboard=false",
        "mesh=2,2,2",
    ]
    given = [
        ("model", model),
        ("data", data),
        ("train", train),
        ("optim", ["learning_rate=0.003", "warmup_steps=5", "ema=0.9"]),
    ]
    return [
        "-m",
        "experiments.pretrain",
        f"--workdir={workdir}",
        *(f"--config.{section}.{flag}" for section, fields in given for flag in fields),
        *flags,
    ]


@pytest.fixture(scope="module")
def whole(home):
    """The workdir of two processes that nobody disturbed."""
    said = finish(start(pretrain(home, home / "whole"), home, "whole"))
    assert f"finished at step {STEPS}" in said
    return home / "whole"


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]


# Runs.


def test_of_two_processes_the_first_writes(whole, home):
    assert {"config.json", "tokenizer", "metrics.jsonl", "checkpoints", "loss.png"} == set(os.listdir(whole)) - {
        ".lock"
    }
    assert [r["step"] for r in losses(whole) if "loss" in r] == [*range(1, STEPS + 1)]
    assert [r["step"] for r in losses(whole) if "validation_loss" in r] == [5, 10]
    assert all({"loss/even", "loss/odd", "epoch/even"} < r.keys() for r in losses(whole) if "loss" in r)
    said = [(home / f"whole-1.{stream}").read_text() for stream in ("out", "err")]
    assert "step" not in said[0] + said[1] and "training:" not in said[0]


@pytest.mark.parametrize("devices, mesh", [(8, "8,1,1"), (1, "1,1,1")])
def test_one_process_goes_on_with_what_two_began(devices, mesh, whole, home):
    workdir = home / f"on-{devices}"
    shutil.copytree(whole, workdir)
    for step in checkpoint.list_steps(workdir / "checkpoints"):
        if step > 4:
            shutil.rmtree(workdir / "checkpoints" / str(step))
    run = Process(pretrain(home, workdir, f"--config.train.mesh={mesh}"), home, workdir.name, devices)
    assert "resuming at step 4" in finish([run])
    found, expected = losses(workdir), losses(whole)
    assert [r.keys() for r in found] == [r.keys() for r in expected]
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=1e-5), (a, b)
    assert found != expected and found[:4] == expected[:4]  # 1e-5 was needed, and it did resume


def wait_for(condition, processes):
    while not condition():
        assert all(process.child.poll() is None for process in processes), [
            process.wait()[2][-3000:] for process in processes
        ]
        time.sleep(0.005)


def test_a_peer_that_hangs_or_dies_ends_the_run_which_goes_on_exactly(whole, home):
    workdir = home / "disturbed"
    lines = lambda: kills.count_lines(workdir / "metrics.jsonl")  # noqa: E731
    stopped, other = pair = start(pretrain(home, workdir, "--config.train.watchdog_seconds=5"), home, "hang")
    wait_for(lambda: lines() >= 2, pair)
    stopped.child.send_signal(signal.SIGSTOP)
    status, _, error = other.wait(60)
    stopped.child.kill()
    assert status == 1 and "Timeout (0:00:05)" in error and "train.py" in error, error[-3000:]
    stopped.child.wait()

    # Where the other waits at a barrier, not in a collective, it is the heartbeat that tells.
    other, killed = pair = start(pretrain(home, workdir), home, "kill", lambda i: ["--heartbeat_seconds=12"])
    wait_for(lambda: lines() >= 6, pair)
    killed.child.kill()
    status, _, error = other.wait(60)
    assert status not in (0, 2, 143) and lines() < STEPS + 2, (status, error[-3000:])
    print("killed: the other left with", status)

    assert "resuming at step" in finish(start(pretrain(home, workdir), home, "again"))
    assert losses(workdir) == losses(whole)


def test_a_signal_to_one_is_a_signal_to_all(home):
    workdir = home / "signalled"
    pair = start(pretrain(home, workdir, steps=3000), home, "signalled")
    wait_for(lambda: kills.count_lines(workdir / "metrics.jsonl") >= 3, pair)
    pair[1].child.send_signal(signal.SIGTERM)
    found = [process.wait() for process in pair]
    assert [status for status, _, _ in found] == [143, 143], found
    saved = checkpoint.read_metadata(workdir / "checkpoints")["step"]
    assert f"SIGTERM: saved at step {saved}" in found[0][1]
    assert [r["step"] for r in losses(workdir) if "loss" in r][-1] == saved < 3000


def test_two_finetune_as_one_does(home):
    rng = random.Random(0)
    with open(home / "topics.jsonl", "w") as file:
        for _ in range(120):
            words = ["".join(rng.choices("abcdefgh", k=3)) for _ in range(4)]
            words[rng.randrange(4)] = label = rng.choice(["cat", "dog"])
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    arguments = lambda workdir: [  # noqa: E731
        "-m",
        "experiments.finetune",
        "--config=classify",
        f"--workdir={home / workdir}",
        *(
            f"--config.{flag}"
            for flag in (
                f"data.train=jsonl:{home}/topics.jsonl",
                "data.tokenizer=bpe:280",
                "model.layers=1",
                "model.dim=32",
                "model.heads=4",
                "model.context=32",
                "task.length=32",
                "optim.warmup_steps=2",
                "train.steps=6",
                "train.batch_size=16",
                "train.evaluate_every=3",
                "train.checkpoint_every=3",
                "train.tensorboard=false",
                "train.mesh=2,2,2",
                "peft.kind=lora",
                "peft.trained=all",
            )
        ),
    ]
    finish([Process(arguments("tuned-1"), home, "tuned-1", 8)])
    said = finish(start(arguments("tuned-2"), home, "tuned-2"))
    assert "best at step" in said
    assert "best" not in (home / "tuned-2-1.out").read_text()
    for a, b in zip(losses(home / "tuned-1"), losses(home / "tuned-2"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    one, two = ((home / name / "predictions.jsonl").read_text() for name in ("tuned-1", "tuned-2"))
    assert one == two
    one, two = (runs.restore_params(home / name / "final" / "checkpoints")[0] for name in ("tuned-1", "tuned-2"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, two)


def test_two_start_from_a_model_as_one_does(home):
    """From LoRA of the peft library on a published model with an uneven vocabulary, over a packed base."""
    config = dataclasses.replace(LLAMA, vocab_size=261)
    params = parallel.init(nn.build(config), jax.random.PRNGKey(0))
    hf.save(home / "base", config, params, tokenizers.load("bytes"))
    params = peft.add(params, LoRA(rank=2), jax.random.PRNGKey(1))
    hf.save_adapter(home / "adapters", config, params, LoRA(rank=2), str(home / "base"))
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(40)))
    arguments = lambda workdir: [  # noqa: E731
        "-m", "experiments.finetune", f"--workdir={home / workdir}",
        *(f"--config.{flag}" for flag in (
            "task.kind=language_model", f"model.init_from={home}/adapters", "task.length=32",
            f"data.train=jsonl:{home}/texts.jsonl", "optim.warmup_steps=0", "train.steps=2", "train.batch_size=8",
            "train.evaluate_every=2", "train.tensorboard=false", "train.mesh=2,2,2", "peft.kind=lora",
            "peft.quantize=int8")),
    ]  # fmt: skip
    finish([Process(arguments("started-1"), home, "started-1", 8)])
    finish(start(arguments("started-2"), home, "started-2"))
    for a, b in zip(losses(home / "started-1"), losses(home / "started-2"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


# What is refused.


def test_processes_that_disagree_say_how(home):
    differing = lambda i: ["--config.train.steps=15", "--config.data.workers=3"] * i  # noqa: E731
    pair = start(pretrain(home, home / "w"), home, "config", each=differing)
    for status, _, error in (process.wait() for process in pair):
        assert status == 2 and "process 1 has config.train.steps: 10 -> 15" in error, error
        assert "workers" not in error and "Traceback" not in error
    assert not (home / "w").exists()


def test_other_data_is_refused(home):  # and Open MPI's mpirun is understood
    places = [home / "here", home / "there"]
    for place in places:
        place.mkdir()
        (place / "a.txt").write_text(place.name * 500)
    flags = ["--config.data.train=text:*.txt", "--config.data.tokenizer=bytes", "--config.data.validation=text:*.txt"]
    flags.append("--config.data.mixture=")
    port = processes.free_port()
    pair = [
        Process(
            [*pretrain(home, home / "d"), *flags, QUIET],
            home,
            f"data-{i}",
            4,
            cwd=place,
            OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://127.0.0.1:34911",
            OMPI_COMM_WORLD_SIZE=2,
            OMPI_COMM_WORLD_RANK=i,
            OMPI_COMM_WORLD_LOCAL_RANK=i,
            JAX_COORDINATOR_PORT=port,
        )
        for i, place in enumerate(places)
    ]
    for status, _, error in (process.wait() for process in pair):
        assert status == 2 and "differ in their data" in error and "process 1 has data:" in error


def test_a_coordinator_that_does_not_answer(home):
    port = processes.free_port()
    status, out, error = Process(
        pretrain(
            home, home / "w", f"--coordinator=localhost:{port}", "--processes=2", "--process_id=1", "--join_seconds=2"
        ),
        home,
        "alone",
        1,
    ).wait(100)
    assert status == 2 and f"localhost:{port}" in error and "within 2 s" in error, error
    assert len(error.strip().splitlines()) == 1 and not (home / "w").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("", 2, None), "need --coordinator=HOST:PORT"),
        (("", None, 0), "need --coordinator"),
        (("here", 2, 0), "--coordinator=here must be HOST:PORT"),
        (("h:1", 2, 2), "--process_id=2 must be from 0 to --processes=2 - 1"),
        (("localhost:1", None, None), "needs --processes and --process_id"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, words, monkeypatch):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(UserError, match=words):
        parallel.join_processes(*arguments)


def test_an_error_ends_a_process_whose_threads_still_compile():
    code = "import threading, time; threading.Thread(target=time.sleep, args=[1000]).start(); print('said', end='')"
    done = processes.run(["-c", f"{code}; from nanoflax import parallel; parallel.exit_process(3)"], timeout=60)
    assert (done.returncode, done.stdout) == (3, "said")


def test_a_process_alone_joins_nothing(monkeypatch):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: called.append(1))
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
        parallel.join_processes()
        monkeypatch.setenv(name, "2")
        parallel.join_processes()
        monkeypatch.delenv(name)
    assert len(called) == 2 and parallel.gather_from_processes(1) == [1]
    assert parallel.run_on_main_process(lambda: "x") == "x"
    votes = parallel.HostPoll(0)
    assert [votes(step, step) for step in (1, 2)] == [[1], [2]]


# What one process finds out among others.


MESHES = {
    "8,1,1": None,
    "2,2,2": None,
    "1,2,4": None,
    "1,1,8": None,
    "2,1,4": None,
    "4,1,2": [0, 4, 1, 5, 2, 6, 3, 7],
    "8,1,1 mixed": [0, 4, 1, 5, 6, 2, 7, 3],
}


MEMBER = "import sys; from tests.system import hosts_test; hosts_test.member(sys.argv[1])"


def member(directory):
    """Prints as JSON what a process finds; of two, they also save a state for others to read."""
    from nanoflax import nn, parallel, train
    from nanoflax.config import Config, ModelConfig, OptimConfig, TrainConfig

    parallel.join_processes(heartbeat=300)
    count, found = jax.process_count(), {"rows": {}}
    if count > 1:
        found |= agreement(pathlib.Path(directory), jax.process_index())
    whole = {"x": np.arange(16 * 3).reshape(16, 3), "y": np.arange(16.0)}
    for name, order in MESHES.items() if jax.device_count() == 8 else ():
        devices = [jax.devices()[i] for i in order] if order else None
        mesh = parallel.make_mesh(name.split()[0], devices)
        if order:  # as a TPU's topology may have it
            mesh = jax.sharding.Mesh(np.array(devices).reshape(mesh.devices.shape), mesh.axis_names)
        rows = parallel.own_rows(mesh, 16)
        batch = parallel.put_batch({k: x[rows] for k, x in whole.items()}, mesh)
        for k, x in batch.items():
            assert x.shape == whole[k].shape
            for shard in x.addressable_shards:
                np.testing.assert_array_equal(shard.data, whole[k][shard.index])
            np.testing.assert_array_equal(parallel.fetch(x), whole[k])
        found["rows"][name] = rows

    def state_of(shape, make):
        config = Config(
            model=ModelConfig(vocab_size=64, layers=2, dim=32, heads=8, context=16),
            optim=OptimConfig(ema=0.9),
            train=TrainConfig(mesh=shape, seed=5),
        )
        model, mesh = nn.build(config.model), parallel.make_mesh(shape)
        return make(model, train.make_optimizer(config.optim, 10)[0], config, mesh)

    def digest(state):
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return hashlib.sha256(
            b"".join(jax.tree_util.keystr(path).encode() + parallel.fetch(x).tobytes() for path, x in leaves)
        ).hexdigest()

    with runs.Checkpoints(pathlib.Path(directory) / "checkpoints") as saves:
        if count > 1:
            state = state_of("2,2,2", train.init_state)._asdict()
            found["saved"] = digest(state)
            saves.save(3, state, {"x": 1}, metric=0.5)
        other = "1,4,2" if count > 1 else "1,-1,1"
        restored, meta = saves.restore(state_of(other, train.abstract_state)._asdict())
        found |= {"restored": digest(restored), "meta": meta, "latest": saves.latest(), "best": saves.best()}
    print("\n" + json.dumps(found))


def agreement(directory, index):
    """What a process of two hears from the other."""

    def message(function):
        try:
            function()
        except UserError as error:
            return str(error)

    def refuse():
        raise UserError(f"refused by {index}")

    def vote():
        votes, told = parallel.HostPoll(0, seconds=0.2), []
        for step in range(1, 200):
            time.sleep(0.01 if index else 0.005)
            told.append(votes(step, [index, step]))
        return told

    lock.VISIBLE_SECONDS = 1
    shared = lock.WorkdirLock(directory / "shared")
    return {
        "gathered": parallel.gather_from_processes([index, 0.1 + 0.2 * index, float("inf")]),
        "first": parallel.run_on_main_process(lambda: index),
        "refused": message(lambda: parallel.run_on_main_process(refuse)),
        "differ": message(lambda: parallel.check_processes_agree("x", {"a": {"b": index, "c": 1}})),
        "same": message(lambda: parallel.check_processes_agree("x", {"a": {"b": (1, 2)}})),
        "votes": vote(),
        "locks": shared._file is not None,
        "not shared": message(lambda: lock.WorkdirLock(directory / f"own-{index}")),
    }


@pytest.fixture(scope="module")
def members(home):
    """What the two processes of a run found."""
    port = processes.free_port()  # as srun starts them
    pair = [
        Process(
            ["-c", MEMBER, str(home)],
            home,
            f"member-{i}",
            4,
            SLURM_JOB_ID=7,
            SLURM_NTASKS=2,
            SLURM_STEP_NODELIST="localhost",
            SLURM_PROCID=i,
            SLURM_LOCALID=i,
            JAX_COORDINATOR_PORT=port,
        )
        for i in range(2)
    ]
    found = [process.wait() for process in pair]
    assert [status for status, _, _ in found] == [0, 0], [error[-3000:] for _, _, error in found]
    return [json.loads(out.splitlines()[-1]) for _, out, _ in found]


def test_what_all_agree_on(members):
    for found in members:
        assert found["gathered"] == [[0, 0.1, float("inf")], [1, 0.1 + 0.2, float("inf")]]
        assert found["first"] == 0 and found["refused"] == "refused by 0"
        assert "process 1 has a.b: 0 -> 1" in found["differ"] and found["same"] is None
        assert "own-" in found["not shared"] and "of process 1 is not the directory" in found["not shared"]
    assert [found["locks"] for found in members] == [True, False]
    one, other = (found["votes"] for found in members)
    told = [votes for votes in one if votes]
    assert one == other and 5 < len(told) < 100
    assert all(a[0] == 0 and b[0] == 1 and a[1] == b[1] for a, b in told)


def test_a_process_reads_the_rows_that_its_devices_hold(members):
    first, second = (found["rows"] for found in members)
    low, high, all_ = [*range(8)], [*range(8, 16)], [*range(16)]
    assert first == {
        "8,1,1": low,
        "2,2,2": low,
        "1,2,4": low,
        "1,1,8": all_,
        "2,1,4": low,
        "4,1,2": all_,
        "8,1,1 mixed": [0, 1, 4, 5, 10, 11, 14, 15],
    }
    assert second == {
        "8,1,1": high,
        "2,2,2": high,
        "1,2,4": high,
        "1,1,8": all_,
        "2,1,4": high,
        "4,1,2": all_,
        "8,1,1 mixed": [2, 3, 6, 7, 8, 9, 12, 13],
    }


@pytest.mark.parametrize("devices", [8, 1])
def test_what_two_saved_is_restored_to_the_bit(devices, members, home):
    digest = members[0]["saved"]
    for found in members:
        assert found["saved"] == found["restored"] == digest and found["meta"] == {"x": 1}
        assert found["latest"] == found["best"] == 3
    alone = Process(["-c", MEMBER, str(home)], home, f"alone-{devices}", devices)
    found = json.loads(finish([alone]).splitlines()[-1])
    assert found["restored"] == digest and len(found["rows"].get("8,1,1", [])) in (16, 0)
