"""Truncations of the distribution of logits: each keeps the tokens that a warper of Transformers keeps, and gives the
others -inf. The numbers are scalars, or arrays [B, 1] where a value turns the truncation off for its row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jaxtyping import Float

from nanoflax import parallel

Logits = Float[jax.Array, "B V"]
Number = Any  # a scalar or Float[jax.Array, "B 1"]
OUT = -jnp.inf
MOST_OF_TOP_H = 100  # tokens that Transformers' top-h considers


def truncate_by_rank(logits: Logits, top_k: Number, outside_top_p: Number) -> Logits:
    """top-k (Fan et al. 2018; off: 0), then top-p (Holtzman et al. 2020); outside_top_p: 1 - p, off: 0. None: not
    computed. Equal logits at the border of top-k are kept together; at that of top-p, those of the largest ids."""
    if not jnp.ndim(top_k):
        return _by_rank(top_k, outside_top_p, logits)
    # Sorting takes long, and often few rows need it.
    sort = lambda wanted, *x: jax.lax.cond(wanted.any(), _by_rank, lambda *x: x[-1], *x)
    rows = (top_k > 0) | (outside_top_p > 0), top_k, outside_top_p, logits
    if parallel.current_platform() != "cpu":
        return sort(*rows)
    return jax.lax.map(lambda row: sort(*(x[None] for x in row))[0], rows)  # a CPU has no sort in parallel


def _by_rank(top_k, outside_top_p, logits):
    V, ordered = logits.shape[-1], jnp.sort(logits, axis=-1)
    if top_k is not None:
        top_k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
        kth = jnp.take_along_axis(ordered, jnp.broadcast_to(V - top_k, (len(logits), 1)), -1)
        logits, ordered = (jnp.where(x < kth, OUT, x) for x in (logits, ordered))
    if outside_top_p is not None:
        # In multiples of 2^-31, so that the sums, and the border between equal logits, are exact.
        p = jnp.round(jax.nn.softmax(ordered, axis=-1) * 2.0**31).astype(jnp.uint32)
        sums = jnp.cumsum(p, axis=-1).astype(jnp.float32) / 2.0**31
        outside = (sums <= outside_top_p) & (outside_top_p > 0)
        kept = V - jnp.minimum(outside.sum(-1, keepdims=True), V - 1)
        least = jnp.take_along_axis(ordered, V - kept, -1)
        ties = logits == least
        rank = jnp.cumsum(ties[:, ::-1], axis=-1)[:, ::-1] + (logits > least).sum(-1, keepdims=True)
        logits = jnp.where((logits > least) | ties & (rank <= kept), logits, OUT)
    return logits


def truncate_by_entropy(logits: Logits, top_h: Number) -> Logits:
    """The most probable tokens whose terms of the entropy sum to at most this share of it (Baghaei Potraghloo et al.
    2025; off: 0), of the 100 most probable ones; the first always."""
    best, ids = jax.lax.top_k(logits, min(MOST_OF_TOP_H, logits.shape[-1]))
    terms = entr(jax.nn.softmax(best, axis=-1))
    kept = (jnp.cumsum(terms, axis=-1) <= terms.sum(-1, keepdims=True) * top_h).at[:, 0].set(True)
    found = jnp.full_like(logits, OUT).at[jnp.arange(len(logits))[:, None], ids].set(jnp.where(kept, best, OUT))
    return jnp.where(top_h > 0, found, logits)


def truncate_typical(logits: Logits, mass: Number) -> Logits:
    """The tokens whose log-probability is nearest to its mean, with this total probability (Meister et al. 2023; off:
    1). Tokens at the same distance are kept together."""
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

    def above(logits, least):
        p = jax.nn.softmax(logits, axis=-1)
        return jnp.where((p < least(p)) & (logits < logits.max(-1, keepdims=True)), OUT, logits)

    if min_p is not None:
        logits = above(logits, lambda p: min_p * p.max(-1, keepdims=True))
    if epsilon is not None:
        logits = above(logits, lambda p: epsilon)
    if eta is not None:
        logits = above(logits, lambda p: jnp.minimum(eta, jnp.sqrt(eta) * jnp.exp(-entr(p).sum(-1, keepdims=True))))
    return logits
