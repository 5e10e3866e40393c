"""Examples in files of people: tables as Python's csv writes them, CoNLL of every kind, tags as seqeval reads them."""

import csv
import dataclasses
import datetime
import decimal
import io
import json
import re
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanoflax import data, tasks
from nanoflax.errors import UserError
from nanoflax.tasks import Chat, Classification, Pair, Problem, Tagging, Text, metrics
from nanoflax.tasks.sources import TaskSource
from nanoflax.tasks.tags import from_bio, to_bio

CELL = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\ufeff") | st.sampled_from("\"\t,;\n\r' "),
    max_size=12,
)


def read(source, kind, text=None, path=None, **options):
    """(examples, the lines of the report) of a source, or of a new file with this text."""
    if path is not None:
        path.write_text(text, encoding=options.pop("encoding", "utf-8"), newline="")
        source = f"{source}:{path}"
    report = data.DataReport()
    return tasks.read(TaskSource(source, **options), kind, report=report), report.lines()


# Parquet and the hub.


def test_parquet_holds_what_json_lines_hold(tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "é"}], "n": i}
        for i in range(5)
    ]
    sentences = [{"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}, {"tokens": ["c"], "ner_tags": ["O"]}]
    for kind, values, fields in ((Chat, chats, ""), (Tagging, sentences, "tags=ner_tags")):
        rows = datasets.Dataset.from_list(values)
        rows.to_parquet(tmp_path / "x.parquet")
        rows.to_json(tmp_path / "x.jsonl")
        expected, _ = read(f"jsonl:{tmp_path}/x.jsonl", kind, fields=fields)
        found, lines = read(f"parquet:{tmp_path}/x.parquet", kind, fields=fields)
        plain = [dataclasses.replace(example, place="") for example in found]
        assert plain == [dataclasses.replace(example, place="") for example in expected] and not lines
    with pytest.raises(UserError, match="no object has tags; .*tokens, ner_tags; .*--config.data.fields=tags=ner_tags"):
        read(f"parquet:{tmp_path}/x.parquet", Tagging)


def test_values_of_parquet_that_json_does_not_have_become_text(tmp_path):
    days = [datetime.date(2020, 1, 1 + i % 2) for i in range(40)]
    rows = {"text": [f"text {i}".encode() for i in range(40)], "label": days, "answer": [decimal.Decimal("1.50")] * 40}
    pq.write_table(pa.table(rows | {"prompt": rows["text"]}), tmp_path / "x.parquet")
    found = tasks.load(f"parquet:{tmp_path}/x.parquet", Classification)
    assert found.labels == ("2020-01-01", "2020-01-02") and found.train[0].text == "text 0"
    (problem, *_) = tasks.read(f"parquet:{tmp_path}/x.parquet", Problem)
    assert (problem.prompt, problem.answer) == ("text 0", "1.50") and problem.extra["label"] == "2020-01-01"


def test_classes_and_splits_of_a_hub_data_set(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    for split, n in (("train", 6), ("test", 3)):
        rows = {"text": [f"{split} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]}
        rows["label"][-1] = -1 if split == "test" else rows["label"][-1]
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    found = tasks.load(f"hub:{tmp_path}", Classification)
    assert found.labels == ("bad", "good")
    assert [(x.text, x.labels) for x in found.train] == [(f"train {i}", (["bad", "good"][i % 2],)) for i in range(6)]
    assert [x.text for x in found.validation] == ["test 0", "test 1"]  # a hidden label is left out, and counted
    assert len(found.report.counts) == 1
    assert [x.text for x in tasks.read(f"hub:{tmp_path}:test", Text)] == ["test 0", "test 1", "test 2"]
    assert [x.text for x in tasks.read(f"hub:{tmp_path}", Classification, split="test")] == ["test 0", "test 1"]
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(UserError, match="has no split 'validation', only train; choose"):
        tasks.read(f"hub:{tmp_path}", Classification, split="validation")


# Tables.


def is_table(text, delimiter):
    """Whether the module csv reads a text that it wrote."""
    try:
        list(csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True))
    except csv.Error:
        return False
    return True


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(CELL, CELL).filter(lambda row: all(map(str.strip, row))), min_size=1, max_size=6),
    kind=st.sampled_from(["csv", "tsv"]),
    header=st.booleans(),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_tables_are_read_as_pythons_csv_writes_them(tmp_path_factory, rows, kind, header, end, quoting, encoding):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=",\t"[kind == "tsv"], lineterminator=end, quoting=quoting)
    writer.writerows([("target", "source")] * header + [row[::-1] if header else row for row in rows])
    first = file.getvalue().split("\n")[0]
    # Without a header, the first row must not look like one.
    assume(header or not ("," not in first and ";" in first) and not re.search(r"\A[\w.-]+\Z", "".join(rows[0])))
    # Python does not quote a carriage return at the end of a line, which is then a part of the line's end.
    assume(quoting == csv.QUOTE_ALL or not any(row[0 if header else 1].endswith("\r") for row in rows))
    # Nor one inside a line with quotes, which Python's own reader then refuses.
    assume('"' not in file.getvalue() or is_table(file.getvalue(), ",\t"[kind == "tsv"]))
    path = tmp_path_factory.getbasetemp() / "table"
    # Without cleaning, so that each character counts.
    found, _ = read(kind, Pair, file.getvalue(), path, encoding=encoding, unicode="", whitespace="")
    assert [(e.source, e.target) for e in found] == rows


@pytest.mark.parametrize("title", ["", "# made in 2024\n", "Reviews, of films\n\n", "a,b,c,d\n"])
def test_a_header_below_a_title_and_between_the_lines(tmp_path, title):
    text = f"{title}Label,text\nx,one\ny,two\nLabel,text\nx,three\n"  # the lines of two files
    found, report = read("csv", Classification, text, tmp_path / "t.csv")
    assert [(e.text, *e.labels) for e in found] == [("one", "x"), ("two", "y"), ("three", "x")]
    assert [line.split(":")[0] for line in report] == [
        *(["lines above the header, left out"] if title else []), "headers between the lines, left out"
    ]  # fmt: skip


def test_a_column_that_is_there_twice_is_not_guessed(tmp_path):
    with pytest.raises(UserError, match="t.csv:1: the header has 'label' twice; rename"):
        read("csv", Classification, "text,label,label\na,x,1\n", tmp_path / "t.csv")
    assert len(read("csv", Classification, "id,text,label,id\n1,a,x,1\n", tmp_path / "t.csv")[0]) == 1


def test_quotes_that_enclose_no_cell_are_read_as_they_are_and_reported(tmp_path):
    text = 'text\tlabel\n"Hello" he said\tx\nan "odd one\ty\n"never closed\tx\n"tab\there ""so"""\ty\n'
    found, lines = read("tsv", Classification, text, path := tmp_path / "x.tsv")
    texts = ['"Hello" he said', 'an "odd one', '"never closed', 'tab\there "so"']
    assert [e.text for e in found] == texts and [e.labels[0] for e in found] == [*"xyxy"]
    assert lines == [f"lines with quotes that do not enclose a cell, read as they are: 2 ({path}:2, {path}:4)"]
    text = 'text,label\n"one, two\nthree",x\n"a" b,y\nlast,x\n'
    found, lines = read("csv", Classification, text, path := tmp_path / "x.csv")
    assert [(e.text, e.place) for e in found] == [
        ("one, two\nthree", f"{path}:2"), ('"a" b', f"{path}:4"), ("last", f"{path}:5")]  # fmt: skip
    assert [line.partition(":")[0] for line in lines] == [
        "quotes around delimiters and line ends, read as one cell",
        "lines with quotes that do not enclose a cell, read as they are",
    ]


@pytest.mark.parametrize(
    "kind, header",
    [
        ("tsv", "Text\tLabel"),
        ("tsv", " TEXT \tlabel "),
        ("tsv", "\ufefftext\tLABEL"),
        ("tsv", '"text"\t"label"'),
        ("csv", "Text,Label"),
        ("csv", "Text;Label"),
        ("csv", "sep=;\nText;Label"),
    ],
)
def test_a_header_may_be_written_otherwise(tmp_path, kind, header):
    between = "\t" if kind == "tsv" else ";" if ";" in header else ","
    text = f"{header}\nfine film{between}pos\nbad film{between}neg\n"
    found, lines = read(kind, Classification, text, tmp_path / "x")
    assert [(e.text, e.labels) for e in found] == [("fine film", ("pos",)), ("bad film", ("neg",))] and not lines
    report = data.DataReport()
    mapped = TaskSource(f"{kind}:{tmp_path}/x", fields="text=TEXT,label=Label")
    assert tasks.read(mapped, Classification, report=report) == found


def test_json_fields_may_have_capitals(tmp_path):
    text = '{"Text": "a", "LABEL": 1}\n{"text": "b", "Text": "no", "label": 2}\n'
    found, lines = read("jsonl", Classification, text, tmp_path / "x")
    assert [(e.text, e.labels) for e in found] == [("a", ("1",)), ("b", ("2",))] and not lines


@pytest.mark.parametrize(
    "kind, text, example, names, fields",
    [
        ("tsv", "review\tstars\ngood\t5\nbad\t1\n", Classification, "review, stars", "text=review,label=stars"),
        ("tsv", "id\treview\tstars\n1\tgood\t5\n2\tso so\t1\n", Classification, "id, review, stars",
         "text=review,label=stars"),
        ("csv", "Review text,Number of stars\n" + "a film,5\nno film,1\n" * 10, Classification,
         "Review text, Number of stars", "'text=Review text,label=Number of stars'"),
        ("csv", "Review ,Stars\ngood film,5\n", Classification, "Review , Stars", "text=Review,label=Stars"),
        ("csv", "label,body\n1,good one\n2,bad one\n", Classification, "label, body", "text=body"),
        ("csv", "English,Finnish\na house,talo\n", Pair, "English, Finnish", "source=English,target=Finnish"),
        ("jsonl", '{"stars": 5, "review": "good"}\n', Classification, "stars, review", "text=review,label=stars"),
        ("jsonl", '{"x": "a", "my text": "b"}\n', Pair, "x, my text", "'source=x,target=my text'"),
        ("jsonl", '{"body": "b"}\n', Classification, "body", "text=body,label=NAME"),
        ("jsonl", '{"words": ["a"], "ner_tags": ["O"]}\n', Tagging, "words, ner_tags", "tokens=words,tags=ner_tags"),
        ("jsonl", '[\n{"content": "b"}\n]', Text, "content", "text=content"),
        ("jsonl", '{"instruction": "a", "output": "b"}\n', Chat, "instruction, output", "messages=NAME"),
    ],
)  # fmt: skip
def test_other_names_are_shown_with_the_flag_that_maps_them(tmp_path, kind, text, example, names, fields):
    with pytest.raises(UserError) as error:
        read(kind, example, text, tmp_path / "x")
    message = str(error.value)
    assert names in message and f"--config.data.fields={fields} " in message and "\n" not in message
    if "NAME" not in fields:
        value = fields.strip("'")
        found = tasks.read(TaskSource(f"{kind}:{tmp_path}/x", fields=value), example, report=data.DataReport())
        assert found


def test_labels_that_are_no_numbers_are_left_out(tmp_path):
    lines = [f'{{"text": "a", "label": {label}}}' for label in ("NaN", "Infinity", "-Infinity", "1e999", "2.5")]
    lines += ['{"text": NaN, "label": "x"}', '{"text": "b", "labels": ["x", NaN]}']
    found, report = read("jsonl", Classification, "\n".join(lines), path := tmp_path / "x")
    assert [e.labels for e in found] == [("2.5",)]
    assert report == [
        f"examples without a label, left out: 5 ({path}:1, {path}:2, {path}:3, ...)",
        f"examples without text in 'text', left out: 1 ({path}:6)",
    ]


# CoNLL.


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    tabs=st.booleans(),
    columns=st.sampled_from([2, 4]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    last_line=st.booleans(),
    comments=st.booleans(),
)
def test_conll_files_of_every_kind(tmp_path_factory, data, tabs, columns, end, last_line, comments):
    letters = st.characters(blacklist_categories=["Cs", "Cc", "Zs", "Zl", "Zp", "Cf"])
    word = st.text(letters, min_size=1, max_size=5) | st.just("#") | st.just('"')
    if tabs:
        word |= st.sampled_from(["New York", "1\u00a0000", "a\u3000b", "x#y z"])
    tag = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])
    sentences = data.draw(st.lists(st.lists(st.tuples(word, tag), min_size=1, max_size=4), min_size=1, max_size=4))
    between, lines = "\t" if tabs else " ", []
    for number, sentence in enumerate(sentences):
        lines += [f"# sent_id = {number}", "# text = a b", "#", "# id 48\tdomain=en"] if comments else []
        lines += [between.join([word, *["_"] * (columns - 2), tag]) for word, tag in sentence] + [""]
    path = tmp_path_factory.getbasetemp() / "x.conll"
    found, _ = read("conll", Tagging, end.join(lines[: None if last_line else -1]), path, unicode="")
    assert [e.tokens for e in found] == [tuple(word for word, _ in sentence) for sentence in sentences]
    wanted = [to_bio([tag for _, tag in sentence])[0] for sentence in sentences]
    assert [list(e.tags) for e in found] == wanted


