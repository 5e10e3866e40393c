"""The arrays of annotations: JAX's, and NumPy's, which JAX functions take as well."""

from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray
