"""Completions: their log-probabilities are those of the trainer, also after filters, and the ends are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import alignment, nn, parallel
from nanoflax.config import GenerationDefaults, ModelConfig
from nanoflax.tokenizers import pad_left
from tests.compiled import apply
from tests.generate.sampling_test import make, transformers_filtered

FILTERS = {
    "plain": dict(temperature=1.0),
    "temperature": dict(temperature=0.6),
    "top_p": dict(temperature=1.3, top_p=0.8),
    "top_k": dict(temperature=0.9, top_k=5),
    "min_p": dict(temperature=1.0, min_p=0.1),
    "all": dict(temperature=1.2, top_k=20, top_p=0.9, min_p=0.02),
}
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
log_probabilities = jax.jit(alignment.log_probabilities, static_argnums=0, static_argnames="entropy")


def drawn(model, params, seed=0, new=12, eos=(1,), **filters):
    tokens, lengths = pad_left(PROMPTS)
    rng = jax.random.PRNGKey(seed)
    found = alignment.sample_completions(
        model, params, tokens, lengths, rng, max_new_tokens=new, eos_ids=eos, chunk=5, **filters
    )
    return found, alignment.training_rows(tokens, lengths, found)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("fields", [dict(tied=True, positions="rotary"), dict(kv_heads=2, window=6)], ids=str)
def test_sampler_and_trainer_agree(name, fields):
    model, params = make(sharpness=2.0, **fields)
    found, batch = drawn(model, params, **FILTERS[name])
    got = log_probabilities(model, params, batch, temperature=FILTERS[name]["temperature"])
    used = batch["weights"] > 0
    np.testing.assert_allclose(np.asarray(got)[used], batch["old"][used], atol=1e-5)
    assert ("support" in batch) == (len(FILTERS[name]) > 1)
    assert used.sum() == found.mask.sum() > 20


@pytest.mark.parametrize("name", FILTERS)
def test_log_probabilities_are_those_of_transformers_filters(name):
    model, params = make(sharpness=2.0)
    found, _ = drawn(model, params, new=4, eos=(), **FILTERS[name])
    for prompt, new, logp in zip(PROMPTS, found.tokens.tolist(), found.log_probabilities, strict=True):
        logits = apply(model, params, jnp.array([prompt + new]))[0][0, len(prompt) - 1 : -1]
        kept = np.asarray(transformers_filtered(logits, np.zeros((4, 1), int), **FILTERS[name]), np.float64)
        expected = kept - np.log(np.exp(kept).sum(-1, keepdims=True))
        np.testing.assert_allclose(logp, expected[np.arange(4), new], atol=1e-5)


def test_gradients_are_those_of_the_filtered_distribution():
    # sum over the support of p * d log p = 0, so the mean gradient over all tokens weighted by p vanishes.
    model, params = make(vocab_size=16, sharpness=1.0)
    _, batch = drawn(model, params, new=1, eos=(), temperature=0.8, top_k=6)
    rows = 16
    one = {name: np.repeat(x[:1], rows, 0) for name, x in batch.items()}
    at = int(one["weights"][0].argmax())
    one["targets"] = one["targets"].copy()
    one["targets"][:, at] = np.arange(rows)

    def expectation(params, p):
        logp = log_probabilities(model, params, one, temperature=0.8)[:, at]
        return jnp.sum(jnp.where(p > 0, p * logp, 0)), logp

    _, logp = expectation(params, jnp.ones(rows))
    p = np.exp(logp)
    assert (p > 0).sum() == 6
    np.testing.assert_allclose(p.sum(), 1, atol=1e-5)
    inside = {name: x[p > 0] for name, x in one.items()}

    def inner(params):
        logp = log_probabilities(model, params, inside, temperature=0.8)[:, at]
        return jnp.sum(p[p > 0] * logp)

    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(jax.jit(jax.grad(inner))(params)))
    assert size < 1e-5


def test_a_rounding_at_the_border_excludes_no_drawn_token():
    # Two ids with equal logits at the border of top-p: the trainer's logits differ in their last bit.
    model, params = make(vocab_size=16, sharpness=0.0)  # all logits are equal
    found, batch = drawn(model, params, eos=(), temperature=1.0, top_p=0.5)
    params = jax.tree.map(lambda x: x * (1 + 1e-6), params)
    got = np.asarray(log_probabilities(model, params, batch))
    np.testing.assert_allclose(got[batch["weights"] > 0], -np.log(8), atol=1e-5)
    assert np.isfinite(got).all() and found.mask.all()


def test_a_completion_has_its_end_and_nothing_after_it():
    model, params = make(sharpness=1.0)
    found, batch = drawn(model, params, new=30, eos=(1, 2), temperature=1.0)
    for row, (tokens, mask, logp, ended) in enumerate(
        zip(found.tokens, found.mask, found.log_probabilities, found.ended, strict=True)
    ):
        n = int(mask.sum())
        assert mask[:n].all()
        assert not np.isin(tokens[: n - 1], (1, 2)).any()
        assert ended == (tokens[n - 1] in (1, 2))
        assert ended or n == 30
        assert not tokens[n:].any() and not logp[n:].any()
        ids = [int(batch["first"][row]), *batch["targets"][row].tolist()]
        k = len(PROMPTS[row])
        assert ids[: k + n] == [*PROMPTS[row], *tokens[:n].tolist()]
        assert batch["weights"][row].tolist() == [0] * (k - 1) + [1] * n + [0] * (len(ids) - k - n)
    assert found.ended.any()


def test_early_stop_and_chunks_change_nothing():
    model, params = make(sharpness=1.0)
    tokens, lengths = pad_left(PROMPTS)
    results = [
        alignment.sample_completions(
            model, params, tokens, lengths, jax.random.PRNGKey(3), max_new_tokens=20, eos_ids=(1, 2, 3, 4), chunk=chunk
        )
        for chunk in (3, 20)
    ]
    assert results[0].tokens.tolist() == results[1].tokens.tolist()
    np.testing.assert_allclose(results[0].log_probabilities, results[1].log_probabilities, atol=1e-6)


def test_rules_of_generation_and_ids_above_the_vocabulary():
    rules = GenerationDefaults(repetition_penalty=5.0, suppress_tokens=(3,), min_new_tokens=10)
    config = dict(vocab_size=24, context=64, layers=1, dim=16, heads=2)
    plain, ruled = (nn.build(ModelConfig(**config, **extra)) for extra in ({}, {"generation": rules}))
    _, params = make(sharpness=1.0, **config)
    params = parallel.init(plain, jax.random.PRNGKey(0))
    a, _ = drawn(plain, params, vocab_size=20)
    b, batch = drawn(ruled, params, vocab_size=20)
    assert a.tokens.tolist() == b.tokens.tolist() and a.tokens.max() < 20
    got = log_probabilities(plain, params, batch)
    np.testing.assert_allclose(np.asarray(got)[batch["weights"] > 0], batch["old"][batch["weights"] > 0], atol=1e-5)


def test_entropy_is_that_of_scipy():
    from scipy import stats

    model, params = make(sharpness=2.0)
    _, batch = drawn(model, params, temperature=0.7, top_k=7)
    _, entropy = log_probabilities(model, params, batch, temperature=0.7, entropy=True)
    inputs = np.concatenate([batch["first"][:, None], batch["targets"][:, :-1]], 1)
    logits = np.asarray(apply(model, params, inputs)[0], np.float64) / 0.7
    keep = np.unpackbits(batch["support"], axis=-1, count=logits.shape[-1]) > 0
    p = np.where(keep, np.exp(logits), 0)
    np.testing.assert_allclose(entropy, stats.entropy(p, axis=-1), atol=1e-5)
