"""Data: nothing is lost, repeated or dropped in silence, from the files to the batches."""

import dataclasses
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import absl.logging
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflax import data, report
from nanoflax.data import Batches, Windows, cache, evaluation_batches, prefetch, processes, tokenizing
from nanoflax.data import store as stores
from nanoflax.data.batches import SMALL_EPOCH
from nanoflax.data.parts import _cut
from nanoflax.errors import UserError
from nanoflax.tokenizers import trained
from tests.report.progress_test import run_in_terminal

BYTES = trained.ByteTokenizer()


def store_of(documents, directory):
    """A TokenStore of lists of ids, as `prepare` would write it, in one shard."""
    directory.mkdir(parents=True, exist_ok=True)
    tokens = np.asarray([i for ids in documents for i in [*ids, 257]], np.uint16)
    offsets = np.cumsum([0] + [len(ids) + 1 for ids in documents], dtype=np.int64)
    shard = stores.Shard("part-00000-000.bin", len(tokens), len(documents), 0, "00" * 16)
    content = [shard.header(2), tokens.tobytes(), bytes(-2 * len(tokens) % 8), offsets.tobytes()]
    (directory / shard.name).write_bytes(b"".join(content))
    meta = {"dtype": "uint16", "n_tokens": len(tokens), "n_documents": len(documents), "bos_id": 257}
    (directory / "meta.json").write_text(json.dumps({**meta, "shards": [dataclasses.astuple(shard)]}))
    return data.TokenStore.open(directory)


def prepare(tmp_path, source, split="all", **options):
    return data.prepare(source, BYTES, split, tmp_path / "cache", progress=False, **options)


@pytest.fixture
def corpus(tmp_path):
    """150 documents in one file: source string, texts."""
    texts = [f"document {i} é\n" + "line of it\n" * (i % 7) for i in range(150)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return f"text:{path}", texts


# Sources.


def test_pydocs_is_prose_in_a_fixed_order():
    first = list(itertools.islice(data.documents("pydocs", "all"), 120))
    assert first == list(itertools.islice(data.documents("pydocs", "all"), 120))
    assert any(text.startswith("_pydecimal\n\n") for text in first)
    assert all(text.strip() for text in first)


def test_text_files_are_documents_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "sub" / "d.jsonl.gz").write_bytes(gzip.compress(b'{"t": "four"}\n\n{"t": "five"}'))
    (tmp_path / "sub" / "e.rst").write_text("no document")
    source = data.Source(f"text:{tmp_path}/**/*", field="t")
    assert list(data.documents(source, "all")) == ["one\r\n", "two", "three", "four", "five"]


def test_bad_lines_are_counted_with_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"text": "ok"}\n{"text": \n{"body": "x"}\n[1]\n{"text": 3}\n{"text": " "}\n'
        b'{"text": "a\xffb"}\n{"text": "\\ud800"}\n' + b"[" * 100_000 + b"\n"
    )
    report = data.DataReport()
    assert list(data.documents(f"text:{path}", "all", report)) == ["ok", "a\ufffdb", "\ufffd"]
    lines = "\n".join(report.lines())
    assert report.counts.total() == 8
    for place in (
        f"{path}:2, {path}:9",
        f"{path}:3, {path}:4, {path}:5",
        f"{path}:6",
        f"{path}:7, byte 11",
        f"{path}:8",
    ):
        assert place in lines


def test_invalid_utf8_in_a_text_file_is_replaced_and_counted(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"abc\xff\xfe def")
    (tmp_path / "y.txt").write_bytes(b"")
    store = prepare(tmp_path, f"text:{tmp_path}/*.txt")
    assert BYTES.decode(store.read(0, store.n_tokens).tolist()) == "abc\ufffd\ufffd def"
    assert "x.txt, byte 3" in store.report[0] and "y.txt" in store.report[1]


