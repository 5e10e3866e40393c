"""The most probable token, drawn ones, top-k and top-p: the results of NumPy, JAX and a sorted list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import kernels

OUT = -np.inf


def numbers(seed, *shape, few=False):
    """Normal numbers, or few different ones, so that many are equal; some are -inf, and 0 and -0 are among them."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, shape) * np.float32(0.5) if few else 3 * rng.standard_normal(shape, np.float32)
    x = np.where(rng.random(shape) < 0.1, OUT, np.where(rng.random(shape) < 0.1, np.float32(-0.0), x))
    x[..., 0] = 0  # a row has a number
    return x.astype(np.float32)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 1000), (5, 33)])
def test_argmax_is_the_first_of_the_largest(shape, few):
    x = numbers(0, *shape, few=few)
    np.testing.assert_array_equal(jax.jit(kernels.argmax)(x), x.argmax(-1))


def test_argmax_of_nan_is_an_id_below_every_vocabulary():
    assert kernels.argmax(jnp.array([0.0, jnp.nan, 1.0])) == kernels.argmax(jnp.full(8, jnp.nan)) == 0


def test_categorical_draws_what_jax_draws():
    logits = numbers(1, 4, 300)
    for seed in range(20):
        key = jax.random.PRNGKey(seed)
        np.testing.assert_array_equal(kernels.categorical(key, logits), jax.random.categorical(key, logits))


def by_sorting(x, top_k, outside):
    """top-k and top-p of one row, from its sorted numbers."""
    if top_k:
        x = np.where(x < np.sort(x)[-min(top_k, len(x))], OUT, x)
    if outside:
        order = np.lexsort((np.arange(len(x)), x))  # ascending; of equal numbers the first one first
        p = np.exp(np.float64(x[order]) - x.max())
        outside = (np.cumsum(p) <= outside * p.sum()).sum()
        x = x.copy()
        x[order[: min(outside, len(x) - 1)]] = OUT
    return x


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("V", [1, 2, 333])
def test_truncation_keeps_what_sorting_keeps(V, few):
    scalars = jax.jit(kernels.truncate_by_rank)
    rng, x = np.random.default_rng(V), numbers(V, 6, V, few=few)
    for top_k in (0, 1, 3, V, 1000):
        for outside in (0.0, 1e-7, 0.0512, 0.477, 0.913, 1 - 1e-7):
            expected = np.stack([by_sorting(row, top_k, outside) for row in x])
            found = scalars(x, jnp.int32(top_k), jnp.float32(outside))
            np.testing.assert_array_equal(found, expected, err_msg=f"{top_k} {outside}")
    k, outside = rng.integers(0, 5, (6, 1)), rng.choice([0, 0.3123, 0.8321], (6, 1)).astype(np.float32)
    k[0] = outside[0] = 0
    expected = np.stack([by_sorting(row, *numbers) for row, *numbers in zip(x, k[:, 0], outside[:, 0], strict=True)])
    np.testing.assert_array_equal(scalars(x, k, outside), expected)
    np.testing.assert_array_equal(kernels.truncate_by_rank(jnp.asarray(x), 3, None), scalars(x, 3, 0.0))
    np.testing.assert_array_equal(kernels.truncate_by_rank(jnp.asarray(x), None, 0.4), scalars(x, 0, 0.4))
