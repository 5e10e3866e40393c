"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.kernels import Array, Queries, States
from nanoflax.nn.attention import AttentionInputs, LayerCache, heads_first
from nanoflax.nn.layers import Linear, Norm
from nanoflax.nn.positions import rotate

NORM_EPS = 1e-6  # of the norms inside, whatever model.norm_eps is, as in DeepSeek's code


def empty_latent_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> LayerCache:
    """The latent vectors and rotary keys of one layer before the first token: zeros [B, 1, length, rank + rope_dim]."""
    shape = (batch, 1, length, config.latent.rank + config.latent.rope_dim)
    return {"key": parallel.split_cache(jnp.zeros(shape, dtype))}


class LatentAttention(nn.Module):
    """Attention whose keys and values come from one vector per token. Settings: config.latent.

    A token's latent vector [rank] gives the keys and values of all heads by the matrix `latent_up`; a rotary key
    [rope_dim] is common to all heads. The cache holds these rank + rope_dim numbers of each token alone.
    """

    config: ModelConfig
    out_stddev: float
    causal: bool = True

    def setup(self):
        c, a = self.config, self.config.latent
        if a.query_rank:
            self.query_down = Linear(a.query_rank, c.has_bias("qkv"))
            self.query_norm = Norm("rmsnorm", NORM_EPS, False)
            self.query_up = Linear(c.heads * c.K, False)
        else:
            self.query = Linear(c.heads * c.K, False)
        self.latent_down = Linear(a.rank + a.rope_dim, c.has_bias("qkv"))
        self.latent_norm = Norm("rmsnorm", NORM_EPS, False)
        self.latent_up = Linear(c.heads * (c.K - a.rope_dim + a.value_dim), False)
        self.out = Linear(c.dim, c.has_bias("out"), self.out_stddev)

    def __call__(
        self, x: States, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> tuple[States, LayerCache | None]:
        """Self-attention; cache: this layer's, to be written at slot inputs.index.
        Returns (the output, the new cache)."""
        c, a, T = self.config, self.config.latent, x.shape[1]
        q = self.query_up(self.query_norm(self.query_down(x))) if a.query_rank else self.query(x)
        q = q.reshape(*x.shape[:2], c.heads, c.K)
        q = jnp.concatenate([q[..., : -a.rope_dim], self._turned(q[..., -a.rope_dim :], inputs)], -1).swapaxes(1, 2)
        latent, key = jnp.split(self.latent_down(x), [a.rank], -1)
        key = self._turned(key[:, :, None], inputs)[:, :, 0]
        latent = jnp.concatenate([self.latent_norm(latent), key], -1)[:, None]
        if cache is not None:
            written = latent.astype(cache["key"].dtype)
            latent = jax.lax.dynamic_update_slice(cache["key"], written, (0, 0, inputs.index, 0))
            cache = cache | {"key": latent}
        # For a key and a head, absorbed scores and sums need 2 rank + rope_dim - K - value_dim more products per query.
        # Plain attention computes the keys and values of all slots again: rank (K - rope_dim + value_dim) per call.
        # So long prompts are read plain, and new tokens absorbed (DeepSeek-V3: up to 170 at once).
        more, up = 2 * a.rank + a.rope_dim - c.K - a.value_dim, a.rank * (c.K - a.rope_dim + a.value_dim)
        absorbed = cache is not None and T * more <= up
        attend = self.absorbed if absorbed else self.plain
        y = attend(q, latent, inputs, self.causal and cache is None)
        return self.out(y.swapaxes(1, 2).reshape(*x.shape[:2], -1)), cache

    def plain(
        self, q: Queries, latent: Float[Array, "B 1 S C"], inputs: AttentionInputs, causal: bool
    ) -> Float[Array, "B H T _"]:
        """Attention to the keys and values of all heads. latent: with the rotary keys at the end."""
        c, a = self.config, self.config.latent
        B, _, S, _ = latent.shape
        up = self.latent_up(latent[:, 0, :, : a.rank]).reshape(B, S, c.heads, -1).swapaxes(1, 2)
        k, v = jnp.split(up, [c.K - a.rope_dim], -1)
        k = jnp.concatenate([k, jnp.broadcast_to(latent[..., a.rank :], (B, c.heads, S, a.rope_dim))], -1)
        return self._heads_first(q, k, v, inputs, causal)

    def absorbed(
        self, q: Queries, latent: Float[Array, "B 1 S C"], inputs: AttentionInputs, causal: bool
    ) -> Float[Array, "B H T _"]:
        """`plain` with the matrix of the keys applied to the queries and that of the values to the result, so that
        all heads read the latent vectors themselves (DeepSeek-AI 2024, section 2.1.2)."""
        c, a, p = self.config, self.config.latent, self.variables["params"]["latent_up"]
        adapted = self.latent_up(jnp.eye(a.rank, dtype=q.dtype)) if "lora_a" in p else p["kernel"].astype(q.dtype)
        for_keys, for_values = jnp.split(adapted.reshape(a.rank, c.heads, -1), [c.K - a.rope_dim], -1)
        q, turned = jnp.split(q, [c.K - a.rope_dim], -1)
        q = jnp.concatenate([jnp.einsum("bhtk,rhk->bhtr", q, for_keys), turned], -1)
        y = self._heads_first(q, latent, latent[..., : a.rank], inputs, causal)
        return jnp.einsum("bhtr,rhv->bhtv", y, for_values)

    def _heads_first(self, q, k, v, inputs, causal):
        c, k, v = self.config, parallel.gather_sequence(k), v if v is None else parallel.gather_sequence(v)
        scale = c.attention_scale or c.K**-0.5  # K also of the longer absorbed queries
        return heads_first(q, k, v, inputs.mask, causal, inputs.bias, scale, c.attention_softcap)

    def _turned(self, x, inputs):
        """x [B, T, H, rope_dim] with rotary positions, if the layer has them."""
        return x if inputs.angles is None else rotate(x, inputs.angles, self.config.rope.interleaved)
