"""Token stores in many shards: the same tokens as in one, whoever builds them, whenever building was interrupted."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from nanoflax import data, storage, tokenizers
from nanoflax.data import building, processes, ranges, store, tokenizing
from nanoflax.data.parts import plan
from nanoflax.errors import UserError
from nanoflax.tokenizers import trained
from tests.storage.servers import bucket

BYTES = trained.ByteTokenizer()


@pytest.fixture
def small(monkeypatch):
    """Parts, shards and chunks of a few documents."""
    monkeypatch.setattr(tokenizing, "SHARD_TOKENS", 200)
    monkeypatch.setattr(tokenizing, "CHUNK", 100)


@pytest.fixture
def texts(tmp_path):
    """60 documents in 60 files."""
    texts = [f"document {i} é\n" + "line of it\n" * (i % 7) for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02}.txt").write_text(text)
    return texts


def small_plan(tmp_path):
    return plan(f"text:{tmp_path}/*.txt", "all", 500)


def built(directory, planned, numbers=None):
    """The store of a plan, by `tokenize_part` alone."""
    directory.mkdir(exist_ok=True)
    for number in range(len(planned.parts)) if numbers is None else numbers:
        tokenizing.tokenize_part(directory, planned, number, BYTES)
    return tokenizing.write_index(directory, planned, BYTES, {})


def contents(directory):
    return {path.name: path.read_bytes() for path in pathlib.Path(directory).iterdir()}


def test_shards_hold_what_one_file_holds(texts, tmp_path, small, monkeypatch):
    many = built(tmp_path / "many", small_plan(tmp_path))
    numbers = [shard.name[5:10] for shard in many.shards]
    assert len(numbers) > len({*numbers}) > 4, "several parts with several shards"
    assert all(shard.n_tokens < 200 + max(map(len, texts)) + 10 for shard in many.shards)
    ids = [list(text.encode()) + [BYTES.eos_id] for text in texts]
    stream = np.concatenate(ids)
    begins = np.cumsum([0, *map(len, ids)])
    assert (many.n_tokens, many.n_documents, many.n_bytes) == (len(stream), 60, sum(len(i) - 1 for i in ids))
    spans = np.random.default_rng(0).integers(0, len(stream), (9, 2))
    for start, stop in [(0, len(stream)), (0, 0), (5, 5), (190, 220), *spans]:
        found = many.read(start, stop)
        assert found.tolist() == stream[start:stop].tolist() and found.dtype == np.uint16
    positions = np.arange(len(stream)).reshape(-1, 1)
    assert (many.document(positions) == np.searchsorted(begins, positions, "right") - 1).all()
    assert many.document(0) == 0 and many.begin(np.arange(61)).tolist() == begins.tolist()
    monkeypatch.undo()
    one = built(tmp_path / "one", plan(f"text:{tmp_path}/*.txt", "all"))
    assert len(one.shards) == 1 and one.fingerprint == many.fingerprint
    monkeypatch.setattr(store, "HASHED_WHOLE", 100)
    assert store.fingerprint_of(many) != one.fingerprint


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_write_what_single_parts_write_in_any_order(texts, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(processes, "POOL_BYTES", 0)
    planned = small_plan(tmp_path)
    expected = contents(built(tmp_path / "expected", planned, [2, 0, 1, *range(len(planned.parts)), 1]).directory)
    (tmp_path / "store").mkdir()
    processes.tokenize_parts(tmp_path / "store", planned, BYTES, workers)
    assert contents(tokenizing.write_index(tmp_path / "store", planned, BYTES, {}).directory) == expected


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("chunks", [1, 2, 5, 7])
def test_interrupted_parts_continue_with_the_first_missing_shard(texts, tmp_path, small, chunks):
    planned, directory = small_plan(tmp_path), tmp_path / "store"
    expected = contents(built(tmp_path / "expected", planned).directory)
    directory.mkdir()
    for number in range(len(planned.parts)):
        left = iter(range(chunks))

        def kill(progress, left=left):
            if next(left, None) is None:
                raise KilledError

        with contextlib.suppress(KilledError):
            tokenizing.tokenize_part(directory, planned, number, BYTES, on_progress=kill)
    before = {path: path.stat().st_ino for path in directory.glob("*.bin")}
    assert before if chunks > 2 else not list(directory.glob("*.tmp"))
    assert contents(built(directory, planned).directory) == expected
    assert before == {path: path.stat().st_ino for path in before}, "complete shards are not written again"


CHILD = """
import sys, time
from nanoflax.data import parts, processes
from nanoflax.tokenizers import trained

class Slow(trained.ByteTokenizer):
    def encode(self, text):
        time.sleep(0.02)
        return super().encode(text)

if __name__ == "__main__":
    processes.POOL_BYTES = 0
    processes.tokenize_parts(sys.argv[1], parts.plan(sys.argv[2], "all", 500), Slow(), 2)
