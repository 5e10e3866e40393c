"""Layers whose state has one size for any text: the gated delta rule and Mamba-2."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.kernels import Array, States, Tokens
from nanoflax.nn.attention import AttentionInputs, LayerCache
from nanoflax.nn.layers import Linear, activate, rms_norm

State = Float[Array, "B H K N"]  # float32; K, N: the sizes of a key and of a value


def empty_recurrent_cache(config: ModelConfig, layer: int, batch: int, dtype: DTypeLike) -> LayerCache:
    """The state of one layer before the first token: of the recurrence, float32, and of the convolution."""
    r = config.recurrent
    state = jnp.zeros((batch, r.heads, r.key_dim, r.value_dim), jnp.float32)
    channels = 2 * r.groups * r.key_dim + r.heads * r.value_dim
    return {"state": parallel.split_cache(state), "conv": jnp.zeros((batch, r.conv - 1, channels), dtype)}


def chunked(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H N"],
    log_decay: Float[Array, "B T H"],
    beta: Float[Array, "B T H"] | None,
    state: State,
    segments: Tokens | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "B T H N"], State]:
    """A linear recurrence of a matrix S per head, in float32: (q_t S_t at every position t, the last S).

    S_t = a_t S_{t-1} + k_t v_t^T (Dao and Gu 2024, section 2), where a_t = exp(log_decay_t); with beta
    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T (Yang et al. 2024, equation 10). H / G neighbouring
    heads share a query and a key. state: S before the first token. segments: where they change, S becomes 0;
    tokens of segment 0 add nothing to S. chunk: tokens that matrix products compute at once (Yang et al.,
    section 3.3); T = 1 is the recurrence.
    """
    (B, T, G, _), H, C = q.shape, v.shape[2], min(chunk, q.shape[1])
    starts = jnp.zeros((B, T), jnp.int32)
    if segments is not None:
        k = jnp.where(segments[..., None, None] > 0, k, 0)
        starts = starts.at[:, 1:].set(segments[:, 1:] != segments[:, :-1])

    def split(x, heads):  # [B, T, heads, ...] -> [chunks, B, G, heads / G, C, ...]; zeros after the text change nothing
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -T % C)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(B, -1, C, G, heads // G, *x.shape[3:])
        return jnp.moveaxis(x, (1, 2), (0, 4))

    q, k, v, a = split(q, G), split(k, G), split(v, H), split(log_decay, H)
    document = split(jnp.broadcast_to(starts[..., None], (B, T, G)), G).cumsum(-1)  # documents that began in the chunk
    # decay[i, j]: of S from token j to token i. A difference of two long sums would be less exact.
    later = jnp.tri(C, k=-1, dtype=jnp.float32)
    decay = jnp.exp((later * a[..., None]).cumsum(-2))
    decay *= jnp.tri(C) * (document[..., None] == document[..., None, :])
    from_state = jnp.exp(a.cumsum(-1)) * (document == 0)  # of S from before the chunk to token i
    transposed = k.swapaxes(-1, -2)
    scores, correction = (q @ transposed) * decay, None
    if beta is not None:
        # The writes of a chunk depend on each other: w_i = b_i (v_i - k_i S_0 - sum_{j < i} (k_i k_j) decay_ij w_j).
        b = split(beta, H)[..., None]
        system = b * (k @ transposed) * decay * later + jnp.eye(C)
        right = jnp.concatenate([b * v, b * from_state[..., None] * k], -1)
        solved = jax.lax.linalg.triangular_solve(system, right, left_side=True, lower=True, unit_diagonal=True)
        v, correction = jnp.split(solved, [v.shape[-1]], -1)
    writes = transposed * decay[..., -1:, :]  # what the keys of the chunk add to its last S

    def step(S, x):
        q, v, from_state, scores, writes, correction = x
        w = v if correction is None else v - correction @ S
        y = from_state[..., None] * (q @ S) + scores @ w
        return from_state[..., -1:, None] * S + writes @ w, y

    S = state.reshape(B, G, H // G, *state.shape[2:])
    S, y = jax.lax.scan(step, S, (q, v, from_state, scores, writes, correction))
    y = jnp.moveaxis(y, (0, 4), (1, 2)).reshape(B, -1, H, y.shape[-1])
    return y[:, :T], S.reshape(state.shape)


def convolve(
    x: Float[Array, "B T C"], kernel: Float[Array, "X 1 C"], before: Float[Array, "B W C"], segments: Tokens | None
) -> tuple[Float[Array, "B T C"], Float[Array, "B W C"]]:
    """A causal convolution of each channel alone over X tokens of the same document; before: the W = X - 1
    inputs before x. Returns (the output, the last W inputs)."""
    T, W = x.shape[1], before.shape[1]
    if segments is not None:
        x = jnp.where(segments[..., None] > 0, x, 0)
        segments = jnp.pad(segments, [(0, 0), (W, 0)], mode="edge")
    x, y = jnp.concatenate([before.astype(x.dtype), x], 1), jnp.zeros_like(x)
    for i in range(W + 1):
        term = x[:, i : i + T] * kernel[i].astype(x.dtype)
        y += term if segments is None else jnp.where((segments[:, i : i + T] == segments[:, W:])[..., None], term, 0)
    return y, x[:, T:]


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
        before = empty_recurrent_cache(c, 0, B, x.dtype) if cache is None else cache
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
