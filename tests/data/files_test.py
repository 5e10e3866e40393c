"""Text files of people: every encoding with a mark, every line end, and one line for what cannot be read."""

import codecs
import gzip
import io
import json
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflax import data
from nanoflax.errors import UserError

MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",  # these three codecs write the mark themselves
    "utf-16": b"",
    "utf-32": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
LINE = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\n\ufeff\0"), max_size=30)


def lines_of(path, report=None):
    with data.open_text(path) as file:
        return [line for _, line in data.text_lines(file, str(path), report)]


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(LINE, min_size=1, max_size=6).filter(lambda lines: lines[-1]),
    encoding=st.sampled_from([*MARKS]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    last_end=st.booleans(),
    zipped=st.booleans(),
)
def test_lines_are_those_of_python_in_every_encoding(tmp_path_factory, lines, encoding, end, last_end, zipped):
    content = MARKS[encoding] + (end.join(lines) + end * last_end).encode(encoding)
    path = tmp_path_factory.getbasetemp() / ("lines.txt.gz" if zipped else "lines.txt")
    path.write_bytes(gzip.compress(content) if zipped else content)
    decoded = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig" if encoding == "utf-8" else encoding)
    assert lines_of(path) == lines == [line.rstrip("\n").removeprefix("\ufeff") for line in decoded]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(LINE, LINE | st.floats() | st.none(), max_size=3), max_size=5), st.booleans())
def test_json_lines_and_a_list_hold_the_same(tmp_path_factory, records, ascii_only):
    path = tmp_path_factory.getbasetemp() / "records.json"
    found = []
    for text in (
        "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records),
        json.dumps(records, indent=2, ensure_ascii=ascii_only),
        json.dumps(records),
    ):
        path.write_text(text, encoding="utf-8")
        with data.open_text(path) as file:
            report = data.DataReport()
            values = [value for _, value in data.json_lines(file, str(path), report)]
        assert not report.counts
        found.append(repr(values))  # NaN does not equal itself
    assert found == [repr(records)] * 3


def test_a_list_with_a_mistake_is_reported_with_its_lines(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[\n {"text": "a"},\n {"text": "b"},\n')
    report = data.DataReport()
    with data.open_text(path) as file:
        assert not list(data.json_lines(file, str(path), report))
    assert report.places[data.MALFORMED] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    assert "a list of objects" in data.MALFORMED


def test_cp1252_is_counted_with_its_line_or_refused(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes("one\nGröße\nthree\n".encode("cp1252"))
    assert lines_of(path, report := data.DataReport()) == ["one", "Gr\ufffd\ufffde", "three"]
    assert report.lines() == [f"invalid UTF-8, read as U+FFFD: 1 ({path}:2, byte 2)"]
    with pytest.raises(UserError, match=r"x.txt:2, byte 2 is not UTF-8; .*iconv"):
        lines_of(path)


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as book:
        book.writestr("sheet.xml", "<a/>" * 50)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.txt", "one\ntwo\n".encode("utf-16-le"), "UTF-16 without a byte-order mark.*iconv"),
        ("x.txt", "один\nдва\n".encode("utf-16-be") * 9, "UTF-16 without a byte-order mark.*iconv"),
        ("x.txt", "one\n".encode("utf-16")[:-1], "cannot be read: .*truncated"),
        ("x.txt", "one\n".encode("utf-32")[:-1], "cannot be read: .*truncated"),
        ("x.xlsx", archive(), "no text"),
        ("x.gz", gzip.compress(b"some text" * 1000, mtime=0)[:-9], "cannot be read: Compressed file ended"),
        ("x.gz", gzip.compress(bytes(range(1, 256)) * 9, mtime=0)[:40] + b"x" * 300, "cannot be read"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        lines_of(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    for path, words in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(UserError, match=f"{path} cannot be read: {words}"):
            lines_of(path)


def test_an_empty_file_has_no_line_and_a_name_does_not_decide(tmp_path):
    for name, content, lines in (
        ("a", b"", []),
        ("a.gz", b"", []),
        ("a.gz", b"plain", ["plain"]),  # decompressed by a browser that kept the name
        ("a", gzip.compress(b"packed", mtime=0), ["packed"]),
        ("a", b"a\0b\n", ["a\0b"]),
        ("a", b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "two"]),  # two files, joined
    ):
        (tmp_path / name).write_bytes(content)
        assert lines_of(tmp_path / name) == lines


def test_a_corpus_of_utf16_is_the_corpus(tmp_path):
    texts = ["Été\n", "日本語\n"]
    for i, (text, encoding) in enumerate(zip(texts, ("utf-16", "utf-8-sig"), strict=True)):
        (tmp_path / f"{i}.txt").write_text(text, encoding=encoding)
    (tmp_path / "2.jsonl").write_text('{"text": "x\u2028y"}\n', encoding="utf-16")
    assert list(data.documents(f"text:{tmp_path}/*", "all")) == [*texts, "x\u2028y"]


def test_a_corpus_with_another_field_names_the_flag(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 3, "body": "x"}\n{"title": "y"}\n')
    with pytest.raises(UserError, match="a.jsonl:1: .*choose one of body, title, as in --config.data.field=body"):
        list(data.documents(f"text:{tmp_path}/*.jsonl", "all"))
    (tmp_path / "b.jsonl").write_text('{"text": "z"}\n')  # then the other file is only reported
    assert list(data.documents(f"text:{tmp_path}/*.jsonl", "all")) == ["z"]


def test_a_name_with_brackets_is_a_file_if_it_is_no_pattern_of_others(tmp_path):
    (tmp_path / "notes[1].txt").write_text("one")
    name = f"text:{tmp_path}/notes[1].txt"
    assert list(data.documents(name, "all")) == ["one"]
    (tmp_path / "notes1.txt").write_text("two")
    assert list(data.documents(name, "all")) == ["two"]


def test_a_folder_is_told_how_to_name_its_files(tmp_path):
    with pytest.raises(UserError, match=rf"is not known; write text:{tmp_path}/\*\*/\*.txt, or choose"):
        data.Source(str(tmp_path))
