"""Where a token stands: sinusoidal, learned and rotary positions, as pure functions."""

import jax
import jax.numpy as jnp


def restarting(segments):
    """Positions that restart at every document of a packed window.

    segments: [B, T] int32, constant within a document. Returns [B, T] int32 positions from 0.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def sinusoidal(positions, dim):
    """Fixed sines and cosines (Vaswani et al. 2017, section 3.5), interleaved as in the paper.

    positions: [B, T] int32. Returns [B, T, D] float32.
    """
    rate = 10_000.0 ** (-jnp.arange(0, dim, 2) / dim)
    angle = positions[..., None] * rate
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*positions.shape, dim)


def rotary_angles(positions, head_dim, theta=10_000.0):
    """Cosines and sines of rotary positions (Su et al. 2021), each [B, T, 1, K/2] float32."""
    rate = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angle = positions[..., None, None] * rate
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x, angles):
    """Turn pairs (x_i, x_{i+K/2}) of each head by their angle, in float32 (the Llama layout).

    x: [B, T, H, K]; angles: from `rotary_angles`. Returns [B, T, H, K] in x's dtype.
    """
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
