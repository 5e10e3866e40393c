"""Log-likelihoods of candidates: Transformers', every sequence there is, and few compilations."""

import itertools

import jax
import numpy as np
import pytest

from nanoflax import generate, hf
from nanoflax.config import ModelConfig, RopeConfig
from nanoflax.errors import UserError
from nanoflax.nn import build
from tests.compiled import apply
from tests.generate.beams_test import KINDS, make, ragged


def test_totals_equal_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.nn.models_test import randomize

    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    ).eval()
    randomize(theirs, 0, std=0.2)
    theirs.save_pretrained(tmp_path)
    from nanoflax.nn import build

    config, params = hf.load(str(tmp_path))
    prompts, new = ragged(3, 30, 1, 7, vocab=61), ragged(5, 2, 9, 34, vocab=61)
    expected = []
    for prompt, row in zip(prompts, new, strict=True):
        with torch.no_grad():
            logp = theirs(torch.tensor([prompt + row])).logits.log_softmax(-1)[0]
        expected.append(sum(logp[len(prompt) - 1 + i, t].item() for i, t in enumerate(row)))
    found = generate.log_likelihoods(build(config), params, prompts, new, batch_size=3)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("architecture", KINDS)
def test_every_sequence_of_two_has_its_share_of_all_probability(architecture):
    model, params = make(architecture)
    (prompt,) = ragged(5)
    every = [list(pair) for pair in itertools.product(range(29), repeat=2)]
    found = generate.log_likelihoods(model, params, [prompt] * len(every), every, batch_size=64)
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-4)
    assert np.ptp(found) > 1
    first = generate.log_likelihoods(model, params, [prompt] * 29, [[i] for i in range(29)])
    share = np.exp(found).reshape(29, 29).sum(1)
    np.testing.assert_allclose(share, np.exp(first), rtol=1e-3)


@pytest.mark.parametrize("architecture", KINDS)
def test_neither_neighbours_nor_padding_matter(architecture):
    model, params = make(architecture)
    prompts, new = ragged(3, 20, 1, 7, 16), ragged(5, 2, 9, 4, 1)
    together = generate.log_likelihoods(model, params, prompts, new)
    alone = [
        generate.log_likelihoods(model, params, [p], [n], batch_size=1)[0] for p, n in zip(prompts, new, strict=True)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_padding_does_not_change_rotary_angles(scaling):
    factors = dict(short_factors=(1.0,) * 4, long_factors=(2.0, 3.0, 4.0, 5.0)) if scaling == "longrope" else {}
    rope = RopeConfig(theta=100.0, scaling=scaling, factor=4.0, context=12, **factors)
    model, params = make("decoder", positions="rotary", rope=rope)
    prompts, new = ragged(3, 5, 7, 16), ragged(2, 6, 8, 4)  # texts of 4, 10, 14 and 19 tokens, and the last of each
    found = generate.log_likelihoods(model, params, prompts, new)
    for prompt, row, total in zip(prompts, new, found, strict=True):
        logp = jax.nn.log_softmax(apply(model, params, np.array([prompt + row[:-1]]))[0])[0]
        expected = sum(float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(row))
        assert total == pytest.approx(expected, rel=1e-5)


def test_one_compilation_for_a_bucket(compilations):
    model, params = make("decoder", seed=3)
    with compilations() as names:
        generate.log_likelihoods(
            model, params, ragged(*range(1, 15)), ragged(*[2] * 14), batch_size=7
        )  # no other test has 7
    assert sum("_scores" in name for name in names) == 1, names


def test_ranks_and_what_has_no_room():
    assert [generate.rank([-3.0, -1, -2, -1], i) for i in range(4)] == [4, 1, 3, 2]
    model, params = make("decoder")
    with pytest.raises(UserError, match="pair 1: 30 and 4 tokens.*pair 2 has an empty prompt or continuation"):
        generate.log_likelihoods(model, params, ragged(29, 30, 3), ragged(4, 4, 0))
    with pytest.raises(UserError, match="pair 0: 3 and 33 tokens"):
        generate.log_likelihoods(*make("lstm"), ragged(3), ragged(33))


def test_a_softcap_and_a_bias_count():
    model, params = make("decoder", head_bias=True, logit_softcap=2.0)
    prompt, new = ragged(4, 6)
    logits = apply(model, params, np.array([prompt + new]))[0][0]
    logp = jax.nn.log_softmax(logits)[len(prompt) - 1 : -1]
    (found,) = generate.log_likelihoods(model, params, [prompt], [new])
    assert found == pytest.approx(float(logp[np.arange(6), new].sum()), rel=1e-5)


def test_errors_call_pairs_by_their_names():
    model = build(ModelConfig(vocab_size=8, context=4))
    with pytest.raises(
        UserError, match="^q:3 candidate 1: 4 and 2 tokens.*4; q:4 has an empty prompt or continuation$"
    ):
        generate.log_likelihoods(
            model, {}, [[1], [1] * 4, [1]], [[2], [2, 3], []], names=["q:1", "q:3 candidate 1", "q:4"]
        )
