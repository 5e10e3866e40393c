"""Mixture of experts: against a dense reference of all experts, in NumPy or by einsum."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanoflax import config as configs
from nanoflax import parallel, peft, train
from nanoflax.config import MoEConfig
from nanoflax.kernels import grouped, quantized
from nanoflax.nn import build, moe
from nanoflax.train.objectives import with_router
from tests.compiled import apply

SMALL = configs.preset("nano-1m", vocab_size=67, dim=32, heads=4, layers=2, mlp_dim=24, mlp_bias=True)
ROUTERS = {
    "softmax": MoEConfig(experts=8, active=3),
    "deepseek": MoEConfig(
        experts=8, active=3, scores="sigmoid", correction=True, groups=4, top_groups=2, scale=2.5, shared_dim=16
    ),
    "gates": MoEConfig(
        experts=4, active=2, expert_dim=20, renormalise=False, router_bias=True, shared_dim=16, shared_gate=True
    ),
    "llama4": MoEConfig(
        experts=4, active=2, scores="sigmoid", renormalise=False, weigh_inputs=True, expert_bias=False, shared_dim=16
    ),
    "ernie": MoEConfig(
        experts=8, active=3, correction=True, least_sum=0.6, expert_bias=False, expert_dim=20, shared_dim=16
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
    total = max(scores[chosen].sum(), m.least_sum) if m.renormalise else 1
    return {e: m.scale * scores[e] / total for e in chosen}


def dense(x, p, c):
    """The layer with all experts on all tokens."""
    m = c.moe

    def mlp(p, x):
        linear = lambda name, x: x @ p[name]["kernel"] + p[name].get("bias", 0)
        gate = linear("gate", x)
        return linear("down", gate * sigmoid(gate) * linear("up", x))

    y = np.zeros_like(x)
    logits = x @ p["router"]["kernel"] + p["router"].get("bias", 0)
    experts = [jax.tree.map(lambda w, e=e: w[e], p["experts"]) for e in range(m.experts)]
    for n, row in enumerate(logits):
        for e, weight in chosen_by_hand(row, m, p["router"].get("correction", 0)).items():
            y[n] += mlp(experts[e], weight * x[n]) if m.weigh_inputs else weight * mlp(experts[e], x[n])
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
    np.testing.assert_allclose(apply(layer, p, x).reshape(-1, 32), expected, rtol=1e-4, atol=1e-5)


def test_blocks_and_ragged_products_agree_with_einsum():
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(6, 4, 5), (8, 5, 7)]))
    experts = jnp.array([0, 0, 2, 3, 7, 7])

    def both(product):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sin(product(x, w)).sum(), (0, 1)))(x, w)

    expected = both(lambda x, w: jnp.einsum("nbi,nio->nbo", x, w[experts]))
    for product in (grouped.by_block, grouped.ragged, grouped.grouped_matmul):
        found = both(lambda x, w, product=product: product(x, w, experts))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_texts_of_a_vmap_share_one_ragged_product():
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = (jax.random.normal(key, shape) for key, shape in zip(keys, [(3, 6, 2, 5), (8, 5, 7)], strict=True))
    experts = jnp.array([[0, 0, 2, 3, 7, 7], [1, 2, 2, 2, 5, 8], [8] * 6])  # 8: none
    expected = jnp.einsum("snbi,snio->snbo", x, jnp.concatenate([w, jnp.zeros_like(w[:1])])[experts])
    for product in (grouped.ragged, jax.jit(grouped.ragged)):
        run = jax.vmap(product, (0, None, 0))
        np.testing.assert_allclose(run(x, w, experts), expected, atol=1e-5)
        assert str(jax.make_jaxpr(run)(x, w, experts)).count("ragged_dot_general[") == 1
    for axes in ((None, None, 0), (0, None, None), (0, 0, 0), (None, 0, None)):
        arguments = [a if axis == 0 else a[0] for a, axis in zip((x, jnp.stack([w] * 3), experts), axes, strict=True)]
        each = [[a[i] if axis == 0 else a for a, axis in zip(arguments, axes, strict=True)] for i in range(3)]
        expected = jnp.stack([grouped.ragged(*one) for one in each])
        np.testing.assert_allclose(jax.vmap(grouped.ragged, axes)(*arguments), expected, atol=1e-5)
    packed = quantized.quantize(w, "int8", group=5)
    expected = [grouped.ragged(*one, packed, number) for *one, number in zip(x, experts, strict=True)]
    np.testing.assert_allclose(jax.vmap(grouped.ragged, (0, None, 0))(x, packed, experts), expected, atol=1e-5)


@pytest.mark.parametrize("M, E", [(2, 8), (100, 3), (1000, 16), (4096, 4)])
def test_every_token_has_a_row_in_a_block_of_its_expert(M, E):
    ids = np.minimum(np.random.default_rng(0).geometric(0.3, M) - 1, E - 1)
    rows, places, experts = map(np.asarray, grouped.blocks_of(jnp.asarray(ids), E, len(ids)))
    size = len(rows) // len(experts)
    np.testing.assert_array_equal(rows[places], np.arange(M))
    np.testing.assert_array_equal(experts[places // size], ids)
    assert (rows < M).sum() == M and (np.diff(experts) >= 0).all() and len(rows) <= 1.25 * M


def test_a_chosen_expert_gets_a_gradient_and_decoding_equals_the_full_pass():
    c = dataclasses.replace(SMALL, moe=ROUTERS["deepseek"])
    model = build(c)
    params = parallel.init(model, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 67, (2, 9))
    full, _ = apply(model, params, ids)
    cache, steps = model.empty_cache(2, 9), []
    for t in range(9):
        logits, cache = apply(model, params, ids[:, t : t + 1], cache=cache)
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, 1), full, atol=1e-5)
    grads = jax.jit(jax.grad(lambda p: model.apply({"params": p}, ids)[0].var()))(params)["decoder"]["block_0"]["mlp"]
    assert np.abs(grads["router"]["kernel"]).max() > 0 and not grads["router"]["correction"].any()
    assert np.abs(grads["experts"]["up"]["kernel"]).max((1, 2)).min() > 0


@partial(jax.jit, static_argnums=0)
def terms_of(model, params, batch):
    sums = train.objectives.with_router(train.causal_lm)(model, params, batch)
    return sums.objective - sums.loss, sums.logged


def test_router_terms_leave_out_padding_and_are_the_same_in_a_scan_and_with_remat():
    m = MoEConfig(experts=8, active=3, balance_loss=0.5, z_loss=0.25)
    c = dataclasses.replace(SMALL, moe=m)
    params = parallel.init(build(c), jax.random.key(0))
    params = jax.tree.map(lambda x: x * 8, params)  # so that experts differ in load
    rng = np.random.default_rng(0)
    segments = (np.arange(12) < np.array([[12], [7]])).astype(np.int32)
    batch = {
        "targets": rng.integers(0, 67, (2, 12)).astype(np.int32),
        "first": np.ones(2, np.int32),
        "weights": segments.astype(np.float32),
        "segments": segments,
        "start": np.ones(2, np.int32),
    }
    found = terms_of(build(c), params, batch)
    stacked = parallel.stack(params)
    for model, p in [(build(c, "blocks"), params), (build(c), stacked), (build(c, "dots"), stacked)]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), terms_of(model, p, batch), found)
        grads = jax.jit(jax.grad(lambda p, model=model: terms_of(model, p, batch)[0]))(p)["decoder"]
        router = [g for path, g in jax.tree_util.tree_leaves_with_path(grads) if "router" in jax.tree_util.keystr(path)]
        assert router and all(np.abs(g).max() > 0 for g in router)
    other = batch | {"targets": np.where(segments > 0, batch["targets"], 5)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), terms_of(build(c), params, other)[1], found[1]
    )
    n = segments.sum()
    load = float(found[1]["expert_load"] / n)
    assert 1 < load < 8 / 3 and found[1]["dropped"] == 0
    expected = 0.5 * found[1]["balance_loss"] + 0.25 * found[1]["router_z_loss"]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_corrections_alone_equal_the_loads(scores):
    m = MoEConfig(experts=8, active=2, correction=True, scores=scores)
    c = dataclasses.replace(SMALL, moe=m)
    params = parallel.init(build(c), jax.random.key(0))
    trained, rest = peft.split(
        params, jax.tree_util.tree_map_with_path(lambda path, _: "correction" in str(path), params)
    )
    rest = jax.tree_util.tree_map_with_path(lambda path, x: x * (20 if "router" in str(path) else 1), rest)
    rng = np.random.default_rng(0)
    batch = {
        "targets": rng.integers(0, 67, (8, 32)).astype(np.int32),
        "first": np.ones(8, np.int32),
        "weights": np.ones((8, 32), np.float32),
    }
    objective, optimizer = with_router(train.causal_lm), optax.adam(0.01)

    @jax.jit
    def step(trained, state):
        def total(trained):
            sums = objective(build(c), peft.join(trained, rest), batch)
            return sums.objective, sums

        pull, sums = jax.grad(total, has_aux=True)(trained)
        updates, state = optimizer.update(pull, state)
        return optax.apply_updates(trained, updates), state, sums

    state, loads = optimizer.init(trained), []
    for _ in range(60):
        trained, state, sums = step(trained, state)
        loads.append(float(sums.logged["expert_load"] / sums.weight))
        np.testing.assert_allclose(sums.objective, sums.loss, rtol=1e-6)  # what is minimised has no other value
    assert loads[0] > 1.4 and loads[-1] < 1.25, loads[::59]


def test_a_step_logs_the_router_and_its_loss_is_not_the_reported_one():
    c = dataclasses.replace(SMALL, moe=MoEConfig(experts=4, active=2, balance_loss=0.1))
    config, model = configs.Config(model=c), build(c)
    optimizer = optax.sgd(0.1)
    state = train.init_state(model, optimizer, config, parallel.make_mesh("1,1,1", jax.devices()[:1]))
    batch = {
        "targets": np.ones((2, 8), np.int32),
        "first": np.ones(2, np.int32),
        "weights": np.ones((2, 8), np.float32),
    }
    _, metrics = jax.jit(train.make_train_step(model, optimizer, config))(state, batch)
    assert {"expert_load", "dropped", "balance_loss", "router_z_loss"} <= metrics.keys()
    np.testing.assert_allclose(metrics["objective"], metrics["loss"] + 0.1 * metrics["balance_loss"], rtol=1e-5)


def test_sigmoid_scores_that_are_all_zero_give_zero_weights():
    _, weights, shares = moe.route(jnp.full((1, 4), -200.0), MoEConfig(experts=4, active=2, scores="sigmoid"))
    assert not weights.any() and not shares.any()
