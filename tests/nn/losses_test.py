"""Losses against the naive formula, PyTorch and brute force; and what must not leak or be whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanoflax import nn, parallel, train
from nanoflax.config import POSITIONS, ModelConfig
from nanoflax.data import Windows
from nanoflax.nn import build
from nanoflax.parallel import init
from tests.closeness import assert_trees_close
from tests.compiled import apply

B, T, D, V = 2, 6, 8, 11


def problem(seed=0, dtype=jnp.float32):
    """hidden, kernel, targets, weights: uneven weights, some of them 0."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 3, (B, T)).astype(np.float32)
    weights[0, 2:4] = 0
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), dtype),
        jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32),
        jnp.asarray(weights),
    )


def naive(hidden, kernel, targets, weights, z_loss=0.0, label_smoothing=0.0):
    """The definition: full logits, full probabilities, smoothed one-hot targets."""
    logits = (hidden @ kernel.astype(hidden.dtype)).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    hot = jax.nn.one_hot(targets, V)
    smooth = (1 - label_smoothing) * hot + label_smoothing / V
    z = jnp.log(jnp.exp(logits).sum(-1))
    total = -(smooth * log_p).sum(-1) + z_loss * z**2
    return (total * weights).sum(), -((hot * log_p).sum(-1) * weights).sum()


OPTIONS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2), (0.05, 0.1)]


@pytest.mark.parametrize("chunks", [1, 2, 3, 6])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunked_cross_entropy_is_the_naive_one(chunks, options):
    hidden, kernel, targets, weights = problem()

    @jax.jit
    def both(h, k):
        scaled = lambda f: lambda h, k: (lambda a, b: (3 * a, b))(*f(h, k))  # a cotangent of 3
        ours = lambda h, k: nn.chunked_cross_entropy(h, k, targets, weights, None, chunks, *options)
        plain = lambda h, k: naive(h, k, targets, weights, *options)
        return (ours(h, k), *(jax.value_and_grad(scaled(f), (0, 1), has_aux=True)(h, k) for f in (ours, plain)))

    value, (ours, dours), (plain, dplain) = both(hidden, kernel)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)
    np.testing.assert_allclose(value, (plain[0] / 3, plain[1]), rtol=1e-6)
    assert [g.dtype for g in dours] == [g.dtype for g in dplain]
    assert_trees_close(dours, dplain, 5e-6)


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_cross_entropy_of_each_row_is_its_part_of_the_sum(chunks):
    hidden, kernel, targets, weights = problem()
    loss = lambda h, k: nn.chunked_cross_entropy(h, k, targets, weights, None, chunks, 0.05, 0.1, 0.0, 0, True)
    rows = [naive(hidden[i : i + 1], kernel, targets[i : i + 1], weights[i : i + 1])[1] for i in (0, 1)]
    np.testing.assert_allclose(jax.jit(loss)(hidden, kernel)[2], rows, rtol=1e-6)
    found, grads = jax.jit(jax.value_and_grad(lambda h, k: (lambda a, *b: (a, b))(*loss(h, k)), (0, 1), has_aux=True))(
        hidden, kernel
    )
    np.testing.assert_allclose(found[1][1], rows, rtol=1e-6)
    plain = lambda h, k: nn.chunked_cross_entropy(h, k, targets, weights, None, chunks, 0.05, 0.1)[0]
    assert_trees_close(grads, jax.jit(jax.grad(plain, (0, 1)))(hidden, kernel), 1e-6)


def test_columns_that_a_gpu_needs_change_nothing(monkeypatch):
    """There the vocabulary is padded to a multiple of 128 inside the loss."""
    hidden, kernel, targets, weights = problem()
    bias = jnp.linspace(-1, 1, V)

    def numbers(name):
        monkeypatch.setattr(parallel, "current_platform", lambda: name)

        def loss(hidden, kernel, bias):
            options = dict(chunks=2, z_loss=0.05, label_smoothing=0.1, softcap=5.0)
            return nn.chunked_cross_entropy(hidden, kernel, targets, weights, bias, **options)

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        return step(hidden, kernel, bias), f"{D},128" in str(step.trace(hidden, kernel, bias).jaxpr)

    (plain, unpadded), (found, padded) = numbers("cpu"), numbers("gpu")
    assert padded and not unpadded
    assert_trees_close(found, plain, 1e-6)


