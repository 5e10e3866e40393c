"""The whole decoder: causality, caches, packed windows, and equality with Transformers."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import generate, hf, train
from nanoflax.config import POSITIONS, ModelConfig, RopeConfig
from nanoflax.errors import UserError
from nanoflax.nn import alignment, build, head_kernel
from nanoflax.parallel import init
from nanoflax.planning import flops_per_token
from tests.compiled import apply, prefill

GPT2 = dict(vocab_size=61, context=64, layers=2, dim=32, heads=4)
LLAMA = dict(
    vocab_size=67,
    context=64,
    layers=2,
    dim=32,
    heads=4,
    kv_heads=2,
    norm="rmsnorm",
    activation="silu",
    gated=True,
    positions="rotary",
    bias=False,
    tied=False,
)


def make(seed=0, **fields):
    """A model, and parameters large enough that every part of it shows in the logits."""
    model = build(ModelConfig(**fields))
    return model, scaled(init(model, jax.random.PRNGKey(seed)), seed)


def scaled(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(5 * p if p.ndim > 1 else p + 0.2 * rng.normal(size=p.shape), jnp.float32),
        jax.device_get(params),
    )


@partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, segments=None):
    return model.apply({"params": params}, tokens, segments)[0]


def tokens_of(seed, *shape, vocab=61):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_causality_by_gradient(positions, kv_heads):
    # Each token reads a row of the table of its own, so a row's gradient is that token's.
    T, t = 8, 4
    model, params = make(**GPT2 | dict(positions=positions, kv_heads=kv_heads, tied=False))

    def logits(table):
        return model.apply({"params": params | {"embed": {"embedding": table}}}, jnp.arange(T)[None])[0][0, t]

    jacobian = jax.jit(jax.jacrev(logits))(params["embed"]["embedding"])  # [V, V, D]
    reach = np.abs(jacobian).max((0, 2))
    assert (reach[: t + 1] > 1e-6).all()
    assert (reach[t + 1 :] == 0).all()


@pytest.mark.parametrize("fields", [*(GPT2 | {"positions": p} for p in POSITIONS), LLAMA], ids=[*POSITIONS, "llama"])
def test_cached_decoding_equals_the_full_pass(fields):
    # Rows of 12, 9 and 5 tokens, padded on the left: prefill seven slots, then one by one.
    model, params = make(**fields)
    tokens, lengths, P = tokens_of(1, 3, 12), [12, 9, 5], 12
    cache = model.empty_cache(3, 16, start=P - jnp.array(lengths))
    decode = jax.jit(model.decode)
    parts = []
    for piece in (tokens[:, :7], *(tokens[:, i : i + 1] for i in range(7, P))):
        logits, cache = decode(params, piece, cache)
        parts.append(logits)
    found = np.concatenate(parts, axis=1)
    assert int(cache["index"]) == P
    for row, length in enumerate(lengths):
        whole = logits_of(model, params, tokens[row : row + 1, P - length :])
        np.testing.assert_allclose(found[row, P - length :], whole[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_an_isolated_document_does_not_see_its_neighbour(positions):
    model, params = make(**GPT2 | {"positions": positions})
    segments = np.array([[1] * 5 + [2] * 7], np.int32)
    apply = lambda tokens: np.asarray(logits_of(model, params, tokens, segments))
    first, second, other = tokens_of(0, 1, 5), tokens_of(1, 1, 7), tokens_of(2, 1, 7)
    join = lambda a, b: np.concatenate([a, b], axis=1)
    both = apply(join(first, second))
    # Not at all, to the last bit: neither backwards nor forwards in the window.
    np.testing.assert_array_equal(both[:, :5], apply(join(first, other))[:, :5])
    np.testing.assert_array_equal(both[:, 5:], apply(join(other[:, :5], second))[:, 5:])
    assert not np.array_equal(both[:, 5:], apply(join(first, other))[:, 5:])
    # And it has the logits of a window of its own.
    for tokens, logits in ((first, both[:, :5]), (second, both[:, 5:])):
        np.testing.assert_allclose(logits, logits_of(model, params, tokens), atol=1e-5)


def test_joined_documents_do_see_each_other():
    model, params = make(**GPT2)
    tokens = tokens_of(0, 1, 12)
    changed = np.where(np.arange(12) == 0, (tokens + 1) % 61, tokens)
    a, b = (logits_of(model, params, x)[0, -1] for x in (tokens, changed))
    assert np.abs(a - b).max() > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_hidden_are_the_two_halves(tied):
    model, params = make(**GPT2 | {"tied": tied})
    tokens = tokens_of(0, 2, 5)
    hidden, _ = apply(model, params, tokens, method="hidden")
    logits, cache = apply(model, params, tokens)
    assert cache is None and logits.dtype == jnp.float32
    np.testing.assert_allclose(hidden @ head_kernel(model.config, params), logits, atol=1e-5)


def test_bfloat16_computes_close_to_float32_and_gives_float32_logits():
    model, params = make(**LLAMA)
    half = build(ModelConfig(**LLAMA, dtype="bfloat16"))
    tokens = tokens_of(0, 2, 9)
    whole, found = (logits_of(m, params, tokens) for m in (model, half))
    assert found.dtype == jnp.float32
    hidden = jax.eval_shape(lambda: half.apply({"params": params}, tokens, method="hidden")[0])
    assert hidden.dtype == jnp.bfloat16
    assert half.empty_cache(1, 4)["layers"][0]["key"].dtype == jnp.bfloat16
    assert 1e-4 < np.abs(found - whole).mean() < 0.05 * np.abs(whole).mean()


def test_dropout_is_off_by_default_and_follows_its_key():
    model, params = make(**GPT2 | {"dropout": 0.3})
    plain, _ = make(**GPT2)
    tokens = tokens_of(0, 2, 5)

    @jax.jit
    def dropped(key):
        return model.apply({"params": params}, tokens, deterministic=False, rngs={"dropout": jax.random.PRNGKey(key)})[
            0
        ]

    np.testing.assert_array_equal(logits_of(model, params, tokens), logits_of(plain, params, tokens))
    np.testing.assert_array_equal(dropped(1), dropped(1))
    assert np.abs(dropped(1) - dropped(2)).max() > 0.01


def test_initial_loss_is_that_of_a_uniform_guess():
    model = build(ModelConfig(**GPT2))
    params = init(model, jax.random.PRNGKey(0))
    logits = logits_of(model, params, tokens_of(0, 4, 16))
    loss = -jax.nn.log_softmax(logits)[..., 0].mean()
    assert loss == pytest.approx(np.log(61), abs=0.05)


def test_residual_projections_start_smaller():
    model = build(ModelConfig(**GPT2 | {"layers": 8, "dim": 64}))
    block = jax.device_get(init(model, jax.random.PRNGKey(0)))["decoder"]["block_0"]
    assert block["mlp"]["up"]["kernel"].std() == pytest.approx(0.02, rel=0.05)
    assert block["mlp"]["down"]["kernel"].std() == pytest.approx(0.02 / 4, rel=0.05)
    assert block["attention"]["out"]["kernel"].std() == pytest.approx(0.02 / 4, rel=0.05)


def test_flops_are_six_per_matrix_weight_and_attention():
    for fields in (GPT2, LLAMA):
        model, params = make(**fields)
        c = model.config
        weights = sum(p.size for path, p in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel")
        weights += c.dim * c.vocab_size if c.tied else 0  # the embedding is the head too
        assert flops_per_token(c, 10) == 6 * weights + 12 * c.layers * c.dim * 10
        sliding = dataclasses.replace(c, layers=2, window=4, layer_types=("sliding", "full"))
        full = dataclasses.replace(c, layers=2)
        assert flops_per_token(full, 10) - flops_per_token(sliding, 10) == 12 * c.dim * (10 - 4)
        assert flops_per_token(full, 3) == flops_per_token(sliding, 3)


# A bottleneck: one vector is all that a decoder sees of its source.

SOURCES = [
    dict(vocab_size=61, context=32, layers=2, dim=32, heads=4, architecture="encoder_decoder", positions="rotary"),
    dict(vocab_size=61, context=32, layers=2, dim=16, heads=1, architecture="lstm"),
    dict(
        vocab_size=61,
        context=32,
        layers=2,
        dim=16,
        heads=1,
        architecture="lstm",
        lstm_start="zeros",
        lstm_attention="multiplicative",
    ),
]
pairs = pytest.mark.parametrize("fields", SOURCES, ids=["transformer", "lstm", "lstm-zeros"])
kinds = pytest.mark.parametrize("kind", ["mean", "first"])


def left_padded(lengths, width):
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    return np.where(mask, tokens_of(1, len(lengths), width), 7).astype(np.int32), mask


@pairs
@pytest.mark.parametrize("kind", ["none", "mean", "first"])
def test_the_decoder_sees_the_vector_alone(fields, kind):
    model, params = make(**fields, bottleneck=kind)
    targets, (source, mask) = tokens_of(2, 2, 5), left_padded([6, 4], 6)
    E, rng = fields["dim"] * (2 if fields["architecture"] == "lstm" else 1), np.random.default_rng(0)
    states = rng.normal(size=(2, 6, E)).astype(np.float32)

    @jax.jit
    def logits(states, ends):
        """With these encoder states in place of the encoder's, and `ends` as its last h and c."""

        def given(method, args, kwargs, context):
            found = {"encode": states, "_encode": (states, [ends] * 2)}
            name = context.method_name
            return found[name] if name in found else method(*args, **kwargs)

        with nn.intercept_methods(given):
            return model.apply({"params": params}, targets, source, mask)[0]

    ends, others = rng.normal(size=(2, 2, 2 * E)).astype(np.float32)
    noise = rng.normal(size=states.shape).astype(np.float32)
    if kind == "first":
        noise[np.arange(2), [0, 2]] = 0
    else:
        noise -= (noise * mask[..., None]).sum(1, keepdims=True) / mask.sum(1)[:, None, None]
        noise = np.where(mask[..., None], noise, 9)
    found, same = logits(states, ends), logits(states + noise, others)
    if kind == "none":
        assert np.abs(found - same).max() > 0.01
    else:
        np.testing.assert_allclose(same, found, atol=1e-5)
        noise[:, -1] += 1
        noise[np.arange(2), [0, 2]] += 1
        assert (np.abs(logits(states + noise, ends) - found).max((1, 2)) > 0.01).all()