@pytest.mark.parametrize(
    "name,match",
    [
        ("pydoc", "choose pydocs"),
        ("text:", "choose pydocs"),
        ("tfds:", "choose pydocs"),
        ("text:{}/none*.txt", "no file"),
        ("text:{}/*.rst", "1 files, none"),
        ("text:{}", "no file"),
        ("text:{}/empty.txt", "empty documents: 1"),
        ("text:{}/cut.txt.gz", "cannot be read"),
    ],
)
def test_unusable_sources_are_refused(tmp_path, name, match):
    (tmp_path / "a.rst").write_text("x")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text" * 100)[:-20])
    with pytest.raises(UserError, match=match) as error:
        prepare(tmp_path, name.format(tmp_path))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/*.tmp"))


def test_a_line_of_ten_megabytes(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "x y" * 3_500_000}) + '\n{"text": "z"}\n')
    store = prepare(tmp_path, f"text:{tmp_path}/x.jsonl")
    assert (store.n_documents, store.n_tokens, store.n_bytes) == (2, 10_500_003, 10_500_001)


# Splits.


def test_the_hash_split_is_a_partition_and_stays_with_the_document(corpus, tmp_path):
    source, texts = corpus
    train, valid = (list(data.documents(source, s)) for s in ("train", "validation"))
    assert sorted(train + valid) == sorted(texts) and 0 < len(valid) < 20
    path = tmp_path / "reversed.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts[::-1], "new"]))
    assert set(valid) <= set(data.documents(f"text:{path}", "validation")) <= {*valid, "new"}


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab \n", max_size=400), st.floats(0.01, 0.9))
def test_a_cut_loses_nothing(text, fraction):
    head, tail = _cut(text, fraction)
    assert head + tail == text


def test_one_book_gives_both_splits(tmp_path):
    text = "".join(f"A paragraph, number {i}.\n\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    (train,), (valid,) = (list(data.documents(f"text:{tmp_path}/book.txt", split)) for split in ("train", "validation"))
    assert train + valid == text and train.endswith(".\n\n")
    assert 0.04 < len(valid) / len(text) < 0.06


def test_a_second_source_is_the_validation_split(corpus, tmp_path):
    source, texts = corpus
    (tmp_path / "held_out.txt").write_text("held out")
    source = data.Source(source, validation=f"text:{tmp_path}/held_out.txt")
    assert list(data.documents(source, "train")) == texts
    assert list(data.documents(source, "validation")) == ["held out"]


# TFDS.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A dataset prepared on disk by TFDS itself, without TensorFlow: its data directory."""
    import tensorflow_datasets as tfds

    class NanoflaxMini(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            label = tfds.features.ClassLabel(num_classes=2)
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": text, "title": text, "label": label})
            )

        def _split_generators(self, download_manager):
            return {"train": self._examples("train", 20), "test": self._examples("test", 3)}

        def _examples(self, split, n):
            for i in range(n):
                yield i, {"text": f"{split} é {i}", "title": f"title {i}", "label": 0}

        def _generate_examples(self):
            raise NotImplementedError

    directory = tmp_path_factory.mktemp("tfds")
    NanoflaxMini(data_dir=directory, file_format="array_record").download_and_prepare()
    return str(directory)


def test_a_tfds_dataset_is_read_by_its_own_splits_without_tensorflow(dataset, tmp_path):
    source = data.Source("tfds:nanoflax_mini:1.0.0:text", data_dir=dataset)
    expected = {"train": [f"train é {i}" for i in range(20)], "validation": [f"test é {i}" for i in range(3)]}
    for split, texts in expected.items():
        assert sorted(data.documents(source, split)) == sorted(texts)
        assert prepare(tmp_path, source, split).n_documents == len(texts)
    assert len(list(data.documents(source, "all"))) == 23
    assert "tensorflow" not in sys.modules


def test_a_tfds_field_must_be_one_of_its_text_features(dataset):
    for name in ("tfds:nanoflax_mini", "tfds:nanoflax_mini:label"):
        with pytest.raises(UserError, match="text, title"):
            next(data.documents(data.Source(name, data_dir=dataset)))


@pytest.mark.parametrize("name", ["tfds:tiny_shakespeare", "tfds:no_such_dataset"])
def test_a_dataset_not_prepared_fails_at_once_without_a_network(name, tmp_path, monkeypatch, caplog):
    (tmp_path / "none" / "tiny_shakespeare" / "1.0.0").mkdir(parents=True)  # TFDS warns of it
    monkeypatch.setattr(absl.logging.get_absl_logger(), "propagate", True)  # to caplog

    def slow(*args, **kwargs):  # a name server that never answers
        time.sleep(10)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", slow)
    start = time.monotonic()
    with pytest.raises(UserError, match="not prepared.*tfds build") as error:
        prepare(tmp_path, data.Source(name, data_dir=str(tmp_path / "none")))
    assert time.monotonic() - start < 8 and "\n" not in str(error.value) and not caplog.records


# The token store.


def test_a_store_holds_the_documents(corpus, tmp_path):
    source, texts = corpus
    store = prepare(tmp_path, source)
    ids = [i for text in texts for i in [*text.encode(), BYTES.eos_id]]
    tokens = store.read(0, store.n_tokens)
    assert tokens.tolist() == ids and tokens.dtype == np.uint16
    assert [tokens[end - 1] for end in store.begin(np.arange(1, 151))] == [BYTES.eos_id] * len(texts)
    assert (store.n_documents, store.n_bytes) == (150, len("".join(texts).encode()))
    assert store.report == []


def test_a_store_is_reused_until_its_source_changes(corpus, tmp_path, monkeypatch):
    source, _ = corpus
    first = prepare(tmp_path, source)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "build_store", None)
        assert prepare(tmp_path, source).fingerprint == first.fingerprint
    with open(source.removeprefix("text:"), "a") as file:
        file.write('{"text": "one more"}\n')
    second = prepare(tmp_path, source)
    assert second.n_documents == 151 and second.fingerprint != first.fingerprint


@pytest.mark.parametrize("file", ["part-00000-000.bin", "part-00000.json", "meta.json"])
def test_a_damaged_store_is_built_again(corpus, tmp_path, file):
    source, _ = corpus
    first = prepare(tmp_path, source)
    fingerprint, directory = first.fingerprint, first.directory
    os.truncate(directory / file, 64)
    if file != "part-00000.json":  # which only building reads
        with pytest.raises(UserError, match="no complete token store"):
            data.TokenStore.open(directory)
    assert prepare(tmp_path, source).fingerprint == fingerprint


def test_workers_do_not_change_the_files(corpus, tmp_path, monkeypatch):
    source, _ = corpus
    monkeypatch.setattr(tokenizing, "CHUNK", 300)
    files = [
        {path.name: path.read_bytes() for path in store.directory.iterdir()}
        for store in (data.prepare(source, BYTES, "all", tmp_path / str(n), n, False) for n in (1, 2))
    ]
    assert files[0] == files[1]


CHILD = """
import sys
from nanoflax import data, tokenizers
from nanoflax.data import processes
if {slow}:
    def slow(*args):
        import time
        print("building", flush=True)
        time.sleep(60)
    processes.encode = slow
store = data.prepare({source!r}, tokenizers.ByteTokenizer(), "all", {cache!r}, progress=False)
print(store.fingerprint)
"""


def child(source, cache, slow):
    code = CHILD.format(source=source, cache=str(cache), slow=slow)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_a_killed_preparation_leaves_nothing_in_the_way(corpus, tmp_path):
    source, _ = corpus
    directory = tmp_path / "cache"
    process = child(source, directory, slow=True)
    assert process.stdout.readline() == "building\n"
    (building,) = (path for path in directory.iterdir() if path.is_dir())
    (building / "part-00000-000.bin.1.tmp").write_text("half")
    os.utime(building, (0, 0))
    cache._remove_abandoned(directory)
    assert building.exists(), "a living process keeps its files"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert prepare(tmp_path, source).n_documents == 150
    assert sorted(path.name for path in building.iterdir()) == [
        "built.json",
        "meta.json",
        "part-00000-000.bin",
        "part-00000.json",
    ]


def test_a_store_that_nobody_continues_is_removed_after_a_week(corpus, tmp_path):
    finished = prepare(tmp_path, corpus[0]).directory
    begun = shutil.copytree(finished, finished.with_name("0" * 32))
    (begun / "meta.json").unlink()
    others = tmp_path / "cache" / "others"
    others.mkdir()
    for path, days in ((begun, 6), (finished, 8), (others, 8)):
        os.utime(path, (time.time() - days * 86400,) * 2)
    cache._remove_abandoned(tmp_path / "cache")
    assert begun.exists()
    os.utime(begun, (time.time() - 8 * 86400,) * 2)
    cache._remove_abandoned(tmp_path / "cache")
    assert not begun.exists() and finished.exists() and others.exists()


def test_two_processes_at_once_both_end_well(corpus, tmp_path):
    processes = [child(corpus[0], tmp_path / "cache", slow=False) for _ in range(2)]
    prints = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert prints == {prepare(tmp_path, corpus[0]).fingerprint}


def test_lines_of_tokenizing_tell_rate_and_time_left(corpus, tmp_path, monkeypatch, capsys):
    source, _ = corpus
    prepared = data.prepare(source, BYTES, "train", tmp_path / "quick")
    assert capsys.readouterr().err == "", "what is done at once needs no line"
    monkeypatch.setattr(tokenizing, "CHUNK", 300)
    monkeypatch.setattr(processes.Tokenizing, "quiet", 0)
    monkeypatch.setattr(processes.Tokenizing, "line_every", 0)
    data.prepare(source, BYTES, "train", tmp_path / "slow", 1)
    first, *lines, last = capsys.readouterr().err.splitlines()
    for line in (first, *lines):
        assert re.fullmatch(
            rf"tokenizing {re.escape(source)} train  [\d.]+k?B, [\d.]+k? tokens"
            r"  [\d.]+[kMG]?B/s  \d+:\d\d left",
            line,
        ), line
    assert len(lines) > 5 and re.search(r"B/s  in 0:0\d$", last)
    assert f"{report.format_count(prepared.n_tokens)} tokens" in last


@pytest.mark.parametrize("pattern", ["*.jsonl", "*.txt", "*.gz", "*"])
def test_the_share_that_is_read_grows_to_all_of_it(tmp_path, pattern):
    for i in range(5):
        lines = "".join(json.dumps({"text": f"{i} {j} " * 20}) + "\n" for j in range(1000))
        (tmp_path / f"{i}.jsonl").write_text(lines)
        (tmp_path / f"{i}.txt").write_text(lines)
        (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    found, read = data.DataReport(), []
    for _ in data.documents(f"text:{tmp_path}/{pattern}", "all", found):
        read.append(found.share)
    assert read == sorted(read) and 0 < read[0] < 0.3 and 0.9 < read[-1] <= 1
    assert 0.3 < read[len(read) // 2] < 0.7


def test_tokenizing_on_a_terminal_leaves_the_cursor_and_stdout_alone(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 1000)
    output, stdout, status = run_in_terminal(f'''
from nanoflax import data, tokenizers
from nanoflax.data import processes
encode = processes.encode
processes.encode = lambda *args: (print("to stdout"), encode(*args))[1]
data.prepare("text:{tmp_path}/a.txt", tokenizers.ByteTokenizer(), "all", "{tmp_path}/cache")
''')
    assert status == 0 and stdout == "to stdout\n"
    assert "tokenizing text:" in output and "11k tokens" in output and "━" in output
    assert "\x1b[?25l" not in output


def test_an_unusable_cache_is_named(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache directory .*file"):
        data.prepare(corpus[0], BYTES, "all", tmp_path / "file")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        prepare(tmp_path, corpus[0])
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_ids_beyond_the_vocabulary_are_refused(corpus, tmp_path):
    class Wrong(trained.ByteTokenizer):
        vocab_size, fingerprint = 100, "wrong"

    with pytest.raises(UserError, match="257.*vocabulary of 100"):
        data.prepare(corpus[0], Wrong(), "all", tmp_path / "cache", progress=False)


# Windows and batches.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), max_size=9), min_size=1, max_size=8), st.integers(1, 12))
def test_windows_are_the_stream(tmp_path_factory, documents, length):
    store = store_of(documents, tmp_path_factory.mktemp("store"))
    windows = Windows(store, length, isolated=True)
    stream = [(i, d) for d, ids in enumerate(documents) for i in [*ids, 257]]
    assert len(windows) == -(-len(stream) // length)
    for w in range(len(windows)):
        got, part = windows[w], stream[w * length : (w + 1) * length]
        rest = length - len(part)
        assert got["targets"].tolist() == [i for i, _ in part] + [0] * rest
        assert got["weights"].tolist() == [1] * len(part) + [0] * rest
        assert got["first"] == (stream[w * length - 1][0] if w else 257)
        assert got["segments"].tolist() == [d - part[0][1] + 1 for _, d in part] + [0] * rest
        assert got["start"] == 257
        assert {k: v.dtype.name for k, v in got.items()} == {
            "targets": "int32",
            "first": "int32",
            "weights": "float32",
            "segments": "int32",
            "start": "int32",
        }


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**40), st.booleans())
def test_each_epoch_is_a_permutation(tmp_path_factory, n, rows, seed, shuffle):
    store = store_of([[1] * (3 * n - 2)], tmp_path_factory.mktemp("store"))
    batches = Batches(Windows(store, 3), 2 * rows, seed, shuffle)
    assert len(batches.windows) == n
    stream = [i for step in range(3 * n + 8) for i in batches.indices(step)]
    epochs = [stream[e * n : (e + 1) * n] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if shuffle and n > 20:
        assert epochs[0] != epochs[1] and epochs[0] != list(range(n))
    for own in (range(rows), range(0, 2 * rows, 2), [2 * rows - 1]):  # of one host
        part = Batches(batches.windows, 2 * rows, seed, shuffle, own)
        for step in (0, 1, 7):  # any step alone, whatever came before it
            for name, array in batches[step].items():
                np.testing.assert_array_equal(part[step][name], array[list(own)])
        assert part.describe(7) == batches.describe(7)
    for step in (0, 1, 7):
        assert batches.indices(step) == stream[step * 2 * rows : (step + 1) * 2 * rows]


def test_a_large_epoch_is_a_permutation_too(tmp_path):
    n = SMALL_EPOCH + 100
    batches = Batches(Windows(store_of([[1] * (n - 1)], tmp_path / "s"), 1), n, 3)
    first, second = batches.indices(0), batches.indices(1)
    assert sorted(first) == sorted(second) == list(range(n)) and first != second


def test_batches_differ_by_seed_and_are_named(tmp_path):
    store = store_of([list(b"first"), list(b"second one"), list(b"3")], tmp_path / "s")
    windows = Windows(store, 4)
    assert Batches(windows, 4, 1).indices(0) != Batches(windows, 4, 2).indices(0)
    plain = Batches(windows, 2, shuffle=False)
    assert plain.describe(0) == [(0, 0, 0), (1, 0, 1)] and plain.describe(2) == [(4, 1, 2), (0, 0, 0)]
    assert BYTES.decode(windows[1]["targets"].tolist()) == "tse"
    with pytest.raises(UserError, match="batch_size 0: must be at least 1"):
        Batches(windows, 0)
    with pytest.raises(UserError, match="length 0"):
        Windows(store, 0)


@pytest.mark.parametrize("owns", [[None], [[0, 2], [1, 3]]])
def test_evaluation_sees_each_token_once(tmp_path, owns):
    windows = Windows(store_of([list(range(100))], tmp_path / "s"), 8)
    hosts = [list(evaluation_batches(windows, 4, own)) for own in owns]
    assert {b["targets"].shape for host in hosts for b in host} == {(4 // len(owns), 8)}
    seen = [t for host in hosts for b in host for t in b["targets"][b["weights"] > 0]]
    assert sorted(seen) == [*range(100), 257]


def test_prefetch_keeps_order_passes_errors_and_ends():
    def failing():
        yield from range(5)
        raise KeyError("lost")

    assert list(prefetch(range(100), 3)) == list(range(100))
    got = prefetch(failing())
    assert [next(got) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="lost"):
        next(got)
    before = threading.active_count()
    endless = prefetch(itertools.count())
    assert next(endless) == 0 and threading.active_count() == before + 1
    endless.close()
    assert threading.active_count() == before
