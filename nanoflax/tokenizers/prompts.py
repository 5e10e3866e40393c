"""Requests to a generating model: the forms, checks and padding of prompts, the ids that end a text, settings for each
prompt; and the tokens of an answer with their log-probabilities."""

import itertools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.tokenizers.chat import stop_ids
from nanoflax.tokenizers.framing import prompt_ids


def request_of(
    config: ModelConfig,
    prompts: Any,
    new: int | Sequence[int],
    eos_id: Any,
    vocab_size: int | None,
    tokenizer: Any = None,
) -> tuple[np.ndarray, np.ndarray, tuple[tuple[int, ...], int]]:
    """(prompts padded on the left [B, P], their lengths [B], (eos_ids, vocab_size)) of the arguments of
    `nanoflax.sample`; new: max_new_tokens.

    Raises: UserError for a prompt or a setting of config.generation that the model cannot follow.
    """
    if tokenizer is not None:
        texts = [prompts] if isinstance(prompts, str) else prompts
        prompts = [prompt_ids(tokenizer, p, config.reads_source) if isinstance(p, str) else p for p in texts]
        eos_id = stop_ids(tokenizer) if eos_id is None else eos_id
        vocab_size = vocab_size or tokenizer.vocab_size
    prompts = token_lists(prompts)
    check_prompts(config, prompts, new)
    eos_id = config.generation.eos_token_id if eos_id is None else eos_id
    eos_ids = tuple(map(int, np.ravel(eos_id)))
    return *pad_left(prompts, config.max_length), (eos_ids, vocab_size or config.vocab_size - config.vocab_padding)


def token_lists(prompts: Any) -> list[list[int]]:
    """Prompts of token ids (an array [B, T] or [T], one list, or lists of any lengths) as lists of integers.

    Raises: UserError for a text, and for what is no token id.
    """
    given = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    given = [p.tolist() if hasattr(p, "tolist") else p for p in given] if isinstance(given, list | tuple) else given
    if isinstance(given, list) and given and all(type(p) is int for p in given):
        given = [given]
    words = "token ids: an array [B, T] or [T] of integers, a list of them or a list of lists"
    if isinstance(given, str) or isinstance(given, list) and any(isinstance(p, str) for p in given):
        raise UserError(f"prompts={str(prompts)[:60]!r} is a text; give a tokenizer, or {words}")
    if not isinstance(given, list) or not all(isinstance(p, list | tuple) for p in given):
        raise UserError(f"prompts={str(prompts)[:60]} must be {words}")
    for i, prompt in enumerate(given):
        if wrong := [t for t in prompt if not isinstance(t, numbers.Integral) or isinstance(t, bool)]:
            raise UserError(f"prompt {i} has {wrong[0]!r:.60}, which is no token id; prompts must be {words}")
    return [[int(t) for t in prompt] for prompt in given]


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]) -> None:
    """Raises: UserError if the model cannot continue the prompts by max_new_tokens, one number or one for each."""
    if config.head != "lm":
        raise UserError(
            f"model.architecture={config.architecture!r} with model.head={config.head!r} generates no text; "
            "use a decoder or an encoder-decoder"
        )
    config.generation.refuse()
    if not prompts:
        raise UserError("prompts is empty; give at least one prompt")
    limits: Any = list(max_new_tokens) if np.ndim(max_new_tokens) else [max_new_tokens] * len(prompts)  # type: ignore
    if not all(isinstance(n, int | np.integer) and n >= 1 for n in limits):
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1, and an integer")
    if len(limits) != len(prompts):
        raise UserError(f"max_new_tokens: {len(limits)} values for {len(prompts)} prompts; give one for each")
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} is empty; give at least one token, such as the tokenizer's bos_id")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            bad = next(t for t in prompt if not 0 <= t < config.vocab_size)
            raise UserError(f"prompt {i} has token id {bad}, outside the model's vocabulary of {config.vocab_size}")
        if not config.reads_source and len(prompt) + limit > config.max_length:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={limit} this "
                f"exceeds the model's context of {config.context}; shorten the prompt or lower max_new_tokens"
            )
        if max(len(prompt), limit) > config.max_length:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, max_new_tokens={limit}: neither "
                f"may exceed the model's context of {config.context}"
            )


