"""Where a token stands: sinusoidal, learned and rotary positions, as pure functions."""

import jax
import jax.numpy as jnp


def restarting(segments):
    """Positions that restart at every document of a packed window.

    segments: [B, T] int32, constant within a document. Returns [B, T] int32 positions from 0.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def sinusoidal(positions, dim, halves=False):
    """Fixed sines and cosines (Vaswani et al. 2017, section 3.5), interleaved as in the paper, or
    all sines before all cosines (Marian).

    positions: [B, T] int32. Returns [B, T, D] float32.
    """
    rate = 10_000.0 ** (-jnp.arange(0, dim, 2) / dim)
    angle = positions[..., None] * rate
    pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-2 if halves else -1)
    return pairs.reshape(*positions.shape, dim)


def rotary_rates(config, local=False):
    """Radians a position by which each rotary pair turns (Su et al. 2021): [rotary_dim / 2].

    local: in a layer with a window, which keeps rope_local_theta and no scaling where the first is
    set. Scalings: linear (Chen et al. 2023) slows every pair by rope_factor; llama3 (Llama 3.1)
    only those that turn fewer than rope_low times in rope_context, those under rope_high partly.
    """
    c = config
    if local and c.rope_local_theta is not None:
        return base_rates(c.rope_local_theta, c.rotary_dim)
    rates = base_rates(c.rope_theta, c.rotary_dim)
    if c.rope_scaling == "linear":
        return rates / c.rope_factor
    if c.rope_scaling == "llama3":
        turns = c.rope_context * rates / (2 * jnp.pi)
        kept = jnp.clip((turns - c.rope_low) / (c.rope_high - c.rope_low), 0, 1)
        return rates * (kept + (1 - kept) / c.rope_factor)
    return rates


def base_rates(theta, dim):
    """Radians a position by which each of dim / 2 rotary pairs turns, unscaled: [dim / 2]."""
    return theta ** (-jnp.arange(0, dim, 2) / dim)


def rotary_angles(positions, rates):
    """Cosines and sines of rotary positions, each [B, T, 1, rotary_dim / 2] float32.

    positions: [B, T] int32; rates: from `rotary_rates`.
    """
    angle = positions[..., None, None] * rates
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x, angles):
    """Turn pairs (x_i, x_{i+R/2}) of each head's first R = rotary_dim by their angle, in float32
    (the Llama layout).

    x: [B, T, H, K]; angles: from `rotary_angles`. Returns [B, T, H, K] in x's dtype.
    """
    cos, sin = angles
    half = cos.shape[-1]
    a, b, rest = jnp.split(x, [half, 2 * half], axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def relative_buckets(distance, buckets=32, furthest=128, causal=True):
    """The bucket of a distance between key and query (Raffel et al. 2020, section 2.1).

    distance: int32, key position less query position. Near distances have a bucket each, further
    ones share buckets of logarithmic width up to `furthest`. Without `causal` half of the buckets
    are for keys after the query. Returns int32 in [0, buckets), of the same shape.
    """
    first = 0
    if causal:
        distance = jnp.maximum(-distance, 0)
    else:
        buckets //= 2
        first = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    near = buckets // 2
    scale = (buckets - near) / jnp.log(furthest / near)
    far = near + (jnp.log(jnp.maximum(distance, 1) / near) * scale).astype(jnp.int32)
    return first + jnp.where(distance < near, distance, jnp.minimum(far, buckets - 1))
