"""The table of tasks: everything that depends on `config.task.kind` is in the row of this kind.

task = TASKS["classify"]
rows = encode_for_task(examples, config, tokenizer)
numbers, predictions = Evaluator(model, config, tokenizer, rows, mesh)(params)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from nanoflax import alignment, parallel, tokenizers, train
from nanoflax.config import TASK_KINDS, Config, ExampleData, ModelConfig, with_recipe
from nanoflax.tasks import metrics
from nanoflax.tasks.kinds import Chat, Classification, Pair, Preference, Problem, Tagging, Text
from nanoflax.tasks.noise import DENOISING, Masking, Noise
from nanoflax.tasks.targets import (
    Scores,
    complete_problems,
    generate_targets,
    generation_options,
    score_exact,
    score_rewards,
    score_translations,
    table_of_samples,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A row of TASKS. `evaluator` is a tasks.Evaluator, `number` means its first rows, `task` is a configuration."""

    examples: type  # the kind of example, from tasks.kinds
    unlabelled: Callable[[str, str], Any]  # (text, place) -> an example without its label, for prediction
    architectures: tuple[str, ...]  # architectures that can learn the task
    head: str = ""  # the head of the model; empty: the head does not change
    has_labels: bool = False  # the model has classes, ModelConfig.class_names
    gives_score: bool = False  # the head gives one number for a text
    length_fields: tuple[str, ...] = ("length",)  # fields of the configuration that limit the tokens of a row
    noise: Callable[[Any], type[Noise]] | None = None  # task -> the class that corrupts its texts
    objective: Callable  # of nanoflax.train or nanoflax.alignment, for the batches of Rows
    objective_fields: tuple[str, ...] = ()  # fields of the configuration that are keyword arguments of the objective
    measures_loss: bool = True  # an evaluation measures the objective; else the first metric is that of the best step
    metrics: tuple[str, ...] = ("perplexity",)  # metrics of an evaluation besides validation_loss
    token_accuracy: str = ""  # name of the token-accuracy metric; empty if not reported
    predict: Callable | None = None  # (evaluator, params, number) -> a prediction for each row
    # (evaluator, params, number) -> the result to show for each row: {class: probability}, (word, tag) pairs, or a text
    describe: Callable | None = None
    show: Callable[[Any], str] = str  # a result of `describe` -> lines of text
    score: Callable | None = None  # (predictions, examples, task) -> (numbers, report)
    scores_table: Callable[[dict], list[str]] | None = None  # report -> lines of a readable table
    samples_table: Callable[[Any, list, int], list[str]] | None = None  # (examples, predictions, most) -> lines
    pair_rewards: Callable | None = None  # (model, params, batch, task) -> [B, 2] float32, for PairRows
    # (tokenizer, text, is_source) -> the ids of a prompt for generation. If None, `describe` answers prompts.
    prompt: Callable[..., list[int]] | None = None
    generation: Callable[[Any], dict] = lambda task: {}  # task -> default settings of generation
    needs_prompt: bool = True  # an empty prompt is an error
    plots_alignment: bool = False  # a run ends with a plot of the attention between source and target

    @property
    def generates(self) -> bool:
        """Whether predictions, and so an evaluation, are generated token by token."""
        return self.predict in (generate_targets, complete_problems)


# Predictions.


def class_probabilities(evaluator: Any, params: Any, number: int) -> Float[np.ndarray, "number classes"]:
    """The softmax of the logits, or their sigmoid if a text may have several classes."""
    logits = np.array([row for row, _ in evaluator.logits(params, number)])
    return np.asarray(jax.nn.sigmoid(logits) if evaluator.rows.multi_label else jax.nn.softmax(logits))


def predict_classes(evaluator: Any, params: Any, number: int) -> list[tuple[str, ...]]:
    """A tuple of class names for each text: the most probable one, or with multi_label all above 0.5."""
    names, found = evaluator.config.model.class_names, class_probabilities(evaluator, params, number)
    if evaluator.rows.multi_label:
        return [tuple(name for name, p in zip(names, row, strict=True) if p > 0.5) for row in found]
    return [(names[row.argmax()],) for row in found]


def describe_classes(evaluator: Any, params: Any, number: int) -> list[dict[str, float]]:
    """{class: probability} of each text, the most probable first."""
    names, found = evaluator.config.model.class_names, class_probabilities(evaluator, params, number)
    return [{names[i]: float(row[i]) for i in (-row).argsort()} for row in found]


def predict_tags(evaluator: Any, params: Any, number: int) -> list[list[str]]:
    """The tag of each word of each sentence; O for words that truncation cut off."""
    return [
        tokenizers.word_tags(row.argmax(-1), weights, evaluator.config.model.class_names, len(example.tokens))
        for (row, weights), example in zip(
            evaluator.logits(params, number), evaluator.rows.examples[:number], strict=True
        )
    ]


