"""Measures a model on the examples of a task, and predicts from texts without labels."""

import collections
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nanoflax import parallel, train
from nanoflax.config import Config
from nanoflax.data import DataReport
from nanoflax.tasks import metrics
from nanoflax.tasks.batches import evaluation_batches, is_packed
from nanoflax.tasks.encoding import encode
from nanoflax.tasks.kinds import Classification, Example, Pair, Text
from nanoflax.tasks.packing import packed_evaluation
from nanoflax.tasks.rows import Rows
from nanoflax.tasks.table import TASKS, length_limits, noise_for, objective_of, with_sentinels


def encode_for_task(
    examples: Sequence[Example], config: Config, tokenizer: Any, report: DataReport | None = None
) -> Rows:
    """Encodes examples as Rows for the task of a Config, with the noise of this task. See `encode`."""
    task: Any = config.task  # any kind except Pretrain, which has no examples
    names, several = config.model.class_names, config.model.multi_label
    target_length = length_limits(task).get("task.target_length")
    noise = noise_for(task, with_sentinels(task, tokenizer))
    form: dict[str, Any] = dict(chat=getattr(task, "chat", None), scored=TASKS[task.kind].gives_score)
    return encode(examples, tokenizer, task.length, names, several, task.truncate, target_length, report, noise, **form)


def encode_texts(
    texts: Sequence[str], config: Config, tokenizer: Any, report: DataReport | None = None, place: str = "text"
) -> Rows:
    """Encodes texts without labels as Rows for prediction. Their places are "text 1", "text 2", ..."""
    make = TASKS[config.task.kind].unlabelled
    examples = [make(text, f"{place} {i}") for i, text in enumerate(texts, 1)]
    return encode_for_task(examples, config, tokenizer, report)


