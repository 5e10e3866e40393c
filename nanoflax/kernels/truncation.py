"""Truncations of the distribution of logits: each keeps the tokens that a warper of Transformers keeps, and gives the
others -inf. The numbers are scalars, or arrays [B, 1] where a value turns the truncation off for its row. On a CPU such
a row costs nothing, except in `truncate_below`; elsewhere all rows are computed if one needs it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jaxtyping import Float, UInt32

from nanoflax import parallel

Logits = Float[jax.Array, "B V"]
Number = Any  # a scalar or Float[jax.Array, "B 1"]
OUT = -jnp.inf
MOST_OF_TOP_H = 100  # tokens that Transformers' top-h considers


def truncate_by_rank(logits: Logits, top_k: Number, outside_top_p: Number) -> Logits:
    """The logits that top-k (Fan et al. 2018; off: 0) and then top-p (Holtzman et al. 2020) keep, and -inf.

    outside_top_p: 1 - p in float32, off: 0. Both are scalars, or None: not computed; or both are arrays [B, 1]. Equal
    logits at the border of top-k are kept together; at that of top-p those of the largest ids are kept. On a CPU this
    takes 0.9 ms a row, sorting 8.7 (V = 50,257).
    """
    wanted = (top_k > 0) | (outside_top_p > 0) if np.ndim(top_k) else True
    return _of_rows(_by_rank, wanted, top_k, outside_top_p, logits)


def _of_rows(truncate, wanted, *arrays):
    """truncate(*arrays); the last array has the logits. On a CPU a row that is not `wanted` [B, 1] costs nothing."""
    if not np.ndim(wanted):
        return truncate(*arrays)
    if parallel.current_platform() != "cpu":
        return _if_any(truncate, wanted, *arrays)

    def one_row(row):
        return _if_any(truncate, *(x[None] for x in row))[0]

    def row_by_row(*arrays):
        return jax.lax.map(one_row, (wanted, *arrays))

    return _if_any(row_by_row, wanted, *arrays)


def _if_any(truncate, wanted, *arrays):
    """truncate(*arrays) if a row is wanted, else the logits, which are the last array."""
    return jax.lax.cond(wanted.any(), truncate, lambda *arrays: arrays[-1], *arrays)


def _by_rank(top_k, outside_top_p, logits):
    # Nothing is sorted. The logits become integers with the same order, and the border between kept tokens and others
    # is the largest integer with a property, which `_largest` finds bit by bit.
    B, V = logits.shape
    count = lambda mask: mask.sum(-1, keepdims=True)
    if top_k is not None:
        wanted, order = jnp.where(top_k > 0, jnp.minimum(top_k, V), V), _order(logits)
        logits = jnp.where(order < _largest(lambda n: count(order >= n) >= wanted, B, 32), OUT, logits)
    if outside_top_p is not None:
        order = _order(logits)
        # In multiples of 2^-31, so that the sums, and the border between equal logits, are exact in any order.
        p = jnp.round(jax.nn.softmax(logits, axis=-1) * 2.0**31).astype(jnp.uint32)
        outside = lambda total: (total.astype(jnp.float32) / 2.0**31 <= outside_top_p) & (outside_top_p > 0)
        total = lambda n: jnp.where(order <= n, p, 0).sum(-1, keepdims=True, dtype=jnp.uint32)
        last = _largest(lambda n: outside(total(n)), B, 32)  # every token up to it is outside
        # Of the next tokens, which are equal, some more are. At least one token stays.
        highest = order.max(-1, keepdims=True)
        border = jnp.where(order > last, order, highest).min(-1, keepdims=True)
        equal, ids = order == border, jnp.arange(V, dtype=jnp.uint32)[None]
        more = total(last) + (ids + 1) * jnp.where(equal, p, 0).max(-1, keepdims=True)
        kept = jnp.where(last < highest, count(equal) - count(outside(more) & (ids < count(equal))), 1)
        first = _largest(lambda n: count(equal & (ids >= n)) >= kept, B, V.bit_length())
        logits = jnp.where((order > border) | equal & (ids >= first), logits, OUT)
    return logits


def truncate_by_entropy(logits: Logits, top_h: Number) -> Logits:
    """The most probable tokens whose terms of the entropy sum to at most this share of it (Baghaei Potraghloo et al.
    2025; off: 0), of the 100 most probable ones; the first always."""
    return _of_rows(_by_entropy, top_h > 0, top_h, logits)


def _by_entropy(top_h, logits):
    best, ids = jax.lax.top_k(logits, min(MOST_OF_TOP_H, logits.shape[-1]))
    terms = entr(jax.nn.softmax(best, axis=-1))
    kept = (jnp.cumsum(terms, axis=-1) <= terms.sum(-1, keepdims=True) * top_h).at[:, 0].set(True)
    found = jnp.full_like(logits, OUT).at[jnp.arange(len(logits))[:, None], ids].set(jnp.where(kept, best, OUT))
    return jnp.where(top_h > 0, found, logits)


def truncate_typical(logits: Logits, mass: Number) -> Logits:
    """The tokens whose log-probability is nearest to its mean, with this total probability (Meister et al. 2023; off:
    1). Tokens at the same distance are kept together."""
    return _of_rows(_typical, mass < 1, mass, logits)


def _typical(mass, logits):
    logp = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(logp)
    distance = jnp.abs(-logp - entr(p).sum(-1, keepdims=True))
    nearest, p = jax.lax.sort((distance, p), num_keys=1)
    last = (jnp.cumsum(p, axis=-1) < mass).sum(-1, keepdims=True)
    border = jnp.take_along_axis(nearest, jnp.minimum(last, logits.shape[-1] - 1), -1)
    return jnp.where((distance > border) & (mass < 1), OUT, logits)


def truncate_below(logits: Logits, min_p: Number = None, epsilon: Number = None, eta: Number = None) -> Logits:
    """Without the tokens that are less probable than min_p times the most probable one (Nguyen et al. 2024), than
    epsilon, or than min(eta, sqrt(eta) / exp(entropy)) (both Hewitt et al. 2022), one after the other; off: 0. The most
    probable token stays."""
    highest = lambda p: p.max(-1, keepdims=True)
    spread = lambda p: jnp.exp(-entr(p).sum(-1, keepdims=True))
    kinds = (
        (min_p, lambda x, p: x * highest(p)),
        (epsilon, lambda x, p: x),
        (eta, lambda x, p: jnp.minimum(x, jnp.sqrt(x) * spread(p))),
    )

    def below(least, x, logits):
        p = jax.nn.softmax(logits, axis=-1)
        return jnp.where((p < least(x, p)) & (logits < highest(logits)), OUT, logits)

    for number, least in kinds:
        if number is not None:
            run = functools.partial(below, least)
            logits = _if_any(run, number > 0, number, logits) if np.ndim(number) else run(number, logits)
    return logits


def _largest(holds: Callable[[jax.Array], jax.Array], B: int, bits: int) -> UInt32[jax.Array, "B 1"]:
    """The largest number of so many bits for which a property holds that holds for all smaller ones; else 0.

    Two bits at a time: `holds` gets three numbers for each row, [3, B, 1]. (One bit takes 1.4 times as long, four bits
    twice as long.)
    """
    pairs, digits = (bits + 1) // 2, jnp.arange(1, 4, dtype=jnp.uint32)[:, None, None]

    def step(i, n):
        shift = (2 * (pairs - 1 - i)).astype(jnp.uint32)
        return n | holds(n | digits << shift).sum(0, dtype=jnp.uint32) << shift

    return jax.lax.fori_loop(0, pairs, step, jnp.zeros((B, 1), jnp.uint32))


def _order(x: Logits) -> UInt32[jax.Array, "B V"]:
    """Numbers with the order of x; those of 0 and -0 are equal."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    zero = jnp.uint32(2**31)
    return jnp.where(x == 0, zero, jnp.where(bits >> 31, ~bits, bits | zero))
