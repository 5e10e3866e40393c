"""The arrays of annotations (JAX's, and NumPy's, which JAX functions take as well) and frequent shapes."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray

Tokens = Int[Array, "B T"]
Source = Int[Array, "B S"]
SourceMask = Bool[Array, "B S"]  # True at real tokens
States = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
Queries = Float[Array, "B H T K"]
Keys = Float[Array, "B G S K"]  # or values


def is_key_of_rows(rng: jax.Array) -> bool:
    """Whether rng is an array of random keys, with one for each row, and not one key."""
    return rng.ndim > (0 if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else 1)
