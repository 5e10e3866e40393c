"""The columns that pad a vocabulary for a mesh: no loss, gradient, draw or score knows them. The oracle is torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import generate, nn, parallel, train
from nanoflax.config import ModelConfig
from tests.compiled import apply

B, T, D, REAL, PADDING = 2, 6, 8, 37, 11


@pytest.mark.parametrize("seed", range(8))
def test_loss_and_gradients_are_those_of_torch_over_the_real_vocabulary(seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    has_bias, smoothing, z_loss, softcap = (rng.random(4) < 0.5) * np.array([1, 0.1, 0.01, 3.0])
    chunks = int(rng.choice([1, 2, 3, 6]))
    hidden, kernel, bias = (
        rng.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (D, REAL + PADDING), (REAL + PADDING,))
    )
    kernel[:, REAL:] *= 9  # the padding would be likely
    targets, weights = rng.integers(0, REAL, (B, T)), rng.random((B, T)).astype(np.float32)

    def ours(hidden, kernel, bias):
        options = chunks, float(z_loss), float(smoothing), float(softcap), PADDING
        return nn.chunked_cross_entropy(hidden, kernel, targets, weights, bias if has_bias else None, *options)

    (objective, nll), gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(hidden, kernel, bias)

    x, w, b = (torch.tensor(a, requires_grad=True) for a in (hidden, kernel, bias))
    logits = x @ w[:, :REAL] + (b[:REAL] if has_bias else 0 * b[:REAL])
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits).reshape(-1, REAL)
    entropy = torch.nn.functional.cross_entropy
    of = lambda **options: entropy(logits, torch.tensor(targets).reshape(-1), reduction="none", **options)
    each = of(label_smoothing=float(smoothing)) + z_loss * torch.logsumexp(logits, -1) ** 2
    (each * torch.tensor(weights).reshape(-1)).sum().backward()
    expected = (each.detach().numpy() * weights.reshape(-1)).sum()
    assert objective == pytest.approx(expected, rel=1e-5)
    assert nll == pytest.approx((of().detach().numpy() * weights.reshape(-1)).sum(), rel=1e-5)
    for found, leaf in zip(gradients, (x, w, b), strict=True):
        np.testing.assert_allclose(found, leaf.grad, atol=2e-5)
    assert not np.any(gradients[1][:, REAL:]) and not np.any(gradients[2][REAL:])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder", "lstm"])
def test_draws_and_scores_are_those_of_the_model_without_padding(architecture, tied):
    plain = ModelConfig(vocab_size=REAL, context=16, dim=16, layers=1, heads=2, architecture=architecture, tied=tied)
    padded = dataclasses.replace(plain, vocab_size=REAL + PADDING, vocab_padding=PADDING)
    key = jax.random.PRNGKey(1)
    cut = parallel.init(nn.build(plain), key)
    params = parallel.init(nn.build(padded), key)
    # The numbers drawn at the start do not depend on the padding.
    jax.tree.map(np.testing.assert_array_equal, nn.without_padding(padded, params)[1], cut)
    filled = jax.tree.map(lambda x: x + 0.2, params)  # equal rows add a constant to each logit
    cut = jax.tree.map(lambda x: x + 0.2, cut)
    prompts = [[1, 2, 3], [4]]

    def outcomes(config, params):
        model = nn.build(config)
        drawn = generate.sample(model, params, prompts, max_new_tokens=6, temperature=3.0, rng=key)
        best = generate.beam_search(model, params, prompts, beams=3, max_new_tokens=4)
        return drawn, best, generate.log_likelihoods(model, params, prompts, [[5, 6], [7]])

    # top_k and top_p would hide a likely id of the padding: the draws come from the whole distribution.
    found, expected = outcomes(padded, filled), outcomes(plain, cut)
    assert max(max(new) for new in found[0]) < REAL and found[1] == expected[1]
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)


def test_masked_language_models_guess_no_padding():
    config = ModelConfig(
        vocab_size=REAL + PADDING, vocab_padding=PADDING, context=8, dim=16, layers=1, heads=2,
        architecture="encoder", head="mlm", head_bias=True,
    )  # fmt: skip
    model = nn.build(config)
    params = parallel.init(model, jax.random.PRNGKey(0))
    params["logit_bias"] = jnp.arange(REAL + PADDING, dtype=jnp.float32)  # the padding would be the most probable
    batch = {"tokens": np.ones((1, 8), np.int32), "padding_mask": np.ones((1, 8), bool)}
    batch |= {"targets": batch["tokens"], "weights": np.ones((1, 8), np.float32)}
    assert (np.asarray(train.guesses(model, params, batch)) == REAL - 1).all()
    logits = apply(model, params, batch["tokens"], batch["padding_mask"])
    assert (jax.nn.softmax(logits)[..., REAL:] == 0).all() and jnp.isfinite(logits[..., :REAL]).all()
