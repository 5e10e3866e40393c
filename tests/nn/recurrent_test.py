"""Recurrent layers: one recurrence in chunks, step by step, and as Transformers computes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next

from nanoflax import parallel, peft
from nanoflax.config import Config, ModelConfig, RecurrentConfig
from nanoflax.config import peft as peft_configs
from nanoflax.errors import UserError
from nanoflax.generate import beam_search, sample
from nanoflax.kernels import chunked
from nanoflax.nn import build
from tests.compiled import apply

B, T, G, H, K, N, V = 2, 45, 2, 4, 8, 6, 31
run = jax.jit(chunked, static_argnums=7)
RECURRENT = RecurrentConfig(heads=4, groups=2, key_dim=8, value_dim=6, chunk=8, conv_bias=True)
BASE = ModelConfig(
    vocab_size=V,
    layers=2,
    dim=16,
    heads=2,
    positions="none",
    norm="rmsnorm",
    context=64,
    recurrent=RECURRENT,
    bias=False,
)
MODELS = {
    "delta": dataclasses.replace(BASE, layer_types=("delta",), mlp_dim=24),
    "mamba2": dataclasses.replace(BASE, layer_types=("mamba2",), mlp_dim=0),
    "hybrid": dataclasses.replace(
        BASE, layers=3, layer_types=("delta", "full", "mamba2"), positions="rotary", attention_gate=True
    ),
}


def draws(seed=0):
    """(q, k, v, log_decay, beta, state) with k of length 1 and decays from almost 0 to almost 1."""
    rng = np.random.default_rng(seed)
    q, k, v, a, b, state = (
        rng.normal(size=shape).astype(np.float32)
        for shape in [(B, T, G, K), (B, T, G, K), (B, T, H, N), (B, T, H), (B, T, H), (B, H, K, N)]
    )
    return q, k / np.linalg.norm(k, axis=-1, keepdims=True), v, -np.exp(2 * a), 1 / (1 + np.exp(-b)), state


def by_steps(q, k, v, log_decay, beta, state, segments):
    """The recurrence token by token, in float64."""
    q, k = (np.repeat(x.astype(np.float64), H // G, 2) for x in (q, k))
    S, out = state.astype(np.float64), []
    for t in range(q.shape[1]):
        if t:
            S = S * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        S = S * np.exp(log_decay[:, t].astype(np.float64))[..., None, None]
        write = v[:, t].astype(np.float64)
        if beta is not None:
            write = beta[:, t, :, None] * (write - np.einsum("bhk,bhkn->bhn", k[:, t], S))
        real = (segments[:, t] > 0)[:, None, None, None]
        S = S + real * k[:, t, :, :, None] * write[:, :, None]
        out.append(np.einsum("bhk,bhkn->bhn", q[:, t], S))
    return np.stack(out, 1), S


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("kind", ["delta", "mamba2"])
def test_chunks_equal_the_recurrence_in_packed_rows(kind, chunk):
    q, k, v, a, beta, state = draws()
    beta = beta if kind == "delta" else None
    segments = np.repeat([[1, 2, 3, 4, 5], [1, 1, 2, 3, 0]], 9, 1)
    segments[0, :2] = 1
    segments[0, 16] = 7  # a document of one token
    y, last = run(q, k, v, a, beta, state, segments, chunk)
    real = segments > 0
    expected, expected_last = by_steps(q, k, v, a, beta, state, segments)
    np.testing.assert_allclose(y[real], expected[real], atol=1e-5)
    np.testing.assert_allclose(last[0], expected_last[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["delta", "mamba2"])
def test_gradients_do_not_depend_on_the_chunk(kind):
    q, k, v, a, beta, state = draws(1)
    segments = np.repeat([[1, 2, 3], [1, 1, 2]], 15, 1)
    weights = np.random.default_rng(2).normal(size=v.shape)

    def loss(inputs, chunk):
        q, k, v, a, beta, state = inputs
        y, last = chunked(q, k, v, a, beta if kind == "delta" else None, state, segments, chunk)
        return (weights * y).sum() + last.sum()

    grads = jax.jit(jax.grad(loss), static_argnums=1)
    inputs = (q, k, v, a, beta, state)
    for found, expected in zip(grads(inputs, 16), grads(inputs, 1), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name, least", [("recurrent", -np.inf), ("chunk", -1.0)])
def test_the_delta_rule_equals_transformers(name, least):
    q, k, v, a, beta, state = draws(2)
    a = a.clip(least)  # in chunks, Transformers subtracts sums of decays: digits are lost where they are large
    function = getattr(modeling_qwen3_next, f"torch_{name}_gated_delta_rule")
    inputs = [torch.tensor(x) for x in (q, k, v, a, beta)]
    expected, expected_last = function(*inputs, initial_state=torch.tensor(state), output_final_state=True)
    y, last = run(q * K**-0.5, k, v, a, beta, state, np.ones((B, T), np.int32), 16)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(last, expected_last, atol=1e-5)


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    """(model, params) whose decays, steps and norms are far from their first values."""
    model = build(MODELS[request.param])

    @jax.jit
    def moved(params):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
        leaves = [x + 0.2 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, leaves)

    return model, moved(parallel.init(model, jax.random.PRNGKey(0)))


def test_documents_of_a_packed_row_do_not_see_each_other(made):
    model, params = made
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, V, n) for n in (5, 1, 14, 9)]
    row = np.concatenate([*documents, [0, 0]])[None]
    segments = np.repeat([1, 2, 3, 4, 0], [5, 1, 14, 9, 2])[None]
    packed = apply(model, params, row, segments)[0][0]
    first = 0
    for document in documents:
        alone = apply(model, params, document[None])[0][0]
        np.testing.assert_allclose(packed[first : first + len(document)], alone, atol=1e-5)
        first += len(document)


def test_decoding_with_padding_on_the_left_equals_the_full_pass(made):
    model, params = made
    rng = np.random.default_rng(1)
    lengths = np.array([12, 2])
    tokens = rng.integers(1, V, (2, 20))
    cache = model.empty_cache(2, 20, jnp.asarray(12 - lengths))
    found, at = [], 0
    for n in (1, 10, 1, 4, 1, 1, 1, 1):  # the padding of row 1 ends inside the second call
        logits, cache = apply(model, params, tokens[:, at : at + n], cache=cache)
        found.append(logits)
        at += n
    found = jnp.concatenate(found, 1)
    for row, length in enumerate(lengths):
        start = 12 - length
        alone = apply(model, params, tokens[row : row + 1, start:])[0]
        np.testing.assert_allclose(found[row, start:], alone[0], atol=1e-5)
    assert all(x.dtype == jnp.float32 for layer in cache["layers"] for name, x in layer.items() if name == "state")


def test_samples_and_beams_of_ragged_prompts(made):
    model, params = made
    prompts = [[3, 4, 5, 6, 7, 8], [9]]
    found = sample(model, params, prompts, 6, temperature=0)
    for prompt, new in zip(prompts, found, strict=True):
        text = list(prompt)
        for _ in range(6):
            padded = np.array([text + [0] * (12 - len(text))])  # causal: what follows changes nothing
            text.append(int(apply(model, params, padded)[0][0, len(text) - 1].argmax()))
        assert new == text[len(prompt) :]
    one, many = (beam_search(model, params, prompts, beams=n, max_new_tokens=6) for n in (1, 3))
    assert one == found

    def score(prompt, new):
        logits = apply(model, params, np.array([prompt + new]))[0][0, len(prompt) - 1 : -1]
        return float(jax.nn.log_softmax(logits)[np.arange(len(new)), np.array(new)].sum())

    assert all(score(p, b) >= score(p, a) - 1e-4 for p, a, b in zip(prompts, one, many, strict=True))


def test_a_scan_over_layers_and_remat_compute_the_same():
    config = MODELS["mamba2"]
    tokens = np.random.default_rng(0).integers(0, V, (2, 20))
    params = parallel.init(build(config), jax.random.PRNGKey(0))

    def gradient(model, params):
        return jax.jit(jax.grad(lambda p: (model.apply({"params": p}, tokens)[0] ** 2).mean()))(params)

    expected = gradient(build(config), params)
    found = gradient(build(config, remat="blocks"), parallel.stack(params))
    for a, b in zip(jax.tree.leaves(parallel.unstack(found)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_what_is_not_computed_is_refused():
    model = build(MODELS["hybrid"])
    params = jax.eval_shape(model.init, jax.random.PRNGKey(0), jnp.zeros((1, 2), jnp.int32))["params"]
    for kind in (peft_configs.PromptTuning, peft_configs.PrefixTuning):
        with pytest.raises(UserError, match="delta and mamba2"):
            peft.add(params, kind(), jax.random.PRNGKey(0))
    config = dataclasses.replace(Config(), model=MODELS["hybrid"])
    with pytest.raises(UserError, match="context=2"):
        parallel.check_mesh(config, parallel.abstract_mesh((1, 1, 1, 2)))
    with pytest.raises(UserError, match="recurrent.groups=2 is not divisible by tensor=4"):
        parallel.check_mesh(config, parallel.abstract_mesh((1, 1, 4)))
    bad = dataclasses.replace(MODELS["delta"], recurrent=dataclasses.replace(RECURRENT, groups=3))
    with pytest.raises(UserError, match="groups=3 does not divide heads=4"):
        build(bad)
