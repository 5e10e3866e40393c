"""Distillation: divergences and gradients against torch and trl; pieces, padding, and what the teacher may not do."""

import dataclasses
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nanoflax import alignment, nn, parallel, train
from nanoflax.config import ModelConfig
from tests.closeness import assert_trees_close
from tests.compiled import apply
from tests.parallel.mesh_test import run_child

V, B, T = 37, 3, 8
RNG = np.random.default_rng(0)
STUDENT = ModelConfig(vocab_size=V, context=16, layers=1, dim=16, heads=2)
TEACHER = ModelConfig(vocab_size=V, context=16, layers=2, dim=24, heads=2, tied=False, positions="rotary")
KINDS = [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5), ("jsd", 0.2)]  # and the beta of trl


def a_model(config, seed=0):
    """(model, parameters far from zero)."""
    model = nn.build(config)
    noise = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: x + 0.3 * noise.normal(size=x.shape).astype(np.float32), parallel.init(model, jax.random.PRNGKey(0))
    )
    return model, params


def a_batch(high=V):
    weights = (RNG.random((B, T)) < 0.7).astype(np.float32)
    targets = RNG.integers(high, size=(B, T)).astype(np.int32)
    return {"targets": targets, "first": np.zeros(B, np.int32), "weights": weights}


def logits_of(model, params, batch):
    return apply(model, params, nn.shift_right(batch["targets"], batch["first"]))[0]


def trl_loss(student, teacher, weights, beta, temperature):
    """trl's loss of GKD, a sum over the tokens with weight 1."""
    with warnings.catch_warnings(action="ignore"):  # that trl may change this class
        from trl.experimental.gkd import GKDTrainer  # takes two seconds, which collecting the tests need not wait for
    labels = torch.where(torch.tensor(weights) > 0, 1, -100)
    arguments = student, teacher, labels, beta, temperature
    return GKDTrainer.generalized_jsd_loss(*arguments, reduction="sum")


@pytest.mark.parametrize("kind, beta, temperature", [*((*kind, 2.5) for kind in KINDS), ("forward_kl", 0.0, 1.0)])
def test_the_loss_and_its_gradient_are_those_of_trl(kind, beta, temperature):
    (student, params), (teacher, held) = a_model(STUDENT), a_model(TEACHER, 1)
    batch, options = a_batch(), dict(divergence=kind, temperature=temperature, beta=beta if kind == "jsd" else 0.5)

    def ours(params):
        sums = alignment.distill(student, params | {"teacher": held}, batch, teacher=teacher, **options)
        return sums.objective, sums

    gradient, sums = jax.jit(jax.grad(ours, has_aux=True))(params)
    logits, back = jax.vjp(jax.jit(lambda params: logits_of(student, params, batch)), params)
    known = torch.tensor(np.asarray(logits_of(teacher, held, batch)))
    given = torch.tensor(np.asarray(logits), requires_grad=True)
    expected = temperature**2 * trl_loss(given, known, batch["weights"], beta, temperature)
    expected.backward()
    np.testing.assert_allclose(sums.objective, expected.item(), rtol=1e-5)
    assert_trees_close(gradient, back(jnp.asarray(given.grad.numpy()))[0], 1e-5)
    assert sums.weight == batch["weights"].sum()
    plain = trl_loss(given, known, batch["weights"], 0.0, 1.0)
    np.testing.assert_allclose(sums.logged["kl"], plain.item(), rtol=1e-5)
    assert ("divergence" in sums.logged) == (kind != "forward_kl" or temperature != 1)