@pytest.mark.parametrize("chunks", [1, 3])
def test_bfloat16_hidden_states_give_float32_sums_and_kernel_gradients(chunks):
    hidden, kernel, targets, weights = problem(dtype=jnp.bfloat16)
    gradient = jax.value_and_grad(
        lambda h, k: nn.chunked_cross_entropy(h, k, targets, weights, None, chunks)[0], (0, 1)
    )
    value, (dh, dk) = jax.jit(gradient)(hidden, kernel)
    exact, (eh, ek) = jax.value_and_grad(lambda h, k: naive(h, k, targets, weights)[0], (0, 1))(
        hidden.astype(jnp.float32), kernel.astype(jnp.bfloat16).astype(jnp.float32)
    )
    assert (value.dtype, dh.dtype, dk.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(value, exact, rtol=1e-4)  # products are summed in float32
    np.testing.assert_allclose(dh.astype(jnp.float32), eh, atol=0.05)
    np.testing.assert_allclose(dk, ek, atol=0.05)


def test_the_plain_cross_entropy_carries_no_gradient():
    hidden, kernel, targets, weights = problem()
    grads = jax.grad(lambda h, k: nn.chunked_cross_entropy(h, k, targets, weights)[1], (0, 1))(hidden, kernel)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_torch(smoothing):
    torch = pytest.importorskip("torch")
    hidden, kernel, targets, weights = problem()
    logits = torch.tensor(np.asarray(hidden @ kernel)).reshape(-1, V).requires_grad_()
    each = torch.nn.functional.cross_entropy(
        logits, torch.tensor(np.asarray(targets)).long().reshape(-1), reduction="none", label_smoothing=smoothing
    )
    (each * torch.tensor(np.asarray(weights)).reshape(-1)).sum().backward()
    objective, nll = nn.token_losses(hidden @ kernel, targets, 0.0, smoothing)
    np.testing.assert_allclose(objective.reshape(-1), each.detach(), rtol=1e-5)
    gradient = jax.grad(lambda x: (nn.token_losses(x, targets, 0.0, smoothing)[0] * weights).sum())(hidden @ kernel)
    np.testing.assert_allclose(gradient.reshape(-1, V), logits.grad, atol=1e-6)


def test_large_logits_stay_finite():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    for target, expected in ((0, 0), (1, 2e4)):
        objective, nll = nn.token_losses(logits, jnp.array([target]), 0.0, 0.1)
        assert nll[0] == pytest.approx(expected, abs=1e-3) and jnp.isfinite(objective[0])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 600), st.integers(1, 10**6))
def test_chunks_divide_the_window_and_are_neither_large_nor_thin(rows, length, vocab):
    n = nn.chunks_of(rows, length, vocab)
    assert length % n == 0 and (n == 1 or rows * length // n >= 512)
    if rows * length * vocab <= 2**22:
        assert n == 1


def test_chunks_of_common_shapes(monkeypatch):
    assert nn.chunks_of(16, 256, 256) == 1
    for rows, length in ((8, 1024), (64, 1024), (2, 2048)):  # GPT-2's vocabulary: thin pieces
        assert rows * length // nn.chunks_of(rows, length, 50257) == 512
    monkeypatch.setattr(parallel, "current_platform", lambda: "gpu")
    assert nn.chunks_of(16, 1024, 50257) == 4  # of 0.2 G logits


@pytest.mark.parametrize("whole", [False, True])
def test_logits_of_a_large_vocabulary_are_never_whole(whole):
    # Compiled, not run. The whole logits would be 8 x 1024 x 50257 floats, 1.5 GiB.
    config = ModelConfig(vocab_size=50257, context=1024, layers=1, dim=16, heads=2)
    model = build(config)
    params = jax.eval_shape(model.init, jax.random.PRNGKey(0), np.zeros((1, 1), np.int32))["params"]
    shape = lambda *s, dtype=jnp.int32: jax.ShapeDtypeStruct(s, dtype)
    batch = {"targets": shape(8, 1024), "first": shape(8), "weights": shape(8, 1024, dtype=jnp.float32)}
    step = jax.value_and_grad(lambda p, b: train.causal_lm(model, p, b, chunks=int(whole))[0])
    compiled = jax.jit(step).lower(params, batch).compile()
    logits = 8 * 1024 * 50257 * 4
    used = compiled.memory_analysis().temp_size_in_bytes
    text = compiled.as_text()
    held = any(f"f32[{s}]" in text for s in ("8,1024,50257", "8192,50257", "50257,8192"))
    if whole:  # one piece on purpose: what this test must be able to see
        assert used > logits and held
    else:
        assert used < logits / 4 and not held


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int32, (2, 7), elements=st.integers(0, 9)), hnp.arrays(np.int32, (2,), elements=st.integers(0, 9)))
def test_shift_right_puts_each_target_one_place_later(targets, first):
    expected = [[f, *row[:-1]] for f, row in zip(first, targets, strict=True)]
    np.testing.assert_array_equal(nn.shift_right(jnp.asarray(targets), jnp.asarray(first)), expected)
    np.testing.assert_array_equal(nn.shift_right(jnp.asarray(targets), 3)[:, 0], [3, 3])


def model_of(**fields):
    model = build(ModelConfig(**dict(vocab_size=13, context=16, layers=2, dim=16, heads=2) | fields))
    return model, jax.tree.map(lambda p: p * 5, init(model, jax.random.PRNGKey(0)))


