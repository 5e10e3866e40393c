"""Attention sinks and the clamped gated MLP, against Transformers' gpt_oss and a plain softmax."""

import dataclasses
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import parallel
from nanoflax.config import ModelConfig, validate
from nanoflax.errors import UserError
from nanoflax.kernels import fused_attention as kernels
from nanoflax.nn import build, layers
from nanoflax.nn.attention import heads_first
from tests.closeness import assert_trees_close
from tests.compiled import prefill


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_mask(B, T, S):
    mask = np.random.default_rng(5).random((B, 1, T, S)) < 0.6
    mask[0, :, 1] = False  # a query that sees only the sink
    return mask


@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_sinks_equal_transformers(G, masked):
    torch = pytest.importorskip("torch")
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    B, H, T, S, K = 2, 4, 5, 7, 8
    q, k, v, sinks, dy = (normal(i, *s) for i, s in enumerate([(B, H, T, K), *[(B, G, S, K)] * 2, (H,), (B, H, T, K)]))
    mask = random_mask(B, T, S) if masked else None
    tq, tk, tv, ts = (torch.tensor(x).requires_grad_() for x in (q, k, v, sinks))
    module = types.SimpleNamespace(num_key_value_groups=H // G, sinks=ts, training=False)
    added = torch.zeros(()) if mask is None else torch.tensor(np.where(mask, 0, np.finfo(np.float32).min))
    expected, weights = eager_attention_forward(module, tq, tk, tv, added, scaling=0.3)
    expected.backward(torch.tensor(dy).transpose(1, 2))
    found, pull = jax.vjp(lambda q, k, v, s: heads_first(q, k, v, mask, scale=0.3, sinks=s), q, k, v, sinks)
    np.testing.assert_allclose(found, expected.detach().transpose(1, 2), atol=2e-6)
    for ours, theirs in zip(pull(dy), (tq, tk, tv, ts), strict=True):
        np.testing.assert_allclose(ours, theirs.grad, atol=1e-5)
    ours = heads_first(jnp.asarray(q), jnp.asarray(k), None, mask, scale=0.3, sinks=jnp.asarray(sinks))
    np.testing.assert_allclose(ours, weights.detach(), atol=2e-6)


def plain(q, k, v, mask, bias, softcap, sinks):
    """The softmax over the scores and the sink, written out; its gradient is JAX's own."""
    H, K = q.shape[1], q.shape[-1]
    k, v = (jnp.repeat(x, H // x.shape[1], 1) for x in (k, v))
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k) * K**-0.5
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    scores = jnp.where(mask, scores + bias, -jnp.inf)
    sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], -1))[..., :-1] @ v


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_causal_blocks_bias_and_softcap_equal_a_plain_softmax(softcap):
    B, H, G, T, K = 2, 4, 2, 130, 4  # from 128 on, a causal call has two blocks of queries
    q, k, v, sinks = normal(0, B, H, T, K), normal(1, B, G, T, K), normal(2, B, G, T, K), normal(3, H)
    bias, dy, mask = normal(4, 1, H, T, T), normal(5, B, H, T, K), random_mask(B, T, T)

    def ours(q, k, v, bias, sinks):
        return heads_first(q, k, v, mask, True, bias, softcap=softcap, sinks=sinks)

    def theirs(q, k, v, bias, sinks):
        return plain(q, k, v, mask & np.tri(T, dtype=bool), bias, softcap, sinks)

    (found, pull), (expected, pull_plain) = (jax.vjp(f, q, k, v, bias, sinks) for f in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert_trees_close(pull(dy), pull_plain(dy), 1e-5)


def test_a_query_without_a_key_gets_zero_and_large_sinks_stay_finite():
    q, k, v = normal(0, 1, 2, 2, 4), normal(1, 1, 2, 3, 4), normal(2, 1, 2, 3, 4)
    nothing = np.zeros((1, 1, 2, 3), bool)
    assert not np.any(heads_first(q, k, v, nothing, sinks=jnp.zeros(2)))
    for sink, expected in [(-1e4, heads_first(q, k, v)), (1e4, np.zeros_like(q))]:
        sinks = jnp.full(2, sink)
        np.testing.assert_allclose(heads_first(q, k, v, sinks=sinks), expected, atol=1e-6)
        grads = jax.grad(lambda q, s: heads_first(q, k, v, sinks=s).sum(), (0, 1))(q, sinks)
        assert all(np.isfinite(g).all() for g in grads)


MODEL = ModelConfig(
    vocab_size=23, context=32, layers=2, dim=16, heads=4, kv_heads=2, positions="rotary", window=3,
    layer_types=("sliding", "full"), attention_sinks=True, gated=True, activation="silu", swiglu_limit=0.02,
    swiglu_alpha=1.5, dtype="float32")  # fmt: skip


@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def run(model, params, tokens, cache=None):
    return model.apply({"params": params}, tokens, cache=cache)


def random_params(model):
    params = parallel.init(model, jax.random.PRNGKey(0))
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [x + 0.1 * normal(i, *x.shape) for i, x in enumerate(leaves)])