def describe_tags(evaluator: Any, params: Any, number: int) -> list[list[tuple[str, str]]]:
    """The (word, tag) pairs of each sentence."""
    return [
        list(zip(example.tokens, tags, strict=True))
        for example, tags in zip(evaluator.rows.examples[:number], predict_tags(evaluator, params, number), strict=True)
    ]


def fill_masks(evaluator: Any, params: Any, number: int) -> list[str]:
    """Each text, with the model's predictions for masked tokens between ⟦ and ⟧."""
    found = []
    for batch in evaluator.batches(number):
        tokens, guesses, weights, real = map(
            parallel.fetch,
            (batch["targets"], evaluator.guesses(params, batch), batch["weights"], batch["padding_mask"]),
        )
        found += [
            tokenizers.show_mask(evaluator.tokenizer, row[mask], w[mask])
            for row, w, mask in zip(np.where(weights > 0, guesses, tokens), weights, real, strict=True)
        ]
    return found[:number]


def predict_rewards(evaluator: Any, params: Any, number: int) -> list[dict[str, float]]:
    """The rewards of both answers of each pair."""
    return [{"reward_chosen": float(a), "reward_rejected": float(b)} for a, b in evaluator.rewards(params, number)]


def describe_score(evaluator: Any, params: Any, number: int) -> list[float]:
    """The score of each text."""
    return [float(scores[0]) for scores, _ in evaluator.logits(params, number)]


# Scores: (numbers, report).


def score_classes(predictions: list, examples: list, _: Any) -> Scores:
    report = metrics.classes(predictions, [example.labels for example in examples])
    return {"accuracy": report["accuracy"], "macro_f1": report["macro"]["f1"]}, report


def score_tags(predictions: list, examples: list, _: Any) -> Scores:
    report = metrics.tags(predictions, [list(example.tags) for example in examples])
    return {"f1": report["micro"]["f1"], "accuracy": report["accuracy"]}, report


# Prompts.


def _chat_prompt(tokenizer: Any, text: str, is_source: bool) -> list[int]:
    return tokenizers.chat_prompt(tokenizer, [{"role": "user", "content": text}])


TASKS = {
    "classify": Task(
        examples=Classification,
        unlabelled=lambda text, place: Classification(text, None, place),
        architectures=("encoder", "decoder"),
        head="classify",
        has_labels=True,
        objective=train.classify,
        metrics=("accuracy", "macro_f1"),
        predict=predict_classes,
        describe=describe_classes,
        show=lambda classes: "\n".join(f"{name}\t{p:.4f}" for name, p in classes.items()),
        score=score_classes,
        scores_table=metrics.metrics_table,
    ),
    "tag": Task(
        examples=Tagging,
        unlabelled=lambda text, place: Tagging(tuple(text.split()), None, place),
        architectures=("encoder",),
        head="tag",
        has_labels=True,
        objective=train.tag,
        metrics=("f1", "accuracy"),
        predict=predict_tags,
        describe=describe_tags,
        show=lambda words: "\n".join(f"{word}\t{tag}" for word, tag in words),
        score=score_tags,
        scores_table=metrics.metrics_table,
    ),
    "translate": Task(
        examples=Pair,
        unlabelled=lambda text, place: Pair(text, None, place),
        architectures=("encoder_decoder", "lstm"),
        length_fields=("length", "target_length"),
        objective=train.seq2seq,
        metrics=("exact_match", "bleu", "chrf", "rouge_l"),
        predict=generate_targets,
        describe=generate_targets,
        score=score_translations,
        prompt=tokenizers.prompt_ids,
        generation=generation_options,
        plots_alignment=True,
    ),
    "instruct": Task(
        examples=Chat,
        unlabelled=lambda text, place: Chat(({"role": "user", "content": text},), place),
        architectures=("decoder",),
        head="lm",
        objective=train.causal_lm,
        prompt=_chat_prompt,
    ),
    "language_model": Task(
        examples=Text,
        unlabelled=Text,
        architectures=("decoder",),
        head="lm",
        objective=train.causal_lm,
        metrics=("perplexity", "bits_per_byte"),
        prompt=tokenizers.prompt_ids,
        needs_prompt=False,
    ),
    "distill": Task(
        examples=Text,
        unlabelled=Text,
        objective=alignment.distill,
        objective_fields=("divergence", "beta", "temperature", "mix"),
        architectures=("decoder",),
        head="lm",
        metrics=("perplexity", "bits_per_byte", "kl"),
        prompt=tokenizers.prompt_ids,
        needs_prompt=False,
    ),
    "distill_chat": Task(
        examples=Chat,
        unlabelled=lambda text, place: Chat(({"role": "user", "content": text},), place),
        objective=alignment.distill,
        objective_fields=("divergence", "beta", "temperature", "mix"),
        architectures=("decoder",),
        head="lm",
        metrics=("perplexity", "kl"),
        prompt=_chat_prompt,
    ),
    "grpo": Task(
        examples=Problem,
        unlabelled=lambda text, place: Problem(text, "", place),
        architectures=("decoder",),
        head="lm",
        length_fields=("length", "target_length"),
        objective=alignment.policy_gradient,
        objective_fields=("temperature", "clip_low", "clip_high", "beta"),
        measures_loss=False,
        metrics=("reward", "pass_at_k"),
        predict=complete_problems,
        score=score_rewards,
        samples_table=table_of_samples,
        prompt=tokenizers.prompt_ids,
        generation=generation_options,
    ),
    "masked_lm": Task(
        examples=Text,
        unlabelled=Text,
        architectures=("encoder",),
        head="mlm",
        noise=lambda task: Masking,
        objective=train.masked_lm,
        metrics=("perplexity", "masked_accuracy"),
        token_accuracy="masked_accuracy",
        predict=fill_masks,
        describe=fill_masks,
    ),
    "denoise": Task(
        examples=Text,
        unlabelled=Text,
        architectures=("encoder_decoder", "lstm"),
        length_fields=("length", "target_length"),
        noise=lambda task: DENOISING[task.noise],
        objective=train.seq2seq,
        metrics=("exact_match", "token_accuracy"),
        token_accuracy="token_accuracy",
        predict=generate_targets,
        describe=generate_targets,
        score=score_exact,
    ),
    "preference": Task(
        examples=Preference,
        unlabelled=Text,
        architectures=("decoder",),
        head="lm",
        objective=alignment.preference,
        objective_fields=("loss", "beta", "label_noise", "margin", "nll_weight"),
        metrics=("preference_accuracy", "reward_margin"),
        pair_rewards=lambda model, params, batch, task: alignment.answer_rewards(
            model, params, batch, task.loss, task.beta
        ),
        predict=predict_rewards,
        prompt=tokenizers.prompt_ids,
    ),
    "reward": Task(
        examples=Preference,
        unlabelled=Text,
        architectures=("decoder",),
        head="classify",
        gives_score=True,
        objective=alignment.bradley_terry,
        objective_fields=("center",),
        metrics=("preference_accuracy", "reward_margin"),
        pair_rewards=lambda model, params, batch, task: alignment.pair_scores(model, params, batch),
        predict=predict_rewards,
        describe=describe_score,
        show=lambda score: f"{score:.4f}",
    ),
}