def per_token(model, params, batch):
    """The loss of every target, [B, T], taken one weight at a time."""
    eye = jnp.eye(batch["targets"].size).reshape(-1, *batch["targets"].shape)
    one = lambda w: train.causal_lm(model, params, batch | {"weights": w})[0]
    return jax.vmap(one)(eye).reshape(batch["targets"].shape)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("isolated", [False, True])
def test_a_label_never_leaks_into_its_own_prediction(positions, isolated):
    # If the logits at t do not know target t, the probabilities of its possible values sum to 1.
    model, params = model_of(positions=positions)
    targets = np.random.default_rng(0).integers(0, 13, (1, 8)).astype(np.int32)
    batch = {"targets": targets, "first": jnp.array([1])}
    if isolated:
        batch["segments"] = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]])

    @jax.jit
    def probability_mass(params):
        def loss(t, value):
            changed = batch | {
                "targets": jnp.asarray(targets).at[0, t].set(value),
                "weights": jnp.zeros((1, 8)).at[0, t].set(1.0),
            }
            return train.causal_lm(model, params, changed)[1]

        of = jax.vmap(jax.vmap(loss, (None, 0)), (0, None))
        return jnp.exp(-of(jnp.arange(8), jnp.arange(13))).sum(1)

    np.testing.assert_allclose(probability_mass(params), 1, atol=1e-5)


class Store:
    """Documents of tokens as data.TokenStore holds them, each with its end 0."""

    meta = {"bos_id": 0}

    def __init__(self, *documents):
        ended = [np.array([*d, 0], np.int32) for d in documents]
        self.tokens, self.n_tokens = np.concatenate(ended), sum(map(len, ended))
        self.begins = np.cumsum([0, *map(len, ended)])

    def read_all(self, spans):
        return [self.tokens[start:stop] for start, stop in spans]

    def begin(self, documents):
        return self.begins[documents]

    def document(self, positions):
        return np.searchsorted(self.begins, positions, side="right") - 1


@pytest.mark.parametrize("positions", POSITIONS)
def test_isolated_losses_do_not_depend_on_the_neighbours_at_all(positions):
    # The second window begins inside the first document.
    model, params = model_of(positions=positions)
    losses_of = jax.jit(lambda batch: per_token(model, params, batch))

    def second_document(first_document):
        windows = Windows(Store(first_document, [5, 6, 7], [8, 9]), 8, isolated=True)
        batch = windows.batch([1])
        assert batch["targets"].tolist() == [[*first_document[8:], 0, 5, 6, 7, 0, 8, 9]]
        return np.asarray(losses_of(batch))[0, 2:]

    a = second_document([1, 2, 3, 4, 1, 2, 3, 4, 1])
    b = second_document([3, 3, 3, 3, 3, 3, 3, 11, 3])
    np.testing.assert_array_equal(a, b)


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.int32, (2, 7), elements=st.integers(1, 9)), hnp.arrays(np.int32, (2, 7), elements=st.integers(0, 1))
)
def test_with_segments_a_document_is_never_entered_from_the_one_before(targets, steps):
    # Brute force: within a document the token before; at the first place of the window `first`.
    segments = np.cumsum(steps, axis=1, dtype=np.int32)
    inputs = np.asarray(nn.shift_right(jnp.asarray(targets), 0, jnp.asarray(segments)))
    for b, t in np.ndindex(2, 7):
        inside = t > 0 and segments[b, t] == segments[b, t - 1]
        assert inputs[b, t] == (targets[b, t - 1] if inside else 0)


def test_objective_sums_skip_what_has_no_weight():
    model, params = model_of()
    targets = np.random.default_rng(0).integers(0, 13, (2, 8)).astype(np.int32)
    weights = np.float32([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8])
    batch = {"targets": targets, "first": np.zeros(2, np.int32), "weights": weights}
    causal = jax.jit(lambda batch: train.causal_lm(model, params, batch, z_loss=1e-3))
    objective, nll, weight, _ = causal(batch)
    assert weight == 11 and objective > nll
    other = np.where(weights > 0, targets, (targets + 1) % 13)
    np.testing.assert_array_equal(causal(batch | {"targets": other}), causal(batch))
    each = np.asarray(jax.jit(lambda b: per_token(model, params, b))(batch))
    assert nll == pytest.approx((each * weights).sum(), rel=1e-5)


def test_objective_options_are_passed_on():
    model, params = model_of()
    targets = np.random.default_rng(0).integers(0, 13, (2, 8)).astype(np.int32)
    batch = {"targets": targets, "first": np.zeros(2, np.int32), "weights": np.ones((2, 8), np.float32)}
    inputs = nn.shift_right(jnp.asarray(targets), 0)
    logits, _ = apply(model, params, inputs)
    expected, nll = nn.token_losses(logits, targets, 0.01, 0.1)
    found = jax.jit(lambda p: train.causal_lm(model, p, batch, chunks=4, z_loss=0.01, label_smoothing=0.1))(params)
    np.testing.assert_allclose(found[:2], (expected.sum(), nll.sum()), rtol=1e-5)
