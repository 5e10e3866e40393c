"""Attention as a function, the layer that owns its projections, and the cache as a value."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Num

from nanoflax import kernels, parallel
from nanoflax.config import ModelConfig
from nanoflax.kernels import Array, Keys, MaskSpec, Queries, States, Tokens, softmax_attention
from nanoflax.nn import masking
from nanoflax.nn.layers import Linear, Norm
from nanoflax.nn.positions import Angles, rotate

Mask = Bool[Array, "#B #H #T #S"]
Bias = Float[Array, "1 H T S"]  # added to the scores, float32
Sinks = Float[Array, " H"]  # scores of each head's sink
LayerCache = dict[str, Num[Array, "B ..."]]  # of kernels.KeyValues; of a source cross_key and cross_value

CAUSAL_BLOCKS = 2  # blocks of queries; a block computes only the scores of keys up to its last query


def dot_product_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    mask: Mask | None = None,
    causal: bool = False,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Sinks | None = None,
) -> Float[Array, "B T H K"]:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1), softmax in float32.

    G divides H: grouped queries (Ainslie et al. 2023). causal: query t attends only to keys 0 .. t
    (T = S), and of these to what the mask allows. scale: of the scores, default K^-1/2. softcap:
    scores become cap tanh(score / cap) (Gemma 2); 0 for none. sinks: a score of each head for a key whose
    value is 0 (Xiao et al. 2023; gpt-oss). The result has q's dtype. A query without an allowed key gets the
    mean of the values, or with sinks 0, never NaN.
    """
    y = heads_first(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), mask, causal, bias, scale, softcap, sinks)
    return y.swapaxes(1, 2)


