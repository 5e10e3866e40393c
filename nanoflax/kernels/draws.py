"""The most probable token, and a token drawn by its probability."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from nanoflax.kernels.arrays import Array


def argmax(x: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """x.argmax(-1) in int32; 0 in a row with NaN. Two reductions take a fifth of the time of XLA's one on a CPU."""
    V = x.shape[-1]
    ids = jnp.where(x >= x.max(-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V)
    return ids.min(-1) % V


def categorical(rng: jax.Array, logits: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """jax.random.categorical(rng, logits) in int32."""
    return argmax(logits + jax.random.gumbel(rng, logits.shape, logits.dtype))
