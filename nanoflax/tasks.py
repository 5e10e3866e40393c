"""What a model can be taught: for each task its examples, models, objective, answers and measures.

    task = TASKS["classify"]
    judge = Judge(model, config, tokenizer, labels, rows)
    numbers, predictions = judge(params)
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from nanoflax import batching, beams, metrics, objectives, sampling, sharding
from nanoflax.examples import Chat, Classification, Pair, Tagging, Text


class Task(NamedTuple):
    """A row of TASKS."""

    examples: type  # of nanoflax.examples
    architectures: tuple  # that can learn it
    objective: Callable  # of nanoflax.objectives, over the batches of batching.Rows
    answer: Callable | None = None  # (judge, params, number of rows) -> predictions
    measure: Callable | None = None  # (predictions, examples) -> (numbers, report)
    metrics: tuple = ("perplexity",)  # what a Judge finds beside validation_loss


class Judge:
    """Measures parameters on rows: their loss, and what the task is measured by.

    After a call, `report` holds every figure in a form for JSON.
    """

    def __init__(self, model, config, tokenizer, labels, rows, mesh):
        """config: a Config; labels: the class names of classify and tag; rows: a batching.Rows."""
        self.model, self.config, self.tokenizer = model, config, tokenizer
        self.labels, self.rows, self.mesh = labels, rows, mesh
        self.task = TASKS[config.task.kind]
        self.report = {}
        self._sums = jax.jit(
            lambda params, batch: self.task.objective(model, params, batch)[1:])
        self._logits = jax.jit(lambda params, batch: model.apply(
            {"params": params}, batch["tokens"], batch["padding_mask"]))

    def __call__(self, params, batches=0):
        """(numbers, predictions) on the first so many batches of the rows, 0 for all.

        numbers: {"validation_loss": nats, the task's figures}; predictions: one for each row, or
        none where the task is measured by its loss.
        """
        number = len(self.rows)
        if batches:
            number = min(number, batches * self.config.train.batch_size)
        sums = np.zeros(2)
        for batch in self.batches(number):
            sums += [float(x) for x in self._sums(params, batch)]
        numbers = {"validation_loss": sums[0] / max(sums[1], 1)}
        if self.task.answer is None:
            return numbers | {"perplexity": metrics.perplexity(*sums)}, []
        predictions = self.task.answer(self, params, number)
        figures, self.report = self.task.measure(predictions, self.rows.examples[:number])
        return numbers | figures, predictions

    def batches(self, number):
        """The first rows in batches on the mesh; the last is filled up with rows of weight 0."""
        B = self.config.train.batch_size
        for batch in itertools.islice(batching.evaluation(self.rows, B), -(-number // B)):
            yield sharding.put_batch(batch, self.mesh)

    def logits(self, params, number):
        """The logits and the weights of each of the first rows."""
        found = ((np.asarray(self._logits(params, batch)), np.asarray(batch["weights"]))
                 for batch in self.batches(number))
        return list(itertools.islice(
            (pair for logits, weights in found for pair in zip(logits, weights)), number))


# Answers.


def class_names(judge, params, number):
    """The name of the likeliest class of each text, or of all likelier than not of several."""
    names, logits = judge.labels, judge.logits(params, number)
    if judge.rows.rows[0]["label"].ndim:
        return [tuple(name for name, x in zip(names, row) if x > 0) for row, _ in logits]
    return [(names[row.argmax()],) for row, _ in logits]


def tag_names(judge, params, number):
    """The tag of each word of each sentence."""
    return [batching.word_tags(row.argmax(-1), weights, judge.labels, len(example.tokens))
            for (row, weights), example in zip(judge.logits(params, number), judge.rows.examples)]


def written(judge, params, number):
    """What the model writes for each source, greedily or by config.task.beams."""
    task, B, tokenizer = judge.config.task, judge.config.train.batch_size, judge.tokenizer
    options = dict(max_new_tokens=task.target_length, eos_id=tokenizer.eos_id,
                   vocab_size=tokenizer.vocab_size)
    sources, found = [row["source"].tolist() for row in judge.rows.rows[:number]], []
    for i in range(0, number, B):
        part = sources[i:i + B]
        part += [part[-1]] * (B - len(part))  # no compilation for the last batch
        new = (beams.beam_search(judge.model, params, part, task.beams, **options)
               if task.beams > 1 else
               sampling.sample(judge.model, params, part, temperature=0, **options))
        found += map(tokenizer.decode, new)
    return found[:number]


# Measures.


def class_scores(predictions, examples):
    report = metrics.classes(predictions, [example.labels for example in examples])
    return {"accuracy": report["accuracy"], "macro_f1": report["macro"]["f1"]}, report


def tag_scores(predictions, examples):
    report = metrics.tags(predictions, [list(example.tags) for example in examples])
    return {"f1": report["micro"]["f1"], "accuracy": report["accuracy"]}, report


def text_scores(predictions, examples):
    targets = [example.target for example in examples]
    report = metrics.translation(predictions, targets)
    return {"exact_match": metrics.exact_match(predictions, targets), "bleu": report["bleu"],
            "chrf": report["chrf"], "rouge_l": metrics.rouge_l(predictions, targets)}, report


TASKS = {
    "classify": Task(Classification, ("encoder", "decoder"), objectives.classify, class_names,
                     class_scores, ("accuracy", "macro_f1")),
    "tag": Task(Tagging, ("encoder",), objectives.tag, tag_names, tag_scores,
                ("f1", "accuracy")),
    "translate": Task(Pair, ("encoder_decoder", "lstm"), objectives.seq2seq, written, text_scores,
                      ("exact_match", "bleu", "chrf", "rouge_l")),
    "instruct": Task(Chat, ("decoder",), objectives.causal_lm),
    "language_model": Task(Text, ("decoder",), objectives.causal_lm),
}
