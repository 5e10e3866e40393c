"""What a model can be taught: for each task its examples, models, objective, answers and measures.

    task = TASKS["classify"]
    judge = Judge(model, config, tokenizer, labels, rows, mesh)
    numbers, predictions = judge(params)
"""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanoflax import (
    batching, beams, denoising, distributed, encoding, metrics, objectives, placement, sampling,
    sharding)
from nanoflax.examples import Chat, Classification, Pair, Tagging, Text


class Task(NamedTuple):
    """A row of TASKS."""

    examples: type  # of nanoflax.examples
    architectures: tuple  # that can learn it
    objective: Callable  # of nanoflax.objectives, over the batches of batching.Rows
    answer: Callable | None = None  # (judge, params, number of rows) -> predictions
    measure: Callable | None = None  # (predictions, examples, TaskConfig) -> (numbers, report)
    metrics: tuple = ("perplexity",)  # what a Judge finds beside validation_loss
    accuracy: str = ""  # what the share of targets that are likeliest is called, if it is told


def encode(examples, config, tokenizer, labels=(), several=False, report=None):
    """Examples as the batching.Rows of a Config's task, its noise among them."""
    task, noise = config.task, None
    if task.kind in ("masked_lm", "denoise"):
        noise = denoising.Noise(task, denoising.marked(task, tokenizer))
    return batching.encode(examples, tokenizer, task.length, labels, several, task.truncate,
                           task.target_length, report, noise)


class Judge:
    """Measures parameters on rows: their loss, and what the task is measured by.

    After a call, `report` holds every figure in a form for JSON. Of several processes all call it,
    and all find the same.
    """

    def __init__(self, model, config, tokenizer, labels, rows, mesh):
        """config: a Config; labels: the class names of classify and tag; rows: a batching.Rows."""
        self.model, self.config = model, config
        self.tokenizer = denoising.marked(config.task, tokenizer)
        self.labels, self.mesh, self.task = labels, mesh, TASKS[config.task.kind]
        self.rows = rows.drawn([(i, 0) for i in range(len(rows))])  # noise that stays the same
        if "source" in self.rows.rows[0] and self.task.examples is Text:
            self.rows = dataclasses.replace(self.rows, examples=[
                Pair(*(self.tokenizer.decode(row[name]) for name in ("source", "targets")),
                     text.place) for row, text in zip(self.rows.rows, rows.examples)])
        self.report = {}

        def sums(params, batch):
            _, nll, weight = self.task.objective(model, params, batch)
            right = weight if not self.task.accuracy else jnp.sum(
                batch["weights"] * (guesses(params, batch) == batch["targets"]))
            return nll, weight, right

        def logits(params, batch):
            return model.apply({"params": params}, batch["tokens"], batch["padding_mask"])

        def guesses(params, batch):
            return objectives.guesses(model, params, batch, self.tokenizer.vocab_size)

        self._sums, self._guesses, self._logits = (
            jax.jit(placement.traced_on(mesh, f)) for f in (sums, guesses, logits))

    def __call__(self, params, batches=0):
        """(numbers, predictions) on the first so many batches of the rows, 0 for all.

        numbers: {"validation_loss": nats, the task's figures}; predictions: one for each row, or
        none where the task is measured by its loss. With config.task.max_shift also the figures on
        the same rows shifted (always the same way), as NAME_shifted.
        """
        number = len(self.rows)
        if batches:
            number = min(number, batches * self.config.train.batch_size)
        numbers, predictions, self.report = self._measured(params, number)
        if self.config.task.max_shift:
            judge = copy.copy(self)
            judge.rows = self.rows.shifted(self.config.task.max_shift, 1.0, (0,), range(number))
            found, _, self.report["shifted"] = judge._measured(params, number)
            numbers |= {f"{name}_shifted": value for name, value in found.items()}
        return numbers, predictions

    def _measured(self, params, number):
        sums = np.zeros(3)
        for batch in self.batches(number):
            sums += [float(x) for x in self._sums(params, batch)]
        nats, weight, right = sums
        numbers = {"validation_loss": nats / max(weight, 1)}
        if self.task.measure is None:
            numbers["perplexity"] = metrics.perplexity(nats, max(weight, 1))
        if self.task.accuracy:
            numbers[self.task.accuracy] = right / max(weight, 1)
        predictions = self.task.answer(self, params, number) if self.task.answer else []
        if self.task.measure is None:
            return numbers, predictions, {}
        figures, report = self.task.measure(predictions, self.rows.examples[:number],
                                            self.config.task)
        return numbers | figures, predictions, report

    def batches(self, number):
        """The first rows in batches on the mesh; the last is filled up with rows of weight 0."""
        B = sharding.whole_batch(self.config.train.batch_size, self.mesh)
        own = sharding.rows(self.mesh, B)
        for batch in itertools.islice(batching.evaluation(self.rows, B, own), -(-number // B)):
            yield sharding.put_batch(batch, self.mesh)
            distributed.alive()

    def logits(self, params, number):
        """The logits and the weights of each of the first rows."""
        found = (map(sharding.fetch, (self._logits(params, batch), batch["weights"]))
                 for batch in self.batches(number))
        return list(itertools.islice(
            (pair for logits, weights in found for pair in zip(logits, weights)), number))


def records(examples, predictions):
    """Each example's fields and what a model said of it, as a dict for JSON."""
    for example, said in zip(examples, predictions):
        fields = {field: getattr(example, field) for field in example.fields
                  if hasattr(example, field)}
        if hasattr(example, "labels"):
            fields["label"] = example.labels
        yield fields | {"prediction": said}


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
    return [encoding.word_tags(row.argmax(-1), weights, judge.labels, len(example.tokens))
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
        distributed.alive()
    return found[:number]


def filled(judge, params, number):
    """Each text with the model's guesses, between ⟦ and ⟧, where it was masked."""
    found = []
    for batch in judge.batches(number):
        tokens, guesses, weights, real = map(sharding.fetch, (
            batch["targets"], judge._guesses(params, batch), batch["weights"],
            batch["padding_mask"]))
        found += [encoding.show_mask(judge.tokenizer, row[mask], w[mask]) for row, w, mask in
                  zip(np.where(weights > 0, guesses, tokens), weights, real)]
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
    return {"exact_match": metrics.exact_match(predictions, targets), "bleu": report["bleu"],
            "chrf": report["chrf"], "rouge_l": metrics.rouge_l(predictions, targets)}, report


def exact(predictions, examples, _):
    found = {"exact_match": metrics.exact_match(predictions, [e.target for e in examples])}
    return found, found


TASKS = {
    "classify": Task(Classification, ("encoder", "decoder"), objectives.classify, class_names,
                     class_scores, ("accuracy", "macro_f1")),
    "tag": Task(Tagging, ("encoder",), objectives.tag, tag_names, tag_scores,
                ("f1", "accuracy")),
    "translate": Task(Pair, ("encoder_decoder", "lstm"), objectives.seq2seq, written, text_scores,
                      ("exact_match", "bleu", "chrf", "rouge_l")),
    "instruct": Task(Chat, ("decoder",), objectives.causal_lm),
    "language_model": Task(Text, ("decoder",), objectives.causal_lm),
    "masked_lm": Task(Text, ("encoder",), objectives.masked_lm, filled, None,
                      ("perplexity", "masked_accuracy"), "masked_accuracy"),
    "denoise": Task(Text, ("encoder_decoder", "lstm"), objectives.seq2seq, written, exact,
                    ("exact_match", "token_accuracy"), "token_accuracy"),
}