def test_decoding_with_a_cache_equals_the_full_pass():
    model = build(MODEL)
    params = random_params(model)
    assert params["decoder"]["block_0"]["attention"]["sinks"].shape == (4,)
    tokens = np.random.default_rng(0).integers(0, 23, (2, 12)).astype(np.int32)
    expected, _ = run(model, params, tokens)
    last, cache = prefill(model, params, tokens[:, :5], np.array([5, 5]), 8)
    np.testing.assert_array_equal(last, tokens[:, 4])
    for t in range(4, 12):
        logits, cache = run(model, params, tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-5)


def test_the_clamped_gate_equals_gpt_oss():
    torch = pytest.importorskip("torch")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    gate, up, dy = 3 * normal(0, 5, 6), 3 * normal(1, 5, 6), normal(2, 5, 6)
    both = torch.tensor(np.stack([gate, up], -1).reshape(5, 12)).requires_grad_()
    expected = GptOssExperts._apply_gate(types.SimpleNamespace(alpha=1.3, limit=2.0), both)
    expected.backward(torch.tensor(dy))
    found, pull = jax.vjp(lambda gate, up: layers.gated("silu", gate, up, 2.0, 1.3), gate, up)
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(np.stack(pull(dy), -1).reshape(5, 12), both.grad, atol=1e-5)


def test_the_settings_of_the_clamped_gate_reach_an_mlp():
    tokens, params = np.arange(8, dtype=np.int32)[None], random_params(build(dataclasses.replace(MODEL, layers=1)))
    results = [
        run(build(dataclasses.replace(MODEL, layers=1, **changes)), params, tokens)[0]
        for changes in ({}, {"swiglu_limit": 0.0}, {"swiglu_limit": 0.01}, {"swiglu_alpha": 3.0})
    ]
    assert all(np.abs(results[0] - other).max() > 1e-5 for other in results[1:])


def test_what_does_not_compute_sinks_is_refused():
    call = kernels.Call("gpu", (2, 4, 128, 64), (2, 2, 128, 64), jnp.bfloat16, True, kernels.MaskSpec(), False, 0.0)
    assert kernels.choose("auto", call._replace(sinks=True)) == ("plain", "not cudnn: the softmax has sinks")
    with pytest.raises(UserError, match="the softmax has sinks"):
        kernels.choose("splash", call._replace(platform="tpu", sinks=True))
    for changes, named in [
        (
            dict(latent=dataclasses.replace(MODEL.latent, rank=8)),
            "attention_sinks=True does not work with model.latent",
        ),
        (dict(architecture="lstm"), "attention_sinks=True does not work with model.architecture='lstm'"),
        (dict(activation="gelu"), "swiglu_limit=0.02 needs"),
        (dict(gated=False), "swiglu_limit=0.02 needs"),
    ]:
        with pytest.raises(UserError, match=named):
            validate(dataclasses.replace(MODEL, **changes))


def test_sinks_are_split_with_their_heads():
    from jax.sharding import PartitionSpec as P

    assert parallel.partition_spec("decoder/block_0/attention/sinks", (4,)) == P("tensor")
    assert parallel.partition_spec("decoder/blocks/cross_attention/sinks", (2, 4)) == P(None, "tensor")
