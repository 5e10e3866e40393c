"""Masks against brute-force loops."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanoflax.nn import masking

FEW = settings(max_examples=25, deadline=None)


def ints(shape, low=0, high=6):
    return hnp.arrays(np.int32, shape, elements=st.integers(low, high))


@FEW
@given(ints((2, 3)), ints((2, 4)))
def test_causal_sees_its_position_and_before(q, k):
    mask = np.asarray(masking.causal(q, k))
    assert mask.shape == (2, 1, 3, 4) and mask.dtype == bool
    for b, t, s in np.ndindex(2, 3, 4):
        assert mask[b, 0, t, s] == (k[b, s] <= q[b, t])


def test_causal_of_one_row_is_a_triangle():
    places = jnp.arange(5)
    np.testing.assert_array_equal(masking.causal(places, places)[0, 0], np.tri(5, dtype=bool))


@FEW
@given(hnp.arrays(bool, (3, 4)))
def test_padding_hides_keys_from_every_query(valid):
    mask = np.broadcast_to(masking.padding(jnp.asarray(valid)), (3, 2, 5, 4))
    for b, h, t, s in np.ndindex(mask.shape):
        assert mask[b, h, t, s] == valid[b, s]


@FEW
@given(ints((2, 3), high=2), ints((2, 5), high=2))
def test_segments_see_themselves_alone(q, k):
    mask = np.asarray(masking.segments(jnp.asarray(q), jnp.asarray(k)))
    assert mask.shape == (2, 1, 3, 5)
    for b, t, s in np.ndindex(2, 3, 5):
        assert mask[b, 0, t, s] == (q[b, t] == k[b, s])


def test_masks_combine_and_trace():
    seg, places = jnp.array([[1, 1, 2, 2]]), jnp.arange(4)
    mask = jax.jit(lambda: masking.causal(places, places) & masking.segments(seg, seg))()
    np.testing.assert_array_equal(mask[0, 0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
