"""Schedules by value, optimizers against PyTorch and on toy losses, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nanoflax.config import OPTIMIZERS, SCHEDULES, ModelConfig, MoEConfig, OptimConfig
from nanoflax.nn import build
from nanoflax.train import make_optimizer
from nanoflax.train.optim import decay_mask, layers_above, make_schedule


def params_of(**fields):
    """The shapes of a model's parameters filled with random numbers."""
    model = build(ModelConfig(**dict(vocab_size=17, context=8, layers=1, dim=16, heads=2) | fields))
    shapes = jax.eval_shape(model.init, jax.random.PRNGKey(0), np.zeros((1, 1), np.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_schedules_hit_their_values():
    values = {}
    for kind in SCHEDULES:
        config = OptimConfig(schedule=kind, warmup_steps=10, end_factor=0.1, decay_fraction=0.2)
        schedule = make_schedule(config, 110, 2.0)
        values[kind] = [float(schedule(step)) for step in (0, 5, 10, 60, 88, 99, 110)]
    for found in values.values():
        # Warmup: never 0, 1/11 a step, and the peak right after it.
        np.testing.assert_allclose(found[:3], [2 / 11, 12 / 11, 2.0], rtol=1e-6)
    cosine = lambda step: 0.2 + 1.8 * (1 + np.cos(np.pi * (step - 10) / 100)) / 2
    linear = lambda step: 2.0 - 1.8 * (step - 10) / 100
    np.testing.assert_allclose(values["cosine"][3:], [cosine(s) for s in (60, 88, 99, 110)], rtol=1e-5)
    np.testing.assert_allclose(values["linear"][3:], [linear(s) for s in (60, 88, 99, 110)], rtol=1e-5)
    np.testing.assert_allclose(values["constant"][3:], [2.0] * 4, rtol=1e-6)
    # Stable up to step 88 = 110 - 0.2 * 110, then linear to the end value.
    np.testing.assert_allclose(values["wsd"][3:], [2.0, 2.0, 1.1, 0.2], rtol=1e-5)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(1, 0), (2, 1), (1, 100), (5, 0)])
def test_schedules_of_short_runs_are_positive(kind, steps, warmup):
    schedule = make_schedule(OptimConfig(schedule=kind, warmup_steps=warmup), steps, 1e-3)
    rates = [float(schedule(step)) for step in range(steps)]
    assert all(0 < rate <= 1e-3 * (1 + 1e-6) for rate in rates)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_lowers_a_toy_loss(name):
    params = params_of()
    goal = jax.tree.map(lambda p: p + 0.1, params)
    config = OptimConfig(name=name, learning_rate=0.01, warmup_steps=2, weight_decay=0.0)
    tx, _ = make_optimizer(config, 50)

    def loss(params):
        return sum(jnp.square(p - g).sum() for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(goal), strict=True))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=50)[1]

    values = train(params)
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay(tied):
    mask = by_path(decay_mask(params_of(tied=tied)))
    for path, decays in mask.items():
        assert decays == path.endswith("/kernel"), path
    assert mask["decoder/block_0/mlp/up/kernel"] and not mask["embed/embedding"]
    assert not mask["decoder/position_embed/embedding"] and not mask["decoder/norm/scale"]
    assert ("unembed/kernel" in mask) == (not tied)


