"""Softmax attention whose gradient keeps the weights, not the scores."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def softmax_attention(q, k, v, mask, bias, sinks, softcap):
    """softmax(q k^T) v, [B, G, N, T, K] in the dtype of q. q: [B, G, N, T, K], scaled; N queries share a key. k, v:
    [B, G, S, K]. mask: bool, broadcasts to [B, G, N, T, S]. bias: float32 [1, G, N, T, S]. sinks: float32 [G, N, 1, 1].
    softcap: 0 for none. v=None: the float32 weights [B, G, N, T, S] themselves, without a gradient."""
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
    if sinks is not None:
        largest = jnp.maximum(largest, sinks)
    weights = jnp.exp(scores - largest)  # not yet divided by their sum
    if v is None:
        y = weights
    else:
        weights = weights.astype(v.dtype)
        y = _product("bgnts,bgsk->bgntk", weights, v)
    total, sunk = weights.astype(jnp.float32).sum(-1, keepdims=True), None
    if sinks is not None:
        sunk = jnp.exp(sinks - largest)  # the weight of the sink, whose value is 0
        total = total + sunk
    y = y / total  # after the product: K divisions per query, not S
    y = y if v is None else y.astype(q.dtype)
    return y, (q, k, v, bias, capped, weights, sunk, total, y)


def _product(equation, a, b):
    """einsum in float32. For T = 1 without this dimension: else, under `jax.vmap`, XLA copies the cache on a CPU."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    if a.shape[3] == 1:
        return product(equation.replace("t", ""), a[..., 0, :], b)[..., None, :]
    return product(equation, a, b)


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
