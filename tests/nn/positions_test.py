"""Positions against brute force, the papers' formulas and Transformers' Llama."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanoflax import nn
from nanoflax.config import ModelConfig, RopeConfig
from nanoflax.nn import build, positions
from nanoflax.parallel import init
from tests.compiled import apply

RATES = nn.base_rates(10_000.0, 8)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int32, (3, 9), elements=st.integers(0, 2)))
def test_restarting_counts_from_each_document(segments):
    expected = np.zeros_like(segments)
    for b, row in enumerate(segments):
        for t in range(1, len(row)):
            expected[b, t] = expected[b, t - 1] + 1 if row[t] == row[t - 1] else 0
    found = positions.restarting(jnp.asarray(segments))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_sinusoidal_is_the_papers_formula():
    found = positions.sinusoidal(jnp.array([[0, 3, 117]]), 8)
    for t, place in enumerate((0, 3, 117)):
        for i in range(4):
            angle = place / 10_000 ** (2 * i / 8)
            assert found[0, t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert found[0, t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotary_equals_transformers_llama(theta):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    B, T, H, K = 2, 7, 3, 16
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, T, H, K)).astype(np.float32)
    k = rng.normal(size=(B, T, 1, K)).astype(np.float32)
    place = rng.integers(0, 500, (B, T)).astype(np.int32)
    config = LlamaConfig(
        hidden_size=H * K,
        num_attention_heads=H,
        head_dim=K,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(place).long())
    tq, tk = llama.apply_rotary_pos_emb(torch.tensor(q).transpose(1, 2), torch.tensor(k).transpose(1, 2), cos, sin)
    angles = positions.rotary_angles(jnp.asarray(place), nn.base_rates(theta, K))
    np.testing.assert_allclose(positions.rotate(q, angles), tq.transpose(1, 2), atol=2e-4)
    np.testing.assert_allclose(positions.rotate(k, angles), tk.transpose(1, 2), atol=2e-4)


def test_rotary_products_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.PRNGKey(0), (2, 1, 1, 1, 8))

    def product(m, n):
        at = lambda x, p: positions.rotate(x, positions.rotary_angles(jnp.array([[p]]), RATES))
        return float((at(q, m) * at(k, n)).sum())

    assert product(3, 1) == pytest.approx(product(43, 41), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)


def test_rotate_keeps_the_dtype_and_the_first_token():
    x = jax.random.normal(jax.random.PRNGKey(0), (1, 2, 1, 8), jnp.bfloat16)
    y = positions.rotate(x, positions.rotary_angles(jnp.array([[0, 1]]), RATES))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y[:, 0], x[:, 0])


def test_a_theta_may_be_a_large_integer():
    expected = 3580165449.0 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(nn.base_rates(3580165449, 8), expected, rtol=1e-6)


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_padding_does_not_make_a_text_longer(scaling, architecture):
    factors = dict(short_factors=(1.0, 1.5), long_factors=(2.0, 4.0)) if scaling == "longrope" else {}
    rope = RopeConfig(theta=100.0, scaling=scaling, factor=4.0, context=8, **factors)
    c = ModelConfig(
        architecture=architecture, head="mlm" if architecture == "encoder" else "lm", positions="rotary", rope=rope,
        vocab_size=29, context=32, layers=1, dim=16, heads=4,
    )  # fmt: skip
    model = build(c)
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, init(model, jax.random.PRNGKey(0)))
    tokens = np.random.default_rng(0).integers(0, 29, (1, 24)).astype(np.int32)

    def logits(*inputs):
        found = apply(model, params, *inputs)
        return np.asarray(found if architecture == "encoder" else found[0])

    long = logits(tokens)
    for n in (10, 6):  # of more than rope.context tokens, and of fewer
        real = np.arange(24)[None] < n
        padded = logits(tokens, real if architecture == "encoder" else real.astype(np.int32))
        np.testing.assert_allclose(padded[:, :n], logits(tokens[:, :n]), atol=1e-5)
    assert np.abs(long[:, :6] - padded[:, :6]).max() > 1e-3  # where a longer text has other angles
