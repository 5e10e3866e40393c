"""Quantised matrices: the numbers of the gguf package, products and gradients of the dequantised matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from nanoflax import kernels, nn, parallel
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.kernels import Quantized, grouped_matmul, pack, quantize, quantized, quantized_matmul
from nanoflax.kernels.quantized import dequantize


def kernel(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_offsets(outputs, inputs):
    rng = np.random.default_rng(1)
    values = jnp.asarray(rng.integers(0, 16, (outputs, inputs)), jnp.uint8)
    scales, offsets = (jnp.asarray(rng.standard_normal((outputs, inputs // 32)), jnp.float16) for _ in range(2))
    return Quantized(pack(values), scales, offsets)


@pytest.mark.parametrize("kind, gguf_kind", [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_errors_are_at_most_those_of_gguf(kind, gguf_kind):
    w = kernel(64, 96)
    ours = np.asarray(quantize(w, kind).astype(jnp.float32))
    type_ = GGMLQuantizationType[gguf_kind]
    theirs = quants.dequantize(quants.quantize(np.ascontiguousarray(w.T), type_), type_).T
    assert np.square(ours - w).sum() <= 1.001 * np.square(theirs - w).sum()
    again = np.asarray(quantize(theirs, kind).astype(jnp.float32))
    np.testing.assert_array_equal(again, theirs)  # what gguf has rounded stays as it is


@pytest.mark.parametrize("magnitude", [0.0, 1e-9, 1e-4, 1e4])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_small_and_large_weights_stay_finite(kind, magnitude):
    w = magnitude * kernel(64, 16)
    ours = np.asarray(quantize(w, kind).astype(jnp.float32))
    assert np.isfinite(ours).all() and np.abs(ours - w).max() <= max(0.4 * magnitude, 1e-6)


@functools.cache
def matrix(name):
    """A quantised matrix of these tests, and its dequantised values in float64."""
    shape, kind = dict(
        int8=((96, 50), "int8"), int4=((96, 50), "int4"), odd=((64, 7), "int4"), small=((64, 2), "int4"),
        offsets=((64, 50), None), parts=((1024, 2050), "int4"),
    )[name]  # fmt: skip
    w = quantize(kernel(*shape), kind) if kind else with_offsets(*shape[::-1])
    return w, np.asarray(w.astype(jnp.float32), np.float64)


@jax.jit
def product_and_gradient(x, w):
    """x w, and the gradient by x of its sum with the weights cos 0, cos 1, ..."""

    def loss(x):
        y = quantized_matmul(x, w)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    (_, y), dx = jax.value_and_grad(loss, has_aux=True)(x)
    return y, dx


@pytest.mark.parametrize("rows, by_inputs", [(1, False), (2, False), (40, False), (1, True), (8, True)])
@pytest.mark.parametrize("name", ["int8", "int4", "odd", "small", "offsets", "parts"])
def test_products_and_gradients_are_those_of_the_dequantised_matrix(name, rows, by_inputs, monkeypatch):
    monkeypatch.setattr(quantized, "_SMALL", 100)
    w, plain = matrix(name)
    w = kernels.for_rows(w, 8) if by_inputs else w
    assert w.by_inputs == by_inputs
    x = kernel(2, rows, w.shape[0], seed=2)[0]
    assert plain.shape == w.shape
    y = x @ plain
    dx = np.cos(np.arange(y.size)).reshape(y.shape) @ plain.T
    for ours, theirs in zip(product_and_gradient(x, w), (y, dx), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_order_for_several_rows_changes_no_number(kind):
    w = quantize(kernel(256, 300), kind)
    swapped = kernels.for_rows(w, 3)
    assert swapped.by_inputs and (swapped.shape, swapped.kind, swapped.nbytes) == (w.shape, w.kind, w.nbytes)
    np.testing.assert_array_equal(swapped.astype(jnp.float32), w.astype(jnp.float32))
    experts = quantize(kernel(2, 256, 300), kind)
    for kept, rows in ((w, 2), (w.T, 8), (swapped, 8), (experts, 8), (quantize(kernel(64, 64), kind), 8)):
        assert kernels.for_rows(kept, rows) is kept


def test_gradients_of_bfloat16_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(quantized, "_SMALL", 2000)
    monkeypatch.setattr(quantized, "_PART", 2000)  # 50 parts
    w, dy = quantize(kernel(64, 1600), "int8"), jnp.asarray(kernel(4, 1600, seed=2), jnp.bfloat16)
    (dx,) = jax.vjp(lambda x: quantized_matmul(x, w), jnp.zeros((4, 64), jnp.bfloat16))[1](dy)
    exact = np.asarray(dy, np.float32) @ np.asarray(w.astype(jnp.float32)).T
    assert dx.dtype == jnp.bfloat16 and np.abs(np.asarray(dx, np.float32) - exact).max() < 0.006 * np.abs(exact).max()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_of_an_embedding(kind):
    table = quantize(kernel(10, 32), kind, transposed=False)
    plain = table.astype(jnp.float32)
    assert table.kind == kind and table.shape == plain.shape == (10, 32) and table.T.shape == (32, 10)
    np.testing.assert_array_equal(plain, dequantize(table))
    ids = jnp.asarray([[0, 9, 4], [5, -1, 2]])
    np.testing.assert_array_equal(table[ids], plain[ids])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts(kind):
    w, x, experts = quantize(kernel(3, 32, 16), kind), kernel(4, 2, 32, seed=3), jnp.asarray([0, 1, 1, 2])
    assert w.shape == (3, 32, 16)
    plain = grouped_matmul(x, w.astype(jnp.float32), experts)
    np.testing.assert_allclose(grouped_matmul(x, w, experts), plain, atol=1e-5)


def test_each_row_of_a_vmap_is_the_product_of_one_row():
    w, x = quantize(kernel(64, 48), "int8"), kernel(5, 1, 64, seed=4)
    together = jax.vmap(lambda row: quantized_matmul(row, w))(x)
    np.testing.assert_allclose(together, jnp.stack([quantized_matmul(row, w) for row in x]), atol=1e-5)


def test_a_cache_of_8_bits_has_the_logits_of_floats_nearly():
    config = ModelConfig(vocab_size=50, dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=64, context=16)
    plain, packed = nn.build(config), nn.build(config, cache_dtype="int8")
    params = parallel.init(plain, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    bytes_of = lambda cache: sum(x.nbytes for x in jax.tree.leaves(cache["layers"]))

    def logits(model, widths=(5, 1, 6)):
        cache, found, decode = model.empty_cache(2, 12), [], jax.jit(model.decode)
        for start, width in zip(np.cumsum((0, *widths)), widths, strict=False):
            x, cache = decode(params, tokens[:, start : start + width], cache)
            found.append(x)
        return jnp.concatenate(found, 1), bytes_of(cache)

    (want, size), (found, packed_size) = logits(plain), logits(packed)
    assert packed_size == size * (8 + 4) / 32  # K = 8 numbers of a byte, and a scale of 4 bytes
    error = float(jnp.abs(found - want).max() / jnp.abs(want).max())
    assert 0 < error < 0.02
    # Keys of 8 bits that are written one by one are those that are written together.
    np.testing.assert_allclose(logits(packed, (1,) * 12)[0], logits(packed, (1, 11))[0], atol=1e-4)
    with pytest.raises(UserError, match="cache_dtype='int8' needs attention"):
        nn.build(ModelConfig(vocab_size=50, architecture="lstm"), cache_dtype="int8")