@pairs
@kinds
def test_caches_and_searches_see_the_vector_too(fields, kind):
    model, params = make(**fields, bottleneck=kind)
    targets, (source, mask) = tokens_of(2, 3, 6), left_padded([9, 4, 1], 9)
    whole, _ = apply(model, params, targets, source, mask)
    _, cache = prefill(model, params, source, np.array([9, 4, 1]), 6)
    decode, parts = jax.jit(model.decode), []
    for piece in (targets[:, :2], *(targets[:, i : i + 1] for i in range(2, 6))):
        logits, cache = decode(params, piece, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5, rtol=1e-5)
    prompts = [row[m].tolist() for row, m in zip(source, mask, strict=True)]
    greedy = generate.sample(model, params, prompts, 6, temperature=0)
    assert generate.beam_search(model, params, prompts, 1, 6) == greedy
    assert all(len(row) == 6 for row in generate.beam_search(model, params, prompts, 3, 6))


@pairs
def test_the_vector_is_of_the_real_tokens(fields):
    found = {}
    for kind in ("none", "mean", "first"):
        model, params = make(**fields, bottleneck=kind)
        vector = partial(apply, model, params, method="vector")
        alone, long = tokens_of(1, 1, 4), tokens_of(2, 1, 7)
        padding = np.full((1, 3), 5, np.int32)
        for row in ([alone, padding], [padding, alone]):
            both = np.concatenate([np.concatenate(row, 1), long])
            mask = np.stack([np.concatenate([np.full(x.shape[1], x is alone) for x in row]), np.ones(7, bool)])
            if kind != "none":
                found[kind] = vector(both, mask)
                np.testing.assert_allclose(found[kind], np.concatenate([vector(alone), vector(long)]), atol=1e-5)
        if kind == "none":
            states = apply(model, params, long, method="encode")[0]
            expected = {"mean": states.mean(0), "first": states[0]}
            expected_params = params
        elif "lstm" != fields["architecture"] or fields.get("lstm_start") == "zeros":
            for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_allclose(found[kind][1], expected[kind], atol=1e-5)


