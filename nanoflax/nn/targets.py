"""From targets to the inputs that predict them."""

import jax.numpy as jnp
from jaxtyping import Int

from nanoflax.kernels import Array


def shift_right(
    targets: Int[Array, "B T"],
    first: Int[Array, "#B"] | Int[Array, ""] | int,
    segments: Int[Array, "B T"] | None = None,
    start: Int[Array, "B T"] | Int[Array, "#B"] | Int[Array, ""] | int | None = None,
) -> Int[Array, "B T"]:
    """The inputs that predict `targets`: the same tokens one position later. No other code shifts tokens.

    first: the token before targets[:, 0]. segments: in a packed window, every document except the first
    begins with `start` (default `first`), not with the last token of the previous document; with start [B, T], each
    document has the token at its own first position.
    """

    def column(x):
        return jnp.broadcast_to(jnp.asarray(x, targets.dtype), targets.shape[:1])[:, None]

    inputs = jnp.concatenate([column(first), targets[:, :-1]], axis=1)
    if segments is not None:
        begins = segments[:, 1:] != segments[:, :-1]
        start = jnp.asarray(first if start is None else start, targets.dtype)
        start = start[:, 1:] if start.ndim == 2 else column(start)
        inputs = inputs.at[:, 1:].set(jnp.where(begins, start, inputs[:, 1:]))
    return inputs
