"""Attention as a function, the layer that owns its projections, and the cache as a value."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanoflax.config import ModelConfig
from nanoflax.layers import Linear
from nanoflax.positions import rotate


def attention(q, k, v, mask=None, causal=False):
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), softmax in float32.

    q: [B, T, H, K]; k, v: [B, S, G, K] where G divides H (grouped queries, Ainslie et al. 2023);
    mask: bool, broadcasting to [B, H, T, S], or None; causal: query t sees keys 0 .. t alone (and
    what the mask allows of them), T = S. A query that may see nothing gets the mean of the values,
    never NaN. Returns [B, T, H, K] in q's dtype.
    """
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    # Heads before time: the products are then plain batched matrices, twice as fast on CPU.
    q = (q * K**-0.5).swapaxes(1, 2).reshape(B, G, H // G, T, K)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if mask is not None:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(
            mask.shape[0], G, H // G, *mask.shape[2:])
    if not causal:
        y = _softmax_attention(q, k, v, mask)
    else:
        # Blocks of queries, so that most of what the causal mask hides is never computed.
        size = -(-T // CAUSAL_BLOCKS) if T >= 128 else T
        y = jnp.concatenate([
            _softmax_attention(q[..., a:b, :], k[:, :, :b], v[:, :, :b], _causal_block(mask, a, b))
            for a in range(0, T, size) for b in [min(a + size, T)]], axis=-2)
    return y.reshape(B, H, T, K).swapaxes(1, 2)


CAUSAL_BLOCKS = 2


def _causal_block(mask, a, b):
    """The mask [.., b - a, b] of queries a .. b before keys 0 .. b."""
    block = (jnp.arange(b)[None] <= jnp.arange(a, b)[:, None])[None, None, None]
    if mask is None:
        return block
    rows = mask[..., a:b, :] if mask.shape[-2] > 1 else mask
    return block & rows[..., :b]


@jax.custom_vjp
def _softmax_attention(q, k, v, mask):
    """softmax(q k^T) v. q: [B, G, N, T, K], N queries share a key; k, v: [B, G, S, K]."""
    return _forward(q, k, v, mask)[0]


def _forward(q, k, v, mask):
    scores = jnp.einsum("bgntk,bgsk->bgnts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(v.dtype)
    y = jnp.einsum("bgnts,bgsk->bgntk", weights, v, preferred_element_type=jnp.float32)
    total = weights.astype(jnp.float32).sum(-1, keepdims=True)
    y = (y / total).astype(q.dtype)  # after the product: K divisions a query, not S
    return y, (q, k, v, weights, total, y)


def _backward(saved, dy):
    # As in FlashAttention (Dao et al. 2022, appendix B.4): no sum over S, and none of the mask,
    # whose weights are exactly 0.
    q, k, v, weights, total, y = saved
    dy = (dy / total).astype(dy.dtype)
    dv = jnp.einsum("bgnts,bgntk->bgsk", weights, dy)
    inner = (dy.astype(jnp.float32) * y).sum(-1, keepdims=True)
    dweights = jnp.einsum("bgntk,bgsk->bgnts", dy, v, preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - inner)).astype(q.dtype)
    dq = jnp.einsum("bgnts,bgsk->bgntk", dscores, k)
    dk = jnp.einsum("bgnts,bgntk->bgsk", dscores, q)
    return dq, dk, dv, None


_softmax_attention.defvjp(_forward, _backward)


def empty_cache(config, batch, length, dtype):
    """The keys and values of one layer before any token: zeros, {key, value: [B, S, G, K]}."""
    shape = (batch, length, config.G, config.K)
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


def write_cache(cache, k, v, index):
    """Write k, v [B, T, G, K] at slots index .. index + T of a layer's cache."""
    at = (0, index, 0, 0)
    return {"key": jax.lax.dynamic_update_slice(cache["key"], k.astype(cache["key"].dtype), at),
            "value": jax.lax.dynamic_update_slice(cache["value"], v.astype(cache["value"].dtype), at)}


class Attention(nn.Module):
    """Self-attention with H query heads and G key/value heads."""

    config: ModelConfig
    out_stddev: float

    @nn.compact
    def __call__(self, x, mask=None, angles=None, cache=None, index=None):
        """x: [B, T, D]; mask: bool to [B, H, T, S] or None; angles: of rotary positions, or None;
        cache: this layer's, written at slot `index`; without one the layer is causal.
        Returns ([B, T, D], the new cache or None)."""
        c = self.config
        q = Linear(c.heads * c.K, c.bias, name="query")(x).reshape(*x.shape[:2], c.heads, c.K)
        k = Linear(c.G * c.K, c.bias, name="key")(x).reshape(*x.shape[:2], c.G, c.K)
        v = Linear(c.G * c.K, c.bias, name="value")(x).reshape(*x.shape[:2], c.G, c.K)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            cache = write_cache(cache, k, v, index)
            k, v = cache["key"], cache["value"]
        y = attention(q, k, v, mask, causal=cache is None).reshape(*x.shape[:2], c.heads * c.K)
        return Linear(c.dim, c.bias, self.out_stddev, name="out")(y), cache