"""


def test_a_killed_process_takes_its_workers_along_and_the_next_one_completes_the_store(texts, tmp_path):
    planned, directory = small_plan(tmp_path), tmp_path / "store"
    expected = contents(built(tmp_path / "expected", planned).directory)
    directory.mkdir()
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, str(tmp_path / "child.py"), str(directory), planned.source.name]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()}, start_new_session=True) as process:
        while not any(directory.glob("part-*.json")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while workers_of(process.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not workers_of(process.pid)
    assert 0 < len(tokenizing.missing_parts(directory, planned, BYTES)) < len(planned.parts)
    processes.tokenize_parts(directory, planned, BYTES, 2)
    found = contents(tokenizing.write_index(directory, planned, BYTES, {}).directory)
    assert {name: found[name] for name in expected} == expected
    assert all(name.endswith(".tmp") for name in found.keys() - expected.keys())


def workers_of(session):
    """The processes of a session that are left."""
    return subprocess.run(["ps", "-s", str(session), "-o", "pid="], capture_output=True, text=True).stdout.split()


def test_damaged_shards_alone_are_built_again(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "plan", lambda source, split: plan(source, split, 500))
    source, directory = data.Source(f"text:{tmp_path}/*.txt"), tmp_path / "store"
    build = lambda **options: building.build_store(directory, source, BYTES, "all", processes.tokenize_parts, **options)
    build()
    expected, victims = contents(directory), ["part-00001-000.bin", "part-00003-000.bin"]
    for victim, position in zip(victims, (store.HEADER.size + 9, -9), strict=True):  # a token, a position
        content = bytearray(expected[victim])
        content[position] ^= 1
        (directory / victim).write_bytes(content)
    assert [shard.name for shard, is_damaged in store.damaged(build()) if is_damaged] == victims
    before = {path: path.stat().st_ino for path in directory.glob("*.bin") if path.name not in victims}
    build(check=True)
    assert contents(directory) == expected
    (directory / victims[0]).unlink()
    with pytest.raises(UserError, match="part-00001-000.bin is missing"):
        data.TokenStore.open(directory)
    build()
    assert contents(directory) == expected
    assert before == {path: path.stat().st_ino for path in before}, "the others are not written again"


def test_a_directory_with_something_else_is_refused_and_kept(texts, tmp_path):
    source, engine = data.Source(f"text:{tmp_path}/*.txt"), processes.tokenize_parts
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds mine\.md and no token store"):
        building.build_store(tmp_path / "notes", source, BYTES, "all", engine)
    assert (tmp_path / "notes" / "mine.md").read_text() == "mine"
    building.build_store(tmp_path / "store", source, BYTES, "all", engine)
    with pytest.raises(UserError, match="another store"):
        building.build_store(tmp_path / "store", source, BYTES, "validation", engine)
    (tmp_path / "00.txt").write_text("changed")
    with pytest.raises(UserError, match="have changed"):
        building.build_store(tmp_path / "store", source, BYTES, "all", engine)


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_store_in_a_bucket_is_the_same_and_is_read_by_ranges(texts, tmp_path, small, scheme, monkeypatch):
    planned = small_plan(tmp_path)
    local = built(tmp_path / "local", planned)
    monkeypatch.setattr(ranges, "BLOCK", 64)
    monkeypatch.setattr(ranges, "CACHED_BLOCKS", 8)
    monkeypatch.setattr(ranges, "SEARCHED", 4)
    with bucket(scheme) as (root, _, faults):
        name, faults.rate = f"{root}/tokens/store", 0.05
        with contextlib.suppress(KilledError):
            tokenizing.tokenize_part(name, planned, 0, BYTES, on_progress=lambda _: killed())
        for number in range(len(planned.parts)):
            tokenizing.tokenize_part(name, planned, number, BYTES)
        tokenizing.write_index(name, planned, BYTES, {})
        assert {n: storage.read_bytes(f"{name}/{n}") for n in storage.list_names(name)} == contents(local.directory)
        assert faults.failed, "some requests failed"
        faults.rate, remote = 0.0, data.TokenStore.open(name)
        asked, read_range = [], storage.read_range
        monkeypatch.setattr(storage, "read_range", lambda *args: asked.append(args) or read_range(*args))
        windows = [data.Windows(s, 33, isolated=True) for s in (local, remote)]
        one, other = (w.batch([3]) for w in windows)
        assert all((one[k] == other[k]).all() for k in one)
        assert len(asked) < 20 and all(stop - start == 64 for _, start, stop in asked)
        for indices in ([0, 1, 2], [40, 7, 7, 13], [len(windows[0]) - 1, len(windows[0])]):
            one, other = (w.batch(indices) for w in windows)
            assert all((one[k] == other[k]).all() for k in one)
        assert len(remote._blocks._found) <= 8
        assert not any(is_damaged for _, is_damaged in store.damaged(remote))
        shard = storage.join(name, remote.shards[1].name)
        content = bytearray(storage.read_bytes(shard))
        content[70] ^= 1
        storage.write_bytes(shard, bytes(content))
        assert [i for i, (_, is_damaged) in enumerate(store.damaged(remote)) if is_damaged] == [1]
        storage.write_bytes(shard, bytes(content[:-8]))
        with pytest.raises(UserError, match=f"{remote.shards[1].name} is damaged"):
            data.TokenStore.open(name)


def killed():
    raise KilledError


def huggingface_tokenizer(directory):
    model = Tokenizer(models.BPE(unk_token=None))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    model.train_from_iterator(["some text of words"] * 9, trainer)
    directory.mkdir()
    model.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return tokenizers.load(directory)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface"])
def test_texts_are_encoded_together_as_each_alone(tmp_path, kind):
    texts = ["plain words", "", "\u2581 \u2581x", "a\u0301", "<eos> 日本語 \n\n  end", "\u2581"]
    if kind == "bytes":
        tokenizer = BYTES
    elif kind == "sentencepiece":
        tokenizer = trained.train_sentencepiece(["some text of words\n" * 20], 280)
    else:
        tokenizer = huggingface_tokenizer(tmp_path / "tokenizer")
    expected = [tokenizer.framing.document(tokenizer.encode(text)) for text in texts]
    found = tokenizing.encode(tokenizer, texts)
    assert found.ids.tolist() == sum(expected, []) and found.lengths.tolist() == [*map(len, expected)]
    first, rest = found.split(2)
    assert first.ids.tolist() == sum(expected[:2], []) and rest.ids.tolist() == sum(expected[2:], [])
