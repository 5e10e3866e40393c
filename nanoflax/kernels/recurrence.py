"""Linear recurrences and causal convolutions over the tokens of a text, computed in chunks."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from nanoflax.kernels.arrays import Array, Tokens

State = Float[Array, "B H K N"]  # float32; K, N: the sizes of a key and of a value


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
