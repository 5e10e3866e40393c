"""Runs in buckets of gs:// and s3://, on servers of this machine."""

import json
import os
import random
import time

import jax
import jax.numpy as jnp
import pytest

import nanoflax
from nanoflax import storage
from nanoflax.config import Classify, Config, ExampleData, ModelConfig, OptimConfig, TextData, TrainConfig
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, directory, remote
from nanoflax.runs.checkpoint import Checkpoints
from tests import processes
from tests.storage.servers import bucket

STATE = {"a": {"b": jnp.arange(10.0)}, "c": jnp.ones((3, 3))}
SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE)
FLAGS = """--config.model.layers=1 --config.model.dim=16 --config.model.heads=2 --config.model.context=32
    --config.train.steps=12 --config.train.batch_size=4 --config.train.evaluate_every=4
    --config.train.checkpoint_every=4 --config.train.sample_tokens=0 --config.train.tensorboard=False
    --config.data.tokenizer=bytes --config.data.workers=1 --config.optim.warmup_steps=1""".split()


@pytest.fixture(scope="module", params=["gs", "s3"])
def place(request):
    """(URL of a bucket, environment of its clients, Faults)."""
    with bucket(request.param) as found:
        yield found


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of this process, with the local copies, in a directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(["the", "function", "returns", "a", "number"], k=150)))
    return folder


def save(where, steps, **options):
    with Checkpoints(where, **options) as saves:
        for step in steps:
            saves.save(step, STATE | {"c": jnp.full((3, 3), float(step))}, {"position": step}, metric=float(step))


def test_half_written_and_damaged_steps_are_stepped_over(place):
    where, said = storage.join(place[0], "damage", "checkpoints"), []
    save(where, [1, 2, 3, 4], keep=3)
    found = storage.list_sizes(where)
    assert checkpoint.list_steps(where) == [1, 2, 3, 4], "the three newest and the best"
    objects = [name for name in found if name.startswith("4/") and "commit" not in name and name.count("/") > 1]
    last = max(objects, key=found.get)
    content = storage.read_bytes(storage.join(where, last))
    changed = bytes([content[0] ^ 1]) + content[1:]
    storage.write_bytes(storage.join(where, last), changed)  # one bit
    storage.delete(storage.join(where, "3", "commit_success.txt"))  # as if killed before the commit
    storage.write_bytes(storage.join(where, "9", "state", "manifest.ocdbt"), b"half")
    assert checkpoint.list_steps(where) == [1, 2, 4]
    assert checkpoint.read_metadata(where, log=said.append) == {"position": 2}
    assert "step 4 is damaged" in said[0] and "has changed since it was written" in said[0]
    assert "4/damaged.txt" not in storage.list_sizes(where), "a reader changes nothing"
    with Checkpoints(where, log=said.append) as saves:
        state, meta = saves.restore(SHAPES)
        assert meta == {"position": 2} and float(state["c"][0, 0]) == 2 and saves.best() == 1
    assert {name.split("/")[0] for name in storage.list_sizes(where)} == {"1", "2", "4"}, "unfinished steps are removed"
    assert checkpoint.list_steps(where) == [1, 2] and "was marked" in said[-1]
    for step in (1, 2):
        storage.delete(storage.join(where, str(step), "manifest.json"))
    with Checkpoints(where, log=said.append) as saves, pytest.raises(UserError, match="every checkpoint is damaged"):
        saves.restore(SHAPES)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.check_not_all_damaged(where)


def test_old_steps_lose_their_marker_first(place, monkeypatch):
    where, deleted = storage.join(place[0], "old", "checkpoints"), []
    save(where, [1, 2])
    delete = storage.RemotePath.unlink
    monkeypatch.setattr(storage.RemotePath, "unlink", lambda path: (deleted.append(str(path)), delete(path)))
    with Checkpoints(where, keep=1) as saves:
        saves.save(3, STATE, {}, metric=0.5)
    assert checkpoint.list_steps(where) == [3]
    assert sorted(deleted) == [f"{where}/{step}/commit_success.txt" for step in (1, 2)]
    assert {name.split("/")[0] for name in storage.list_sizes(where)} == {"3"}


