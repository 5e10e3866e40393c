"""Beam search: Transformers' hypotheses and scores, and brute force over every sequence."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import generate, hf
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.nn import LanguageModel, build, shift_right
from nanoflax.parallel import init
from nanoflax.tokenizers import cut
from tests.nn.models_test import randomize, scaled

TINY = dict(vocab_size=29, context=32, layers=1, dim=16, heads=2, tied=False, start_id=2)
KINDS = {"decoder": {}, "encoder_decoder": dict(positions="relative"), "lstm": {}}


def make(architecture, seed=0, **fields):
    model = build(ModelConfig(**TINY | KINDS[architecture] | fields, architecture=architecture))
    return model, scaled(init(model, jax.random.PRNGKey(seed)), seed)


def ragged(*lengths, vocab=29):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


# Transformers.


def theirs_of(family, seed):
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(seed)  # T5 starts from large weights
    common = dict(vocab_size=61, dropout=0.0)
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        )
    if family == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                **common,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                tie_word_embeddings=False,
            )
        )
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            **common,
            max_position_embeddings=64,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        )
    )


# With these seeds hypotheses meet these ends at many places, and every option matters.
@pytest.mark.parametrize("family, seed, eos", [("gpt2", 0, 56), ("t5", 5, 59), ("bart", 1, 8)])
def test_hypotheses_and_scores_equal_transformers(family, seed, eos, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = theirs_of(family, seed).eval()
    randomize(theirs, seed, std=0.2)
    theirs.generation_config.forced_eos_token_id = None  # so that hypotheses end in many ways
    theirs.save_pretrained(tmp_path)
    config, params = hf.load(str(tmp_path))
    model, N = build(config), 20
    prompts = ragged(5, 2, 9, vocab=61)

    def expected(prompt, penalty, early_stopping):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            max_new_tokens=N,
            length_penalty=penalty,
            eos_token_id=eos,
            early_stopping=early_stopping,
            pad_token_id=eos,
            forced_eos_token_id=None,
            forced_bos_token_id=None,
            no_repeat_ngram_size=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        start = len(prompt) if family == "gpt2" else 1
        return ([cut(row[start:].tolist(), [eos]) for row in out.sequences], out.sequences_scores.numpy())

    lengths, seen = set(), set()
    for early_stopping, penalty in itertools.product((True, False, "never"), (0.6, 1.0, 2.0)):
        found = generate.beam_search(model, params, prompts, 4, N, penalty, eos, early_stopping, n_best=4)
        for prompt, pairs in zip(prompts, found, strict=True):
            tokens, scores = expected(prompt, penalty, early_stopping)
            message = f"{early_stopping} {penalty} {prompt}"
            assert [p[0] for p in pairs] == tokens, message
            np.testing.assert_allclose([p[1] for p in pairs], scores, rtol=1e-4, err_msg=message)
            lengths |= set(map(len, tokens))
        seen.add(json.dumps([[row for row, _ in pairs] for pairs in found]))
    assert len(lengths) >= 5 and len(seen) >= 4


# Brute force.


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("eos", [1, None])
def test_a_beam_as_wide_as_the_space_finds_every_sequence_in_order(architecture, eos):
    V, N, W = 3, 4, 81  # ids 3 .. 28 are never chosen
    model, params = make(architecture)
    prompts = ragged(4, 2)

    # Every sequence of N tokens, each shortened to its first end of sequence.
    every = np.array(list(itertools.product(range(V), repeat=N)), np.int32)
    expected = []
    for prompt in prompts:
        if architecture == "decoder":
            inputs = np.concatenate([np.tile(prompt, (len(every), 1)), every], 1)[:, :-1]
            logits = jax.jit(model.apply)({"params": params}, inputs)[0][:, len(prompt) - 1 :]
        else:
            source = np.tile(np.int32(prompt), (len(every), 1))
            logits = jax.jit(model.apply)({"params": params}, shift_right(every, 2), source)[0]
        logp = np.asarray(jax.nn.log_softmax(logits[..., :V]))
        logp = np.take_along_axis(logp, every[..., None], -1)[..., 0]
        sums = {}
        for row, each in zip(every.tolist(), logp, strict=True):
            n = row.index(eos) + 1 if eos in row else N
            sums[tuple(row[:n])] = (each[:n].sum(), n)
        expected.append(sums)
    assert len(expected[0]) == (31 if eos else 81)
    for penalty in (0.6, 1.0, 2.0, 0.0, -1.0):
        found = generate.beam_search(model, params, prompts, W, N, penalty, eos, n_best=W, vocab_size=V)
        for sums, pairs in zip(expected, found, strict=True):
            scores = {row: total / n**penalty for row, (total, n) in sums.items()}
            want = sorted(scores, key=lambda row: -scores[row])
            np.testing.assert_allclose([p[1] for p in pairs], [scores[row] for row in want], rtol=1e-4, atol=1e-5)
            assert {tuple(p[0]) for p in pairs} == {row[:-1] if row[-1] == eos else row for row in want}
            assert tuple(pairs[0][0]) == (want[0][:-1] if want[0][-1] == eos else want[0])


# What beam search and the sampler agree on.


@pytest.mark.parametrize("architecture", KINDS)
def test_one_beam_is_greedy(architecture):
    model, params = make(architecture)
    prompts = ragged(3, 7, 1)
    greedy = generate.sample(model, params, prompts, 12, temperature=0)
    assert generate.beam_search(model, params, prompts, 1, 12) == greedy
    assert len({tuple(row) for row in greedy}) > 1
    eos = greedy[0][4]
    ended = generate.beam_search(model, params, prompts, 1, 12, eos_id=eos, early_stopping=True)
    assert ended == [cut(row, [eos]) for row in greedy]
    assert len(ended[0]) < 12


@pytest.mark.parametrize(
    "architecture, early_stopping", [("decoder", False), ("decoder", True), ("encoder_decoder", True), ("lstm", False)]
)
def test_a_ragged_batch_equals_prompts_one_by_one(architecture, early_stopping):
    # Also: a search that has closed does not change while its neighbours go on.
    model, params = make(architecture)
    prompts = ragged(3, 11, 1, 6)
    free = generate.beam_search(model, params, prompts, 3, 14)
    met = [token for row in free for token in row[1:9]]
    options = dict(beams=3, max_new_tokens=14, eos_id=max(met, key=met.count), n_best=3, early_stopping=early_stopping)
    together = generate.beam_search(model, params, prompts, **options)
    for prompt, pairs in zip(prompts, together, strict=True):
        (alone,) = generate.beam_search(model, params, [prompt], **options)
        assert [tokens for tokens, _ in pairs] == [tokens for tokens, _ in alone]
        np.testing.assert_allclose([s for _, s in pairs], [s for _, s in alone], rtol=1e-4)
        scores = [s for _, s in pairs]
        assert scores == sorted(scores, reverse=True)
    assert len({len(tokens) for pairs in together for tokens, _ in pairs}) > 1


def test_the_best_is_the_first_of_the_n_best():
    model, params = make("decoder")
    prompts = ragged(3, 7)
    best = generate.beam_search(model, params, prompts, 4, 6)
    pairs = generate.beam_search(model, params, prompts, 4, 6, n_best=2)
    assert [len(p) for p in pairs] == [2, 2] and best == [p[0][0] for p in pairs]
    assert all(isinstance(score, float) for p in pairs for _, score in p)


STEPS = []  # one entry for each step of a Constant


class Constant(LanguageModel):
    """The decode interface and nothing else: the same logits at every step, and each one noted."""

    logits: tuple = ()

    def prefill(self, params, tokens, lengths, new_tokens):
        return tokens[:, -1], {"index": jnp.int32(0), "rows": tokens}

    def decode(self, params, tokens, cache):
        jax.debug.callback(lambda: STEPS.append(1))
        return jnp.tile(jnp.float32(self.logits), (len(tokens), 1, 1)), cache


@pytest.mark.parametrize("early_stopping, steps", [(True, 2), (False, 2), ("never", 9)])
def test_the_loop_ends_when_every_search_is_closed(early_stopping, steps):
    # The end is likely: one hypothesis at the first step, two more at the second. A penalty so
    # strong that a sequence of nine could still be the best keeps "never" going.
    STEPS.clear()
    model = Constant(ModelConfig(vocab_size=4, tied=False, dtype="float32"), logits=(0, 5, 0, 0))
    found = generate.beam_search(
        model, {}, [[2], [3, 2]], 2, 9, 3.0 if steps == 9 else 1.0, eos_id=1, early_stopping=early_stopping
    )
    jax.effects_barrier()
    assert len(STEPS) == steps
    if steps == 2:
        assert found == [[], []]


def test_one_compilation_for_a_bucket_whatever_the_penalty(compilations):
    model, params = make("decoder", dim=8)
    with compilations() as names:
        for n, penalty in ((3, 0.6), (9, 1.0), (16, 2.0), (17, 1.0)):
            generate.beam_search(model, params, ragged(n), 2, 3, penalty)
    assert sum("_search" in name for name in names) == 2  # 16 and 32


def test_bad_requests_are_refused_all_at_once():
    model = build(ModelConfig(**TINY))
    search = lambda **k: generate.beam_search(model, {}, [[1]], **k)  # no parameters: none are read
    with pytest.raises(UserError) as caught:
        search(beams=0, length_penalty=float("nan"), early_stopping="always", n_best=5, vocab_size=0)
    for words in (
        "beams=0 must be at least 1",
        "length_penalty=nan must be finite",
        "early_stopping='always' must be True, False or 'never'",
        "n_best=5 must be from 1 to beams=0",
        "vocab_size=0 must be at least 1",
    ):
        assert words in str(caught.value)
    with pytest.raises(UserError, match="n_best=5 must be from 1 to beams=4"):
        search(n_best=5)
    with pytest.raises(UserError, match="max_new_tokens=0 must be at least 1"):
        search(max_new_tokens=0)
