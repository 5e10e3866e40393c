"""The keys and values of past tokens, which attention reads: floats, or int8 with a scale for each vector of K."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from nanoflax import parallel
from nanoflax.kernels.arrays import Array, Keys

KeyValues = Mapping[str, Any]  # key and value [B, G, S, K]; with int8 also key_scale and value_scale [B, G, S, 1]


def empty_key_values(shape: tuple[int, int, int, int], dtype: DTypeLike) -> dict[str, Array]:
    """Those before the first token: zeros of a shape [B, G, S, K]. dtype: int8 takes a quarter of float32's memory."""
    sizes = {"key": shape, "value": shape}
    if dtype != jnp.int8:
        return {name: parallel.split_cache(jnp.zeros(size, dtype)) for name, size in sizes.items()}
    scales = {f"{name}_scale": jnp.zeros((*size[:-1], 1), jnp.float32) for name, size in sizes.items()}
    values = {name: jnp.zeros(size, jnp.int8) for name, size in sizes.items()}
    return {name: parallel.split_cache(x) for name, x in (values | scales).items()}


def write_key_values(
    cache: KeyValues, k: Float[Array, "B G T K"], v: Float[Array, "B G T K"], index: Int[Array, ""]
) -> dict[str, Any]:
    """The cache with keys and values in its slots index .. index + T."""
    new = {"key": k, "value": v}
    if "key_scale" in cache:
        scales = {name: jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32) / 127 for name, x in new.items()}
        new = {name: jnp.round(x / jnp.maximum(scales[name], 1e-30)) for name, x in new.items()}
        new |= {f"{name}_scale": scale for name, scale in scales.items()}
    at = (0, 0, index, 0)
    return dict(cache) | {
        name: jax.lax.dynamic_update_slice(cache[name], x.astype(cache[name].dtype), at) for name, x in new.items()
    }


def read_key_values(cache: KeyValues, dtype: DTypeLike) -> tuple[Keys, Keys]:
    """All keys and values of a cache; those of int8 in a dtype."""
    if "key_scale" not in cache:
        return cache["key"], cache["value"]
    key, value = (cache[name].astype(dtype) * cache[f"{name}_scale"].astype(dtype) for name in ("key", "value"))
    return key, value
