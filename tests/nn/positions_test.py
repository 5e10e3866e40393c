"""Positions against brute force, the papers' formulas and Transformers' Llama."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanoflax import nn, parallel
from nanoflax.config import ModelConfig, RopeConfig
from nanoflax.hf.rope import read_rope
from nanoflax.nn import positions

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


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.2}
LONG = {
    "short_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 9.0, 9.5, 9.9],
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "kind, values",
    [
        ("linear", {"factor": 3.0}),
        ("llama3", YARN | {"low_freq_factor": 0.7, "high_freq_factor": 3.0}),
        ("dynamic", {"factor": 2.5}),
        ("dynamic", {"factor": 0.5}),
        ("yarn", YARN),
        ("yarn", YARN | {"beta_fast": 4.0, "beta_slow": 0.25}),
        ("yarn", YARN | {"beta_fast": 4.0, "beta_slow": 0.25, "truncate": False}),
        ("yarn", YARN | {"beta_fast": 0.0, "beta_slow": None, "truncate": None}),
        ("yarn", YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False}),
        ("yarn", YARN | {"attention_factor": 0.9}),
        ("yarn", YARN | MSCALE),
        ("yarn", YARN | {"mscale": 0.7}),
        ("yarn", YARN | MSCALE | {"attention_factor": 1.3}),
        ("yarn", YARN | MSCALE | {"factor": None}),
        ("yarn", YARN | MSCALE | {"factor": 0.5}),
        ("longrope", LONG),
        ("longrope", LONG | {"factor": 32.0}),
        ("longrope", LONG | {"factor": 0.5}),
        ("longrope", LONG | {"attention_factor": 1.7}),
        ("proportional", {"partial_rotary_factor": 0.4}),
        ("proportional", {"partial_rotary_factor": 0.75, "factor": 3.0}),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_scalings_equal_those_of_transformers(kind, values, nested):
    """Rates and the factor of cosines, for texts around both contexts."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "rope_theta": 500.0} | values
    layer_type = "full_attention" if nested else None
    hf = {"max_position_embeddings": 96, "rope_theta": 500.0, "rope_parameters": {layer_type: rope} if nested else rope}
    theirs = transformers.Qwen3Config(head_dim=16, layer_types=["full_attention"], num_hidden_layers=1, **hf)
    read = {name.removeprefix("rope."): value for name, value in read_rope(hf).items()}
    rates_of = jax.jit(lambda length: nn.rotary_rates(RopeConfig(**read), 16, length=length))
    for length in (10, 64, 65, 96, 97, 200):
        theirs.rope_parameters = {layer_type: dict(rope)} if nested else dict(rope)
        rates, factor = ROPE_INIT_FUNCTIONS[kind](theirs, seq_len=torch.tensor(length), layer_type=layer_type)
        np.testing.assert_allclose(rates_of(length), rates, rtol=2e-5)
        assert positions.attention_factor(RopeConfig(**read)) == pytest.approx(float(factor), rel=1e-6)


@pytest.mark.parametrize("scaling", ["longrope", "dynamic"])
def test_a_cache_has_the_rates_of_the_text_that_fills_it(scaling):
    """In parts, in a cache whose rows are padded on the left, is the whole text; a shorter text is not."""
    rope = RopeConfig(scaling=scaling, factor=4.0, context=6, short_factors=(1.0, 2.0), long_factors=(5.0, 9.0))
    model = nn.build(
        ModelConfig(vocab_size=11, layers=2, dim=8, heads=2, mlp_dim=8, positions="rotary", rope=rope, context=32)
    )
    tokens = jax.random.randint(jax.random.PRNGKey(0), (2, 9), 1, 11)
    params = jax.tree.map(lambda p: p * 8, parallel.init(model, jax.random.PRNGKey(1)))
    segments = jnp.array([[1] * 9, [0] * 2 + [1] * 7])
    expected, _ = model.apply({"params": params}, tokens, segments)
    cache, found = model.empty_cache(2, 9, jnp.array([0, 2])), []
    for part in jnp.split(tokens, [4, 8], axis=1):
        logits, cache = model.decode(params, part, cache)
        found.append(logits)
    shown = np.asarray(segments, bool)
    np.testing.assert_allclose(np.concatenate(found, 1)[shown], expected[shown], atol=1e-5 * np.abs(expected).max())
    short, _ = model.apply({"params": params}, tokens[:, :6], segments[:, :6])
    assert np.abs(short - expected[:, :6])[shown[:, :6]].max() > 0.1
