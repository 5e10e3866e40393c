"""Metrics of predictions: perplexity, classes, entities, translations, summaries.

sacrebleu computes BLEU and chrF. The other metrics are short functions here, so that seqeval, scikit-learn and
rouge-score are no dependencies; tests compare the results with theirs.
"""

import collections
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nanoflax.errors import UserError
from nanoflax.report import printable
from nanoflax.tasks.tags import to_bio


def perplexity(nll: float, weight: float) -> float:
    """exp of the mean cross entropy: `nll` the sum in nats, `weight` the number of tokens."""
    try:
        return math.exp(nll / weight)
    except OverflowError:
        return math.inf


def exact_match(predictions: Sequence, references: Sequence) -> float:
    """The share of predictions that equal their references."""
    _same_number(predictions, references)
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def _same_number(predictions: Sequence, references: Sequence) -> None:
    if len(predictions) != len(references) or not references:
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} references: the numbers must be equal and not 0"
        )


# Classes and entities. Both metrics count true positives, predictions and references of each class.


def classes(predictions: Sequence[str | Iterable[str]], references: Sequence[str | Iterable[str]]) -> dict[str, Any]:
    """The scores of a classification. predictions, references: the label or labels of each example.

    Returns: {"accuracy": the share of examples with all labels right, "micro", "macro" and "weighted": scores,
    "classes": {name: scores}}; scores are {"precision", "recall", "f1", "support"}. A division by 0 gives 0.
    """
    _same_number(predictions, references)
    predicted, true = ([{x} if isinstance(x, str) else set(x) for x in side] for side in (predictions, references))
    return {"accuracy": exact_match(predicted, true)} | _scores(predicted, true, lambda x: x)


def tags(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]], strict: bool = False
) -> dict[str, Any]:
    """The scores of tagging, as in seqeval: an entity is right if its type, start and end are right.

    predictions, references: a list of BIO tags for each sentence, one tag per word. strict: see `entities`.
    Returns: as `classes`; accuracy is the share of words with the right tag.
    """
    _same_number(predictions, references)
    for i, (p, r) in enumerate(zip(predictions, references, strict=True)):
        if len(p) != len(r):
            raise UserError(f"sentence {i}: {len(p)} predicted tags for {len(r)} words")
    words = [tag for tags in references for tag in tags]
    found = exact_match([tag for tags in predictions for tag in tags], words)
    predicted, true = ([set(entities(tags, strict)) for tags in side] for side in (predictions, references))
    return {"accuracy": found} | _scores(predicted, true, lambda entity: entity[0])


def entities(tags: Sequence[str], strict: bool = False) -> list[tuple[str, int, int]]:
    """The (type, first word, last word + 1) of each entity, in order.

    Tags may be of BIO, BIOES or BILOU: see `to_bio`. A tag that continues no entity begins one, as in seqeval by
    default; with `strict`, which is for BIO, it is in no entity, as in seqeval's mode "strict" with IOB2.
    """
    found, kind, start = [], None, 0
    for i, tag in enumerate([*(tags if strict else to_bio(tags)[0]), "O"]):
        prefix, _, name = tag.partition("-")
        if prefix == "I" and name == kind:
            continue
        if kind is not None:
            found.append((kind, start, i))
        kind, start = (name, i) if prefix == "B" else (None, i)
    return found


def _scores(predicted: list[set], true: list[set], class_of: Callable[[Any], str]) -> dict[str, Any]:
    n_right, n_predicted, n_true = (collections.Counter() for _ in range(3))
    for p, t in zip(predicted, true, strict=True):
        for counter, items in ((n_right, p & t), (n_predicted, p), (n_true, t)):
            counter.update(map(class_of, items))
    names = sorted(n_predicted | n_true)
    by_class = {name: _score(n_right[name], n_predicted[name], n_true[name]) for name in names}

    def mean(weights: dict[str, int]) -> dict[str, float]:
        total = sum(weights.values()) or 1
        return {
            key: sum(weights[name] * by_class[name][key] for name in names) / total
            for key in ("precision", "recall", "f1")
        } | {"support": n_true.total()}

    return {
        "micro": _score(n_right.total(), n_predicted.total(), n_true.total()),
        "macro": mean(dict.fromkeys(names, 1)),
        "weighted": mean(n_true),
        "classes": by_class,
    }


def _score(n_right: int, n_predicted: int, n_true: int) -> dict[str, float]:
    return {
        "precision": n_right / n_predicted if n_predicted else 0.0,
        "recall": n_right / n_true if n_true else 0.0,
        "f1": 2 * n_right / (n_predicted + n_true) if n_predicted + n_true else 0.0,
        "support": n_true,
    }


def metrics_table(result: dict[str, Any]) -> list[str]:
    """The lines of a readable table of the result of `classes` or `tags`. Names of classes are safe to print."""
    classes = {printable(name): scores for name, scores in result["classes"].items()}
    rows = [*classes.items(), *((f"{name} average", result[name]) for name in ("micro", "macro", "weighted"))]
    width = max(len(name) for name, _ in rows)
    head = f"{'':{width}}  precision  recall      F1  support"
    return [
        head,
        *(
            f"{name:{width}}  {s['precision']:9.4f}  {s['recall']:6.4f}  {s['f1']:6.4f}  {s['support']:7d}"
            for name, s in rows
        ),
        f"accuracy {result['accuracy']:.4f}",
    ]


# Generated text.


def translation(predictions: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> dict[str, Any]:
    """Corpus BLEU and chrF by sacrebleu, with its signatures, which papers print.

    tokenize: of sacrebleu: "13a" for languages with spaces, "zh", "ja-mecab", "char", ...
    Returns: {"bleu", "chrf", "bleu_signature", "chrf_signature"}.
    """
    import sacrebleu

    _same_number(predictions, references)
    if tokenize not in sacrebleu.BLEU.TOKENIZERS:
        raise UserError(f"tokenize {tokenize!r}: choose {', '.join(sacrebleu.BLEU.TOKENIZERS)}")
    result = {}
    for name, metric in (("bleu", sacrebleu.BLEU(tokenize=tokenize)), ("chrf", sacrebleu.CHRF())):
        result[name] = metric.corpus_score(list(predictions), [list(references)]).score
        result[f"{name}_signature"] = str(metric.get_signature())
    return result


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean F1 of the longest common subsequence of words (Lin 2004), from 0 to 1.

    Words are runs of a-z and 0-9 in lower case, not stemmed, as in rouge-score.
    """
    _same_number(predictions, references)
    total = 0.0
    for pair in zip(predictions, references, strict=True):
        p, r = (re.findall("[a-z0-9]+", text.lower()) for text in pair)
        if common := _longest_common_subsequence(p, r):
            total += 2 * common / (len(p) + len(r))
    return total / len(references)


def _longest_common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0  # the cell above and to the left
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
