"""Layers whose state has one size for any text: the gated delta rule and Mamba-2."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.kernels import States, activate, chunked, convolve
from nanoflax.nn.attention import AttentionInputs, LayerCache
from nanoflax.nn.layers import Linear, rms_norm


def empty_recurrent_cache(config: ModelConfig, batch: int, dtype: DTypeLike) -> LayerCache:
    """The state of one layer before the first token: of the recurrence, float32, and of the convolution, zeros."""
    r = config.recurrent
    state = jnp.zeros((batch, r.heads, r.key_dim, r.value_dim), jnp.float32)
    channels = 2 * r.groups * r.key_dim + r.heads * r.value_dim
    return {"state": parallel.split_cache(state), "conv": jnp.zeros((batch, r.conv - 1, channels), dtype)}


class RecurrentLayer(nn.Module):
    """Projections, a convolution of queries, keys and values, the recurrence `_recur`, a gated norm, a projection."""

    config: ModelConfig
    out_stddev: float
    convolved: ClassVar = ("query", "key", "value")  # in the order of the convolution's channels

    def setup(self):
        c, r = self.config, self.config.recurrent
        self.query, self.key = (Linear(r.groups * r.key_dim, r.bias) for _ in range(2))
        self.value, self.gate = (Linear(r.heads * r.value_dim, r.bias) for _ in range(2))
        self.step = Linear(r.heads, r.bias)
        channels = 2 * r.groups * r.key_dim + r.heads * r.value_dim
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's for a convolution
        self.conv = self.param("conv", uniform, (r.conv, 1, channels))
        self.conv_bias = self.param("conv_bias", nn.initializers.zeros, (channels,)) if r.conv_bias else jnp.zeros(())
        # As Mamba-2: a state keeps exp(-step exp(decay)) of itself, with steps near 0.001 .. 0.1.
        self.decay = self.param("decay", lambda key: jnp.log(jax.random.uniform(key, (r.heads,), minval=1, maxval=16)))
        steps = lambda key: jnp.log(jnp.expm1(10 ** jax.random.uniform(key, (r.heads,), minval=-3, maxval=-1)))
        self.step_bias = self.param("step_bias", steps)
        self.out = Linear(c.dim, r.bias, self.out_stddev)

    def __call__(
        self, x: States, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> tuple[States, LayerCache | None]:
        """cache: this layer's. Returns (the output, the new cache)."""
        c, r, (B, T, _) = self.config, self.config.recurrent, x.shape
        before = empty_recurrent_cache(c, B, x.dtype) if cache is None else cache
        parts = [getattr(self, name)(x) for name in self.convolved]
        u, last = convolve(jnp.concatenate(parts, -1), self.conv, before["conv"], inputs.segments)
        u = activate(c.activation, u + self.conv_bias.astype(u.dtype))
        ends = np.cumsum([part.shape[-1] for part in parts])[:-1]
        u = dict(zip(self.convolved, jnp.split(u, ends, -1), strict=True))
        q, k = (u[name].reshape(B, T, r.groups, r.key_dim).astype(jnp.float32) for name in ("query", "key"))
        v = u["value"].reshape(B, T, r.heads, r.value_dim).astype(jnp.float32)
        step = jax.nn.softplus(self.step(x).astype(jnp.float32) + self.step_bias)
        y, state = self._recur(x, q, k, v, step, before["state"], inputs.segments)
        y = self._gated_norm(y, jax.nn.silu(self.gate(x).reshape(v.shape).astype(jnp.float32)))
        y = self.out(y.reshape(B, T, -1).astype(x.dtype))
        return y, None if cache is None else {"state": state, "conv": last.astype(before["conv"].dtype)}


class DeltaRule(RecurrentLayer):
    """The gated delta rule (Yang et al. 2024, section 3), as in Qwen3-Next."""

    def setup(self):
        super().setup()
        r = self.config.recurrent
        self.write = Linear(r.heads, r.bias)
        self.norm = self.param("norm", nn.initializers.ones, (r.value_dim,))

    def _recur(self, x, q, k, v, step, state, segments):
        K, beta = q.shape[-1], jax.nn.sigmoid(self.write(x).astype(jnp.float32))
        q, k = (rms_norm(u, jnp.full(K, K**-0.5), 1e-6 / K) for u in (q, k))  # of length 1; 1e-6 as Transformers
        return chunked(
            q * K**-0.5, k, v, -jnp.exp(self.decay) * step, beta, state, segments, self.config.recurrent.chunk
        )

    def _gated_norm(self, y, gate):
        return rms_norm(y, self.norm, self.config.norm_eps) * gate


class Mamba2(RecurrentLayer):
    """Mamba-2 (Dao and Gu 2024, section 7): key is the paper's B, query C, value x and step the delta of a step."""

    convolved: ClassVar = ("value", "key", "query")

    def setup(self):
        super().setup()
        r = self.config.recurrent
        self.skip = self.param("skip", nn.initializers.ones, (r.heads,))
        self.norm = self.param("norm", nn.initializers.ones, (r.heads * r.value_dim,))

    def _recur(self, x, q, k, v, step, state, segments):
        r = self.config.recurrent
        step = jnp.clip(step, r.min_step, r.max_step)
        y, state = chunked(q, k, v * step[..., None], -jnp.exp(self.decay) * step, None, state, segments, r.chunk)
        return y + self.skip[:, None] * v, state

    def _gated_norm(self, y, gate):
        y = (y * gate).reshape(*y.shape[:2], self.config.recurrent.groups, -1)
        return rms_norm(y, jnp.ones(y.shape[-1]), self.config.norm_eps).reshape(*gate.shape[:2], -1) * self.norm


RECURRENT_LAYERS: dict[str, type[nn.Module]] = {"delta": DeltaRule, "mamba2": Mamba2}  # kind in config.layer_types
