"""The arrays of annotations: JAX's, and NumPy's, which JAX functions take as well."""

import jax
import numpy as np

Array = jax.Array | np.ndarray