def test_biases_of_experts_and_scales_of_heads_do_not_decay():
    mask = by_path(decay_mask(params_of(moe=MoEConfig(experts=3), qk_norm="each_head")))
    assert mask["decoder/block_0/mlp/experts/up/kernel"]
    assert not mask["decoder/block_0/mlp/experts/up/bias"]
    assert not mask["decoder/block_0/attention/query_norm/scale"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_shrinks_by_the_learning_rate_times_it(name, tied):
    # Without a gradient, decay is all there is. Momentum counts the decay in for sgd (coupled).
    params = params_of(tied=tied)
    config = OptimConfig(
        name=name,
        learning_rate=1e-2,
        muon_learning_rate=1e-2,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.5,
        b1=0.0 if name == "sgd" else 0.9,
    )
    tx, _ = make_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    step = jax.jit(lambda p: optax.apply_updates(p, tx.update(zero, tx.init(p), p)[0]))
    before, after = by_path(params), by_path(step(params))
    for path in before:
        factor = 1 - 1e-2 * 0.5 if path.endswith("/kernel") else 1
        np.testing.assert_allclose(after[path], factor * before[path], rtol=1e-5, err_msg=path)


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    kernel, grads = rng.normal(size=(4, 3)), rng.normal(size=(5, 4, 3))
    config = OptimConfig(
        name="adamw",
        learning_rate=0.05,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.3,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        clip=0,
    )
    tx, schedule = make_optimizer(config, 10)
    params = {"up": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    weight = torch.nn.Parameter(torch.tensor(kernel))
    theirs = torch.optim.AdamW([weight], lr=0.05, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        weight.grad = torch.tensor(g)
        theirs.step()
        updates, state = update({"up": {"kernel": jnp.asarray(g, jnp.float32)}}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["up"]["kernel"], weight.detach(), rtol=1e-5, atol=1e-6)
    assert float(schedule(3)) == pytest.approx(0.05)


@pytest.mark.parametrize("clip, scale", [(1.0, 0.1), (0.0, 1.0), (100.0, 1.0)])
def test_clip_scales_the_global_norm(clip, scale):
    config = OptimConfig(
        name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0, b1=0.0, clip=clip
    )
    tx, _ = make_optimizer(config, 10)
    grads = {"a": jnp.array([6.0, 0.0]), "b": jnp.array([8.0])}  # of norm 10
    updates, _ = tx.update(grads, tx.init(grads), grads)
    np.testing.assert_allclose(updates["a"], -scale * grads["a"], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], -scale * grads["b"], rtol=1e-5)


def test_muon_orthogonalises_hidden_matrices_alone():
    params = params_of(tied=False)
    config = OptimConfig(
        name="muon",
        learning_rate=1e-3,
        muon_learning_rate=0.02,
        warmup_steps=0,
        schedule="constant",
        weight_decay=0.0,
        clip=0,
    )
    tx, _ = make_optimizer(config, 10)
    grads = params_of(tied=False)
    updates = by_path(jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params))
    singular = np.linalg.svd(updates["decoder/block_0/attention/query/kernel"], compute_uv=False)
    assert singular.max() < 2 * singular.min()  # Newton-Schulz is loose about 1
    for path in ("unembed/kernel", "embed/embedding", "decoder/norm/scale"):  # Adam: all entries alike
        size = np.abs(updates[path])
        assert 1e-3 < size.min() and size.max() < 1.01 * size.min() < 2e-3, path


def test_muon_takes_each_expert_as_a_matrix():
    rng = np.random.default_rng(0)
    kernels = jnp.asarray(rng.normal(size=(3, 8, 6)), jnp.float32)
    tx, _ = make_optimizer(OptimConfig(name="muon", learning_rate=1e-3, muon_learning_rate=0.02, weight_decay=0.0), 10)

    def update(params):
        return tx.update(params, tx.init(params), params)[0]

    together = update({"mlp": {"experts": {"up": {"kernel": kernels}}}})["mlp"]["experts"]["up"]["kernel"]
    router = np.abs(update({"mlp": {"router": {"kernel": kernels[0]}}})["mlp"]["router"]["kernel"])
    assert router.max() < 1.01 * router.min()  # Adam's first step: all entries alike
    for i, kernel in enumerate(kernels):
        alone = update({"mlp": {"up": {"kernel": kernel}}})["mlp"]["up"]["kernel"]
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-6)


def test_a_layer_learns_slower_than_the_one_above():
    params = params_of(layers=3, tied=False)
    grads = jax.tree.map(jnp.ones_like, params)

    def update(layer_decay):
        config = OptimConfig(name="sgd", warmup_steps=0, layer_decay=layer_decay)
        optimizer, _ = make_optimizer(config, 10)
        return by_path(optimizer.update(grads, optimizer.init(params), params)[0])

    plain, decayed = update(1.0), update(0.5)
    above = {
        "unembed": 0,
        "decoder/norm": 0,
        "decoder/block_2": 1,
        "decoder/block_1": 2,
        "decoder/block_0": 3,
        "embed": 4,
        "decoder/position_embed": 4,
    }
    for path, found in decayed.items():
        (n,) = (n for start, n in above.items() if path.startswith(f"{start}/"))
        np.testing.assert_allclose(found, plain[path] * 0.5**n, rtol=1e-6)


def test_an_encoder_stands_below_its_decoder():
    leaf = {"x": 0}
    blocks = lambda n: {f"block_{i}": leaf for i in range(n)}
    params = {
        "embed": leaf,
        "encoder": blocks(2) | {"norm": leaf, "embed_norm": leaf},
        "decoder": blocks(1) | {"norm": leaf},
        "logit_bias": 0,
    }
    assert by_path(layers_above(params)) == {
        "embed/x": 4,
        "encoder/embed_norm/x": 4,
        "encoder/block_0/x": 3,
        "encoder/block_1/x": 2,
        "encoder/norm/x": 1,
        "decoder/block_0/x": 1,
        "decoder/norm/x": 0,
        "logit_bias": 0,
    }
    top = {"decoder": {"block_11": leaf}}  # all that is trained
    assert by_path(layers_above(top)) == {"decoder/block_11/x": 1}
