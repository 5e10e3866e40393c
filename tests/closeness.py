"""Comparison of trees of arrays, within a fraction of the largest number of the whole tree.

Some tensors are mathematically zero (the gradient of a key's bias). They hold rounding noise that
differs between CPUs, so a tolerance relative to one tensor would test the noise.
"""

import jax
import jax.numpy as jnp
import numpy as np


def assert_trees_close(found, expected, relative_to_tree=1e-6):
    """Two trees of arrays (or two arrays) have the same structure and the same numbers.

    Floating-point numbers may differ by relative_to_tree times the largest magnitude of a
    floating-point number in the whole of `expected`; integers and booleans are equal.
    """
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = [np.asarray(x) for x in jax.tree.leaves(expected)]
    scale = max((np.abs(x.astype(np.float64)).max(initial=0) for x in leaves if _is_float(x)), default=0)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), leaves, strict=True):
        x, where = np.asarray(x), jax.tree_util.keystr(path)
        assert x.shape == y.shape, where
        if _is_float(y):
            difference = np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0)
            assert difference <= relative_to_tree * scale, f"{where} differs by {difference / scale:.2g} of the tree"
        else:
            np.testing.assert_array_equal(x, y, err_msg=where)


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)
