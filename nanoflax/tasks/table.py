"""What a model can be taught: for each task its examples, models, objective, answers and measures.

task = TASKS["classify"]
judge = Judge(model, config, tokenizer, labels, rows, mesh)
numbers, predictions = judge(params)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from nanoflax import generate, parallel, tokenizers, train
from nanoflax.tasks import metrics
from nanoflax.tasks.kinds import Chat, Classification, Pair, Tagging, Text


class Task(NamedTuple):
    """A row of TASKS."""

    examples: type  # of nanoflax.examples
    architectures: tuple  # that can learn it
    objective: Callable  # of nanoflax.objectives, over the batches of batching.Rows
    answer: Callable | None = None  # (judge, params, number of rows) -> predictions
    measure: Callable | None = None  # (predictions, examples, TaskConfig) -> (numbers, report)
    metrics: tuple = ("perplexity",)  # what a Judge finds beside validation_loss
    accuracy: str = ""  # what the share of targets that are likeliest is called, if it is told


# Answers.


def class_names(judge, params, number):
    """The name of the likeliest class of each text, or of all likelier than not of several."""
    names, found = judge.labels, probabilities(judge, params, number)
    if judge.rows.rows[0]["label"].ndim:
        return [tuple(name for name, p in zip(names, row) if p > 0.5) for row in found]
    return [(names[row.argmax()],) for row in found]


def probabilities(judge, params, number):
    """The probability of each class of each text; of several labels, of each by itself."""
    logits = np.array([row for row, _ in judge.logits(params, number)])
    several = judge.rows.rows[0]["label"].ndim
    return np.asarray(jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits))


def tag_names(judge, params, number):
    """The tag of each word of each sentence."""
    return [
        tokenizers.word_tags(row.argmax(-1), weights, judge.labels, len(example.tokens))
        for (row, weights), example in zip(judge.logits(params, number), judge.rows.examples)
    ]


def written(judge, params, number):
    """What the model writes for each source, greedily or by config.task.beams."""
    task, B, tokenizer = judge.config.task, judge.config.train.batch_size, judge.tokenizer
    options = dict(max_new_tokens=task.target_length, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    sources, found = [row["source"].tolist() for row in judge.rows.rows[:number]], []
    for i in range(0, number, B):
        part = sources[i : i + B]
        part += [part[-1]] * (B - len(part))  # no compilation for the last batch
        new = (
            generate.beam_search(judge.model, params, part, task.beams, **options)
            if task.beams > 1
            else generate.sample(judge.model, params, part, temperature=0, **options)
        )
        found += map(tokenizer.decode, new)
        parallel.alive()
    return found[:number]


def filled(judge, params, number):
    """Each text with the model's guesses, between ⟦ and ⟧, where it was masked."""
    found = []
    for batch in judge.batches(number):
        tokens, guesses, weights, real = map(
            parallel.fetch, (batch["targets"], judge._guesses(params, batch), batch["weights"], batch["padding_mask"])
        )
        found += [
            tokenizers.show_mask(judge.tokenizer, row[mask], w[mask])
            for row, w, mask in zip(np.where(weights > 0, guesses, tokens), weights, real)
        ]
    return found[:number]


# Measures.


def class_scores(predictions, examples, _):
    report = metrics.classes(predictions, [example.labels for example in examples])
    return {"accuracy": report["accuracy"], "macro_f1": report["macro"]["f1"]}, report


def tag_scores(predictions, examples, _):
    report = metrics.tags(predictions, [list(example.tags) for example in examples])
    return {"f1": report["micro"]["f1"], "accuracy": report["accuracy"]}, report


def text_scores(predictions, examples, task):
    targets = [example.target for example in examples]
    report = metrics.translation(predictions, targets, task.bleu_tokenize)
    copied = metrics.translation([e.source for e in examples], targets, task.bleu_tokenize)
    report["bleu_of_source"] = copied["bleu"]
    return {
        "exact_match": metrics.exact_match(predictions, targets),
        "bleu": report["bleu"],
        "chrf": report["chrf"],
        "rouge_l": metrics.rouge_l(predictions, targets),
    }, report


def exact(predictions, examples, _):
    found = {"exact_match": metrics.exact_match(predictions, [e.target for e in examples])}
    return found, found


TASKS = {
    "classify": Task(Classification, ("encoder", "decoder"), train.classify, class_names,
                     class_scores, ("accuracy", "macro_f1")),
    "tag": Task(Tagging, ("encoder",), train.tag, tag_names, tag_scores,
                ("f1", "accuracy")),
    "translate": Task(Pair, ("encoder_decoder", "lstm"), train.seq2seq, written, text_scores,
                      ("exact_match", "bleu", "chrf", "rouge_l")),
    "instruct": Task(Chat, ("decoder",), train.causal_lm),
    "language_model": Task(Text, ("decoder",), train.causal_lm),
    "masked_lm": Task(Text, ("encoder",), train.masked_lm, filled, None,
                      ("perplexity", "masked_accuracy"), "masked_accuracy"),
    "denoise": Task(Text, ("encoder_decoder", "lstm"), train.seq2seq, written, exact,
                    ("exact_match", "token_accuracy"), "token_accuracy"),
}  # fmt: skip
