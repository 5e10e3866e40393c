"""Attention and the layers against PyTorch, on the same numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.kernels import activate, add_bias, matmul, write_key_values
from nanoflax.kernels.activations import ACTIVATIONS
from nanoflax.nn import layers
from nanoflax.nn.attention import dot_product_attention
from nanoflax.nn.blocks import empty_cache
from tests.closeness import assert_trees_close


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("H, G", [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("mask_heads", [None, 1, "H"])
def test_attention_equals_torch(H, G, mask_heads):
    torch = pytest.importorskip("torch")
    B, T, S, K = 2, 5, 7, 8
    q, k, v = normal(0, B, T, H, K), normal(1, B, S, G, K), normal(2, B, S, G, K)
    out_gradient, mask = normal(3, B, T, H, K), None
    if mask_heads:
        mask = np.random.default_rng(4).random((B, H if mask_heads == "H" else 1, T, S)) < 0.6
        mask[..., 0] = True  # torch gives NaN where a query sees nothing
    tq, tk, tv = (torch.tensor(x).transpose(1, 2).requires_grad_() for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        tq, tk, tv, None if mask is None else torch.tensor(mask), enable_gqa=True
    ).transpose(1, 2)
    expected.backward(torch.tensor(out_gradient))
    found, pull = jax.vjp(lambda *x: dot_product_attention(*x, mask), q, k, v)
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)
    for ours, theirs in zip(pull(out_gradient), (tq, tk, tv), strict=True):
        np.testing.assert_allclose(ours, theirs.grad.transpose(1, 2), atol=1e-5)


def test_a_query_that_sees_nothing_gets_the_mean_and_finite_gradients():
    q, k, v = normal(0, 1, 2, 2, 4), normal(1, 1, 3, 2, 4), normal(2, 1, 3, 2, 4)
    mask = np.zeros((1, 1, 2, 3), bool)
    np.testing.assert_allclose(
        dot_product_attention(q, k, v, mask), np.broadcast_to(v.mean(1, keepdims=True), q.shape), atol=1e-6
    )
    grads = jax.grad(lambda *x: dot_product_attention(*x, mask).sum(), (0, 1, 2))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)


def test_hidden_keys_change_nothing_at_all():
    q, k, v = normal(0, 1, 2, 2, 4), normal(1, 1, 5, 2, 4), normal(2, 1, 5, 2, 4)
    mask = (np.arange(5) < 3)[None, None, None]
    before = dot_product_attention(q, k, v, mask)
    k[:, 3:], v[:, 3:] = 1e4, -1e4
    np.testing.assert_array_equal(before, dot_product_attention(q, k, v, mask))


def test_bfloat16_attention_is_close_and_keeps_its_dtype():
    q, k, v = normal(0, 2, 6, 4, 8), normal(1, 2, 6, 2, 8), normal(2, 2, 6, 2, 8)
    half = dot_product_attention(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), dot_product_attention(q, k, v), atol=0.03)


def test_write_key_values_writes_by_index_and_nothing_else():
    config = ModelConfig(vocab_size=8, dim=16, heads=4, kv_heads=2)
    cache = write_key_values(
        empty_cache(config, 0, 2, 6, jnp.float32, ""), jnp.ones((2, 2, 2, 4)), 2 * jnp.ones((2, 2, 2, 4)), jnp.int32(3)
    )
    expected = np.zeros((2, 2, 6, 4), np.float32)
    expected[:, :, 3:5] = 1
    np.testing.assert_array_equal(cache["key"], expected)
    np.testing.assert_array_equal(cache["value"], 2 * expected)


@pytest.mark.parametrize("d_in, d_out", [(8, 24), (24, 8)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_and_its_gradient_are_the_plain_ones(d_in, d_out, dtype):
    x, w = jnp.asarray(normal(0, 2, 3, d_in), dtype), jnp.asarray(normal(1, d_in, d_out), dtype)
    dy = jnp.asarray(normal(2, 2, 3, d_out), dtype)
    y, pull = jax.vjp(matmul, x, w)
    y_plain, pull_plain = jax.vjp(lambda x, w: x @ w, x, w)
    np.testing.assert_array_equal(y, y_plain)
    ours, plain = pull(dy), pull_plain(dy)
    assert [x.dtype for x in ours] == [x.dtype for x in plain]
    assert_trees_close(ours, plain, 2e-6 if dtype == jnp.float32 else 0.01)


def test_the_gradient_of_a_bias_is_summed_in_float32():
    y, dy = jnp.zeros((4, 500, 3), jnp.bfloat16), jnp.asarray(1 + 0.1 * normal(0, 4, 500, 3), jnp.bfloat16)
    exact = np.asarray(dy, np.float64).sum((0, 1))
    found, (dx, dbias) = jax.vjp(add_bias, y, jnp.ones(3))[0], jax.vjp(add_bias, y, jnp.ones(3))[1](dy)
    assert found.dtype == dx.dtype == jnp.bfloat16 and dbias.dtype == jnp.float32
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_allclose(dbias, exact, rtol=1e-6)


@pytest.mark.parametrize("kind, bias", [("layernorm", True), ("layernorm", False), ("rmsnorm", False)])
def test_norms_equal_torch(kind, bias):
    torch = pytest.importorskip("torch")
    D, eps = 12, 1e-3  # an eps large enough to be seen
    theirs = torch.nn.RMSNorm(D, eps) if kind == "rmsnorm" else torch.nn.LayerNorm(D, eps, bias=bias)
    params = {"scale": normal(0, D)} | ({"bias": normal(1, D)} if bias else {})
    with torch.no_grad():
        for name, value in params.items():
            getattr(theirs, name.replace("scale", "weight")).copy_(torch.tensor(value))
    x, dy = 3 + normal(2, 2, 4, D), normal(3, 2, 4, D)
    tx = torch.tensor(x).requires_grad_()
    expected = theirs(tx)
    expected.backward(torch.tensor(dy))
    norm = layers.Norm(kind, eps, bias)
    found, pull = jax.vjp(lambda p, x: norm.apply({"params": p}, x), params, x)
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)
    grads, dx = pull(dy)
    np.testing.assert_allclose(dx, tx.grad, atol=1e-5)
    np.testing.assert_allclose(grads["scale"], theirs.weight.grad, atol=1e-5)
    # Statistics and the gradients of parameters are in float32, whatever comes in.
    half, dhalf = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    y, pull_half = jax.vjp(lambda p, x: norm.apply({"params": p}, x), params, half)
    np.testing.assert_allclose(y.astype(jnp.float32), found, atol=0.06)
    (exact, _), (grads, dx) = pull_of(norm, params, half, dhalf), pull_half(dhalf)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert_trees_close(grads, exact, 1e-6)


def test_gradients_have_the_dtype_of_their_parameters():
    norm, linear, x = layers.Norm("layernorm", 1e-5, True), layers.Linear(3), jnp.ones((2, 4), jnp.bfloat16)
    for module in (norm, linear):
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), module.init(jax.random.key(0), x))
        grads = jax.grad(lambda p, module=module: module.apply(p, x).astype(jnp.float32).sum())(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def pull_of(norm, params, x, dy):
    """The gradients of a norm at the same numbers in float32."""
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    return jax.vjp(lambda p, x: norm.apply({"params": p}, x), params, x)[1](dy)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients_equal_torch(monkeypatch, name, platform):
    monkeypatch.setattr(parallel, "current_platform", lambda: platform)
    F = pytest.importorskip("torch").nn.functional
    import torch

    theirs = {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu": F.relu,
        "relu2": lambda x: F.relu(x) ** 2,
        "tanh": torch.tanh,
    }[name]
    x = np.linspace(-6, 6, 100, dtype=np.float32)  # without 0, where the gradient of relu is a convention
    tx = torch.tensor(x).requires_grad_()
    expected = theirs(tx)
    expected.backward(torch.tensor(x))
    found, pull = jax.vjp(partial(activate, name), x)
    np.testing.assert_allclose(found, expected.detach(), atol=2e-6)
    np.testing.assert_allclose(pull(x)[0], tx.grad, atol=6e-5)  # they are up to 6
    # In bfloat16 only the result is rounded, as in torch.
    half = activate(name, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, theirs(torch.tensor(x).bfloat16()).float(), rtol=0.008, atol=1e-6)


def test_exact_and_tanh_gelu_differ():
    x = jnp.linspace(-3, 3, 50)
    difference = ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_tanh"](x)
    assert 1e-4 < jnp.abs(difference).max() < 1e-2


@pytest.mark.parametrize("gated", [False, True])
def test_mlp_is_its_formula(gated):
    mlp = layers.MLP(24, "silu", gated, True, 0.02)
    x = normal(0, 2, 3, 8)
    params = mlp.init(jax.random.PRNGKey(0), x)["params"]
    params = jax.tree.map(lambda p: normal(p.size, *p.shape), params)
    linear = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
    silu = lambda x: x / (1 + np.exp(-x))
    hidden = silu(linear("gate", x)) * linear("up", x) if gated else silu(linear("up", x))
    np.testing.assert_allclose(mlp.apply({"params": params}, x), linear("down", hidden), rtol=1e-4, atol=1e-4)
    assert ("gate" in params) == gated


def test_linear_keeps_float32_parameters_and_computes_in_its_inputs_dtype():
    linear = layers.Linear(3)
    x = jnp.ones((2, 4), jnp.bfloat16)
    params = linear.init(jax.random.PRNGKey(0), x)["params"]
    assert {p.dtype.name for p in jax.tree.leaves(params)} == {"float32"}
    assert linear.apply({"params": params}, x).dtype == jnp.bfloat16
    assert set(layers.Linear(3, bias=False).init(jax.random.PRNGKey(0), x)["params"]) == {"kernel"}


def test_embedding_looks_up_rows():
    embedding = layers.Embedding(5, 4, jnp.bfloat16)
    ids = jnp.array([[4, 0], [2, 2]])
    table = embedding.init(jax.random.PRNGKey(0), ids)["params"]["embedding"]
    found = embedding.apply({"params": {"embedding": table}}, ids)
    np.testing.assert_array_equal(found, table.astype(jnp.bfloat16)[np.array(ids)])
