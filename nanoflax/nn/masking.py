"""Boolean attention masks as pure functions: True where a query may attend to a key.

Every mask broadcasts to [B, H, T, S]; masks combine with `&`.
"""

import jax.numpy as jnp
from jaxtyping import Bool, Int

from nanoflax.kernels import Array


def causal(query_positions: Int[Array, "*#B T"], key_positions: Int[Array, "*#B S"]) -> Bool[Array, "_ 1 T S"]:
    """A query attends to keys at its own position or before. Positions [T] without B are the same for all rows."""
    q, k = jnp.atleast_2d(query_positions), jnp.atleast_2d(key_positions)
    return (k[:, None, :] <= q[:, :, None])[:, None]


def padding(valid: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Every query attends to the valid keys."""
    return valid[:, None, None, :]


def segments(query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """A query attends to keys of its own document in a packed window."""
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


def window(queries: Int[Array, "*#B T"], keys: Int[Array, "*#B S"], size: int) -> Bool[Array, "_ 1 T S"]:
    """A query attends to keys fewer than `size` positions before or after its own (sliding window,
    Beltagy et al. 2020); in a decoder, combine with `causal`. queries, keys: their positions."""
    q, k = jnp.atleast_2d(queries), jnp.atleast_2d(keys)
    return (jnp.abs(q[:, :, None] - k[:, None, :]) < size)[:, None]


def chunk(queries: Int[Array, "*#B T"], keys: Int[Array, "*#B S"], size: int) -> Bool[Array, "_ 1 T S"]:
    """A query attends to keys of its own part of the text, of `size` positions (Llama 4)."""
    q, k = jnp.atleast_2d(queries), jnp.atleast_2d(keys)
    return (q[:, :, None] // size == k[:, None, :] // size)[:, None]