# Values from the table for a task configuration.


def config_of(model: ModelConfig) -> Config:
    """The Config of a model that is not a run: default settings, and the task of a head with classes or a score.

    Texts are read as they are, up to the context of the model. There are no data.
    """
    config = Config(model=model)
    for kind, task in TASKS.items():
        fits = task.gives_score if model.is_regression else task.has_labels
        if fits and task.head == model.head and model.architecture in task.architectures:
            chosen = TASK_KINDS[kind](length=model.context)
            data = ExampleData(train="", unicode="", whitespace="")
            config = dataclasses.replace(config, data=data, task=chosen)
    return with_recipe(config)[0]  # fills train.batch_size


def length_limits(task: Any) -> dict[str, int]:
    """{"task.length": tokens, ...}: the largest lengths of rows for a task configuration."""
    return {f"task.{name}": getattr(task, name) for name in TASKS[task.kind].length_fields}


def objective_of(task: Any) -> Callable:
    """The objective of a task configuration: a function (model, params, batch, rng=None, **options) -> train.Sums."""
    row = TASKS[task.kind]
    return functools.partial(row.objective, **{name: getattr(task, name) for name in row.objective_fields})


def with_sentinels(task: Any, tokenizer: Any) -> Any:
    """The tokenizer with the mask or sentinels that the noise of a task configuration needs, if any."""
    kind = TASKS[task.kind].noise
    return kind(task).prepare(tokenizer) if kind else tokenizer


def exported_tokenizer(task: Any, tokenizer: Any) -> Any:
    """The tokenizer for Transformers: with the mask or sentinels of the task, and the template of its chats."""
    tokenizer = with_sentinels(task, tokenizer)
    has_chats = TASKS[task.kind].examples is Chat or getattr(task, "chat", False)
    return tokenizers.with_plain_template(tokenizer) if has_chats else tokenizer


def prompt_of(task: Any) -> Callable[..., list[int]] | None:
    """Task.prompt of a task configuration; of a task with task.chat, the prompt for a reply."""
    row = TASKS[task.kind]
    return _chat_prompt if row.prompt and getattr(task, "chat", False) else row.prompt


def in_form_of(task: Any, examples: list) -> Any:
    """The task configuration; if it has task.chat, this says whether the examples are chats."""
    if getattr(task, "chat", True) is not None:
        return task
    return dataclasses.replace(task, chat=any(isinstance(example.prompt, tuple) for example in examples))


def noise_for(task: Any, tokenizer: Any) -> Noise | None:
    """The Noise of a task configuration, or None for tasks without noise. tokenizer: see with_sentinels."""
    kind = TASKS[task.kind].noise
    return kind(task)(task, tokenizer) if kind else None
