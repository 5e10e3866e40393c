"""Attention as a function, the layer that owns its projections, and the cache as a value."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanoflax.config import ModelConfig
from nanoflax.layers import Linear
from nanoflax.positions import rotate


def attention(q, k, v, mask=None):
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), softmax in float32.

    q: [B, T, H, K]; k, v: [B, S, G, K] where G divides H (grouped queries, Ainslie et al. 2023);
    mask: bool, broadcasting to [B, H, T, S], or None. A query that may see nothing gets the mean
    of the values, never NaN. Returns [B, T, H, K] in q's dtype.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    # Heads before time: the products are then plain batched matrices, twice as fast on CPU.
    q = (q * K**-0.5).swapaxes(1, 2).reshape(B, G, H // G, T, K)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bgntk,bgsk->bgnts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(-1, G, H // G, *mask.shape[2:])
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    # Softmax divides after the product with the values: K numbers a query, not S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    y = jnp.einsum("bgnts,bgsk->bgntk", weights.astype(v.dtype), v,
                   preferred_element_type=jnp.float32)
    y = (y / weights.sum(-1, keepdims=True)).astype(q.dtype)
    return y.reshape(B, H, T, K).swapaxes(1, 2)


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
    def __call__(self, x, mask, angles=None, cache=None, index=None):
        """x: [B, T, D]; mask: bool to [B, H, T, S]; angles: of rotary positions, or None; cache:
        this layer's, written at slot `index`. Returns ([B, T, D], the new cache or None)."""
        c = self.config
        q = Linear(c.heads * c.K, c.bias, name="query")(x).reshape(*x.shape[:2], c.heads, c.K)
        k = Linear(c.G * c.K, c.bias, name="key")(x).reshape(*x.shape[:2], c.G, c.K)
        v = Linear(c.G * c.K, c.bias, name="value")(x).reshape(*x.shape[:2], c.G, c.K)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            cache = write_cache(cache, k, v, index)
            k, v = cache["key"], cache["value"]
        y = attention(q, k, v, mask).reshape(*x.shape[:2], c.heads * c.K)
        return Linear(c.dim, c.bias, self.out_stddev, name="out")(y), cache