@pytest.mark.parametrize("kind, forward", [("forward_kl", True), ("reverse_kl", False)])
def test_a_divergence_is_that_of_torch(kind, forward):
    student, teacher = (RNG.normal(size=(5, V)).astype(np.float32) * 3 for _ in range(2))
    p, q = (F.log_softmax(torch.tensor(x), -1) for x in (student, teacher))
    pair = (p, q) if forward else (q, p)
    expected = F.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(alignment.divergence_between(student, teacher, kind), expected, rtol=1e-5)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_a_student_that_equals_its_teacher_learns_nothing(kind, beta):
    model, params = a_model(STUDENT)
    batch = a_batch()

    def ours(own):
        given = own | {"teacher": params}
        return alignment.distill(model, given, batch, teacher=model, divergence=kind, temperature=2.0).objective

    value, gradient = jax.jit(jax.value_and_grad(ours))(params)
    assert abs(value) < 1e-5 and max(float(abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-4


@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_the_mix_with_the_cross_entropy(mix):
    (student, params), (teacher, held) = a_model(STUDENT), a_model(TEACHER, 1)
    batch, together = a_batch(), params | {"teacher": held}
    smoothed = dict(label_smoothing=0.1, z_loss=0.01)
    distill = partial(alignment.distill, student, batch=batch, teacher=teacher, temperature=2.0)
    plain = jax.jit(lambda: train.causal_lm(student, params, batch, **smoothed))()
    pure, found = jax.jit(lambda: (distill(together), distill(together, mix=mix, **smoothed)))()
    np.testing.assert_allclose(found.objective, (1 - mix) * pure.objective + mix * plain.objective, rtol=1e-5)
    np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-5)


def test_without_a_teacher_it_is_next_token_prediction():
    student, params = a_model(STUDENT)
    batch = a_batch()
    objectives = partial(alignment.distill, temperature=3.0), train.causal_lm
    found, expected = jax.jit(lambda: [objective(student, params, batch) for objective in objectives])()
    assert found == expected


@pytest.mark.parametrize(
    "kind, rows", [("forward_kl", (0, 3)), ("forward_kl", (2, 5)), ("reverse_kl", (2, 5)), ("jsd", (2, 5))]
)
def test_rows_of_padding_get_no_probability(kind, rows):
    """Tables of other lengths, by padding that counts (as published models have it) or not (vocab_padding)."""
    configs = (STUDENT, TEACHER)
    plain = [a_model(config, seed) for seed, config in enumerate(configs)]
    batch = a_batch()

    def longer(pair, n, masked):
        model, params = pair
        config = dataclasses.replace(model.config, vocab_size=V + n, vocab_padding=n * masked)
        grow = lambda x: jnp.concatenate([x, RNG.normal(size=(n, *x.shape[1:])).astype(np.float32)])
        params = params | {"embed": {"embedding": grow(params["embed"]["embedding"])}}
        if not config.tied:
            params |= {"unembed": {"kernel": grow(params["unembed"]["kernel"].T).T}}
        return nn.build(config), params

    def value(pairs):
        (student, params), (teacher, held) = pairs
        found = partial(alignment.distill, student, batch=batch, teacher=teacher, divergence=kind)
        objective = lambda p: found(p | {"teacher": held}, vocab_size=V, mix=0.5, label_smoothing=0.1).objective
        value, gradient = jax.jit(jax.value_and_grad(objective))(params)
        return value, gradient["embed"]["embedding"]

    expected, gradient = value(plain)
    found, longer_gradient = value([longer(pair, n, True) for pair, n in zip(plain, rows, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(longer_gradient[:V], gradient, rtol=1e-3, atol=1e-4)
    assert not longer_gradient[V:].any()
    published, _ = value([longer(pair, n, False) for pair, n in zip(plain, rows, strict=True)])
    assert np.isfinite(published)
    if not rows[0]:  # the cross entropy of the student is over all rows of its own table
        np.testing.assert_allclose(published, expected, rtol=1e-5)


def test_pieces_equal_the_whole(monkeypatch):
    (student, params), (teacher, held) = a_model(STUDENT), a_model(TEACHER, 1)
    batch = a_batch()

    def both():
        loss = lambda p: alignment.distill(student, p | {"teacher": held}, batch, teacher=teacher, mix=0.2).objective
        return jax.jit(jax.value_and_grad(loss))(params)

    whole = both()
    monkeypatch.setattr(nn, "chunks_of", lambda *_: 4)
    assert_trees_close(both(), whole, 1e-6)


def test_no_logits_of_either_model_are_whole_in_memory(monkeypatch):
    """The largest arrays of the gradient, and the memory that the compiler plans: 8 pieces against one."""
    sizes = dict(vocab_size=4096, context=512, layers=1, dim=16, heads=2)
    student, teacher = nn.build(ModelConfig(**sizes)), nn.build(ModelConfig(**sizes | {"dim": 32}))
    shape = jax.ShapeDtypeStruct
    batch = {
        "targets": shape((2, 512), jnp.int32),
        "first": shape((2,), jnp.int32),
        "weights": shape((2, 512), "float32"),
    }
    params, held = map(parallel.param_shapes, (student, teacher))

    def planned(pieces):
        monkeypatch.setattr(nn, "chunks_of", lambda *_: pieces)
        loss = lambda p, t, batch: alignment.distill(student, p | {"teacher": t}, batch, teacher=teacher).objective
        return jax.jit(jax.grad(loss)).lower(params, held, batch).compile().memory_analysis().temp_size_in_bytes

    logits = 2 * 512 * 4096 * 4
    whole, pieces = planned(1), planned(8)
    assert whole > 3 * logits
    assert pieces < whole / 4 and pieces < logits


def test_a_mesh_computes_the_same():
    """Rows, T and both vocabularies are split; both tables have rows of padding."""
    assert run_child("on_meshes", file="alignment.distillation_test") == "same"


def on_meshes():
    student, params = a_model(dataclasses.replace(STUDENT, vocab_size=40, vocab_padding=3))
    teacher, held = a_model(dataclasses.replace(TEACHER, vocab_size=44, vocab_padding=7), 1)
    batch = a_batch() | {"weights": np.ones((B, T), np.float32)}
    batch = {name: np.concatenate([x[:1], x]) for name, x in batch.items()}

    def gradient(mesh):
        def loss(params, held, batch):
            given = params | {"teacher": held}
            return alignment.distill(student, given, batch, teacher=teacher, vocab_size=V, mix=0.2).objective

        placed = (parallel.put_params(tree, mesh) for tree in (params, held))
        step = jax.jit(parallel.with_mesh(mesh, jax.value_and_grad(loss)))
        return jax.tree.map(np.asarray, step(*placed, parallel.put_batch(batch, mesh)))

    expected = gradient(parallel.make_mesh("1,1,1", jax.devices()[:1]))
    for shape in ("2,1,2,2", "1,4,2,1"):
        assert_trees_close(gradient(parallel.make_mesh(shape)), expected, 1e-5)
    return "same"


def test_dropout_is_of_the_student_alone():
    config = dataclasses.replace(STUDENT, dropout=0.5)
    model, params = a_model(config)
    batch, key = a_batch(), jax.random.PRNGKey(3)
    seen = {}

    class Spy:
        config = model.config

        def apply(self, variables, *args, **named):
            seen.setdefault(named["method"], named)
            return model.apply(variables, *args, **named)

    kl = alignment.distill(model, params | {"teacher": params}, batch, key, teacher=Spy()).logged["kl"]
    assert kl > 1 and "rngs" not in seen["hidden"] and seen["hidden"].get("deterministic", True)
