"""Documents that are not worth their tokens are left out, counted, and the same for every reader."""

import dataclasses
import json

import numpy as np
import pytest

from nanoflax import data
from nanoflax.config import TextData
from nanoflax.data import duplicates, parts
from nanoflax.data.duplicates import EXACT, NEAR, left_out
from nanoflax.data.quality import Quality
from nanoflax.errors import UserError
from nanoflax.tokenizers import trained


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
    texts, report = kept(source, "all", languages="EN, nl,", min_chars=10, max_chars=200)
    assert texts == english
    assert sorted(report.counts.values()) == [1, 1, 150]
    assert any("other languages than EN, nl,, left out: 150 (de: 'Die Kommission" in line for line in report.lines())


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


def random_texts(number, seed, words=range(30, 200)):
    """Texts of random words, and from each third text a copy in which some words differ."""
    random, texts = np.random.default_rng(seed), []
    for i in range(number):
        text = [f"w{n}" for n in random.integers(0, 3000, random.choice(words))]
        if i % 3 == 2:
            text = texts[random.integers(len(texts))].split()
            for at in random.integers(0, len(text), random.integers(1, 6)):
                text[at] = f"w{random.integers(3000)}"
        texts.append(" ".join(text))
    return texts


def shingles(text):
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_near_duplicates_are_those_of_brute_force(tmp_path, threshold):
    pytest.importorskip("rensa")
    texts = random_texts(500, 1)
    found = left_out(Quality(dedup=f"minhash:{threshold}"), [texts])[0]
    sets, margin = [shingles(text) for text in texts], 0.12  # three standard errors of a sketch of 128 numbers
    similarity = lambda i, j: len(sets[i] & sets[j]) / len(sets[i] | sets[j])
    remaining = [i for i in range(len(texts)) if i not in found]
    nearest = [max((similarity(i, j) for j in remaining if j < i), default=0.0) for i in range(len(texts))]
    assert all(nearest[i] < threshold + margin for i in remaining)
    assert all(nearest[i] > threshold - margin for i in found)
    assert len(found) > 50 and len(remaining) > 333


def test_words_of_ascii_text_are_those_of_other_text():
    text = "".join(map(chr, range(128))) * 2 + "It's a_1 (TEST).\n\tNot-this\x00 2.5\x1c end"
    assert duplicates.word_hashes(text + " é")[:-1].tolist() == duplicates.word_hashes(text).tolist()


def test_case_and_punctuation_make_no_difference_to_near_duplicates():
    pytest.importorskip("rensa")
    texts = [
        "One two; three four five six seven.",
        "ONE TWO THREE (four) five, six seven",
        "素早い茶色の狐が走る",
        "素早い茶色の狐が走る。",
    ]
    assert left_out(Quality(dedup="minhash:0.9"), [texts[:2], texts[2:]]) == ({1: NEAR}, {1: NEAR})
    assert left_out(Quality(dedup="exact"), [texts, texts[1:]]) == ({}, {0: EXACT, 1: EXACT, 2: EXACT})


def test_copies_of_evaluation_text_are_those_of_brute_force(tmp_path):
    random = np.random.default_rng(0)
    evaluation = random_texts(30, 2) + ["nine words that are short but enough to search", "too short"]
    texts = random_texts(300, 3)
    for i in range(0, 300, 5):  # between 8 and 17 words of an evaluation text, inside a document
        words, copy = texts[i].split(), random.choice(evaluation[:30]).split()
        at, length = random.integers(0, 10), random.integers(8, 18)
        texts[i] = " ".join([*words[:20], *copy[at : at + length], *words[20:]])
    texts[7] += ". Nine words that are: short, but enough to SEARCH!"
    texts[8] += " too short"
    searched = [" " + " ".join(text.split()) + " " for text in evaluation[:30]]
    runs_of = lambda text: [" ".join(text.split()[i : i + 13]) for i in range(len(text.split()) - 12)]
    expected = {
        i for i, text in enumerate(texts) if any(f" {run} " in e for run in runs_of(text) for e in searched)
    } | {7}
    found = left_out(Quality(decontaminate=13), [texts], evaluation)[0]
    assert set(found) == expected and 20 < len(expected) < 50


def test_phrases_of_many_documents_are_no_copies():
    phrase = " ".join(f"licence{i}" for i in range(20))
    texts = [f"{phrase} document {i}" for i in range(11)]
    assert left_out(Quality(decontaminate=13), [texts], [phrase]) == ({},)
    assert len(left_out(Quality(decontaminate=13), [texts[:10]], [phrase])[0]) == 10


def test_training_documents_lose_what_the_validation_text_holds(tmp_path):
    common = " ".join(f"secret{i}" for i in range(13))
    source = corpus(tmp_path, [f"document {i} " + f"text{i} " * 30 + common * (i in (3, 120)) for i in range(200)])
    (tmp_path / "held_out.txt").write_text(f"Question. {common}")
    (tmp_path / "benchmark.txt").write_text(" ".join(["document 5", *["text5"] * 20]))
    original = data.Source(source, validation=f"text:{tmp_path}/held_out.txt")
    quality = Quality(decontaminate=13, evaluation=f"text:{tmp_path}/benchmark.txt")
    report, texts = data.DataReport(), list(data.documents(original))
    remaining = list(data.documents(dataclasses.replace(original, quality=quality), "train", report))
    assert remaining == [text for i, text in enumerate(texts) if i not in (3, 5, 120)]
    assert list(report.counts) == ["documents that share 13 words in a row with evaluation text, left out"]


def test_the_tokens_are_prepared_again_if_a_setting_or_the_evaluation_text_changes(tmp_path):
    source = data.Source(corpus(tmp_path, [f"document {i % 150} of some words" for i in range(300)]))
    (tmp_path / "benchmark.txt").write_text("nothing")

    def fingerprint(**settings):
        made = dataclasses.replace(source, quality=Quality(**settings))
        store = data.prepare(made, trained.ByteTokenizer(), "train", tmp_path / "cache", progress=False)
        return store.fingerprint, store.report

    plain, exact = fingerprint(), fingerprint(dedup="exact")
    assert plain[0] != exact[0] and not plain[1] and exact[1][0].startswith(f"{EXACT}: 1")
    against = dict(dedup="exact", decontaminate=5, evaluation=f"text:{tmp_path}/benchmark.txt")
    assert fingerprint(**against)[0] == exact[0]
    (tmp_path / "benchmark.txt").write_text("document 3 of some words\n\ndocument 4")
    assert fingerprint(**against)[0] != exact[0]


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"dedup": "near"}, "choose exact, or minhash:THRESHOLD"),
        ({"dedup": "minhash:80"}, "choose exact, or minhash:THRESHOLD"),
        ({"min_chars": 9, "max_chars": 5}, "data.max_chars=5 is less than data.min_chars=9"),
        ({"languages": "en,german"}, "german is not known; choose from"),
        ({"languages": " ,"}, "no code is not known; choose from"),
        ({"evaluation": "text:x"}, "set data.decontaminate=13 too"),
        ({"evaluation": "x", "decontaminate": 13}, "data source 'x' is not known"),
    ],
)
def test_unusable_settings_are_refused(settings, match):
    with pytest.raises(UserError, match=match):
        data.source_of(TextData(**settings))
