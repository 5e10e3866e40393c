"""Mixture of experts: against a dense reference of all experts, in NumPy or by einsum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import config as configs
from nanoflax import parallel
from nanoflax.config import MoEConfig
from nanoflax.nn import build, moe

SMALL = configs.preset("nano-1m", vocab_size=67, dim=32, heads=4, layers=2, mlp_dim=24, mlp_bias=True)
ROUTERS = {
    "softmax": MoEConfig(experts=8, active=3),
    "deepseek": MoEConfig(
        experts=8, active=3, scores="sigmoid", correction=True, groups=4, top_groups=2, scale=2.5, shared_dim=16
    ),
    "gates": MoEConfig(
        experts=4, active=2, expert_dim=20, renormalise=False, router_bias=True, shared_dim=16, shared_gate=True
    ),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def chosen_by_hand(logits, m, correction):
    """{expert: weight} of one token, a formula at a time."""
    scores = np.exp(logits) / np.exp(logits).sum() if m.scores == "softmax" else sigmoid(logits)
    rank = scores + correction
    size = m.experts // m.groups
    if m.groups > 1:
        best = [sum(sorted(rank[g * size : (g + 1) * size])[-2:]) for g in range(m.groups)]
        kept = np.argsort(best)[-m.top_groups :]
        rank = np.array([rank[e] if e // size in kept else -np.inf for e in range(m.experts)])
    chosen = np.argsort(rank)[-m.active :]
    total = scores[chosen].sum() if m.renormalise else 1
    return {e: m.scale * scores[e] / total for e in chosen}


def dense(x, p, c):
    """The layer with all experts on all tokens."""
    m = c.moe

    def mlp(p, x):
        linear = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]
        gate = linear("gate", x)
        return linear("down", gate * sigmoid(gate) * linear("up", x))

    y = np.zeros_like(x)
    logits = x @ p["router"]["kernel"] + p["router"].get("bias", 0)
    experts = [mlp(jax.tree.map(lambda w, e=e: w[e], p["experts"]), x) for e in range(m.experts)]
    for n, row in enumerate(logits):
        for e, weight in chosen_by_hand(row, m, p["router"].get("correction", 0)).items():
            y[n] += weight * experts[e][n]
    if m.shared_dim:
        y += mlp(p["shared"], x) * (sigmoid(x @ p["shared_gate"]["kernel"]) if m.shared_gate else 1)
    return y


@pytest.mark.parametrize("router", ROUTERS)
def test_experts_equal_a_dense_reference(router):
    c = dataclasses.replace(SMALL, moe=ROUTERS[router])
    layer, x = moe.MoE(c, 0.02), jax.random.normal(jax.random.key(0), (2, 11, 32))
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    rng = np.random.default_rng(0)
    p = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
    expected = dense(np.asarray(x, np.float64).reshape(-1, 32), p, c)
    np.testing.assert_allclose(layer.apply({"params": p}, x).reshape(-1, 32), expected, rtol=1e-4, atol=1e-5)


def test_blocks_and_ragged_products_agree_with_einsum():
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(6, 4, 5), (8, 5, 7)]))
    experts = jnp.array([0, 0, 2, 3, 7, 7])

    def both(product):
        return jax.value_and_grad(lambda x, w: jnp.sin(product(x, w)).sum(), (0, 1))(x, w)

    expected = both(lambda x, w: jnp.einsum("nbi,nio->nbo", x, w[experts]))
    for product in (moe.by_block, moe.ragged, moe.grouped_matmul):
        found = both(lambda x, w, product=product: product(x, w, experts))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("M, E", [(2, 8), (100, 3), (1000, 16), (4096, 4)])
def test_every_token_has_a_row_in_a_block_of_its_expert(M, E):
    ids = np.minimum(np.random.default_rng(0).geometric(0.3, M) - 1, E - 1)
    rows, places, experts = map(np.asarray, moe.blocks_of(jnp.asarray(ids), E))
    size = len(rows) // len(experts)
    np.testing.assert_array_equal(rows[places], np.arange(M))
    np.testing.assert_array_equal(experts[places // size], ids)
    assert (rows < M).sum() == M and (np.diff(experts) >= 0).all() and len(rows) <= 1.25 * M


def test_a_chosen_expert_gets_a_gradient_and_decoding_equals_the_full_pass():
    c = dataclasses.replace(SMALL, moe=ROUTERS["deepseek"])
    model = build(c)
    params = parallel.init(model, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 67, (2, 9))
    full, _ = model.apply({"params": params}, ids)
    cache, steps = model.empty_cache(2, 9), []
    for t in range(9):
        logits, cache = model.apply({"params": params}, ids[:, t : t + 1], cache=cache)
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, 1), full, atol=1e-5)
    grads = jax.grad(lambda p: model.apply({"params": p}, ids)[0].var())(params)["decoder"]["block_0"]["mlp"]
    assert np.abs(grads["router"]["kernel"]).max() > 0 and not grads["router"]["correction"].any()
    assert np.abs(grads["experts"]["up"]["kernel"]).max((1, 2)).min() > 0
