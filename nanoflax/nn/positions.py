"""Positions of tokens: sinusoidal, learned, rotary and relative, as pure functions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from nanoflax.config import ModelConfig, RopeConfig
from nanoflax.errors import UserError
from nanoflax.kernels import Array


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


def sinusoidal(positions: Int[Array, "B T"], dim: int, kind: str = "sinusoidal") -> Float[Array, "B T {dim}"]:
    """Fixed sines and cosines (Vaswani et al. 2017, section 3.5), float32.

    kind: sinusoidal_halves has all sines before all cosines (Marian), instead of interleaved as in the paper;
    sinusoidal_fairseq (M2M-100) too, and its last rate is 1/10000.
    """
    rate = 10_000.0 ** (-jnp.arange(0, dim, 2) / (max(dim - 2, 1) if kind == "sinusoidal_fairseq" else dim))
    angle = positions[..., None] * rate
    pairs = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1 if kind == "sinusoidal" else -2)
    return pairs.reshape(*positions.shape, dim)


def rotary_rates(
    rope: RopeConfig, dim: int, local: bool = False, length: Int[Array, ""] | int | np.integer = 0
) -> Float[Array, " R"]:
    """The angle, in radians per position, by which each rotary pair of `dim` numbers turns (Su et al. 2021).

    local: for a layer with a window; if rope.local_theta is set, the layer uses it without scaling.
    length: the tokens of the longest text; only longrope and dynamic depend on it.
    Scalings: linear (Chen et al. 2023) divides every rate by the factor; llama3 (Llama 3.1) divides
    the rates of fewer than `low` turns in rope.context, and rates below `high` turns in part; yarn (Peng et al. 2023,
    section 3.2) the same with a ramp over the number of the pair; longrope (Ding et al. 2024) divides each rate by a
    number of its own; dynamic (NTK) raises theta for texts longer than rope.context; proportional rotates only the
    first rope.fraction of the pairs.
    """
    if local and rope.local_theta is not None:
        return base_rates(rope.local_theta, dim)
    theta, context = rope.theta, rope.context
    if rope.scaling == "dynamic":
        theta *= (rope.factor * jnp.maximum(length / context, 1) - (rope.factor - 1)) ** (dim / (dim - 2))
    rates, pairs = base_rates(theta, dim), jnp.arange(dim // 2)
    if rope.scaling in ("none", "dynamic"):
        return rates
    if rope.scaling == "linear":
        return rates / rope.factor
    if rope.scaling == "proportional":
        return jnp.where(pairs < int(rope.fraction * dim // 2), rates / rope.factor, 0)
    if rope.scaling == "longrope":
        return rates / jnp.where(length > context, jnp.array(rope.long_factors), jnp.array(rope.short_factors))
    if rope.scaling == "llama3":
        turns = context * rates / (2 * jnp.pi)
        kept = jnp.clip((turns - rope.low) / (rope.high - rope.low), 0, 1)
    else:
        pair_of = lambda turns: dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)  # the pairs that turn so often in rope.context
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        kept = 1 - jnp.clip((pairs - low) / (high - low or 0.001), 0, 1)
    return rates * (kept + (1 - kept) / rope.factor)


def attention_factor(rope: RopeConfig) -> float:
    """The factor of cosines and sines (yarn: Peng et al. 2023, equation 22; longrope: as in Phi-3's code)."""
    if rope.scaling not in ("yarn", "longrope") or rope.attention_factor is None and rope.factor <= 1:
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    grown = math.log(rope.factor)
    return 1 + 0.1 * grown if rope.scaling == "yarn" else math.sqrt(1 + grown / math.log(rope.context))


def base_rates(theta: float | Float[Array, ""], dim: int) -> Float[Array, " R"]:
    """The angle, in radians per position, by which each rotary pair turns, without scaling."""
    theta = float(theta) if isinstance(theta, int) else theta  # a config.json may write 3580165449, not an int32
    return theta ** (-jnp.arange(0, dim, 2) / dim)


# Cosines and sines of rotary pairs, float32. Pair i is (x_i, x_{i+R}), or, if interleaved, (x_{2i}, x_{2i+1}).
Angles = tuple[Float[Array, "#B T 1 R"], Float[Array, "#B T 1 R"]]


def rotary_angles(positions: Int[Array, "B T"], rates: Float[Array, " R"]) -> Angles:
    """Cosines and sines of rotary positions. rates: from `rotary_rates`."""
    angle = positions[..., None, None] * rates
    return jnp.cos(angle), jnp.sin(angle)


def angles_of(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    local: bool = False,
    length: Int[Array, ""] | int | np.integer | None = None,
) -> Angles:
    """Cosines and sines of the rotary positions of a model's layers; local: of those with a window.

    length: for longrope and dynamic, that of the longest text of the batch; none: the largest position + 1, as in
    Transformers (padding without a mask counts). With a cache it is the longest text that the cache has room for: every
    key then has the same rates, so that cached decoding equals the pass over a whole text that fills the cache.
    """
    rope = config.rope
    if length is None:
        length = positions.max() + 1 if rope.scaling in ("longrope", "dynamic") else 0
    rates = rotary_rates(rope, config.rotary_dim, local, length)
    cos, sin = rotary_angles(positions, -rates if rope.reversed else rates)
    factor = 1.0 if local and rope.local_theta is not None else attention_factor(rope)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def query_scale(rope: RopeConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The factor of queries in layers without positions (Nakanishi 2025, scalable softmax; Llama 4)."""
    return 1 + rope.nope_scale * jnp.log1p(jnp.maximum(positions + 1, 0) // rope.nope_floor)


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