def test_a_bottleneck_is_of_models_with_sources_and_not_of_transformers(tmp_path):
    with pytest.raises(UserError, match="model.bottleneck='mean' is for"):
        build(ModelConfig(**GPT2, bottleneck="mean"))
    model, params = make(
        **SOURCES[0]
        | dict(
            positions="relative",
            norm="rmsnorm",
            bias=False,
            activation="relu",
            attention_scale=1.0,
            norm_eps=1e-6,
            bottleneck="mean",
        )
    )
    with pytest.raises(UserError, match="nearest is t5, except model.bottleneck='mean'"):
        hf.save(tmp_path, model.config, params)


# Against Transformers: the loss and every gradient (tests/hf_test.py has all the families).


def randomize(theirs, seed, std=0.1):
    """Weights of every kind far from their initial values, so that none can be mixed up."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.round() + std * torch.randn_like(p))  # norms about 1, the rest about 0


def transformers_gpt2(**changes):
    """Transformers' GPT-2 of our fields."""
    transformers = pytest.importorskip("transformers")
    c = ModelConfig(**GPT2 | changes)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.context,
            n_embd=c.dim,
            n_layer=c.layers,
            n_head=c.heads,
            n_inner=c.F,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            layer_norm_epsilon=c.norm_eps,
            tie_word_embeddings=c.tied,
            attn_implementation="eager",
            activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[c.activation],
        )
    )


