"""Positions of tokens: sinusoidal, learned, rotary and relative, as pure functions."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float, Int

from nanoflax.config import ModelConfig, RopeConfig
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


def rotary_rates(rope: RopeConfig, dim: int, local: bool = False) -> Float[Array, " R"]:
    """The angle, in radians per position, by which each rotary pair of `dim` numbers turns (Su et al. 2021).

    local: for a layer with a window; if rope.local_theta is set, the layer uses it without scaling.
    Scalings: linear (Chen et al. 2023) divides every rate by the factor; llama3 (Llama 3.1) divides
    the rates of fewer than `low` turns in rope.context, and rates below `high` turns in part.
    """
    if local and rope.local_theta is not None:
        return base_rates(rope.local_theta, dim)
    rates = base_rates(rope.theta, dim)
    if rope.scaling == "linear":
        return rates / rope.factor
    if rope.scaling == "llama3":
        turns = rope.context * rates / (2 * jnp.pi)
        kept = jnp.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
        return rates * (kept + (1 - kept) / rope.factor)
    return rates


def base_rates(theta: float, dim: int) -> Float[Array, " R"]:
    """The angle, in radians per position, by which each rotary pair turns, without scaling."""
    return theta ** (-jnp.arange(0, dim, 2) / dim)


# Cosines and sines of rotary pairs, float32. Pair i is (x_i, x_{i+R}), or, if interleaved, (x_{2i}, x_{2i+1}).
Angles = tuple[Float[Array, "#B T 1 R"], Float[Array, "#B T 1 R"]]


def rotary_angles(positions: Int[Array, "B T"], rates: Float[Array, " R"]) -> Angles:
    """Cosines and sines of rotary positions. rates: from `rotary_rates`."""
    angle = positions[..., None, None] * rates
    return jnp.cos(angle), jnp.sin(angle)


def angles_of(config: ModelConfig, positions: Int[Array, "B T"], local: bool = False) -> Angles:
    """Cosines and sines of the rotary positions of a model's layers; local: of those with a window."""
    return rotary_angles(positions, rotary_rates(config.rope, config.rotary_dim, local))


def rotate(x: Float[Array, "#B T H K"], angles: Angles, interleaved: bool = False) -> Float[Array, "#B T H K"]:
    """Turn the pairs of each head's first 2R numbers by their angles (Su et al. 2021), computed in float32.

    The pairs are (x_i, x_{i+R}), as in Llama, or (x_{2i}, x_{2i+1}) if interleaved, as in the paper."""
    cos, sin = angles
    half = cos.shape[-1]
    turned, rest = jnp.split(x.astype(jnp.float32), [2 * half], axis=-1)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)


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
