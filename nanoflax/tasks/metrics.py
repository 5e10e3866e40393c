"""How good a model's answers are: perplexity, classes, entities, translations, summaries.

BLEU and chrF are sacrebleu's. Entities give the numbers of seqeval, classes those of scikit-learn
and ROUGE-L those of rouge-score (each a large dependency for a page of code; tests compare them).
"""

import collections
import math
import re

from nanoflax.errors import UserError


def perplexity(nll, weight):
    """exp of the mean cross entropy: `nll` the sum in nats, `weight` the number of tokens."""
    try:
        return math.exp(nll / weight)
    except OverflowError:
        return math.inf


def exact_match(predictions, references):
    """The share of predictions that equal their references."""
    _same_number(predictions, references)
    return sum(p == r for p, r in zip(predictions, references)) / len(references)


def _same_number(predictions, references):
    if len(predictions) != len(references) or not references:
        raise UserError(
            f"{len(predictions)} predictions for {len(references)} references: they must be as many, and not none"
        )


# Classes and entities: both count what was right, predicted and there, for each class.


def classes(predictions, references):
    """Classification: predicted and true labels of each example, one name or several.

    Returns {"accuracy": the share wholly right, "micro", "macro" and "weighted": scores,
    "classes": {name: scores}}, where scores are {"precision", "recall", "f1", "support"} and 0
    where they divide by 0.
    """
    _same_number(predictions, references)
    predicted, true = ([{x} if isinstance(x, str) else set(x) for x in side] for side in (predictions, references))
    return {"accuracy": exact_match(predicted, true)} | _scores(predicted, true, lambda x: x)


def tags(predictions, references, strict=False):
    """Entities of tagged sentences, as seqeval counts them: right if type and both ends are.

    predictions, references: a list of BIO tags for each sentence, words alone. See `entities` for
    strict. Returns what `classes` does; accuracy is the share of words.
    """
    _same_number(predictions, references)
    for i, (p, r) in enumerate(zip(predictions, references)):
        if len(p) != len(r):
            raise UserError(f"sentence {i}: {len(p)} predicted tags for {len(r)} words")
    words = [tag for tags in references for tag in tags]
    found = exact_match([tag for tags in predictions for tag in tags], words)
    predicted, true = ([set(entities(tags, strict)) for tags in side] for side in (predictions, references))
    return {"accuracy": found} | _scores(predicted, true, lambda entity: entity[0])


def entities(tags, strict=False):
    """BIO tags -> [(type, first word, last word + 1)], in order.

    An I- that continues nothing begins an entity, as in seqeval by default, or with `strict`
    belongs to none, as in its mode "strict" with IOB2.
    """
    found, kind, start = [], None, 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if prefix == "I" and name == kind:
            continue
        if kind is not None:
            found.append((kind, start, i))
        begins = prefix == "B" or prefix == "I" and not strict
        kind, start = (name, i) if begins else (None, i)
    return found


def _scores(predicted, true, class_of):
    right, guessed, there = (collections.Counter() for _ in range(3))
    for p, t in zip(predicted, true):
        for counter, items in ((right, p & t), (guessed, p), (there, t)):
            counter.update(map(class_of, items))
    names = sorted(guessed | there)
    by_class = {name: _score(right[name], guessed[name], there[name]) for name in names}

    def mean(weights):
        total = sum(weights.values()) or 1
        return {
            key: sum(weights[name] * by_class[name][key] for name in names) / total
            for key in ("precision", "recall", "f1")
        } | {"support": there.total()}

    return {
        "micro": _score(right.total(), guessed.total(), there.total()),
        "macro": mean(dict.fromkeys(names, 1)),
        "weighted": mean(there),
        "classes": by_class,
    }


def _score(right, guessed, there):
    return {
        "precision": right / guessed if guessed else 0.0,
        "recall": right / there if there else 0.0,
        "f1": 2 * right / (guessed + there) if guessed + there else 0.0,
        "support": there,
    }


def metrics_table(result):
    """The lines of a report of `classes` or `tags`, for people."""
    rows = [*result["classes"].items(), *((f"{name} average", result[name]) for name in ("micro", "macro", "weighted"))]
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


def translation(predictions, references, tokenize="13a"):
    """Corpus BLEU and chrF by sacrebleu, each with the signature that a paper must print.

    tokenize: sacrebleu's, "13a" for languages with spaces, "zh", "ja-mecab", "char", ...
    Returns {"bleu", "chrf", "bleu_signature", "chrf_signature"}.
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


def rouge_l(predictions, references):
    """The mean F1 of the longest common subsequence of words (Lin 2004), between 0 and 1.

    Words are runs of a-z and 0-9 in lower case, not stemmed, as in rouge-score.
    """
    _same_number(predictions, references)
    total = 0.0
    for pair in zip(predictions, references):
        p, r = (re.findall("[a-z0-9]+", text.lower()) for text in pair)
        if common := _longest_common_subsequence(p, r):
            total += 2 * common / (len(p) + len(r))
    return total / len(references)


def _longest_common_subsequence(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0  # the cell up and to the left
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