@pytest.mark.parametrize("between", ["\t", " "])
def test_a_conll_header_is_no_word(tmp_path, between):
    text = "word tag\nEU B-ORG\n\nsays O\n".replace(" ", between)
    found, lines = read("conll", Tagging, text, tmp_path / "x")
    assert [e.tokens for e in found] == [("EU",), ("says",)]
    assert lines == [f"first lines without a tag, read as a header: 1 ({tmp_path}/x:1 'tag')"]


# Tags.

TYPES = st.sampled_from(["A", "B-C"])
ENTITIES = st.lists(st.tuples(TYPES | st.none(), st.integers(1, 3)), max_size=5)  # (type or None for O, words)


def written(entities, single, last):
    """The tags of these entities, with these letters for a single word and a last word."""
    tags = []
    for name, words in entities:
        if name is None:
            tags += ["O"] * words
        else:
            letters = [single] if words == 1 else ["B", *"I" * (words - 2), last]
            tags += [f"{letter}-{name}" for letter in letters]
    return tags


SCHEMES = {"IOB2": ("B", "I"), "IOBES": ("S", "E"), "BILOU": ("U", "L")}


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=50, deadline=None)
@given(true=ENTITIES, predicted=ENTITIES)
def test_f1_is_seqevals_in_strict_mode(scheme, true, predicted):
    """Also after the tags became BIO, and back."""
    from seqeval import scheme as schemes
    from seqeval.metrics import f1_score

    sides = [written(entities, *SCHEMES[scheme]) for entities in (true, predicted)]
    true, predicted = (tags + ["O"] * (max(map(len, sides)) - len(tags)) for tags in sides)
    assume(any(tag != "O" for tag in true))
    with warnings.catch_warnings(action="ignore"):
        theirs = f1_score([true], [predicted], mode="strict", scheme=getattr(schemes, scheme), zero_division=0)
    labels = [f"{letter}-{name}" for letter in {"I", "B", *SCHEMES[scheme]} for name in ("A", "B-C")]
    bio = [to_bio(tags)[0] for tags in (true, predicted)]
    if scheme == "IOB2":
        assert bio == [true, predicted]
    assert metrics.tags([bio[1]], [bio[0]], strict=True)["micro"]["f1"] == pytest.approx(theirs)
    assert metrics.tags([predicted], [true])["micro"]["f1"] == pytest.approx(theirs)
    assert [from_bio(tags, labels) for tags in bio] == [true, predicted]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["O", *(f"{letter}-{name}" for letter in "BIES" for name in "XY")]), max_size=9))
