"""Formats of files with text: the same documents from each, in ranges too, and one line for what cannot be read."""

import csv
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from nanoflax import data
from nanoflax.data import parts, tables
from nanoflax.errors import UserError
from nanoflax.tokenizers import trained

TEXTS = [f'document {i}: "é, \t日本"\r\n' + "line; of it\n" * (i % 7) for i in range(300)]


def jsonl(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write_table(path, texts, **options):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows([["id", "text"], *enumerate(texts)])


def write_parquet(path, texts, type=None, group=37, **options):
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, type or pa.string())})
    pq.write_table(table, path, row_group_size=group, **options)


def example(text):
    found = tf_example_pb2.Example()
    found.features.feature["id"].int64_list.value.append(3)
    found.features.feature["text"].bytes_list.value.append(text.encode())
    return found.SerializeToString()


def write_records(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def zst(content):
    half = len(content) // 2  # two frames
    return b"".join(zstandard.ZstdCompressor().compress(piece) for piece in (content[:half], content[half:]))


WRITERS = {
    "x.jsonl": lambda path: path.write_bytes(jsonl(TEXTS)),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS))),
    "x.jsonl.zst": lambda path: path.write_bytes(zst(jsonl(TEXTS))),
    "x.csv": lambda path: write_table(path, TEXTS),
    "y.csv": lambda path: write_table(path, TEXTS, delimiter=";", quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "x.tsv": lambda path: write_table(path, TEXTS, delimiter="\t"),
    "x.parquet": lambda path: write_parquet(path, TEXTS),
    "dictionary.parquet": lambda path: write_parquet(path, TEXTS, pa.dictionary(pa.int32(), pa.string())),
    "large.parquet": lambda path: write_parquet(path, TEXTS, pa.large_string(), compression="zstd"),
    "json.array_record": lambda path: write_records(path, jsonl(TEXTS).splitlines()),
    "text.array_record": lambda path: write_records(path, [text.encode() for text in TEXTS]),
    "examples.array_record-00000-of-00001": lambda path: write_records(path, map(example, TEXTS)),
    "binary.parquet": lambda path: write_parquet(path, [text.encode() for text in TEXTS], pa.binary(), group=1000),
}


@pytest.fixture(scope="module")
def fingerprint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    for i, text in enumerate(TEXTS):
        (directory / f"{i:03}.txt").write_bytes(text.encode())
    source = f"text:{directory}/*.txt"
    return data.prepare(source, trained.ByteTokenizer(), "train", directory, progress=False).fingerprint


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_tokens_of_whole_files(tmp_path, name, fingerprint):
    WRITERS[name](tmp_path / name)
    store = data.prepare(f"text:{tmp_path}/{name}", trained.ByteTokenizer(), "train", tmp_path, progress=False)
    assert store.fingerprint == fingerprint and not store.report
    assert list(data.documents(f"text:{tmp_path}/{name}", "all")) == TEXTS


def test_data_sets_of_tfds_and_of_the_hub_give_the_same_tokens(tmp_path, fingerprint):
    class NanoflaxFormats(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, download_manager):
            return {"train": ((i, {"text": text}) for i, text in enumerate(TEXTS))}

        def _generate_examples(self):
            raise NotImplementedError

    NanoflaxFormats(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for i, texts in enumerate((TEXTS[:100], TEXTS[100:])):
        write_parquet(tmp_path / f"hub/data/train-0000{i}-of-00002.parquet", texts)
    for source in (data.Source("tfds:nanoflax_formats", data_dir=str(tmp_path)), data.Source(f"hub:{tmp_path}/hub")):
        store = data.prepare(source, trained.ByteTokenizer(), "train", tmp_path / "cache", progress=False)
        assert store.fingerprint == fingerprint and not store.report


@pytest.mark.parametrize(
    "name, least", [("x.jsonl", 8), ("x.parquet", 8), ("json.array_record", 8), ("x.csv", 1), ("x.jsonl.zst", 1)]
)
def test_ranges_of_a_large_file_are_its_documents(tmp_path, name, least):
    WRITERS[name](tmp_path / name)
    plan = parts.plan(f"text:{tmp_path}/{name}", "all", part_bytes=500)
    assert len(plan.parts) >= least
    found = [list(parts.read(plan, i, data.DataReport())) for i in range(len(plan.parts))]
    assert sum(found, []) == TEXTS


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=40), min_size=1, max_size=30),
    st.integers(1, 200),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
    st.booleans(),
)
def test_lines_are_in_exactly_one_range(tmp_path_factory, texts, part_bytes, end, last_end):
    path = tmp_path_factory.getbasetemp() / "ranges.jsonl"
    lines = [json.dumps({"text": f"x{text}"}, ensure_ascii=False) for text in texts]
    path.write_bytes((end.join(lines) + end * last_end).encode())
    plan = parts.plan(f"text:{path}", "all", part_bytes)
    report = data.DataReport()
    assert [text for i in range(len(plan.parts)) for text in parts.read(plan, i, report)] == [f"x{t}" for t in texts]
    assert not report.counts and sum(part.size for part in plan.parts) == path.stat().st_size


