"""Measure a model on the examples of a task."""

import copy
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from nanoflax import parallel, train
from nanoflax.tasks import metrics
from nanoflax.tasks.batches import evaluation_batches
from nanoflax.tasks.encoding import encode
from nanoflax.tasks.kinds import Pair, Text
from nanoflax.tasks.table import TASKS, length_limits, noise_for, with_sentinels


def encode_for_task(examples, config, tokenizer, labels=(), multi_label=False, report=None):
    """Examples as the Rows of a Config's task, with its noise."""
    task, limits = config.task, length_limits(config.task)
    noise = noise_for(task, with_sentinels(task, tokenizer))
    return encode(
        examples, tokenizer, task.length, labels, multi_label, task.truncate, limits.get("task.target_length"),
        report, noise
    )  # fmt: skip


def encode_texts(texts, config, tokenizer, labels=(), multi_label=False, report=None, place="text"):
    """Texts to predict from, without labels, as the Rows of a Config's task; their places are "text 1" and so on."""
    make = TASKS[config.task.kind].unlabelled
    examples = [make(text, f"{place} {i}") for i, text in enumerate(texts, 1)]
    return encode_for_task(examples, config, tokenizer, labels, multi_label, report)


class Evaluator:
    """Measures parameters on rows: their loss, and what the task is measured by.

    After a call, `report` holds every figure in a form for JSON. Of several processes all call it,
    and all find the same.
    """

    def __init__(self, model, config, tokenizer, labels, rows, mesh):
        """config: a Config; labels: the class names of classify and tag; rows: Rows."""
        self.model, self.config = model, config
        self.tokenizer = with_sentinels(config.task, tokenizer)
        self.labels, self.mesh, self.task = labels, mesh, TASKS[config.task.kind]
        self.rows, self.report = self._with_noise(rows), {}

        def sums(params, batch):
            _, nll, weight = self.task.objective(model, params, batch)
            right = (
                weight
                if not self.task.token_accuracy
                else jnp.sum(batch["weights"] * (guesses(params, batch) == batch["targets"]))
            )
            return nll, weight, right

        def logits(params, batch):
            return model.apply({"params": params}, batch["tokens"], batch["padding_mask"])

        def guesses(params, batch):
            return train.guesses(model, params, batch, self.tokenizer.vocab_size)

        self._sums, self.guesses, self._logits = (jax.jit(parallel.with_mesh(mesh, f)) for f in (sums, guesses, logits))

    def _with_noise(self, rows):
        """The rows, their noise drawn once; the example of a noisy text is the Pair that the noise made."""
        drawn = rows.with_noise([(i, 0) for i in range(len(rows))])
        if "source" not in drawn.rows[0] or self.task.examples is not Text:
            return drawn
        pairs = [
            Pair(*(self.tokenizer.decode(row[name]) for name in ("source", "targets")), text.place)
            for row, text in zip(drawn.rows, rows.examples, strict=True)
        ]
        return dataclasses.replace(drawn, examples=pairs)

    def with_rows(self, rows):
        """This evaluator, and what it has compiled, for other rows."""
        other = copy.copy(self)
        other.rows, other.report = self._with_noise(rows), {}
        return other

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
        if getattr(self.config.task, "max_shift", 0):
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
        if self.task.score is None:
            numbers["perplexity"] = metrics.perplexity(nats, max(weight, 1))
        if self.task.token_accuracy:
            numbers[self.task.token_accuracy] = right / max(weight, 1)
        predictions = self.predict(params, number)
        if self.task.score is None:
            return numbers, predictions, {}
        figures, report = self.task.score(predictions, self.rows.examples[:number], self.config.task)
        return numbers | figures, predictions, report

    def predict(self, params, number=None):
        """A prediction for each of the first rows (default: all), which need no labels; [] for a
        task that is measured by its loss alone."""
        number = len(self.rows) if number is None else number
        return self.task.predict(self, params, number) if self.task.predict else []

    def describe(self, params):
        """What to tell of each row: {class: probability}, (word, tag) pairs, or a text; Task.show writes it."""
        return self.task.describe(self, params, len(self.rows))

    def batches(self, number):
        """The first rows in batches on the mesh; the last is filled up with rows of weight 0."""
        B = parallel.divisible_batch_size(self.config.train.batch_size, self.mesh)
        own = parallel.own_rows(self.mesh, B)
        for batch in itertools.islice(evaluation_batches(self.rows, B, own), -(-number // B)):
            yield parallel.put_batch(batch, self.mesh)
            parallel.reset_watchdog()

    def logits(self, params, number):
        """The logits and the weights of each of the first rows."""
        found = (map(parallel.fetch, (self._logits(params, batch), batch["weights"])) for batch in self.batches(number))
        return list(itertools.islice((pair for logits, weights in found for pair in zip(logits, weights)), number))


def prediction_records(examples, predictions):
    """Each example's fields and what a model said of it, as a dict for JSON."""
    for example, said in zip(examples, predictions):
        fields = {field: getattr(example, field) for field in example.fields if hasattr(example, field)}
        if hasattr(example, "labels"):
            fields["label"] = example.labels
        yield fields | {"prediction": said}