def test_entities_of_any_tags_are_those_of_seqeval(tags):
    from seqeval.metrics.sequence_labeling import get_entities

    theirs = [(name, start, end + 1) for name, start, end in get_entities(tags)]
    assert metrics.entities(tags) == theirs == metrics.entities(to_bio(tags)[0])


@pytest.mark.parametrize(
    "labels, wanted",
    [
        ("O B-X I-X", "B-X O B-X I-X I-X B-X"),
        ("O B-X I-X E-X S-X", "S-X O B-X I-X E-X S-X"),
        ("O B-X I-X L-X U-X", "U-X O B-X I-X L-X U-X"),
        ("O I-X", "I-X O I-X I-X I-X I-X"),
    ],
)
def test_examples_have_the_tags_of_the_models_classes(tmp_path, labels, wanted):
    """So that a tagger of others is measured and trained in its own scheme."""
    tags = "S-X O B-X I-X E-X S-X".split()
    text = json.dumps({"tokens": [*"abcdef"], "tags": tags}) + "\n"
    (example,), lines = read("jsonl", Tagging, text, tmp_path / "x")
    assert " ".join(example.tags) == "B-X O B-X I-X I-X B-X"
    assert lines == [f"sentences with tags of BIOES or BILOU, read as BIO: 1 ({tmp_path}/x:1 'S-X')"]
    (example,) = tasks.read(f"jsonl:{tmp_path}/x", Tagging, labels=labels.split())
    assert " ".join(example.tags) == wanted


def test_the_kind_of_a_file_is_proposed_by_its_name_and_content(tmp_path):
    (tmp_path / "x.csv").write_text("text,label\na,b\n")
    (tmp_path / "x.tsv").write_text("text\tlabel\na\tb\n")
    for source, words in (
        ("{}/x.csv", "write csv:{}/x.csv, or choose jsonl"),
        ("{}/x.json.gz", "write jsonl:{}/x.json.gz, or choose jsonl"),
        ("{}/x.zip", "is not known; choose jsonl"),
        ("tsv:{}/x.csv", "write csv:{}/x.csv"),
        ("csv:{}/x.tsv", "write tsv:{}/x.tsv"),
    ):
        with pytest.raises(UserError) as error:
            tasks.read(source.format(tmp_path), Classification)
        assert words.format(tmp_path) in str(error.value)
