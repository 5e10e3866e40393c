"""Whole models, made of blocks: `build(config)`, `init(model, rng)`, and the decode interface."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanoflax import masking, positions
from nanoflax.attention import empty_cache
from nanoflax.blocks import DecoderBlock
from nanoflax.config import ModelConfig, validate
from nanoflax.errors import UserError
from nanoflax.layers import Embedding, Linear, Norm

REMAT_POLICIES = {
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Decoder(nn.Module):
    """A decoder-only Transformer.

    `apply({"params": params}, tokens)` gives the logits of every position; `hidden` and `head` are
    its two halves, for a loss that never holds all logits; `empty_cache` and `decode` are the
    interface of the samplers.
    """

    config: ModelConfig
    remat: str = "none"

    def setup(self):
        c = self.config
        dtype = self.compute_dtype
        self.embed = Embedding(c.vocab_size, c.dim, dtype)
        if c.positions == "learned":
            self.position_embed = Embedding(c.context, c.dim, dtype)
        block = DecoderBlock
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], static_argnums=(6,))
        self.blocks = [block(c, name=f"block_{i}") for i in range(c.layers)]
        self.norm = Norm(c.norm, c.norm_eps, c.bias)
        if not c.tied:
            self.unembed = Linear(c.vocab_size, bias=False)
        self.drop = nn.Dropout(c.dropout)

    def __call__(self, tokens, segments=None, cache=None, deterministic=True):
        """Logits of the next token at every position.

        tokens: [B, T] int32 below V; segments: [B, T] int32, the document of each token of a packed
        window (0 is padding), or None; cache: from `empty_cache`, whose slots the tokens extend;
        deterministic: False turns dropout on (pass rngs={"dropout": key}).
        Returns (logits [B, T, V] float32, the new cache or None).
        """
        x, cache = self.hidden(tokens, segments, cache, deterministic)
        return self.head(x), cache

    def hidden(self, tokens, segments=None, cache=None, deterministic=True):
        """The normed last states, [B, T, D] in the compute dtype, and the cache."""
        c = self.config
        B, T = tokens.shape
        if cache is None:
            slots = jnp.arange(T, dtype=jnp.int32)[None]
            place = slots if segments is None else positions.restarting(segments)
            mask = None if segments is None else masking.segments(segments, segments)
            index, layers = None, [None] * c.layers
        else:
            index, start, layers = cache["index"], cache["start"], cache["layers"]
            slots = index + jnp.arange(T, dtype=jnp.int32)[None]
            keys = jnp.arange(layers[0]["key"].shape[1], dtype=jnp.int32)[None]
            place = jnp.maximum(slots - start[:, None], 0)
            mask = masking.causal(slots, keys) & masking.padding(keys >= start[:, None])
        x = self.embed(tokens)
        if c.positions == "learned":
            x += self.position_embed(place)
        elif c.positions == "sinusoidal":
            x += positions.sinusoidal(place, c.dim).astype(x.dtype)
        angles = (positions.rotary_angles(place, c.K, c.rope_theta)
                  if c.positions == "rotary" else None)
        x = self.drop(x, deterministic=deterministic)
        new = []
        for block, layer in zip(self.blocks, layers):
            x, layer = block(x, mask, angles, layer, index, deterministic)
            new.append(layer)
        if cache is not None:
            cache = {"layers": new, "index": index + T, "start": start}
        return self.norm(x), cache

    def head(self, x):
        """x: [B, T, D] -> logits [B, T, V] float32."""
        if self.config.tied:
            return jnp.einsum("btd,vd->btv", x, self.embed.embedding.astype(x.dtype),
                              preferred_element_type=jnp.float32)
        return self.unembed(x).astype(jnp.float32)

    @property
    def compute_dtype(self):
        """The dtype of activations: `auto` is float32 on CPU, where bfloat16 gains nothing."""
        if self.config.dtype != "auto":
            return jnp.dtype(self.config.dtype)
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")

    def decode(self, params, tokens, cache):
        """One step of generation: tokens [B, T] int32 extend the cache.

        Returns (logits [B, T, V] float32, cache). The whole of what samplers know of a model.
        """
        return self.apply({"params": params}, tokens, cache=cache)

    def empty_cache(self, batch, length, start=None):
        """A cache of `length` slots. start: [B] int32, the padding before each row's first token."""
        c = self.config
        layers = [empty_cache(c, batch, length, self.compute_dtype) for _ in range(c.layers)]
        start = jnp.zeros(batch, jnp.int32) if start is None else start
        return {"layers": layers, "index": jnp.int32(0), "start": start}


def head_kernel(config, params):
    """The output projection [D, V] of a Decoder's parameters."""
    return params["embed"]["embedding"].T if config.tied else params["unembed"]["kernel"]


def build(config, remat="none"):
    """The Linen module of a ModelConfig.

    Raises: UserError naming every bad field.
    """
    validate(config)
    if config.vocab_size < 1:
        raise UserError("model.vocab_size=0 must be set before a model is built")
    return Decoder(config, remat)



def flops_per_token(config, length=None):
    """Floating-point operations of training on one token, forward and backward.

    6 for each weight of a matrix product and 12 L H K T for attention, not halved for the causal
    mask (Chowdhery et al. 2022, appendix B: the numerator of MFU). length: T, or the context.
    """
    c = config
    attention = c.dim * c.K * (2 * c.heads + 2 * c.G)
    mlp = c.dim * c.F * (3 if c.gated else 2)
    weights = c.layers * (attention + mlp) + c.dim * c.vocab_size
    return 6 * weights + 12 * c.layers * c.heads * c.K * (length or c.context)