def test_a_bad_line_of_a_range_is_found_again(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(TEXTS[:50]) + b'{"text": \n' + jsonl(TEXTS[50:]))
    plan, report = parts.plan(f"text:{path}", "all", 1000), data.DataReport()
    assert [text for i in range(len(plan.parts)) for text in parts.read(plan, i, report)] == TEXTS
    (place,) = report.places[data.MALFORMED]
    with open(path, "rb") as file:
        file.seek(int(place.removeprefix(f"{path} line at byte ")))
        assert file.readline() == b'{"text": \n'


@pytest.mark.parametrize(
    "content", [json.dumps([{"text": t} for t in TEXTS], indent=0), "\ufeff" + jsonl(TEXTS).decode()]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_what_cannot_be_cut_is_one_part(tmp_path, content, encoding):
    (tmp_path / "x.jsonl").write_text(content.removeprefix("\ufeff" * (encoding == "utf-16")), encoding=encoding)
    plan = parts.plan(f"text:{tmp_path}/x.jsonl", "all", 500)
    assert len(plan.parts) == 1 and list(parts.read(plan, 0, data.DataReport())) == TEXTS


def test_only_the_wanted_column_is_read(tmp_path, monkeypatch):
    table = pa.table({"text": ["a", "b"], "body": ["c", None], "n": [[1], [2]], "d": [b"x", b"\xff"]})
    pq.write_table(table, tmp_path / "x.parquet")
    read, original = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda *args, **kw: read.append(args[3]) or original(*args, **kw)
    )
    for field, texts, lines in (
        ("text", ["a", "b"], []),
        ("body", ["c"], [f"rows without a value in column 'body', left out: 1 ({tmp_path}/x.parquet row 1)"]),
        ("d", ["x", "\ufffd"], [f"invalid UTF-8, read as U+FFFD: 1 ({tmp_path}/x.parquet row 1, byte 0)"]),
    ):
        report = data.DataReport()
        assert list(data.documents(data.Source(f"text:{tmp_path}/*", field), "all", report)) == texts
        assert report.lines() == lines
    assert read == [["text"], ["body"], ["d"]]


def test_a_large_group_of_rows_is_not_read_at_once(tmp_path):
    write_parquet(tmp_path / "x.parquet", [os.urandom(500).hex() for _ in range(20_000)], group=20_000)
    texts = data.documents(f"text:{tmp_path}/x.parquet", "all")
    before, _ = pa.total_allocated_bytes(), next(texts)
    assert pa.total_allocated_bytes() - before < 7e6 < (tmp_path / "x.parquet").stat().st_size
    assert sum(1 for _ in texts) == 19_999


