"""Documents that are not worth their tokens are left out, counted, and the same for every reader."""

import json

import pytest

from nanoflax import data
from nanoflax.config import TextData
from nanoflax.data import parts
from nanoflax.data.quality import Quality
from nanoflax.errors import UserError


def corpus(tmp_path, texts, name="corpus"):
    """The name of a source with these documents, in files of 100 documents."""
    (tmp_path / name).mkdir()
    for i in range(0, len(texts), 100):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[i : i + 100]]
        (tmp_path / name / f"{i:06}.jsonl").write_text("".join(lines))
    return f"text:{tmp_path}/{name}/*.jsonl"


def kept(source, split="train", **settings):
    report = data.DataReport()
    return list(data.documents(data.Source(source, quality=Quality(**settings)), split, report)), report


def test_lengths_and_languages_are_counted(tmp_path):
    pytest.importorskip("py3langid")
    english = [f"The committee decided to postpone the vote, and {i} members left the room." for i in range(150)]
    german = [f"Die Kommission hat die Abstimmung verschoben, {i} Mitglieder gingen fort." for i in range(150)]
    source = corpus(tmp_path, [x for pair in zip(english, german, strict=True) for x in pair] + ["short", "x" * 500])
    texts, report = kept(source, "all", languages="en, nl", min_chars=10, max_chars=200)
    assert texts == english
    assert sorted(report.counts.values()) == [1, 1, 150]
    assert any("other languages than en, nl, left out: 150 (de: 'Die Kommission" in line for line in report.lines())


def test_the_same_documents_are_held_out_with_and_without_comparisons(tmp_path):
    texts = [f"document {i % 200}" for i in range(400)]
    source = corpus(tmp_path, texts)
    held_out, _ = kept(source, "validation")
    assert kept(source, "validation", dedup="exact")[0] == held_out
    train, report = kept(source, dedup="exact")
    assert train == list(dict.fromkeys(t for t in texts if t not in held_out))
    assert report.counts.total() == 400 - len(held_out) - len(train)


def test_parts_read_alone_are_the_documents(tmp_path):
    source = data.Source(corpus(tmp_path, [f"document {i % 170}" for i in range(400)]), quality=Quality(dedup="exact"))
    many, one = parts.plan(source, part_bytes=3000), parts.plan(source)
    assert (len(many.parts), len(one.parts)) == (4, 1)
    alone = [list(parts.read(many, i, data.DataReport())) for i in (3, 1, 0, 2)]
    assert [*alone[2], *alone[1], *alone[3], *alone[0]] == list(parts.read(one, 0, data.DataReport()))


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"dedup": "near"}, "choose exact, or minhash:THRESHOLD"),
        ({"dedup": "minhash:80"}, "choose exact, or minhash:THRESHOLD"),
        ({"min_chars": 9, "max_chars": 5}, "data.max_chars=5 is less than data.min_chars=9"),
        ({"languages": "en,german"}, "german is not known; choose from"),
        ({"evaluation": "text:x"}, "set data.decontaminate=13 too"),
        ({"evaluation": "x", "decontaminate": 13}, "data source 'x' is not known"),
    ],
)
def test_unusable_settings_are_refused(settings, match):
    with pytest.raises(UserError, match=match):
        data.source_of(TextData(**settings))
