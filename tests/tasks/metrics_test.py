"""Metrics: the numbers of seqeval, scikit-learn, sacrebleu and rouge-score on anything."""

import math
import warnings

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanoflax import tasks
from nanoflax.config import Translate
from nanoflax.errors import UserError
from nanoflax.tasks import metrics, table
from nanoflax.tasks.kinds import Pair

TAGS = ["O", "B-A", "I-A", "B-B", "I-B", "B-C-D", "I-C-D"]
WORDS = ["the", "cat", "sat", "on", "The", "mat,", "don't", "été", "it's", "2,000", "日本"]


@st.composite
def tagged(draw):
    """Predicted and true tags of some sentences; the tags need not be well-formed BIO."""
    sizes = draw(st.lists(st.integers(0, 8), min_size=1, max_size=5))
    return [[[draw(st.sampled_from(TAGS)) for _ in range(n)] for n in sizes] for _ in range(2)]


def equal(mine, report):
    """Whether our result has the numbers of a report as scikit-learn's output_dict."""
    report = {k: v for k, v in report.items() if isinstance(v, dict) and k != "samples avg"}
    assert {*report} - {"micro avg", "macro avg", "weighted avg"} == {*mine["classes"]}
    for name, theirs in report.items():
        ours = mine[name.split()[0]] if name.endswith(" avg") else mine["classes"][name]
        assert ours == pytest.approx({k.replace("f1-score", "f1"): v for k, v in theirs.items()})


@pytest.mark.parametrize("strict", [False, True])
@settings(max_examples=150, deadline=None)
@given(both=tagged())
def test_entities_are_those_of_seqeval(strict, both):
    from seqeval.metrics import accuracy_score, classification_report
    from seqeval.scheme import IOB2

    predicted, true = both
    mode = {"mode": "strict", "scheme": IOB2} if strict else {}
    assume(any(true))
    mine = metrics.tags(predicted, true, strict)
    assert mine["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    if mine["classes"]:
        with warnings.catch_warnings(action="ignore"):  # of divisions by zero
            equal(mine, classification_report(true, predicted, output_dict=True, zero_division=0, **mode))


def test_entities_need_type_and_both_ends():
    true = [["B-A", "I-A", "O", "B-B"]]
    half = metrics.tags([["B-A", "O", "O", "B-B"]], true)
    assert half["micro"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert half["classes"]["A"]["f1"] == 0 and half["accuracy"] == 0.75
    assert metrics.tags(true, true)["macro"]["f1"] == 1
    assert metrics.entities(["I-A", "I-A", "B-A"]) == [("A", 0, 2), ("A", 2, 3)]
    assert metrics.entities(["I-A", "I-A", "B-A"], strict=True) == [("A", 2, 3)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from(["x", "y", "z"])] * 2), min_size=1, max_size=20))
def test_classes_are_those_of_scikit_learn(pairs):
    from sklearn.metrics import accuracy_score, classification_report

    predicted, true = map(list, zip(*pairs, strict=True))
    mine = metrics.classes(predicted, true)
    assert mine["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    with warnings.catch_warnings(action="ignore"):
        equal(mine, classification_report(true, predicted, output_dict=True, zero_division=0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.sets(st.sampled_from(["x", "y", "z"]))] * 2), min_size=1, max_size=20))
def test_several_labels_are_those_of_scikit_learn(pairs):
    from sklearn.metrics import accuracy_score, classification_report
    from sklearn.preprocessing import MultiLabelBinarizer

    predicted, true = map(list, zip(*pairs, strict=True))
    names = sorted(set().union(*predicted, *true))
    assume(len(names) > 1)  # of a single column it thinks otherwise
    mine, encode = metrics.classes(predicted, true), MultiLabelBinarizer(classes=names)
    predicted, true = encode.fit_transform(predicted), encode.transform(true)
    assert mine["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    with warnings.catch_warnings(action="ignore"):
        equal(
            mine,
            classification_report(
                true, predicted, target_names=names, output_dict=True, labels=range(len(names)), zero_division=0
            ),
        )


def test_a_table_holds_every_figure():
    mine = metrics.tags([["B-A", "O", "B-LONGER", "B-A"]], [["B-A", "B-A", "B-LONGER", "O"]])
    head, *rows, accuracy = tasks.metrics_table(mine)
    assert head.split() == ["precision", "recall", "F1", "support"]
    assert [row.split() for row in rows[:2]] == [
        ["A", "0.5000", "0.5000", "0.5000", "2"],
        ["LONGER", "1.0000", "1.0000", "1.0000", "1"],
    ]
    assert rows[2].split() == ["micro", "average", "0.6667", "0.6667", "0.6667", "3"]
    assert rows[3].split() == ["macro", "average", "0.7500", "0.7500", "0.7500", "3"]
    assert accuracy == "accuracy 0.5000" and len({len(row) for row in (head, *rows)}) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.sampled_from(WORDS), max_size=12)] * 2), min_size=1, max_size=6))
def test_rouge_l_is_that_of_rouge_score(pairs):
    from rouge_score.rouge_scorer import RougeScorer

    predicted, true = zip(*((" ".join(p), " ".join(r)) for p, r in pairs), strict=True)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predicted, true, strict=True)]
    assert metrics.rouge_l(predicted, true) == pytest.approx(sum(expected) / len(expected))


def test_bleu_and_chrf_are_sacrebleus_with_their_signatures():
    import sacrebleu

    predicted = ["The cat sat on a mat.", "Dogs bark, loudly."]
    true = ["The cat sat on the mat.", "The dogs bark loudly."]
    result = metrics.translation(predicted, true)
    assert result["bleu"] == sacrebleu.corpus_bleu(predicted, [true]).score
    assert result["chrf"] == sacrebleu.corpus_chrf(predicted, [true]).score
    assert "tok:13a" in result["bleu_signature"] and "version:" in result["chrf_signature"]
    assert 0 < result["bleu"] < 100 == round(metrics.translation(true, true)["bleu"], 6)
    chinese = metrics.translation(["2019年3月1日"], ["2019年3月2日"], tokenize="zh")
    assert "tok:zh" in chinese["bleu_signature"] and 0 < chinese["bleu"] < 100
    pairs = [Pair("2 January 2020", "二〇二〇年一月二日")] * 3
    scores = [
        table.score_translations([p.target for p in pairs], pairs, Translate(bleu_tokenize=how))
        for how in ("zh", "char", "13a")
    ]
    assert [round(found["bleu"]) for found, _ in scores] == [100, 100, 0]
    with pytest.raises(UserError, match="tokenize 'none of these': choose .*13a"):
        metrics.translation(predicted, true, tokenize="none of these")


def test_exact_match_and_perplexity():
    assert metrics.exact_match(["a", "b", "c"], ["a", "x", "c"]) == pytest.approx(2 / 3)
    assert metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert metrics.perplexity(1e6, 1) == math.inf


@pytest.mark.parametrize(
    "metric", [metrics.exact_match, metrics.classes, metrics.tags, metrics.rouge_l, metrics.translation]
)
def test_unequal_or_no_answers_are_refused(metric):
    for predicted, true in (([["a"]], [["a"], ["b"]]), ([], [])):
        with pytest.raises(UserError, match=f"{len(predicted)} predictions for {len(true)}"):
            metric(predicted, true)
    with pytest.raises(UserError, match="sentence 1: 1 predicted tags for 2 words"):
        metrics.tags([["O"], ["O"]], [["O"], ["O", "O"]])
