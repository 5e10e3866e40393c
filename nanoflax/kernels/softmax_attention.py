"""Softmax attention whose gradient keeps the weights, not the scores."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def softmax_attention(q, k, v, mask, bias, sinks, softcap):
    """softmax(q k^T) v. q: [B, G, N, T, K], N queries share a key; k, v: [B, G, S, K]; sinks: [G, N, 1, 1].
    v=None: the float32 weights [B, G, N, T, S] themselves, without a gradient."""
    return _forward(q, k, v, mask, bias, sinks, softcap)[0]


def _forward(q, k, v, mask, bias, sinks, softcap):
    scores = _product("bgntk,bgsk->bgnts", q, k)
    capped = None
    if softcap:
        scores = capped = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    largest = scores.max(-1, keepdims=True)
    largest = largest if sinks is None else jnp.maximum(largest, sinks)
    weights = jnp.exp(scores - largest)
    weights = weights if v is None else weights.astype(v.dtype)
    y = weights if v is None else _product("bgnts,bgsk->bgntk", weights, v)
    total = weights.astype(jnp.float32).sum(-1, keepdims=True)
    sunk = None if sinks is None else jnp.exp(sinks - largest)
    total = total if sunk is None else total + sunk
    y = y / total  # after the product: K divisions per query, not S
    y = y if v is None else y.astype(q.dtype)
    return y, (q, k, v, bias, capped, weights, sunk, total, y)


def _product(equation, a, b):
    """einsum in float32. For T = 1 without this dimension: else, under `jax.vmap`, XLA copies the cache on a CPU."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    return (
        product(equation.replace("t", ""), a[..., 0, :], b)[..., None, :]
        if a.shape[3] == 1
        else product(equation, a, b)
    )


def _backward(softcap, saved, dy):
    # FlashAttention's gradient (Dao et al. 2022, appendix B.4): sum(dy y) replaces a sum over S. No mask
    # is needed, because masked weights are exactly 0.
    q, k, v, bias, capped, weights, sunk, total, y = saved
    dy = (dy / total).astype(dy.dtype)
    dv = jnp.einsum("bgnts,bgntk->bgsk", weights, dy)
    inner = (dy.astype(jnp.float32) * y).sum(-1, keepdims=True)
    dweights = jnp.einsum("bgntk,bgsk->bgnts", dy, v, preferred_element_type=jnp.float32)
    dscores = weights * (dweights - inner)
    dsinks = None if sunk is None else -(sunk * inner).sum((0, 3), keepdims=True)[0]
    dbias = None if bias is None else dscores.sum(0, keepdims=True)
    if softcap:
        dscores *= 1 - (capped / softcap) ** 2
    dscores = dscores.astype(q.dtype)
    dq = jnp.einsum("bgnts,bgsk->bgntk", dscores, k)
    dk = jnp.einsum("bgnts,bgntk->bgsk", dscores, q)
    return dq, dk, dv, None, dbias, dsinks


softmax_attention.defvjp(_forward, _backward)
