"""Speculative decoding gives the text of `sample`: token by token, or in distribution."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nanoflax
from nanoflax import generate, hf, tokenizers
from nanoflax.config import GenerationDefaults, ModelConfig, RopeConfig
from nanoflax.errors import UserError
from nanoflax.nn import build
from nanoflax.parallel import init
from nanoflax.speculation import Draft, Lookup, accept, speculate
from nanoflax.speculation.caches import Decoding
from tests.generate.beams_test import KINDS, TINY
from tests.generate.sampling_test import chance, make, ragged
from tests.nn.models_test import scaled
from tests.nn.recurrent_test import MODELS

# The rule of acceptance.

V, N = 7, 8_000


def draws_of_the_first_token(rule):
    """How often each token comes first in N texts, and the probabilities that the model gives them."""
    draw = np.random.default_rng(0)
    p, q = (jnp.asarray(draw.normal(size=shape) * 1.5, jnp.float32) for shape in ((3, V), (2, V)))

    def text(key):
        for_guesses, key = jax.random.split(key)
        guesses = jax.random.categorical(for_guesses, q).astype(jnp.int32)
        kept, token = rule(p, guesses, q, key)
        return jnp.where(kept > 0, guesses[0], token), jnp.where(kept > 1, guesses[1], token), kept

    first, second, kept = map(np.asarray, jax.jit(jax.vmap(text))(jax.random.split(jax.random.PRNGKey(1), N)))
    counts = np.bincount(first, minlength=V), np.bincount(second[kept > 0], minlength=V)
    return counts, np.asarray(jax.nn.softmax(p))


def always(p, guesses, q, rng):
    return jnp.int32(2), guesses[0]


def with_the_model_for_the_rest(p, guesses, q, rng):
    """As `accept`, but what replaces a guess is drawn from p."""
    kept, _ = accept(p, guesses, q, rng)
    return kept, jax.random.categorical(jax.random.split(rng)[1], p[kept])


def with_other_logits(p, guesses, q, rng):
    """The guesses were not drawn from these logits."""
    return accept(p, guesses, q / 2, rng)


def test_tokens_follow_the_model_whatever_was_guessed():
    (first, second), p = draws_of_the_first_token(accept)
    assert chance(first, p[0]) > 1e-3 and chance(second, p[1]) > 1e-3


@pytest.mark.parametrize("rule", [always, with_the_model_for_the_rest, with_other_logits])
def test_another_rule_is_noticed(rule):
    (first, _), p = draws_of_the_first_token(rule)
    assert chance(first, p[0]) < 1e-6


def test_certain_guesses_leave_the_distribution_too():
    p = jnp.asarray(np.random.default_rng(0).normal(size=(2, V)), jnp.float32)
    guess = jnp.array([3], jnp.int32)

    def first(key):
        kept, token = accept(p, guess, None, key)
        return jnp.where(kept > 0, guess[0], token)

    found = jax.vmap(first)(jax.random.split(jax.random.PRNGKey(0), N))
    assert chance(np.bincount(found, minlength=V), np.asarray(jax.nn.softmax(p[0]))) > 1e-3


@pytest.mark.parametrize("kind", ["lookup", "draft"])
def test_texts_follow_the_distribution_of_sample(kind):
    sizes = dict(vocab_size=5, layers=1, dim=8, heads=2, context=16)
    model, params = make(2.0, **sizes)
    draft = build(model.config), scaled(init(model, jax.random.PRNGKey(3)), 3)
    proposer = Draft(*draft, tokens=2) if kind == "draft" else Lookup(2, 1, 1)
    prompt, n = [3, 1, 3, 1], 300  # which a lookup continues by 3, 1
    options = dict(temperature=1.2, top_k=4, rng=jax.random.PRNGKey(2))
    found = speculate(model, params, [prompt] * n, proposer, 2, **options)
    expected = generate.sample(model, params, [prompt] * 40 * n, 2, **options)
    count = lambda rows: np.bincount([5 * a + b for a, b in rows], minlength=25)
    assert sum(row.kept for row in found) > n / 10
    of_sample = count(expected)
    assert chance(count([row.tokens for row in found])[of_sample > 0], of_sample[of_sample > 0]) > 1e-3


# The same tokens as `sample`.


class Informed(Lookup):
    """Guesses a known text, with a mistake in every third token."""

    def continuation(self, text, count):
        wrong = [t + (i % 3 == 2) for i, t in enumerate(self.known)][len(text) : len(text) + 3]
        return np.resize(np.int32(wrong), 3) if wrong else np.int32([])


CASES = {name: ModelConfig(**TINY | fields, architecture=name) for name, fields in KINDS.items()}
CASES["hybrid"] = dataclasses.replace(MODELS["hybrid"], layers=2, layer_types=("delta", "full"), tied=False)
CASES["delay"] = dataclasses.replace(CASES["decoder"], output_delay=2, tied=True)


@pytest.mark.parametrize("name", CASES)
def test_greedy_texts_are_those_of_sample(name):
    config = CASES[name]
    rules = GenerationDefaults(
        no_repeat_ngram_size=4, suppress_tokens=(5,), min_new_tokens=3, encoder_repetition_penalty=1.3,
        encoder_no_repeat_ngram_size=2, sequence_bias=(((4,), 0.5), ((3, 7), 2.0)),
        exponential_decay_length_penalty=(8, 1.02),
    )  # fmt: skip
    model = build(dataclasses.replace(config, generation=rules))
    params = scaled(init(model, jax.random.PRNGKey(0)), 0)
    prompt, options = ragged(5)[0], dict(temperature=0, repetition_penalty=1.1, eos_id=[11])
    (expected,) = generate.sample(model, params, [prompt], 14, **options)
    assert len(expected) > 7
    informed = Informed(3)
    object.__setattr__(informed, "known", [*prompt, *([config.start_id] if config.reads_source else []), *expected])
    proposers: list = [informed]
    if name == "hybrid":
        noise = jax.tree.map(lambda x, y: x + 0.2 * y, params, scaled(init(model, jax.random.PRNGKey(1)), 1))
        proposers.append(Draft(model, noise, 3))
    for proposer in proposers:
        (row,) = speculate(model, params, [prompt], proposer, 14, **options)
        assert row.tokens == expected and row.passes < len(expected) and 0 < row.kept < row.guessed, proposer


def test_a_text_that_repeats_its_prompt_needs_few_passes():
    model, params = make(layers=1)
    prompt = ragged(4)[0]
    (greedy,) = generate.sample(model, params, [prompt], 40, temperature=0)
    (row,) = speculate(model, params, [prompt], Lookup(), 40, temperature=0)
    assert row.tokens == greedy and row.passes < 40
    found = Lookup().continuation([1, 2, 3, 9, 8, 1, 2, 3], 6).tolist()
    assert found == [9, 8, 1, 2, 3, 9]
    assert Lookup().continuation([1, 2, 3], 4).tolist() == Lookup().continuation([1, 2, 1], 4).tolist() == []
    assert Lookup().continuation([5, 6, 6, 6], 4).tolist() == [6] * 4


def test_both_forms_of_the_model_share_their_matrices():
    model, params = make(layers=1, dim=8, heads=2, tied=True, dtype="bfloat16")
    decoding = Decoding.of(model, params)
    one, several = (jax.tree_util.tree_leaves_with_path(form[1]) for form in (decoding.one, decoding.several))
    kept = dict(several)
    assert all(kept[path].unsafe_buffer_pointer() == x.unsafe_buffer_pointer() for path, x in one)


def test_few_shapes_are_compiled(compilations):
    model, params = make(layers=1, dim=8, heads=2)
    run = lambda n: speculate(model, params, ragged(n), Lookup(3), 8, temperature=0.5, eos_id=1)
    run(3)
    with compilations() as names:
        for n in (2, 5, 12):
            run(n)
    assert not any("_check" in name or "_prefill" in name for name in names), names


def test_what_cannot_work_is_refused():
    model, params = make(layers=1, dim=8, heads=2)
    other = make(layers=1, dim=8, heads=2, vocab_size=30, context=8)
    source = build(CASES["lstm"])
    for proposer, options, words in [
        (Lookup(0), {}, "tokens=0 must be at least 1"),
        (
            Draft(*other),
            {},
            "a vocabulary of 30 tokens, the model of 29; .*; the draft's context of 8 is too short for 3",
        ),
        (Draft(source, {}), {}, "must both be decoders"),
        (Lookup(), dict(temperature=[0.5]), "one value of each setting"),
        (Lookup(), dict(rng=[0]), "one key for all prompts"),
        (Lookup(), dict(rng=jax.random.split(jax.random.PRNGKey(0), 1)), "one key for all prompts"),
        (Lookup(), dict(top_p=3.0), "top_p=3.0 must be in"),
    ]:
        with pytest.raises(UserError, match=words):
            speculate(model, params, ragged(3), proposer, 8, **options)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_room_for_guesses_does_not_change_the_angles(scaling):
    factors = dict(short_factors=(1.0,) * 2, long_factors=(3.0,) * 2) if scaling == "longrope" else {}
    rope = RopeConfig(scaling=scaling, context=16, factor=4.0, **factors)
    model, params = make(layers=1, dim=8, heads=2, context=64, positions="rotary", rope=rope)
    short, long = ragged(3)[0], [*range(20)]
    (expected,) = generate.sample(model, params, [short], 7, temperature=0)  # with 7 guesses it fills 16 places
    assert speculate(model, params, [short], Lookup(), 7, temperature=0)[0].tokens == expected
    for prompts in [short], [long, short]:
        with pytest.raises(UserError, match=f"may pass model.rope.context=16, where {scaling} has other angles"):
            speculate(model, params, prompts, Lookup(), 8, temperature=0)
    if scaling == "longrope":
        (expected,) = generate.sample(model, params, [long], 8, temperature=0)
        assert speculate(model, params, [long], Lookup(), 8, temperature=0)[0].tokens == expected


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a model, of a smaller one, and of one with another tokenizer."""
    folder, words = tmp_path_factory.mktemp("models"), ["a b c d e f g h in the function " * 20]
    bytes_of, pieces = tokenizers.ByteTokenizer(), tokenizers.train_sentencepiece(words, 280, "bpe")
    for name, layers, tokenizer in [("big", 2, bytes_of), ("small", 1, bytes_of), ("other", 1, pieces)]:
        model, params = make(2.0, layers=layers, vocab_size=tokenizer.vocab_size)
        hf.save(folder / name, model.config, params, tokenizer)
    return folder