def heads_first(
    q: Queries,
    k: Keys,
    v: Float[Array, "B G S _"] | None,
    mask: Mask | None = None,
    causal: bool = False,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Sinks | None = None,
) -> Float[Array, "B H T _"]:
    """`dot_product_attention` with heads before time: its products are then plain batched matrix
    products, twice as fast on CPU. v=None: the float32 weights [B, H, T, S]."""
    B, H, T, K = q.shape
    G = k.shape[1]
    q = (q * (K**-0.5 if scale is None else scale)).reshape(B, G, H // G, T, K)

    def grouped(x):  # [b, H or 1, t, s] -> [b, G, H // G, t, s] or [b, 1, 1, t, s]
        return x[:, :, None] if x.shape[1] == 1 else x.reshape(x.shape[0], G, H // G, *x.shape[2:])

    mask, bias = (None if x is None else grouped(x) for x in (mask, bias))
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(G, H // G, 1, 1)
    if not causal:
        return softmax_attention(q, k, v, mask, bias, sinks, softcap).reshape(B, H, T, -1)  # type: ignore  # of custom_vjp
    # If the mesh's context axis splits T, a block would be on a part of the devices only: use one block.
    size = -(-T // CAUSAL_BLOCKS) if T >= 128 and v is not None and parallel.axis_size("context") == 1 else T
    blocks = []
    for a in range(0, T, size):
        b = min(a + size, T)
        allowed = jnp.arange(b)[None] <= jnp.arange(a, b)[:, None]
        allowed = allowed if mask is None else allowed & _block(mask, a, b)
        block_bias = None if bias is None else _block(bias, a, b)
        block = q[..., a:b, :], k[:, :, :b], None if v is None else v[:, :, :b]
        blocks.append(softmax_attention(*block, allowed, block_bias, sinks, softcap))
    return jnp.concatenate(blocks, axis=-2).reshape(B, H, T, -1)


def attention_weights(
    model: Any, params: dict, *arguments: Any, **named: Any
) -> tuple[list[Float[Array, "B H T S"]], Any]:
    """(the float32 weights of each attention layer, for pictures; the result of `model.hidden`). arguments, named: of
    `hidden`. A model with a source gives only its cross-attention. Rows sum to 1, or less with attention sinks."""
    found = {}  # path of the layer -> its weights

    def record(run, arguments, named, context):  # Linen calls it in place of every method of a module
        result, path = run(*arguments, **named), "/".join(context.module.path)
        if context.method_name == "_heads_first":
            q, k, _, *rest = arguments
            found[path] = run(q, k, None, *rest)
        if context.method_name == "_decoded":  # of the LSTM
            found[path] = result[2][:, None]
        return result

    model = model.clone(config=dataclasses.replace(model.config, attention_backend="plain"), remat="none")
    with nn.intercept_methods(record):
        result = model.apply({"params": params}, *arguments, **named, method="hidden")
    cross = [weights for path, weights in found.items() if not path.endswith("/attention")]
    return cross or [*found.values()], result


def _block(x, a, b):
    """Rows a .. b and columns 0 .. b of a mask or bias [..., T or 1, S]."""
    return (x[..., a:b, :] if x.shape[-2] > 1 else x)[..., :b]


class AttentionInputs(NamedTuple):
    """Mask, bias, rotary angles and cache slot, shared by the layers of a kind."""

    mask: Mask | None = None
    spec: MaskSpec | None = None  # the same mask for kernels, or None if a MaskSpec cannot describe the mask
    bias: Bias | None = None  # from relative positions
    angles: Angles | None = None  # from rotary positions
    index: Any = None  # [] int32, the cache slot of the first token, or None
    source: Any = None  # [B, S, D], the encoder's output for cross-attention, or None
    source_mask: Mask | None = None
    segments: Tokens | None = None  # the document of each token; with a cache 1, and 0 for padding before the text
    query_scale: Any = None  # [B, 1, T, 1] float32, a factor of the queries, or None
    counted: Bool[Array, "B T"] | None = None  # False at tokens that the statistics of routers leave out


class Attention(nn.Module):
    """Multi-head attention with H query heads and G key/value heads: `__call__` is self-attention,
    `cross` is cross-attention."""

    config: ModelConfig
    out_stddev: float
    causal: bool = True

    def setup(self):
        c = self.config
        self.query = Linear(c.heads * c.K, c.has_bias("qkv"))
        self.key = Linear(c.G * c.K, c.has_bias("qkv"))
        self.value = Linear(c.G * c.K, c.has_bias("qkv"))
        self.out = Linear(c.dim, c.has_bias("out"), self.out_stddev)
        self.sinks = self.param("sinks", nn.initializers.zeros, (c.heads,)) if c.attention_sinks else None
        if c.attention_gate:
            self.gate = Linear(c.heads * c.K, c.has_bias("qkv"))
        self.query_norm = self.key_norm = None
        if c.qk_norm != "none":
            kinds = {"each_head": ("layernorm", False, 2), "layer": ("layernorm", True, 1)}
            kind, bias, axes = kinds.get(c.qk_norm, ("rmsnorm", False, 1))
            options = kind, c.norm_eps, bias, c.norm_unit_offset, c.norm_scale and c.qk_norm != "rotated", axes
            self.query_norm, self.key_norm = Norm(*options), Norm(*options)

    def __call__(
        self, x: States, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> tuple[States, LayerCache | None]:
        """Self-attention. cache: this layer's, to be written at slot inputs.index.
        Returns (the output, the new cache)."""
        q = self.queries(x, inputs.angles)
        q = q if inputs.query_scale is None else (q * inputs.query_scale).astype(q.dtype)
        k, v = self.keys_values(x, inputs.angles)
        if cache is not None:
            cache = kernels.write_key_values(cache, k, v, inputs.index)
            k, v = kernels.read_key_values(cache, x.dtype)
        mask, causal, bias, spec = inputs.mask, self.causal and cache is None, inputs.bias, inputs.spec
        if self.has_variable("params", "prefix_key"):
            k, v, mask, bias = self._after_prefix(k, v, mask, bias, x.shape[1], causal)
            causal, spec = False, None
        gate = jax.nn.sigmoid(self.gate(x)) if self.config.attention_gate else None
        return self.attend(q, k, v, mask, causal, bias, spec, cache is not None, gate), cache

    def _after_prefix(self, k, v, mask, bias, T, causal):
        """Prefix tuning (Li and Liang 2021): put trained keys and values [P, G K], visible to every query,
        before the keys and values of the tokens."""
        B, G, S, K = k.shape

        def join(name, x):
            prefix = self.get_variable("params", name).astype(x.dtype).reshape(-1, G, K)
            prefix = jnp.broadcast_to(prefix.swapaxes(0, 1), (B, G, len(prefix), K))
            return jnp.concatenate([prefix, x], 2)

        k, v = join("prefix_key", k), join("prefix_value", v)
        P = k.shape[2] - S
        if causal:
            past = masking.causal(jnp.arange(T), jnp.arange(S))
            mask = past if mask is None else mask & past
        if mask is not None:
            mask = jnp.pad(mask, [(0, 0)] * 3 + [(P, 0)], constant_values=True)
        if bias is not None:
            bias = jnp.pad(bias, [(0, 0)] * 3 + [(P, 0)])
        return k, v, mask, bias

    def cross(
        self, x: States, keys: Keys, values: Keys, mask: Bool[Array, "B 1 1 S"] | None, cached: bool = False
    ) -> States:
        """Cross-attention of x to the keys and values of a source."""
        spec = MaskSpec(valid=None if mask is None else mask[:, 0, 0])
        return self.attend(self.queries(x), keys, values, mask, False, None, spec, cached)

    def queries(self, x: States, angles: Angles | None = None) -> Queries:
        return self._heads(self.query(x), self.config.heads, self.query_norm, angles)

    def keys_values(self, x: Float[Array, "B S D"], angles: Angles | None = None) -> tuple[Keys, Keys]:
        G = self.config.G
        return self._heads(self.key(x), G, self.key_norm, angles), self._heads(self.value(x), G)

    def _heads(self, y, heads, norm=None, angles=None):
        """y [B, T, heads K] as [B, heads, T, K]: normed where config.qk_norm says, clipped, turned by the angles."""
        c, kind = self.config, self.config.qk_norm
        y = norm(y) if norm and kind == "full" else y
        y = y.reshape(*y.shape[:2], heads, c.K)
        y = norm(y) if norm and kind in ("head", "each_head", "layer") else y
        y = y if c.qkv_clip is None else jnp.clip(y, -c.qkv_clip, c.qkv_clip)
        if angles is not None:
            y = rotate(y, angles, c.rope.interleaved)
            y = norm(y) if norm and kind.startswith("rotated") else y
        return y.swapaxes(1, 2)

    def attend(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        mask: Mask | None,
        causal: bool,
        bias: Bias | None = None,
        spec: MaskSpec | None = None,
        cached: bool = False,
        gate: Float[Array, "B T _"] | None = None,
    ) -> States:
        """Attention and the output projection, by the kernel that `kernels.choose` names; with a cache, and
        for init, by `heads_first`. spec: the mask as a MaskSpec, or None. gate: a factor before the projection."""
        c, name = self.config, "plain"
        if not cached and not self.is_initializing():
            name, _ = self.backend(q, k, causal, bias, spec)
        if name == "plain":
            k, v = parallel.gather_sequence(k), parallel.gather_sequence(v)
            y = self._heads_first(q, k, v, mask, causal, bias)
        else:
            y = kernels.attend_by(name, q, k, v, causal, spec, c.attention_scale, c.attention_softcap)
        y = y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)
        return self.out(y if gate is None else y * gate)

    def _heads_first(self, q, k, v, mask, causal, bias):
        c = self.config
        return heads_first(q, k, v, mask, causal, bias, c.attention_scale, c.attention_softcap, self.sinks)

    def backend(self, q: Array, k: Array, causal: bool, bias: Bias | None, spec: MaskSpec | None) -> tuple[str, str]:
        """`kernels.choose` for a call of `attend` without a cache."""
        c, platform = self.config, parallel.current_platform()
        options = bias is not None, c.attention_softcap, c.attention_sinks
        call = kernels.Call(platform, q.shape, k.shape, q.dtype, causal, spec, *options)
        return kernels.choose(c.attention_backend, call)