class Evaluator:
    """Measures parameters on rows: the loss and the metrics of the task.

    objective: default that of the task. After a call, `report` has the details for JSON. In a run of several processes,
    all must call the Evaluator, and all get the same results.
    """

    def __init__(
        self,
        model: Any,
        config: Config,
        tokenizer: Any,
        rows: Rows,
        mesh: jax.sharding.Mesh,
        objective: Callable | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.tokenizer = with_sentinels(config.task, tokenizer)
        self.mesh, self.task = mesh, TASKS[config.task.kind]
        self.rows, self.report = self._with_noise(rows), {}
        # The alignment.Reward of a task with rewards. The caller sets it: opening the one that task.reward names may
        # execute code of a stranger's directory.
        self.reward: Any = None

        objective = objective or objective_of(config.task)

        def sums(params, batch):
            found = objective(model, params, batch)
            logged = dict(found.logged)
            if name := self.task.token_accuracy:
                logged[name] = jnp.sum(batch["weights"] * (guesses(params, batch) == batch["targets"]))
            return {"validation_loss": found.loss, "weight": found.weight} | logged

        def logits(params, batch):
            return model.apply({"params": params}, batch["tokens"], batch["padding_mask"])

        def guesses(params, batch):
            return train.guesses(model, params, batch, self.tokenizer.vocab_size)

        def rewards(params, batch):
            assert self.task.pair_rewards, "this task has no pairs"
            return self.task.pair_rewards(model, params, batch, config.task)

        functions = (sums, guesses, logits, rewards)
        self._sums, self.guesses, self._logits, self._rewards = (
            jax.jit(parallel.with_mesh(mesh, f)) for f in functions
        )

    def _with_noise(self, rows: Rows) -> Rows:
        """The rows with the noise of epoch 0. For denoising, their examples are Pairs (corrupted text, target)."""
        noisy = rows.with_noise([(i, 0) for i in range(len(rows))])
        if "source" not in noisy.rows[0] or self.task.examples is not Text:
            return noisy
        pairs = [
            Pair(self.tokenizer.decode(row["source"]), self.tokenizer.decode(row["targets"]), text.place)
            for row, text in zip(noisy.rows, rows.examples, strict=True)
        ]
        return dataclasses.replace(noisy, examples=pairs)

    def with_rows(self, rows: Rows) -> "Evaluator":
        """An evaluator of other rows that shares the compiled functions of this one."""
        other = copy.copy(self)
        other.rows, other.report = self._with_noise(rows), {}
        return other

    def __call__(self, params: Any, batches: int = 0) -> tuple[dict[str, float], list]:
        """(numbers, predictions) on the first `batches` batches of the rows; 0: on all.

        If the task packs its rows, so does the evaluation, with the same results: a batch holds more of them.
        numbers: validation_loss in nats and the metrics of the task. predictions: one for each row, or [] if only the
        loss measures the task. With config.task.max_shift, numbers also has NAME_shifted, measured on the same rows
        with a shift; each evaluation uses the same shifts.
        """
        number = len(self.rows)
        if batches:
            per_row = self.rows.length / self.rows.mean_tokens if is_packed(self.config.task) else 1
            number = min(number, int(batches * self.config.train.batch_size * per_row))
        numbers, predictions, self.report = self._measure(params, number)
        if max_shift := getattr(self.config.task, "max_shift", 0):
            shifted = copy.copy(self)
            shifted.rows = self.rows.shifted(max_shift, 1.0, (0,), range(number))
            found, _, self.report["shifted"] = shifted._measure(params, number)
            found.pop("bits_per_byte", None)  # the bytes of shifted texts are not known
            numbers |= {f"{name}_shifted": value for name, value in found.items()}
        return numbers, predictions

    def _measure(self, params: Any, number: int) -> tuple[dict[str, float], list, dict]:
        sums = collections.Counter()  # of float64
        for batch in self.batches(number) if self.task.measures_loss else ():
            sums.update({name: float(x) for name, x in self._sums(params, batch).items()})
        weight = max(sums.pop("weight", 0), 1)
        first = {"validation_loss": 0.0} if self.task.measures_loss else {}
        numbers = first | {name: total / weight for name, total in sums.items()}
        if "perplexity" in self.task.metrics:
            numbers["perplexity"] = metrics.perplexity(sums["validation_loss"], weight)
        if "bits_per_byte" in self.task.metrics:
            size = sum(len(example.text.encode(errors="replace")) for example in self.rows.examples[:number])
            numbers["bits_per_byte"] = sums["validation_loss"] / math.log(2) / max(size, 1)
        predictions = self.predict(params, number)
        if self.task.score is None:
            return numbers, predictions, {}
        figures, report = self.task.score(predictions, self.rows.examples[:number], self.config.task)
        return numbers | figures, predictions, report

    def predict(self, params: Any, number: int | None = None) -> list:
        """A prediction for each of the first `number` rows (default: all), with or without labels; [] if only the
        loss measures the task."""
        number = len(self.rows) if number is None else number
        return self.task.predict(self, params, number) if self.task.predict else []

    def describe(self, params: Any) -> list:
        """The result to show for each row: {class: probability}, (word, tag) pairs, or a text. See Task.show."""
        assert self.task.describe, "this task predicts by Task.prompt"
        return self.task.describe(self, params, len(self.rows))

    def batches(self, number: int) -> Iterator[dict[str, Any]]:
        """The first `number` rows in batches on the mesh. Rows of weight 0 fill the last batch."""
        B = parallel.divisible_batch_size(self.config.train.batch_size, self.mesh)
        host_rows = parallel.own_rows(self.mesh, B)
        if is_packed(self.config.task):
            batches = packed_evaluation(self.rows, number, B, host_rows)
        else:
            batches = itertools.islice(evaluation_batches(self.rows, B, host_rows), -(-number // B))
        for batch in batches:
            yield parallel.put_batch(batch, self.mesh)
            parallel.reset_watchdog()

    def rewards(self, params: Any, number: int) -> Float[np.ndarray, "number 2"]:
        """The rewards of the chosen and the rejected answer of each of the first `number` pairs."""
        found = [parallel.fetch(self._rewards(params, batch)) for batch in self.batches(number)]
        return np.concatenate(found)[:number]

    def logits(self, params: Any, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(logits, weights) of each of the first `number` rows, of shapes [classes] and [], or [T, tags] and [T]."""
        found = []
        for batch in self.batches(number):
            logits, weights = map(parallel.fetch, (self._logits(params, batch), batch["weights"]))
            found += zip(logits, weights, strict=True)
        return found[:number]


def prediction_records(examples: Sequence[Example], predictions: Sequence) -> Iterator[dict[str, Any]]:
    """A dict for JSON for each example that has a prediction: the fields of the example, and the prediction."""
    for example, prediction in zip(examples, predictions, strict=False):
        fields = {field: getattr(example, field) for field in example.fields if hasattr(example, field)}
        if isinstance(example, Classification):
            fields["label"] = example.labels
        yield fields | {"prediction": prediction}
