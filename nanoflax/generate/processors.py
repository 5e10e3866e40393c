"""Rules on the next token, and the filters of sampling: functions of logits [B, V] and of the tokens so far.

Sampling and beam search share them. Results and order are those of Transformers' `generate`.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nanoflax import kernels
from nanoflax.config import COLDEST, OF_SAMPLING, GenerationDefaults, fields
from nanoflax.errors import UserError

Logits = Float[jax.Array, "B V"]
OUT = -jnp.inf
NO_DEFAULTS = GenerationDefaults()


class Filters(NamedTuple):
    """How the next token is drawn. Each field is None (off), a number or traced scalar for all rows, or an array [B]
    with a value for each row, where those of NO_EFFECT turn a filter off (outside_top_p: 0)."""

    temperature: Any = 1.0  # None, or 0 in an array: greedy
    top_k: Any = None
    outside_top_p: Any = None  # 1 - top_p, subtracted in float64
    min_p: Any = None
    repetition_penalty: Any = None  # Keskar et al. 2019
    logit_bias: Any = None  # [V] or [B, V] float32, added to the model's logits
    allowed: Any = None  # [W] or [B, W] uint32: bit i % 32 of word i // 32 permits token i
    top_h: Any = None
    typical_p: Any = None
    epsilon_cutoff: Any = None
    eta_cutoff: Any = None
    encoder_repetition_penalty: Any = None
    presence_penalty: Any = None  # of OpenAI's API: subtracted from the logits of the new tokens, of each once,
    frequency_penalty: Any = None  # and this as often as the token is there; both or none are given


# The values without effect. For rows, the first five settings are always arrays, the others only if a row uses one.
NO_EFFECT = dict(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1)
NO_EFFECT |= dict(top_h=0, typical_p=1, epsilon_cutoff=0, eta_cutoff=0, encoder_repetition_penalty=1)


class Written(NamedTuple):
    """The tokens so far of each row. A scalar holds for all rows."""

    history: Int[jax.Array, "B N"]  # -1 where there is none; for a model with a source, from its start token on
    end: Int[jax.Array, "*B"]  # the position in history after the last token
    step: Int[jax.Array, "*B"]  # how many new tokens there are
    limit: Int[jax.Array, "*B"]  # how many there will be
    source: Any = None  # [B, S], -1 where there is none; None: what stands before the new tokens is the prompt

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
    **more: Any,
) -> Filters:
    """Filters as float32 and int32 scalars, so that a new value needs no new compilation; as arrays [B] if a value is
    a list, with an item for each row. more: the other names in `NO_EFFECT`.

    None, also in a list, takes the value of `defaults`. top_k=0, top_p=1, min_p=0, repetition_penalty=1 and the others
    in `NO_EFFECT` turn a filter off. A temperature below 1e-20 is greedy, as 0 is.
    Raises: UserError for a value out of its range, and for lists of unequal lengths; TypeError for another name.
    """
    if unknown := more.keys() - NO_EFFECT.keys():
        raise TypeError(f"{min(unknown)} is not one of {', '.join(NO_EFFECT)}")
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    given = {name: x for name, x in (given | more).items() if x is not None}
    lists = {name: list(x) for name, x in given.items() if np.ndim(x)}
    if len({*map(len, lists.values())}) > 1:
        raise UserError("; ".join(f"{name} has {len(x)} values" for name, x in lists.items()) + "; give one for a row")
    rows = [dict(zip(lists, x, strict=True)) for x in zip(*lists.values(), strict=True)] or [{}]
    common = {name: x for name, x in given.items() if name not in lists}
    settings = [_checked(defaults, common | {name: x for name, x in row.items() if x is not None}) for row in rows]
    found: dict[str, Any] = dict(temperature=None)
    for i, (name, off) in enumerate(NO_EFFECT.items()):
        unset = 1 if name == "temperature" else off
        values = [unset if (x := getattr(s, name)) is None else min(x, 2**31 - 1) for s in settings]
        if any(x != off for x in values) or lists and (i < 5 or name in lists):
            values = [1 - x for x in values] if name == "top_p" else values
            made = np.array(values if lists else values[0], np.int32 if name == "top_k" else np.float32)
            found["outside_top_p" if name == "top_p" else name] = jnp.asarray(made)
    return Filters(**found)


def _checked(defaults, given):
    given = {name: x.item() if isinstance(x, np.generic) else x for name, x in given.items()}
    s = dataclasses.replace(defaults, **given)
    problems = fields.value_problems(s, "")
    if problems or (s.top_k or 0) % 1:
        raise UserError("; ".join(problems) or f"top_k={s.top_k} must be an integer")
    if s.temperature != 0:
        defaults.refuse({*OF_SAMPLING} - given.keys())
    return dataclasses.replace(s, temperature=0) if s.temperature and s.temperature < COLDEST else s


# Rules.


def next_logits(
    logits: Logits, rules: GenerationDefaults, eos_ids: tuple[int, ...], filters: Filters, written: Written
) -> Logits:
    """The logits that `choose` draws from: with the bias, after the rules, and -inf for tokens that are not allowed.
    Where the rules leave no allowed token, `allowed` alone holds."""
    biased = logits if filters.logit_bias is None else logits + filters.logit_bias
    found = process(biased, rules, eos_ids, filters, written)
    if filters.allowed is None:
        return found
    token = jnp.arange(logits.shape[-1])
    permitted = (filters.allowed[..., token // 32] >> (token % 32).astype(jnp.uint32)) & 1 > 0
    found, biased = (jnp.where(permitted, x, OUT) for x in (found, biased))
    return jnp.where((found > OUT).any(-1, keepdims=True), found, biased)


def process(
    logits: Logits, rules: GenerationDefaults, eos_ids: tuple[int, ...], filters: Filters, written: Written
) -> Logits:
    """Logits, or log-probabilities, after the penalties of `filters` and the rules on tokens."""
    f = filters
    penalties = f.encoder_repetition_penalty, f.repetition_penalty, f.presence_penalty, f.frequency_penalty
    axes_of: Any = lambda xs: [0 if x is not None and jnp.ndim(x) else None for x in xs]  # None: one for all rows
    axes = (0, axes_of(penalties), Written(*axes_of(written)))
    return jax.vmap(partial(_process_row, rules, eos_ids), in_axes=axes)(logits, [*penalties], written)


def _process_row(rules, eos_ids, logits: Float[jax.Array, " V"], penalties, w: Written):
    """`process` of one row: history [N], source [S], and scalars."""
    V, length, N = len(logits), (w.history >= 0).sum(), len(w.history)
    of_source, of_history, presence, frequency = penalties
    source = jnp.where(jnp.arange(N) < w.end - w.step, w.history, -1) if w.source is None else w.source

    def last(n):  # the last n tokens, -1 where there are fewer
        return jax.lax.dynamic_slice_in_dim(jnp.pad(w.history, (n, 0), constant_values=-1), w.end, n)

    def biased(logits, numbers):
        bias = jnp.zeros(V)
        for n in {len(ids) for ids in numbers}:
            of_length = [(ids[:-1], ids[-1], x) for ids, x in numbers.items() if len(ids) == n]
            begin, end, number = zip(*of_length, strict=True)
            follows = (last(n - 1) == jnp.array(begin, jnp.int32)).all(-1)
            bias = bias.at[jnp.array(end)].add(jnp.where(follows, jnp.array(number, jnp.float32), 0), mode="drop")
        return (logits + bias).astype(logits.dtype)

    def penalised(logits, ids, penalty):
        return jnp.where(_members(ids, V), jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def without_ngrams(logits, ids, n):
        starts = max(len(ids) - n + 1, 0)
        same = jnp.ones(starts, bool)
        for i, token in enumerate(last(n - 1)):
            same &= (ids[i : i + starts] == token) & (token >= 0)
        return jnp.where(_members(jnp.where(same, ids[n - 1 :], -1), V), OUT, logits)

    logits = biased(logits, dict(rules.sequence_bias))
    if of_source is not None:
        logits = penalised(logits, source, 1 / of_source)
    if of_history is not None:
        logits = penalised(logits, w.history, of_history)
    if presence is not None:
        counts = _counts(jnp.where(jnp.arange(N) < w.end - w.step, -1, w.history), V)
        logits = (logits - (counts > 0) * presence - counts * frequency).astype(logits.dtype)
    if rules.no_repeat_ngram_size:
        logits = without_ngrams(logits, w.history, rules.no_repeat_ngram_size)
    if rules.encoder_no_repeat_ngram_size:
        logits = without_ngrams(logits, source, rules.encoder_no_repeat_ngram_size)
    logits = biased(logits, {ids: OUT for ids in rules.bad_words_ids if len(ids) > 1 or ids[0] not in eos_ids})
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
    if rules.remove_invalid_values:
        logits = jnp.nan_to_num(logits)
    if rules.exponential_decay_length_penalty:
        begin, factor = rules.exponential_decay_length_penalty
        growth = jnp.expm1(jnp.maximum(w.step - begin, 0) * math.log(factor))
        more = jnp.abs(logits) * jnp.minimum(growth, jnp.finfo(jnp.float32).max)  # 0 * inf would be NaN
        logits = jnp.where(mask(eos_ids, V) & jnp.isfinite(logits), logits + more, logits)
    if rules.suppress_tokens:
        logits = jnp.where(mask(rules.suppress_tokens, V), OUT, logits)
    if rules.begin_suppress_tokens:
        begins = w.step == (0 if first is None else (length - w.step == 1).astype(jnp.int32))  # after a forced first
        logits = jnp.where(begins & mask(rules.begin_suppress_tokens, V), OUT, logits)
    return logits


def mask(ids: Sequence[int], V: int) -> np.ndarray:
    """[V] bool: True at the ids."""
    return np.isin(np.arange(V), ids)


def _members(ids: Int[jax.Array, " N"], V: int) -> Bool[jax.Array, " V"]:
    """Which tokens are among the ids; -1 is none."""
    return jnp.zeros(V, bool).at[jnp.where(ids < 0, V, ids)].set(True, mode="drop")


def _counts(ids: Int[jax.Array, " N"], V: int) -> Int[jax.Array, " V"]:
    """How often each token is among the ids; -1 is none."""
    return jnp.zeros(V, jnp.int32).at[jnp.where(ids < 0, V, ids)].add(1, mode="drop")


def only_below(vocab_size: int | None, logits: Logits) -> Logits:
    """Logits with -inf from id vocab_size on, the padding of a vocabulary; None means V."""
    if vocab_size is None or vocab_size >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, OUT)


# Filters.


def filtered(logits: Logits, filters: Filters) -> Logits:
    """Logits over temperature, with -inf for the tokens that the filters exclude, in the order of Transformers."""
    f: Any = Filters(*(x if np.ndim(x) == 0 else x[:, None] for x in filters))
    logits = logits if f.temperature is None else logits / jnp.where(f.temperature == 0, 1, f.temperature)
    if f.top_h is not None:
        logits = kernels.truncate_by_entropy(logits, f.top_h)
    if f.top_k is not None or f.outside_top_p is not None:
        logits = kernels.truncate_by_rank(logits, f.top_k, f.outside_top_p)
    logits = kernels.truncate_below(logits, min_p=f.min_p)
    if f.typical_p is not None:
        logits = kernels.truncate_typical(logits, f.typical_p)
    return kernels.truncate_below(logits, epsilon=f.epsilon_cutoff, eta=f.eta_cutoff)


def choose(logits: Logits, rng: jax.Array, filters: Filters) -> Int[jax.Array, " B"]:
    """The next token of each row: the most probable without a temperature, else drawn. rng: one key, or an array of
    keys with one for each row, which then is drawn as if it were alone."""
    best = kernels.argmax(logits)
    if filters.temperature is None:
        return best
    draw = jax.vmap(kernels.categorical) if kernels.is_key_of_rows(rng) else kernels.categorical
    drawn = lambda: draw(rng, filtered(logits, filters))
    if not jnp.ndim(filters.temperature):
        return drawn()
    warm = filters.temperature > 0  # drawing takes four times as long as the rest, and often no row needs it
    return jax.lax.cond(warm.any(), lambda: jnp.where(warm, drawn(), best), lambda: best)
