"""Targets that a model generates for sources or prompts, and their scores. `evaluator` is a tasks.Evaluator, `number`
means its first rows, `task` is a configuration."""

import math
from typing import Any

import jax

from nanoflax import generate, parallel, tokenizers
from nanoflax.tasks import metrics

Scores = tuple[dict[str, float], dict[str, Any]]  # (numbers, report)


def generate_targets(evaluator: Any, params: Any, number: int, attempt: int | None = None) -> list[str]:
    """The text that the model generates for each source or prompt, greedily or with config.task.beams; with the number
    of an attempt, drawn with the filters of a task with rewards."""
    task, B, tokenizer = evaluator.config.task, evaluator.config.train.batch_size, evaluator.tokenizer
    options = dict(
        max_new_tokens=task.target_length, eos_id=tokenizers.stop_ids(tokenizer), vocab_size=tokenizer.vocab_size
    )
    sources, found = [row["source"].tolist() for row in evaluator.rows.rows[:number]], []
    for i in range(0, number, B):
        part = sources[i : i + B]
        part += [part[-1]] * (B - len(part))  # the last batch has the same shape, so nothing is compiled again
        if attempt is not None:
            drawn = {name: getattr(task, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            key = jax.random.fold_in(jax.random.PRNGKey(attempt), i)
            new = generate.sample(evaluator.model, params, part, rng=key, **drawn, **options)
        elif task.beams > 1:
            new = generate.beam_search(evaluator.model, params, part, task.beams, **options)
        else:
            new = generate.sample(evaluator.model, params, part, temperature=0, **options)
        found += map(tokenizer.decode, new)
        parallel.reset_watchdog()
    return found[:number]


def complete_problems(evaluator: Any, params: Any, number: int) -> list[dict[str, Any]]:
    """The greedy completion of each problem and its reward; with task.attempts also the largest reward of that many
    drawn completions. A reward that failed is None."""
    problems = evaluator.rows.examples[:number]

    def rewards(texts):
        values = parallel.run_on_main_process(lambda: evaluator.reward(texts, problems)[0].tolist())
        return [None if math.isnan(value) else value for value in values]

    found = generate_targets(evaluator, params, number)
    predictions = [{"completion": text, "reward": r} for text, r in zip(found, rewards(found), strict=True)]
    for attempt in range(evaluator.config.task.attempts):
        drawn = rewards(generate_targets(evaluator, params, number, attempt))
        for prediction, value in zip(predictions, drawn, strict=True):
            values = [x for x in (prediction.get("best_reward"), value) if x is not None]
            prediction["best_reward"] = max(values, default=None)
    return predictions


def table_of_samples(problems: list, predictions: list[dict[str, Any]], most: int) -> list[str]:
    """Lines with the rewards, prompts and completions of the first problems."""
    lines = []
    for problem, found in list(zip(problems, predictions, strict=False))[:most]:
        prompt = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
        reward = "failed" if found["reward"] is None else f"{found['reward']:.4g}"
        lines.append(f"  {reward:>8}  {_one_line(prompt)} -> {_one_line(found['completion'])}")
    return [f"  {'reward':>8}  prompt -> completion", *lines] if lines else []


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


# Scores.


def score_translations(predictions: list, examples: list, task: Any) -> Scores:
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


def score_rewards(predictions: list, examples: list, task: Any) -> Scores:
    """The mean reward of greedy completions; pass_at_k is the mean of the best of k drawn ones, for rewards of 0 and 1
    the share of problems that k attempts solve (Chen et al. 2021). Rewards that failed count in neither mean."""

    def mean(name):
        known = [p[name] for p in predictions if p[name] is not None]
        return sum(known) / max(len(known), 1)

    found = {"reward": mean("reward")} | ({"pass_at_k": mean("best_reward")} if task.attempts else {})
    return found, found | {"rewards_failed": sum(p["reward"] is None for p in predictions)}


def score_exact(predictions: list, examples: list, _: Any) -> Scores:
    found = {"exact_match": metrics.exact_match(predictions, [e.target for e in examples])}
    return found, found


def generation_options(task: Any) -> dict[str, Any]:
    return {"max_new_tokens": task.target_length, "temperature": 0.0, "beams": task.beams if task.beams > 1 else 0}
