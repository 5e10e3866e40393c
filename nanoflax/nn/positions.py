"""Positions of tokens: sinusoidal, learned, rotary and relative, as pure functions."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float, Int

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.nn.arrays import Array


def check_context(config: ModelConfig, needed: int | Int[Array, ""]) -> None:
    """Raises: UserError if a call needs more learned positions than there are. A traced number is not checked."""
    if config.positions == "learned" and not isinstance(needed, Tracer) and needed > config.context:
        raise UserError(
            f"{needed} tokens are too many: the model has learned positions for model.context={config.context}"
        )


def restarting(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart from 0 at every document of a packed window.

    segments: constant within a document.
    """
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def sinusoidal(positions: Int[Array, "B T"], dim: int, halves: bool = False) -> Float[Array, "B T {dim}"]:
    """Fixed sines and cosines (Vaswani et al. 2017, section 3.5), float32.

    halves: all sines before all cosines (Marian), instead of interleaved as in the paper.
    """
    rate = 10_000.0 ** (-jnp.arange(0, dim, 2) / dim)
    angle = positions[..., None] * rate
    pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-2 if halves else -1)
    return pairs.reshape(*positions.shape, dim)


def rotary_rates(config: ModelConfig, local: bool = False) -> Float[Array, " R"]:
    """The angle, in radians per position, by which each rotary pair turns (Su et al. 2021).

    local: for a layer with a window; if rope_local_theta is set, the layer uses it without scaling.
    Scalings: linear (Chen et al. 2023) divides every rate by rope_factor; llama3 (Llama 3.1) divides
    the rates of fewer than rope_low turns in rope_context, and rates below rope_high turns in part.
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


def base_rates(theta: float, dim: int) -> Float[Array, " R"]:
    """The angle, in radians per position, by which each rotary pair turns, without scaling."""
    return theta ** (-jnp.arange(0, dim, 2) / dim)


Angles = tuple[Float[Array, "#B T 1 R"], Float[Array, "#B T 1 R"]]  # cosines and sines of rotary pairs, float32


def rotary_angles(positions: Int[Array, "B T"], rates: Float[Array, " R"]) -> Angles:
    """Cosines and sines of rotary positions. rates: from `rotary_rates`."""
    angle = positions[..., None, None] * rates
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "#B T H K"], angles: Angles) -> Float[Array, "#B T H K"]:
    """Turn the pairs (x_i, x_{i+R}) of each head's first 2R numbers by their angles (Su et al. 2021,
    in Llama's layout), computed in float32. angles: from `rotary_angles`."""
    cos, sin = angles
    half = cos.shape[-1]
    a, b, rest = jnp.split(x, [half, 2 * half], axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def relative_buckets(
    distance: Int[Array, "*D"], buckets: int = 32, furthest: int = 128, causal: bool = True
) -> Int[Array, "*D"]:
    """The bucket, in [0, buckets), of a distance between key and query (Raffel et al. 2020, section 2.1).

    distance: key position minus query position. Each short distance has its own bucket; longer distances
    share buckets of logarithmic width up to `furthest`. Without `causal`, half of the buckets are for
    keys after the query.
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