def bucket(n: int, least: int = 16) -> int:
    """The padded length of a prompt of n tokens: the next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def pad_left(prompts: Sequence[Sequence[int]], most: int | None = None, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(prompts padded on the left to a bucket of lengths, of at most `most` [B, P], their lengths [B]), int32."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    P = bucket(int(lengths.max()))
    tokens = np.full((len(prompts), min(P, most or P)), pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return tokens, lengths


def row_settings(
    B: int, V: int, lists: dict[str, Any], logit_bias: Any, log_probabilities: int | None
) -> np.ndarray | None:
    """The logit bias of B prompts as float32 [V], [B, V], or None: of {id: number}, a list of them, or None.

    lists: name -> None, a scalar or values for each prompt; log_probabilities: the number of alternatives, or None.
    Raises: UserError with every list of another length, and every number out of its range.
    """
    one = isinstance(logit_bias, Mapping)
    biases = [logit_bias] if one else [bias or {} for bias in logit_bias or []]
    lists = lists | {"logit_bias": None if one or logit_bias is None else biases}
    wrong = {name: len(x) for name, x in lists.items() if np.ndim(x) and len(x) != B}
    problems = [f"{name}: {n} values for {B} prompts; give one for each" for name, n in wrong.items()]
    for bias in biases:
        for i, value in bias.items():
            if not isinstance(i, int | np.integer) or not 0 <= i < V:
                problems.append(f"logit_bias has id {i!r}, which must be an integer from 0 to {V - 1}")
            elif not isinstance(value, int | float | np.number) or not np.isfinite(value):
                problems.append(f"logit_bias[{i}]={value!r} must be a finite number")
    n = log_probabilities
    if n is not None and not (isinstance(n, int | np.integer) and 0 <= n <= V):
        problems.append(f"log_probabilities={n!r} must be an integer from 0 to {V}, or None")
    if problems:
        raise UserError("; ".join(problems))
    found = np.zeros((len(biases), V), np.float32)
    for row, bias in zip(found, biases, strict=True):
        row[list(bias)] = list(bias.values())
    if logit_bias is None:
        return None
    return found[0] if one else found


class Scored(NamedTuple):
    """Tokens of a text, with the model's log-probabilities in nats, before rules, temperature and filters."""

    tokens: list[int]
    log_probabilities: list[float]
    alternatives: list[dict[int, float]]  # at each position the most probable tokens, best first


def cut(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens of a list before the first that is one of eos_ids."""
    return list(itertools.takewhile(lambda token: token not in eos_ids, row))


def answers(found: Any, eos_ids: Sequence[int], limits: Any) -> list[Any]:
    """The tokens of each row as a list, cut before its end and at its limit; or as a `Scored`.

    found: the tokens [B, T], or (tokens, three arrays as in `scored`).
    """
    tokens, scores = (found[0], found[1]) if isinstance(found, tuple) else (found, None)
    rows = [cut(row[: max(n, 0)], eos_ids) for row, n in zip(tokens.tolist(), limits, strict=True)]
    return scored(rows, *scores) if scores else rows


def scored(rows: list[list[int]], logp: np.ndarray, ids: np.ndarray, best: np.ndarray) -> list[Scored]:
    """A `Scored` of each row, of log-probabilities [B, T], and ids and log-probabilities of alternatives [B, T, n].
    What is longer than a row is cut."""

    def one(row, *arrays):
        logp, ids, best = (x[: len(row)].tolist() for x in arrays)
        return Scored(row, logp, [dict(zip(*pair, strict=True)) for pair in zip(ids, best, strict=True)])

    return [one(*values) for values in zip(rows, logp, ids, best, strict=True)]
