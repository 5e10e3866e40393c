"""Rules on the next token, and the filters of sampling: functions of logits [B, V] and of the tokens so far.

Sampling and beam search share them. Results and order are those of Transformers' `generate`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nanoflax.config import GenerationDefaults, fields
from nanoflax.errors import UserError

Logits = Float[jax.Array, "B V"]
OUT = -jnp.inf
NO_DEFAULTS = GenerationDefaults()


class Filters(NamedTuple):
    """How the next token is drawn: numbers or traced scalars; None turns a filter off."""

    temperature: Any = 1.0  # None: greedy
    top_k: Any = None  # Fan et al. 2018
    outside_top_p: Any = None  # 1 - top_p, subtracted in float64; Holtzman et al. 2020
    min_p: Any = None  # Nguyen et al. 2024
    repetition_penalty: Any = None  # Keskar et al. 2019


class Written(NamedTuple):
    """The tokens so far of each row; -1 where there is none."""

    prompt: Int[jax.Array, "B P"]  # padded on the left; for a model with a source, its start token
    new: Int[jax.Array, "B N"]
    step: Int[jax.Array, ""]  # how many new tokens there are
    limit: Int[jax.Array, ""]  # how many there will be


def make_filters(
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    defaults: GenerationDefaults = NO_DEFAULTS,
) -> Filters:
    """Filters as float32 and int32 scalars, so that a new value needs no new compilation.

    None takes the value of `defaults`. top_k=0, top_p=1, min_p=0 and repetition_penalty=1 turn a filter off.
    Raises: UserError for a value out of its range.
    """
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    s = dataclasses.replace(defaults, **{name: x for name, x in given.items() if x is not None})
    problems = fields.value_problems(s, "")
    if problems or (s.top_k or 0) % 1:
        raise UserError("; ".join(problems) or f"top_k={s.top_k} must be an integer")
    real = lambda x, off: None if x in (None, off) else jnp.float32(x)
    heat = jnp.float32(1) if s.temperature is None else real(s.temperature, 0)
    top_k = None if not s.top_k else jnp.int32(min(s.top_k, 2**31 - 1))
    outside = None if s.top_p in (None, 1) else jnp.float32(1 - s.top_p)
    return Filters(heat, top_k, outside, real(s.min_p, 0), real(s.repetition_penalty, 1))


# Rules.


def process(
    logits: Logits, rules: GenerationDefaults, eos_ids: tuple[int, ...], penalty: Any, written: Written
) -> Logits:
    """Logits, or log-probabilities, after the repetition penalty (None: none) and the rules on tokens."""
    (B, V), w = logits.shape, written
    history = jnp.concatenate([w.prompt, jnp.where(jnp.arange(w.new.shape[1]) < w.step, w.new, -1)], 1)
    end = w.prompt.shape[1] + w.step
    length = (w.prompt >= 0).sum(1) + w.step  # [B]

    def last(n):
        return jax.lax.dynamic_slice_in_dim(jnp.pad(history, [(0, 0), (n, 0)], constant_values=-1), end, n, 1)

    if penalty is not None:
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(_members(history, V), penalised, logits)
    if n := rules.no_repeat_ngram_size:
        starts = history.shape[1] - n + 1
        same = jnp.ones((B, max(starts, 0)), bool)
        for i, token in enumerate(last(n - 1).T):
            same &= history[:, i : i + max(starts, 0)] == token[:, None]
        logits = jnp.where(_members(jnp.where(same, history[:, n - 1 :], -1), V), OUT, logits)
    for *start, token in rules.bad_words_ids:
        if start:
            ends = (last(len(start)) == jnp.array(start)).all(1)
            logits = jnp.where(ends[:, None] & mask([token], V), OUT, logits)
        elif token not in eos_ids:
            logits = jnp.where(mask([token], V), OUT, logits)
    least = rules.min_new_tokens
    if rules.min_length or least:
        early = length < rules.min_length if least is None else jnp.full(B, w.step < least)
        logits = jnp.where(early[:, None] & mask(eos_ids, V), OUT, logits)

    first = rules.forced_bos_token_id
    if first is not None:
        logits = jnp.where((length == 1)[:, None], jnp.where(mask([first], V), 0, OUT), logits)
    if rules.forced_eos_token_id:
        forced = jnp.where(mask(rules.forced_eos_token_id, V), 0, OUT)
        logits = jnp.where(w.step == w.limit - 1, forced, logits)
    if rules.suppress_tokens:
        logits = jnp.where(mask(rules.suppress_tokens, V), OUT, logits)
    if rules.begin_suppress_tokens:
        begins = w.step == (0 if first is None else (length - w.step == 1).astype(jnp.int32))  # after a forced first
        logits = jnp.where(jnp.reshape(begins, (-1, 1)) & mask(rules.begin_suppress_tokens, V), OUT, logits)
    return logits


def mask(ids: Sequence[int], V: int) -> np.ndarray:
    return np.isin(np.arange(V), ids)


def _members(ids: Int[jax.Array, "B _"], V: int) -> Bool[jax.Array, "B V"]:
    """Which tokens are among the ids of a row; -1 is none."""
    rows = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), V), bool).at[rows, jnp.where(ids < 0, V, ids)].set(True, mode="drop")


def only_below(vocab_size: int | None, logits: Logits) -> Logits:
    """Logits with -inf from id vocab_size on, the padding of a vocabulary; None means V."""
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, OUT)


# Filters.


def filtered(logits: Logits, filters: Filters) -> Logits:
    """Logits over temperature, with -inf for the tokens that top-k, top-p and min-p exclude, in this order."""
    f, V = filters, logits.shape[-1]
    logits = logits / f.temperature
    if f.top_k is not None or f.outside_top_p is not None:
        ordered = jnp.sort(logits, axis=-1)
        if f.top_k is not None:  # equal logits are kept together
            kth = ordered[:, V - jnp.minimum(f.top_k, V), None]
            logits, ordered = (jnp.where(x < kth, OUT, x) for x in (logits, ordered))
        if f.outside_top_p is not None:  # of equal logits at the border, those of the largest ids are kept
            # In multiples of 2^-31, so that the sums, and the border between equal logits, are exact.
            p = jnp.round(jax.nn.softmax(ordered, axis=-1) * 2.0**31).astype(jnp.uint32)
            sums = jnp.cumsum(p, axis=-1).astype(jnp.float32) / 2.0**31
            kept = V - jnp.minimum((sums <= f.outside_top_p).sum(-1, keepdims=True), V - 1)
            least = jnp.take_along_axis(ordered, V - kept, -1)
            ties = logits == least
            rank = jnp.cumsum(ties[:, ::-1], axis=-1)[:, ::-1] + (logits > least).sum(-1, keepdims=True)
            logits = jnp.where((logits > least) | ties & (rank <= kept), logits, OUT)
    if f.min_p is not None:
        p = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(p < f.min_p * p.max(-1, keepdims=True), OUT, logits)
    return logits
