"""Attention as a function, the layer that owns its projections, and the cache as a value."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.nn import kernels, masking
from nanoflax.nn.layers import Linear, Norm
from nanoflax.nn.positions import rotate


def dot_product_attention(q, k, v, mask=None, causal=False, bias=None, scale=None, softcap=0.0):
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), softmax in float32.

    q: [B, T, H, K]; k, v: [B, S, G, K] where G divides H (grouped queries, Ainslie et al. 2023);
    mask: bool, broadcasting to [B, H, T, S], or None; causal: query t sees keys 0 .. t alone (and
    what the mask allows of them), T = S; bias: [1, H, T, S] float32 added to the scores, or None;
    scale: of the scores, default K^-1/2; softcap: scores become cap tanh(score / cap) (Gemma 2), 0
    for none. A query that may see nothing gets the mean of the values, never NaN.
    Returns [B, T, H, K] in q's dtype.
    """
    y = heads_first(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), mask, causal, bias, scale, softcap)
    return y.swapaxes(1, 2)


def heads_first(q, k, v, mask=None, causal=False, bias=None, scale=None, softcap=0.0):
    """`attention` with heads before time, q [B, H, T, K] and k, v [B, G, S, K]: the products are
    then plain batched matrices, twice as fast on CPU. Returns [B, H, T, K]."""
    B, H, T, K = q.shape
    G = k.shape[1]
    q = (q * (K**-0.5 if scale is None else scale)).reshape(B, G, H // G, T, K)

    def grouped(x):  # [b, h, t, s] -> [b, G, N, t, s], where h is H or 1
        return x if x is None else x[:, :, None] if x.shape[1] == 1 else x.reshape(x.shape[0], G, H // G, *x.shape[2:])

    mask, bias = grouped(mask), grouped(bias)
    if not causal:
        return _softmax_attention(q, k, v, mask, bias, softcap).reshape(B, H, T, K)
    # Blocks of queries, so that most of what the causal mask hides is never computed. Where context
    # splits T, a block would lie on few of the devices.
    size = -(-T // CAUSAL_BLOCKS) if T >= 128 and parallel.axis_size("context") == 1 else T
    blocks = []
    for a in range(0, T, size):
        b = min(a + size, T)
        seen = jnp.arange(b)[None] <= jnp.arange(a, b)[:, None]
        seen = seen if mask is None else seen & _block(mask, a, b)
        blocks.append(
            _softmax_attention(
                q[..., a:b, :], k[:, :, :b], v[:, :, :b], seen, None if bias is None else _block(bias, a, b), softcap
            )
        )
    return jnp.concatenate(blocks, axis=-2).reshape(B, H, T, K)


CAUSAL_BLOCKS = 2


def attention_weights(q, k, mask=None, scale=None, softcap=0.0):
    """The weights [B, H, T, S] float32 of `heads_first` without its causal mask: to be looked at."""
    B, H, T, K = q.shape
    k = jnp.repeat(k, H // k.shape[1], axis=1)
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32)
    scores *= K**-0.5 if scale is None else scale
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores)


def _block(x, a, b):
    """Rows a .. b and columns 0 .. b of a mask or bias [..., T or 1, S]."""
    return (x[..., a:b, :] if x.shape[-2] > 1 else x)[..., :b]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _softmax_attention(q, k, v, mask, bias, softcap):
    """softmax(q k^T) v. q: [B, G, N, T, K], N queries share a key; k, v: [B, G, S, K]."""
    return _forward(q, k, v, mask, bias, softcap)[0]


def _forward(q, k, v, mask, bias, softcap):
    scores = jnp.einsum("bgntk,bgsk->bgnts", q, k, preferred_element_type=jnp.float32)
    capped = None
    if softcap:
        scores = capped = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(v.dtype)
    y = jnp.einsum("bgnts,bgsk->bgntk", weights, v, preferred_element_type=jnp.float32)
    total = weights.astype(jnp.float32).sum(-1, keepdims=True)
    y = (y / total).astype(q.dtype)  # after the product: K divisions a query, not S
    return y, (q, k, v, bias, capped, weights, total, y)


def _backward(softcap, saved, dy):
    # As in FlashAttention (Dao et al. 2022, appendix B.4): no sum over S, and none of the mask,
    # whose weights are exactly 0.
    q, k, v, bias, capped, weights, total, y = saved
    dy = (dy / total).astype(dy.dtype)
    dv = jnp.einsum("bgnts,bgntk->bgsk", weights, dy)
    inner = (dy.astype(jnp.float32) * y).sum(-1, keepdims=True)
    dweights = jnp.einsum("bgntk,bgsk->bgnts", dy, v, preferred_element_type=jnp.float32)
    dscores = weights * (dweights - inner)
    dbias = None if bias is None else dscores.sum(0, keepdims=True)
    if softcap:
        dscores *= 1 - (capped / softcap) ** 2
    dscores = dscores.astype(q.dtype)
    dq = jnp.einsum("bgnts,bgsk->bgntk", dscores, k)
    dk = jnp.einsum("bgnts,bgntk->bgsk", dscores, q)
    return dq, dk, dv, None, dbias


_softmax_attention.defvjp(_forward, _backward)


def empty_cache(config, batch, length, dtype):
    """The keys and values of one layer before any token: zeros, {key, value: [B, G, S, K]}."""
    shape = (batch, config.G, length, config.K)
    return {name: parallel.split_cache(jnp.zeros(shape, dtype)) for name in ("key", "value")}


def write_cache(cache, k, v, index):
    """Write k, v [B, G, T, K] at slots index .. index + T of a layer's cache."""
    at = (0, 0, index, 0)
    return cache | {
        name: jax.lax.dynamic_update_slice(cache[name], x.astype(cache[name].dtype), at)
        for name, x in [("key", k), ("value", v)]
    }


class AttentionInputs(NamedTuple):
    """What the tokens of a layer see, the same for every layer of a kind."""

    mask: Any = None  # bool, to [B, H, T, S]
    facts: Any = None  # backends.Facts that say the same as the mask, or None where none can
    bias: Any = None  # [1, H, T, S] float32, of relative positions
    angles: Any = None  # of rotary positions
    index: Any = None  # the cache slot of the first token
    source: Any = None  # [B, S, D], an encoder's states
    source_mask: Any = None  # bool, to [B, H, T, S]


class Attention(nn.Module):
    """Attention with H query heads and G key/value heads, of tokens to themselves or a source."""

    config: ModelConfig
    out_stddev: float
    causal: bool = True

    def setup(self):
        c = self.config
        self.query = Linear(c.heads * c.K, c.has_bias("qkv"))
        self.key = Linear(c.G * c.K, c.has_bias("qkv"))
        self.value = Linear(c.G * c.K, c.has_bias("qkv"))
        self.out = Linear(c.dim, c.has_bias("out"), self.out_stddev)
        if c.qk_norm != "none":
            self.query_norm = Norm("rmsnorm", c.norm_eps, False, c.norm_unit_offset)
            self.key_norm = Norm("rmsnorm", c.norm_eps, False, c.norm_unit_offset)

    def __call__(self, x, view, cache=None):
        """x: [B, T, D]; cache: this layer's, written at slot view.index.
        Returns ([B, T, D], the new cache or None)."""
        q = self.queries(x, view.angles)
        k, v = self.keys_values(x, view.angles)
        if cache is not None:
            cache = write_cache(cache, k, v, view.index)
            k, v = cache["key"], cache["value"]
        mask, causal, bias, facts = view.mask, self.causal and cache is None, view.bias, view.facts
        if self.has_variable("params", "prefix_key"):
            k, v, mask, bias = self._after_prefix(k, v, mask, bias, x.shape[1], causal)
            causal, facts = False, None
        return self.attend(q, k, v, mask, causal, bias, facts, cache is not None), cache

    def _after_prefix(self, k, v, mask, bias, T, causal):
        """Prefix tuning (Li and Liang 2021): trained keys and values [P, G K] that every query
        sees, before those of the tokens."""
        B, G, S, K = k.shape

        def join(name, x):
            prefix = self.get_variable("params", name).astype(x.dtype).reshape(-1, G, K)
            prefix = jnp.broadcast_to(prefix.swapaxes(0, 1), (B, G, len(prefix), K))
            return jnp.concatenate([prefix, x], 2)

        k, v = join("prefix_key", k), join("prefix_value", v)
        P = k.shape[2] - S
        if causal:
            seen = masking.causal(jnp.arange(T), jnp.arange(S))
            mask = seen if mask is None else mask & seen
        if mask is not None:
            mask = jnp.pad(mask, [(0, 0)] * 3 + [(P, 0)], constant_values=True)
        if bias is not None:
            bias = jnp.pad(bias, [(0, 0)] * 3 + [(P, 0)])
        return k, v, mask, bias

    def cross(self, x, keys, values, mask, cached=False):
        """x: [B, T, D] looks at a source's keys and values [B, G, S, K], mask [B, 1, 1, S] bool or
        None. Returns [B, T, D]."""
        facts = kernels.MaskSpec(valid=None if mask is None else mask[:, 0, 0])
        return self.attend(self.queries(x), keys, values, mask, False, None, facts, cached)

    def queries(self, x, angles=None):
        """x: [B, T, D] -> [B, H, T, K]."""
        return self._heads(x, self.query, self.config.heads, "query_norm", angles)

    def keys_values(self, x, angles=None):
        """x: [B, S, D] -> keys and values, each [B, G, S, K]."""
        G = self.config.G
        return (self._heads(x, self.key, G, "key_norm", angles), self._heads(x, self.value, G, None, None))

    def _heads(self, x, linear, heads, norm, angles):
        normed = norm if norm and self.config.qk_norm != "none" else None
        y = linear(x)
        if normed and self.config.qk_norm == "full":
            y = getattr(self, norm)(y)
        y = y.reshape(*x.shape[:2], heads, self.config.K)
        if normed and self.config.qk_norm == "head":
            y = getattr(self, norm)(y)
        return (y if angles is None else rotate(y, angles)).swapaxes(1, 2)

    def attend(self, q, k, v, mask, causal, bias=None, facts=None, cached=False):
        """q: [B, H, T, K]; k, v: [B, G, S, K]; facts: what the mask says, as a backends.Facts, or
        None. With a cache, and for init, always plain. Returns the heads' outputs, projected:
        [B, T, D]."""
        c, name = self.config, "plain"
        if not cached and not self.is_initializing():
            name, _ = self.backend(q, k, causal, bias, facts)
        if name == "plain":
            y = heads_first(
                q,
                parallel.gather_sequence(k),
                parallel.gather_sequence(v),
                mask,
                causal,
                bias,
                c.attention_scale,
                c.attention_softcap,
            )
        else:
            y = kernels.BACKENDS[name].attend(q, k, v, causal, facts, c.attention_scale, c.attention_softcap)
        return self.out(y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], c.heads * c.K))

    def backend(self, q, k, causal, bias, facts):
        """`backends.choose` for a call of `attend` without a cache."""
        c = self.config
        return kernels.choose(
            c.attention_backend,
            kernels.Call(
                parallel.current_platform(),
                q.shape,
                k.shape,
                q.dtype,
                causal,
                facts,
                bias is not None,
                c.attention_softcap,
            ),
        )
