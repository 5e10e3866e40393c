"""Rules on the next token, and the filters of sampling: functions of logits [B, V] and of the tokens so far.

Sampling and beam search share them. Results and order are those of Transformers' `generate`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nanoflax import parallel
from nanoflax.config import GenerationDefaults, fields
from nanoflax.errors import UserError
from nanoflax.kernels import is_key_of_rows

Logits = Float[jax.Array, "B V"]
OUT = -jnp.inf
NO_DEFAULTS = GenerationDefaults()


class Filters(NamedTuple):
    """How the next token is drawn. Each field is None (off), a number or traced scalar for all rows, or an array [B]
    with a value for each row; in an array 0 (repetition_penalty: 1) turns the filter off for a row."""

    temperature: Any = 1.0  # None, or 0 in an array: greedy
    top_k: Any = None  # Fan et al. 2018
    outside_top_p: Any = None  # 1 - top_p, subtracted in float64; Holtzman et al. 2020
    min_p: Any = None  # Nguyen et al. 2024
    repetition_penalty: Any = None  # Keskar et al. 2019
    logit_bias: Any = None  # [V] or [B, V] float32, added to the model's logits
    allowed: Any = None  # [W] or [B, W] uint32: bit i % 32 of word i // 32 permits token i


class Written(NamedTuple):
    """The tokens so far of each row. A scalar holds for all rows."""

    history: Int[jax.Array, "B N"]  # -1 where there is none; for a model with a source, from its start token on
    end: Int[jax.Array, "*B"]  # the position in history after the last token
    step: Int[jax.Array, "*B"]  # how many new tokens there are
    limit: Int[jax.Array, "*B"]  # how many there will be

    def add(self, token: Int[jax.Array, " B"]) -> "Written":
        history = self.history.at[jnp.arange(len(token)), self.end].set(token)
        return self._replace(history=history, end=self.end + 1, step=self.step + 1)


def make_filters(
    temperature: Any = None,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    repetition_penalty: Any = None,
    defaults: GenerationDefaults = NO_DEFAULTS,
) -> Filters:
    """Filters as float32 and int32 scalars, so that a new value needs no new compilation; as arrays [B] if a value is
    a list, with an item for each row.

    None, also in a list, takes the value of `defaults`. top_k=0, top_p=1, min_p=0 and repetition_penalty=1 turn a
    filter off.
    Raises: UserError for a value out of its range, and for lists of unequal lengths.
    """
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    given = {name: x for name, x in given.items() if x is not None}
    lists = {name: list(x) for name, x in given.items() if np.ndim(x)}
    if len({*map(len, lists.values())}) > 1:
        raise UserError("; ".join(f"{name} has {len(x)} values" for name, x in lists.items()) + "; give one for a row")
    rows = [dict(zip(lists, x, strict=True)) for x in zip(*lists.values(), strict=True)] or [{}]
    common = {name: x for name, x in given.items() if name not in lists}
    settings = [_checked(defaults, common | {name: x for name, x in row.items() if x is not None}) for row in rows]
    if lists:
        outside = [0 if s.top_p is None else 1 - s.top_p for s in settings]
        heat = jnp.array([1 if s.temperature is None else s.temperature for s in settings], jnp.float32)
        top_k = jnp.array([min(s.top_k or 0, 2**31 - 1) for s in settings], jnp.int32)
        least = jnp.array([s.min_p or 0 for s in settings], jnp.float32)
        penalty = jnp.array([s.repetition_penalty or 1 for s in settings], jnp.float32)
        return Filters(heat, top_k, jnp.array(outside, jnp.float32), least, penalty)
    s = settings[0]
    real = lambda x, off: None if x in (None, off) else jnp.float32(x)
    heat = jnp.float32(1) if s.temperature is None else real(s.temperature, 0)
    top_k = None if not s.top_k else jnp.int32(min(s.top_k, 2**31 - 1))
    outside = None if s.top_p in (None, 1) else jnp.float32(1 - s.top_p)
    return Filters(heat, top_k, outside, real(s.min_p, 0), real(s.repetition_penalty, 1))


def _checked(defaults, given):
    given = {name: x.item() if isinstance(x, np.generic) else x for name, x in given.items()}
    s = dataclasses.replace(defaults, **given)
    problems = fields.value_problems(s, "")
    if problems or (s.top_k or 0) % 1:
        raise UserError("; ".join(problems) or f"top_k={s.top_k} must be an integer")
    return s


# Rules.


def next_logits(
    logits: Logits, rules: GenerationDefaults, eos_ids: tuple[int, ...], filters: Filters, written: Written
) -> Logits:
    """The logits that `choose` draws from: with the bias, after the rules, and -inf for tokens that are not allowed.
    Where the rules leave no allowed token, `allowed` alone holds."""
    biased = logits if filters.logit_bias is None else logits + filters.logit_bias
    found = process(biased, rules, eos_ids, filters.repetition_penalty, written)
    if filters.allowed is None:
        return found
    token = jnp.arange(logits.shape[-1])
    permitted = (filters.allowed[..., token // 32] >> (token % 32).astype(jnp.uint32)) & 1 > 0
    found, biased = (jnp.where(permitted, x, OUT) for x in (found, biased))
    return jnp.where((found > OUT).any(-1, keepdims=True), found, biased)


def process(
    logits: Logits, rules: GenerationDefaults, eos_ids: tuple[int, ...], penalty: Any, written: Written
) -> Logits:
    """Logits, or log-probabilities, after the repetition penalty (None: none) and the rules on tokens."""
    axes = 0, None if jnp.ndim(penalty) == 0 else 0, Written(*(0 if jnp.ndim(x) else None for x in written))  # type: ignore
    return jax.vmap(partial(_process_row, rules, eos_ids), in_axes=axes)(logits, penalty, written)


def _process_row(rules, eos_ids, logits: Float[jax.Array, " V"], penalty, w: Written):
    """`process` of one row: history [N], and scalars."""
    V, length = len(logits), (w.history >= 0).sum()

    def last(n):
        return jax.lax.dynamic_slice_in_dim(jnp.pad(w.history, (n, 0), constant_values=-1), w.end, n)

    if penalty is not None:
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(_members(w.history, V), penalised, logits)
    if n := rules.no_repeat_ngram_size:
        starts = max(len(w.history) - n + 1, 0)
        same = jnp.ones(starts, bool)
        for i, token in enumerate(last(n - 1)):
            same &= w.history[i : i + starts] == token
        logits = jnp.where(_members(jnp.where(same, w.history[n - 1 :], -1), V), OUT, logits)
    for *start, token in rules.bad_words_ids:
        if start:
            ends = (last(len(start)) == jnp.array(start)).all()
            logits = jnp.where(ends & mask([token], V), OUT, logits)
        elif token not in eos_ids:
            logits = jnp.where(mask([token], V), OUT, logits)
    least = rules.min_new_tokens
    if rules.min_length or least:
        early = length < rules.min_length if least is None else w.step < least
        logits = jnp.where(early & mask(eos_ids, V), OUT, logits)

    first = rules.forced_bos_token_id
    if first is not None:
        logits = jnp.where(length == 1, jnp.where(mask([first], V), 0, OUT), logits)
    if rules.forced_eos_token_id:
        forced = jnp.where(mask(rules.forced_eos_token_id, V), 0, OUT)
        logits = jnp.where(w.step == w.limit - 1, forced, logits)
    if rules.suppress_tokens:
        logits = jnp.where(mask(rules.suppress_tokens, V), OUT, logits)
    if rules.begin_suppress_tokens:
        begins = w.step == (0 if first is None else (length - w.step == 1).astype(jnp.int32))  # after a forced first
        logits = jnp.where(begins & mask(rules.begin_suppress_tokens, V), OUT, logits)
    return logits


def mask(ids: Sequence[int], V: int) -> np.ndarray:
    return np.isin(np.arange(V), ids)


def _members(ids: Int[jax.Array, " N"], V: int) -> Bool[jax.Array, " V"]:
    """Which tokens are among the ids; -1 is none."""
    return jnp.zeros(V, bool).at[jnp.where(ids < 0, V, ids)].set(True, mode="drop")


def only_below(vocab_size: int | None, logits: Logits) -> Logits:
    """Logits with -inf from id vocab_size on, the padding of a vocabulary; None means V."""
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, OUT)


# Filters.


def filtered(logits: Logits, filters: Filters) -> Logits:
    """Logits over temperature, with -inf for the tokens that top-k, top-p and min-p exclude, in this order."""
    f: Any = Filters(*(x if jnp.ndim(x) == 0 else x[:, None] for x in filters))
    logits = logits if f.temperature is None else logits / jnp.where(f.temperature == 0, 1, f.temperature)
    if f.top_k is not None or f.outside_top_p is not None:
        if jnp.ndim(f.top_k):  # sorting takes long, and often few rows need it  # type: ignore
            by_rank, wanted = Filters(None, f.top_k, f.outside_top_p), (f.top_k > 0) | (f.outside_top_p > 0)  # type: ignore
            sort = lambda wanted, f, x: jax.lax.cond(wanted.any(), partial(_by_rank, f), lambda x: x, x)
            if parallel.current_platform() == "cpu":  # which has no sort in parallel
                logits = jax.lax.map(lambda row: sort(row[0], row[1], row[2][None])[0], (wanted, by_rank, logits))
            else:
                logits = sort(wanted, by_rank, logits)
        else:
            logits = _by_rank(f, logits)
    if f.min_p is not None:
        p = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(p < f.min_p * p.max(-1, keepdims=True), OUT, logits)
    return logits


def _by_rank(f: Filters, logits: Logits) -> Logits:
    """top-k, then top-p; f: with scalars or arrays [B, 1]."""
    V, ordered = logits.shape[-1], jnp.sort(logits, axis=-1)
    if f.top_k is not None:  # equal logits are kept together
        top_k = jnp.where(f.top_k > 0, jnp.minimum(f.top_k, V), V)
        kth = jnp.take_along_axis(ordered, jnp.broadcast_to(V - top_k, (len(logits), 1)), -1)
        logits, ordered = (jnp.where(x < kth, OUT, x) for x in (logits, ordered))
    if f.outside_top_p is not None:  # of equal logits at the border, those of the largest ids are kept
        # In multiples of 2^-31, so that the sums, and the border between equal logits, are exact.
        p = jnp.round(jax.nn.softmax(ordered, axis=-1) * 2.0**31).astype(jnp.uint32)
        sums = jnp.cumsum(p, axis=-1).astype(jnp.float32) / 2.0**31
        outside = (sums <= f.outside_top_p) & (f.outside_top_p > 0)
        kept = V - jnp.minimum(outside.sum(-1, keepdims=True), V - 1)
        least = jnp.take_along_axis(ordered, V - kept, -1)
        ties = logits == least
        rank = jnp.cumsum(ties[:, ::-1], axis=-1)[:, ::-1] + (logits > least).sum(-1, keepdims=True)
        logits = jnp.where((logits > least) | ties & (rank <= kept), logits, OUT)
    return logits


def choose(logits: Logits, rng: jax.Array, filters: Filters) -> Int[jax.Array, " B"]:
    """The next token of each row: the most probable without a temperature, else drawn. rng: one key, or an array of
    keys with one for each row, which then is drawn as if it were alone."""
    best = logits.argmax(-1).astype(jnp.int32)
    if filters.temperature is None:
        return best
    draw = jax.vmap(jax.random.categorical) if is_key_of_rows(rng) else jax.random.categorical
    drawn = lambda: draw(rng, filtered(logits, filters)).astype(jnp.int32)
    if not jnp.ndim(filters.temperature):
        return drawn()
    warm = filters.temperature > 0  # drawing takes four times as long as the rest, and often no row needs it
    return jax.lax.cond(warm.any(), lambda: jnp.where(warm, drawn(), best), lambda: best)
