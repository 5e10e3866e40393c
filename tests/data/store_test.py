"""Token stores in many shards: the same tokens as in one, whoever builds them, whenever building was interrupted."""

import pathlib

import numpy as np
import pytest

from nanoflax.data import processes, store, tokenizing
from nanoflax.data.parts import plan
from nanoflax.tokenizers import trained

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
def test_processes_write_what_single_parts_write_in_any_order(texts, tmp_path, workers):
    planned = small_plan(tmp_path)
    expected = contents(built(tmp_path / "expected", planned, [2, 0, 1, *range(len(planned.parts)), 1]).directory)
    (tmp_path / "store").mkdir()
    processes.tokenize_parts(tmp_path / "store", planned, BYTES, workers)
    assert contents(tokenizing.write_index(tmp_path / "store", planned, BYTES, {}).directory) == expected