def test_a_run_generates_the_same_text_with_guesses(models):
    run, options = nanoflax.open(models / "big"), dict(max_new_tokens=20, temperature=0)
    texts = ["abcabcabc", "xyz"]
    plain = run.generate(texts, **options)
    assert run.generate(texts, lookup=True, **options) == plain
    assert run.generate(texts, draft=str(models / "small"), **options) == plain
    stop = plain[0][len(texts[0]) + 4 :][:3]
    assert run.generate(texts, lookup=True, stop=[stop], **options) == run.generate(texts, stop=[stop], **options)


@pytest.mark.parametrize("settings, words", [
    (dict(draft="other"), "draft=.* has another tokenizer"),
    (dict(draft="missing"), "missing"),
    (dict(lookup=True, beams=2), "lookup=True: not read with beams=2"),
    (dict(lookup=True, draft="small"), "draft and lookup do not work together"),
    (dict(lookup=True, choices=["a"]), "lookup and choices do not work together"),
])  # fmt: skip
def test_bad_settings_of_guesses_are_refused(models, settings, words):
    if "draft" in settings:
        settings = settings | {"draft": str(models / settings["draft"])}
    with pytest.raises(UserError, match=words):
        nanoflax.open(models / "big").generate("ab", max_new_tokens=4, **settings)