def pretrain(corpus, workdir, cache, env, **options):
    flags = ["-m", "experiments.pretrain", *FLAGS, f"--config.data.train=text:{corpus}/*.txt", f"--workdir={workdir}"]
    return processes.start(flags, env=os.environ | env | {"XDG_CACHE_HOME": str(cache)}, **options)


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The metrics of a run in a local directory."""
    workdir = tmp_path_factory.mktemp("runs") / "local"
    out, err = pretrain(corpus, workdir, workdir.parent / "cache", {}).communicate(120)
    assert "finished at step 12" in out, err
    return losses((workdir / "metrics.jsonl").read_text())


def losses(text):
    records = map(json.loads, text.splitlines())
    return [{k: r[k] for k in ("step", "loss", "validation_loss") if k in r} for r in records]


def test_a_killed_run_goes_on_with_another_cache(place, corpus, uninterrupted, tmp_path, cache):
    url, env, faults = place
    workdir, faults.rate, before = storage.join(url, "run"), 0.05, faults.failed
    try:
        child = pretrain(corpus, workdir, tmp_path / "first", env)
        end = time.monotonic() + 120
        while not checkpoint.list_steps(f"{workdir}/checkpoints") and child.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.05)
        child.kill()
        child.wait()
        left = checkpoint.list_steps(f"{workdir}/checkpoints")
        assert left and left[-1] < 12, child.err.read_text()
        out, err = pretrain(corpus, workdir, tmp_path / "second", env).communicate(120)
    finally:
        faults.rate = 0.0
    assert "resuming at step" in out and "finished at step 12" in out, err
    assert "waiting up to" not in out, "the holder of the lease is dead on this machine"
    assert f"loss curve: {workdir}/loss.png" in out and faults.failed > before
    assert losses(storage.read_bytes(f"{workdir}/metrics.jsonl").decode()) == uninterrupted
    if url.startswith("s3"):
        return  # the rest is the same, and takes some seconds
    run = nanoflax.open(workdir)
    found = run.evaluate(f"text:{corpus}/0.txt")
    text = run.generate("the", max_new_tokens=12, temperature=0)
    exported = storage.join(url, "exported")
    run.save_pretrained(exported)
    assert storage.exists(f"{exported}/config.json")
    back = storage.join(url, "back")
    nanoflax.open(exported).save_run(back)
    again = nanoflax.open(back)
    assert again.generate("the", max_new_tokens=12, temperature=0) == text
    assert again.evaluate(f"text:{corpus}/0.txt")["loss"] == pytest.approx(found["loss"], rel=1e-6)
    with pytest.raises(UserError, match="exists and is not empty"), directory.filled_directory(back):
        pass


@pytest.mark.parametrize("place", ["gs"], indirect=True, scope="module")
def test_finetune_writes_its_results_to_the_bucket(place, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = [{"text": f"{i} {word}", "label": word} for i in range(10) for word in ("cat", "dog")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    workdir, train = storage.join(place[0], "tuned"), TrainConfig(steps=2, batch_size=4, tensorboard=False)
    config = Config(
        model=ModelConfig(layers=1, dim=16, heads=2, context=32),
        data=ExampleData(tokenizer="bytes"),
        optim=OptimConfig(warmup_steps=1),
        train=train,
        task=Classify(length=32),
    )
    tuned = nanoflax.finetune(None, "jsonl:train.jsonl", workdir=workdir, config=config)
    names = set(storage.list_names(workdir))
    assert {"config.json", "result.json", "predictions.jsonl", "final", "checkpoints", "tokenizer"} <= names
    assert checkpoint.list_steps(f"{workdir}/final/checkpoints") == [0]
    want = tuned.predict("3 cat")
    nanoflax.finetune(None, "jsonl:train.jsonl", workdir=workdir, config=config)  # complete: writes final/ again
    assert nanoflax.open(storage.join(workdir, "final")).predict("3 cat") == want


def hold(url, text):
    """Make the lease of a directory be of another process; text: its second line."""
    last = max([*map(int, storage.list_names(f"{url}/.lease")), 0])
    owner = f"process 1 on elsewhere\n{text}\n{random.random()}\nheld"
    storage.write_bytes(f"{url}/.lease/{last + 1:08d}", owner.encode())


def test_one_process_holds_the_lease(place, monkeypatch):
    url, said = storage.join(place[0], "leased"), []
    monkeypatch.setenv("NANOFLAX_LEASE_SECONDS", "2")
    lease = storage.Lease(url)
    with pytest.raises(UserError, match=f"workdir {url} is in use by process {os.getpid()} on"):
        storage.Lease(url, log=said.append)
    time.sleep(1.2)
    lease.check()
    lease.release()
    begin = time.monotonic()
    storage.Lease(url).release()
    assert time.monotonic() - begin < 2, "a released lease is free"  # a held one would take the two seconds
    hold(url, "another-machine 17")
    begin = time.monotonic()
    lease = storage.Lease(url, log=said.append)
    assert 2 < time.monotonic() - begin < 8 and "process 1 on elsewhere may have died" in said[-1]
    assert len(storage.list_names(f"{url}/.lease")) <= 3
    hold(url, "another-machine 17")  # as if this process had slept for longer than the period
    with pytest.raises(UserError, match="is in use by process 1 on elsewhere.*has lost its lease and stops"):
        lease.check()
    lease.release()
    assert storage.read_bytes(f"{url}/.lease/{max(storage.list_names(f'{url}/.lease'))}").endswith(b"held")


def test_a_storage_without_conditions_is_named(place, monkeypatch):
    said, write = [], storage.Lease.__init__.__globals__["objects"].write_bytes
    always = lambda name, content, only_if_absent=False: write(name, content)
    monkeypatch.setattr(storage.Lease.__init__.__globals__["objects"], "write_bytes", always)
    storage.Lease(storage.join(place[0], "unconditional"), log=said.append).release()
    assert "ignores the condition that an object must be new" in said[0]


def test_names_that_leave_the_directory_are_refused(place, cache, tmp_path):
    storage.write_bytes(storage.join(place[0], "evil", "config.json"), b"{}")
    copy = remote.Copy(storage.join(place[0], "evil"), "reading")
    with pytest.raises(UserError, match="is of no file inside a directory"):
        copy.pull({"config.json": "1", "a/../../../../x": "2"})


def test_who_lost_the_lease_commits_nothing(place, cache):
    url = storage.join(place[0], "lost")
    with (
        pytest.raises(UserError, match="has lost its lease and stops"),
        remote.writing(url) as copy,
        Checkpoints(os.path.join(copy, "checkpoints")) as saves,
    ):
        saves.save(1, STATE, {})
        saves.wait()
        hold(url, "another-machine 17")
        saves.save(2, STATE, {})
        saves.wait()
    assert checkpoint.list_steps(f"{url}/checkpoints") == [1]


def test_mistakes_are_one_line(place, corpus, cache):
    data = TextData(train=f"text:{corpus}/*.txt", tokenizer="bytes")
    config = Config(model=ModelConfig(layers=1, dim=16, heads=2, context=128), data=data)
    scheme = place[0].split(":")[0]
    with pytest.raises(UserError, match="there is no bucket nowhere"):
        nanoflax.pretrain(config, f"{scheme}://nowhere/run")
    with pytest.raises(UserError, match="an empty part"):
        nanoflax.pretrain(config, f"{place[0]}/a/../b")
    with pytest.raises(UserError, match="holds nothing"):
        nanoflax.open(f"{place[0]}/nothing-here")
    with pytest.raises(UserError, match=f"give --config.model.init_from={place[0]}/new"):
        nanoflax.pretrain(config, f"{place[0]}/new", restart_from_weights=True)
    with pytest.raises(UserError, match="not a local path"), directory.WorkdirLock(f"{place[0]}/a"):
        pass
