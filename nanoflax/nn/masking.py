"""Boolean attention masks as pure functions: True where a query may look at a key.

Every mask broadcasts to [B, H, T, S]; they combine with `&`.
"""

import jax.numpy as jnp


def causal(query_positions, key_positions):
    """A query sees keys at its own position or before.

    query_positions: [B, T] or [T] int32; key_positions: [B, S] or [S] int32.
    Returns [B, 1, T, S] (or [1, 1, T, S]) bool.
    """
    q, k = jnp.atleast_2d(query_positions), jnp.atleast_2d(key_positions)
    return (k[:, None, :] <= q[:, :, None])[:, None]


def padding(valid):
    """Every query sees the keys that are real. valid: [B, S] bool. Returns [B, 1, 1, S] bool."""
    return valid[:, None, None, :]


def segments(query_segments, key_segments):
    """A query sees keys of its own document in a packed window.

    query_segments: [B, T] int32; key_segments: [B, S] int32. Returns [B, 1, T, S] bool.
    """
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


def window(query_positions, key_positions, size):
    """A query sees keys fewer than `size` positions before its own (sliding window, Beltagy et al.
    2020); combine with `causal`.

    query_positions: [B, T] or [T] int32; key_positions: [B, S] or [S] int32.
    Returns [B, 1, T, S] (or [1, 1, T, S]) bool.
    """
    q, k = jnp.atleast_2d(query_positions), jnp.atleast_2d(key_positions)
    return (q[:, :, None] - k[:, None, :] < size)[:, None]