def transformers_llama(**changes):
    transformers = pytest.importorskip("transformers")
    c = ModelConfig(**LLAMA | changes)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            max_position_embeddings=c.context,
            hidden_size=c.dim,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.G,
            head_dim=c.K,
            intermediate_size=c.F,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
            tie_word_embeddings=c.tied,
            attn_implementation="eager",
        )
    )


@pytest.mark.parametrize(
    "family, changes",
    [
        (transformers_gpt2, {}),
        (transformers_gpt2, dict(tied=False, activation="gelu", mlp_dim=40, norm_eps=1e-3)),
        (transformers_gpt2, dict(dim=48, heads=2, layers=3)),
        (transformers_llama, {}),
        (transformers_llama, dict(kv_heads=1, tied=True, rope=RopeConfig(theta=500.0))),
        (transformers_llama, dict(kv_heads=None, head_dim=12, mlp_dim=56, norm_eps=1e-3)),
    ],
    ids=["gpt2", "gpt2-untied-exact", "gpt2-3x48", "llama-grouped", "llama-multiquery-tied", "llama-head-dim"],
)
def test_logits_loss_and_gradients_equal_transformers(family, changes, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = family(**changes)
    randomize(theirs, 0)
    theirs.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    model = build(config)

    ids = np.random.default_rng(1).integers(0, config.vocab_size, (3, 20)).astype(np.int32)
    output = theirs(torch.tensor(ids).long(), labels=torch.tensor(ids).long())
    output.loss.backward()
    logits = logits_of(model, params, ids)
    np.testing.assert_allclose(logits, output.logits.detach(), atol=1e-4, rtol=1e-4)

    batch = {"targets": ids[:, 1:], "first": ids[:, 0], "weights": np.ones((3, 19), np.float32)}

    def loss(params):
        objective, _, weight, _ = train.causal_lm(model, params, batch)
        return objective / weight

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert value == pytest.approx(output.loss.item(), rel=1e-5)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad)
    theirs.save_pretrained(tmp_path)
    _, expected = hf.load(tmp_path)
    # A key's bias has no gradient in theory, so the floor is a share of the largest one.
    floor = 1e-3 * max(np.linalg.norm(want) for want in jax.tree.leaves(expected))
    for (path, ours), want in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(ours - want) / max(np.linalg.norm(want), floor)
        assert error < 1e-4, jax.tree_util.keystr(path)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_alignment_is_a_layers_mean_cross_attention(family, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.generate.beams_test import theirs_of

    theirs = theirs_of(family, 3).eval()
    randomize(theirs, 3, std=0.2)
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    config, params = hf.load(str(tmp_path))
    source, targets = tokens_of(0, 9), tokens_of(1, 6)
    inputs = np.concatenate([[config.start_id], targets[:-1]])
    with torch.no_grad():
        layers = theirs(
            input_ids=torch.tensor(source)[None].long(),
            output_attentions=True,
            decoder_input_ids=torch.tensor(inputs)[None].long(),
        ).cross_attentions
    means = [layer[0].mean(0).numpy() for layer in layers]
    expected = min(means, key=lambda w: -(w * np.log(w)).sum())
    found = alignment(build(config), params, source.tolist(), targets.tolist())
    np.testing.assert_allclose(found, expected, atol=1e-5)