def damaged(path):
    """Flips a byte in the texts of a Parquet file."""
    content = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(1)
    content[column.data_page_offset + column.total_compressed_size - 10] ^= 255
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name, prepare, words",
    [
        ("x.parquet", lambda path: path.write_bytes(b""), "cannot be read as Parquet: .*0 bytes"),
        ("x.parquet", lambda path: path.write_bytes(jsonl(TEXTS)), "cannot be read as Parquet"),
        (
            "x.parquet",
            lambda path: (write_parquet(path, TEXTS, write_page_checksum=True), damaged(path)),
            "cannot be read as Parquet: .*(CRC|orrupt)",
        ),
        (
            "x.parquet",
            lambda path: (write_parquet(path, TEXTS), path.write_bytes(path.read_bytes()[:-50])),
            "cannot be read as Parquet",
        ),
        (
            "x.parquet",
            lambda path: pq.write_table(pa.table({"a": [1], "b": ["x"], "c": ["a long text" * 9]}), path),
            "no column 'text'; its columns are a, b, c; choose one of c, b, as in --config.data.field=c",
        ),
        (
            "x.parquet",
            lambda path: pq.write_table(pa.table({"text": [["x"]], "b": ["x"]}), path),
            "column 'text' holds list<.*string>, not text; choose one of b",
        ),
        ("x.parquet", lambda path: pq.write_table(pa.table({"n": [1]}), path), "no column holds text"),
        ("x.csv", lambda path: path.write_text("id,body\n1,x y\n"), "no column 'text'; .* id, body; .*field=body"),
        ("x.csv", lambda path: path.write_text("text,text\n1,x\n"), "more than one column 'text'.* its own name"),
        ("x.csv", lambda path: path.write_text("text\tn\nx\t1\n"), "not divided as its name says; name .* .tsv"),
        (
            "x.csv",
            lambda path: path.write_text("id,my text\n1,x y\n"),
            "choose .*, as in --config.data.field='my text'",
        ),
        ("x.csv", lambda path: path.write_text(""), "files without a text"),
        ("x.csv", lambda path: path.write_text("text\n"), "files without a text"),
        ("x.tsv", lambda path: path.write_text("id\ttext\n1\n2\ta\tb\n"), "rows without 2 columns, left out: 2"),
        ("x.jsonl", lambda path: path.write_text('{"text": null}\n{"text": 3}'), "JSON lines without text .*: 2"),
        ("x.array_record", lambda path: path.write_bytes(b""), "cannot be read as ArrayRecord: .*64KB"),
        (
            "x.array_record",
            lambda path: (write_records(path, [b"x"] * 99), path.write_bytes(path.read_bytes()[:-99])),
            "cannot be read as ArrayRecord: .*",
        ),
        (
            "x.array_record",
            lambda path: write_records(path, [b'{"body": "x"}']),
            "record 0: no record has text in field 'text'; choose one of body, as in --config.data.field=body",
        ),
        (
            "x.array_record",
            lambda path: write_records(path, [b'{"text": null}', b"text"]),
            "records without text in field 'text', left out: 1 .*record 0.; malformed records .*: 1 .*record 1.",
        ),
        ("x.jsonl.zst", lambda path: path.write_bytes(zst(jsonl(TEXTS))[:-3]), "cannot be read: Truncated"),
        ("x.txt.zst", lambda path: path.write_bytes(zst(b"some text" * 99) + b"more"), "cannot be read: .*frame"),
    ],
)
def test_damage_is_one_line(tmp_path, name, prepare, words):
    prepare(tmp_path / name)
    with pytest.raises(UserError, match=words) as error:
        data.prepare(f"text:{tmp_path}/{name}", trained.ByteTokenizer(), "all", tmp_path / "c", progress=False)
    assert f"{tmp_path}/{name}" in str(error.value) and "\n" not in str(error.value)


def test_quotes_that_are_never_closed_take_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_CELL", 1000)
    lines = ["text", '"never closed', *(f"line {i}" for i in range(1000)), '"two\nlines"']
    (tmp_path / "x.csv").write_text("\n".join(lines))
    report = data.DataReport()
    found = list(data.documents(f"text:{tmp_path}/x.csv", "all", report))
    assert found == [*lines[1:-1], "two\nlines"]
    assert report.lines() == [f"lines with quotes that do not enclose a cell, read as they are: 1 ({tmp_path}/x.csv:2)"]
