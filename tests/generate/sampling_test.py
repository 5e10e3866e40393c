"""Sampling: Transformers' filters and greedy text, the right distribution, few compilations."""

import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from nanoflax import generate, parallel
from nanoflax.config import GenerationDefaults, ModelConfig, RopeConfig
from nanoflax.errors import UserError
from nanoflax.generate import processors, sample, sampling, stream
from nanoflax.nn import build
from nanoflax.tokenizers import Scored, bucket, check_prompts, pad_left
from tests.compiled import apply

choose, run_rules = jax.jit(sampling.choose), jax.jit(processors.process, static_argnums=(1, 2))


def make(sharpness=4.0, **fields):
    """A model whose greedy text wanders: large random weights and a head that is not tied."""
    model = build(ModelConfig(**dict(vocab_size=29, context=64, layers=2, dim=32, heads=4, tied=False) | fields))
    rng = np.random.default_rng(1)

    def fill(path, x):
        kind = path[-1].key
        std = {"embedding": 1, "kernel": 1.5 / x.shape[0] ** 0.5}.get(kind, 0.1)
        std = sharpness / x.shape[0] ** 0.5 if path[0].key == "unembed" else std
        return jnp.asarray((kind == "scale") + std * rng.normal(size=x.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(fill, parallel.param_shapes(model))


def ragged(*lengths, vocab=29):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


# Filters.


def transformers_filtered(logits, seen, temperature=None, top_k=None, top_p=None, min_p=None, repetition_penalty=None):
    """Transformers' processors in the order of its `generate`."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    processors = [
        cls(value)
        for cls, value in [
            (hf.RepetitionPenaltyLogitsProcessor, repetition_penalty),
            (hf.TemperatureLogitsWarper, temperature),
            (hf.TopKLogitsWarper, top_k),
            (hf.TopPLogitsWarper, top_p),
            (hf.MinPLogitsWarper, min_p),
        ]
        if value is not None
    ]
    scores = torch.tensor(np.asarray(logits))
    for processor in processors:
        scores = processor(torch.tensor(seen), scores)
    return scores.numpy()


COMBINATIONS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product((1.0, 0.6), (None, 1, 5, 99), (None, 0.3, 0.9), (None, 0.2), (None, 1.7))
]


def test_filters_equal_transformers_in_every_combination():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(16, 40)).astype(np.float32) * 3
    seen_ids = rng.integers(0, 40, (16, 6))
    key, run_filters = jax.random.PRNGKey(3), jax.jit(sampling.filtered)
    for options in COMBINATIONS:
        expected = transformers_filtered(logits, seen_ids, **options)
        filters = sampling.make_filters(**options)
        if filters.repetition_penalty is None:
            found = np.asarray(run_filters(logits, filters))
            np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected), str(options))
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        # The same key draws the same tokens from Transformers' scores.
        penalised = after_rules(logits, seen_ids, filters)
        np.testing.assert_array_equal(
            choose(penalised, key, filters), jax.random.categorical(key, expected), str(options)
        )


def after_rules(logits, seen_ids, filters):
    history = jnp.pad(jnp.asarray(seen_ids, jnp.int32), [(0, 0), (0, 1)], constant_values=-1)
    written = sampling.Written(history, jnp.int32(history.shape[1] - 1), jnp.int32(0), jnp.int32(1))
    return run_rules(logits, GenerationDefaults(), (), filters, written)


def test_rows_with_values_of_their_own_are_drawn_as_if_alone():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(len(COMBINATIONS) + 1, 40)) * 3, jnp.float32)
    options = [dict(temperature=0), *({k: v for k, v in o.items() if k != "repetition_penalty"} for o in COMBINATIONS)]
    off = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    names = {name: [(off | o)[name] for o in options] for name in off}
    keys = jax.random.split(jax.random.PRNGKey(5), len(options))
    found = choose(logits, keys, sampling.make_filters(**names))
    alone = [choose(logits[i : i + 1], keys[i], sampling.make_filters(**o)).item() for i, o in enumerate(options)]
    assert found.tolist() == alone
    with pytest.raises(UserError, match="top_k has 2 values; min_p has 1 values; give one for a row"):
        sampling.make_filters(top_k=[1, 2], min_p=[0.1])
    with pytest.raises(UserError, match="top_p=3.0 must be in"):
        sampling.make_filters(top_p=[1.0, 3.0])


def packed(permitted):
    """Booleans [B, V] as the bits of Filters.allowed."""
    bits = np.packbits(np.pad(permitted, [(0, 0), (0, -permitted.shape[1] % 32)]), axis=1, bitorder="little")
    return jnp.asarray(bits.view("<u4"))


def test_bias_and_allowed_tokens_give_the_renormalised_model():
    draw, V = np.random.default_rng(0), 75
    logits, bias = draw.normal(size=(4, V)).astype(np.float32), draw.normal(size=(4, V)).astype(np.float32)
    permitted = draw.random((4, V)) < 0.3
    permitted[0] = np.arange(V) == 70  # in the last word
    rules = GenerationDefaults(suppress_tokens=(3, 70))
    history = jnp.full((4, 2), -1)
    written = processors.Written(history, jnp.int32(1), jnp.int32(0), jnp.int32(1))
    filters = sampling.make_filters(0.7)._replace(logit_bias=jnp.asarray(bias), allowed=packed(permitted))
    found = processors.next_logits(jnp.asarray(logits), rules, (), filters, written)
    weights = np.exp(logits + bias) * permitted
    weights[1:, [3, 70]] = 0  # but the first row has no other token
    np.testing.assert_allclose(jax.nn.softmax(found), weights / weights.sum(1, keepdims=True), rtol=1e-5)
    assert sampling.choose(found, jax.random.PRNGKey(0), filters)[0] == 70
    # The bias of a model of Transformers: before the repetition penalty.
    hf, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    scores, seen = torch.tensor(logits), torch.tensor([[5, 6]] * 4)
    scores = hf.SequenceBiasLogitsProcessor({(i,): float(b) for i, b in enumerate(bias[0])})(seen, scores)
    scores = hf.RepetitionPenaltyLogitsProcessor(1.5)(seen, scores)
    filters = sampling.make_filters(repetition_penalty=1.5)._replace(logit_bias=jnp.asarray(bias[0]))
    written = written._replace(history=jnp.asarray(seen.numpy(), jnp.int32))
    found = processors.next_logits(jnp.asarray(logits), GenerationDefaults(), (), filters, written)
    np.testing.assert_allclose(found, scores, rtol=1e-6)


def test_repetition_penalty_moves_only_what_was_seen_towards_less():
    logits = jnp.array([[2.0, -1.0, 1.5, -0.6]])
    filters = sampling.make_filters(temperature=0, repetition_penalty=2.0)
    assert sampling.choose(after_rules(logits, [[0, 1]], filters), jax.random.PRNGKey(0), filters).tolist() == [2]
    all_negative = jnp.array([[-1.0, -1.4, -1.9, -3.0]])
    assert sampling.choose(after_rules(all_negative, [[0, 1]], filters), jax.random.PRNGKey(0), filters).tolist() == [2]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(temperature=-0.1), "temperature=-0.1 must be at least 0"),
        (dict(temperature=float("nan")), "temperature=nan must be at least 0"),
        (dict(top_k=-1), "top_k=-1 must be at least 0"),
        (dict(top_p=0.0), "top_p=0.0 must be in (0, 1]"),
        (dict(top_p=1.5), "top_p=1.5 must be in (0, 1]"),
        (dict(min_p=-0.1), "min_p=-0.1 must be in [0, 1]"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0 must be positive"),
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1, 29]]), "prompt 0 has token id 29, outside the model's vocabulary of 29"),
        (dict(prompts=[[1, -2]]), "prompt 0 has token id -2"),
        (dict(max_new_tokens=[2, 3]), "max_new_tokens: 2 values for 1 prompts; give one for each"),
        (dict(max_new_tokens=[0]), "max_new_tokens=[0] must be at least 1"),
        (dict(temperature=[1.0, 2.0]), "filters: 2 values for 1 prompts"),
        (dict(rng=[1, 2, 3]), "rng: 3 values for 1 prompts; give one for each"),
        (dict(logit_bias={29: 1.0}), "logit_bias has id 29, which must be an integer from 0 to 28"),
        (dict(logit_bias=[{1: float("nan")}]), "logit_bias[1]=nan must be a finite number"),
        (dict(logit_bias=[{}, {}]), "logit_bias: 2 values for 1 prompts"),
        (dict(log_probabilities=30), "log_probabilities=30 must be an integer from 0 to 29"),
        (dict(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (
            dict(prompts=[[1] * 60], max_new_tokens=5),
            "prompt 0 has 60 tokens; with max_new_tokens=5 this exceeds the model's context of 64",
        ),
    ],
    ids=str,
)
def test_bad_requests_are_refused_before_anything_runs(options, words):
    model = build(ModelConfig(vocab_size=29, context=64, layers=1, dim=8, heads=2))
    options = {"prompts": [[1]], "max_new_tokens": 2} | options
    for call in (sample, lambda *a, **k: list(stream(*a, **k))):
        with pytest.raises(UserError) as caught:
            call(model, {}, **options)  # no parameters: none are read
        assert words in str(caught.value)


def test_numbers_that_are_no_integers_are_refused():
    unchecked = inspect.unwrap(sampling.make_filters)  # the annotations are only checked in tests
    with pytest.raises(UserError, match="top_k=2.5 must be an integer"):
        unchecked(top_k=2.5)
    with pytest.raises(UserError, match="max_new_tokens=2.0 must be at least 1, and an integer"):
        check_prompts(ModelConfig(), [[1]], 2.0)


# Generation.


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_ragged_batch_equals_prompts_one_by_one(positions):
    model, params = make(positions=positions, kv_heads=2)
    prompts = ragged(3, 17, 1, 9)
    together = generate.sample(model, params, prompts, 20, temperature=0)
    assert together == [generate.sample(model, params, [p], 20, temperature=0)[0] for p in prompts]
    assert len({tuple(row) for row in together}) == 4


def test_greedy_takes_the_largest_logit_of_the_full_pass():
    model, params = make()
    prompts = ragged(2, 7)
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens)[0])
    for prompt, new in zip(prompts, generate.sample(model, params, prompts, 12, temperature=0), strict=True):
        whole = prompt + new
        padded = np.zeros((1, 24), np.int32)  # causal: what follows changes nothing
        padded[0, : len(whole)] = whole
        logits = forward(padded)[0]
        for t in range(len(prompt), len(whole)):
            assert whole[t] == logits[t - 1].argmax()


def test_a_prompt_may_fill_the_context_to_its_last_token():
    model, params = make()
    prompt = ragged(60)
    new = generate.sample(model, params, prompt, 4, temperature=0)
    chunks = list(generate.stream(model, params, prompt, 4, temperature=0, chunk=3))
    assert [len(chunk[0]) for chunk in chunks] == [3, 1]
    assert [chunks[0][0] + chunks[1][0]] == new


def test_greedy_equals_transformers_generate(tmp_path):
    torch = pytest.importorskip("torch")
    from nanoflax import hf
    from tests.nn.models_test import randomize, transformers_gpt2

    theirs = transformers_gpt2(context=96, tied=False)
    randomize(theirs, 3)
    theirs.save_pretrained(tmp_path)
    config, params = hf.load(tmp_path)
    theirs.eval()
    theirs.generation_config.eos_token_id = None
    prompts = ragged(5, 1, 21, 12, vocab=config.vocab_size)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())
    found = generate.sample(build(config), params, prompts, 48, temperature=0)
    assert found == expected
    assert all(len(set(row)) > 5 for row in found)  # not a model that repeats one token


def chance(counts, probabilities):
    """The chi-square probability of counts so far from the expected ones."""
    p = np.float64(probabilities)
    return stats.chisquare(counts, counts.sum() * p / p.sum()).pvalue


def test_draws_follow_the_softmax_and_steps_are_independent():
    model, params = make(1.0, vocab_size=7, layers=1)
    n, prompt = 4096, [3, 1]
    rows = np.array(generate.sample(model, params, [prompt] * n, 2, temperature=1.5, rng=jax.random.PRNGKey(5)))
    forward = jax.jit(lambda t: jax.nn.softmax(model.apply({"params": params}, t)[0][:, -1] / 1.5))
    first = np.asarray(forward(np.array([prompt])))[0]
    assert chance(np.bincount(rows[:, 0], minlength=7), first) > 1e-3
    # The second token, given each first one.
    second = np.asarray(forward(np.array([[*prompt, t] for t in range(7)])))
    for t in range(7):
        counts = np.bincount(rows[rows[:, 0] == t, 1], minlength=7)
        assert counts.sum() > 50 and chance(counts, second[t]) > 1e-4


def test_the_key_decides_the_draw():
    model, params = make(1.0)
    draw = lambda seed: generate.sample(model, params, ragged(4), 20, rng=jax.random.PRNGKey(seed))
    assert draw(1) == draw(1) != draw(2)


def greedy_with_an_end(model, params, prompts):
    """Greedy tokens, and an end of sequence that one row meets and another meets later or never."""
    rows = generate.sample(model, params, prompts, 24, temperature=0)
    for eos in sorted(set(rows[0][1:20])):
        if rows[0].index(eos) > 0 and eos not in rows[1][:20]:
            return rows, eos
    raise AssertionError("this seed has no such token")


def test_finished_rows_are_cut_and_frozen_and_do_not_disturb_others():
    model, params = make()
    prompts = ragged(4, 6)
    rows, eos = greedy_with_an_end(model, params, prompts)
    cut = generate.sample(model, params, prompts, 24, temperature=0, eos_id=eos)
    assert cut == generate.sample(model, params, prompts, 24, temperature=0, eos_id=np.array([eos]))
    assert cut == [row[: row.index(eos)] if eos in row else row for row in rows]
    assert len(cut[0]) < len(cut[1])
    # Before cutting: the end, and nothing but the end after it.
    tokens, lengths = pad_left(prompts)
    raw = sampling.compiled(sampling._sample)(
        model, params, tokens, lengths, jax.random.PRNGKey(0), 24, sampling.make_filters(0), 0, 24, (eos,), None, None
    )
    assert (np.asarray(raw)[0, len(cut[0]) :] == eos).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0),
        dict(temperature=0.9, top_k=9, top_p=0.9, min_p=0.01),
        dict(temperature=0.8, repetition_penalty=1.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_end", [False, True])
def test_stream_equals_sample(options, with_end):
    model, params = make()
    prompts = ragged(3, 11)
    end = greedy_with_an_end(model, params, prompts)[1] if with_end else None
    options = options | dict(max_new_tokens=21, rng=jax.random.PRNGKey(4), eos_id=end)
    chunks = list(generate.stream(model, params, prompts, chunk=4, **options))
    assert all(len(row) <= 4 for chunk in chunks for row in chunk)
    joined = [sum(rows, []) for rows in zip(*chunks, strict=True)]
    assert joined == generate.sample(model, params, prompts, **options)


@pytest.mark.parametrize("scaling, new", [("dynamic", 21), ("longrope", 9)])
def test_the_last_chunk_of_a_stream_does_not_turn_its_angles(scaling, new):
    factors = dict(short_factors=(1.0,) * 4, long_factors=(2.0, 3.0, 4.0, 5.0)) if scaling == "longrope" else {}
    model, params = make(positions="rotary", rope=RopeConfig(scaling=scaling, factor=4.0, context=20, **factors))
    options = dict(max_new_tokens=new, temperature=0, log_probabilities=1)
    chunks = generate.stream(model, params, ragged(3, 11), chunk=8, **options)
    streamed = [np.concatenate([s.log_probabilities for s in rows]) for rows in zip(*chunks, strict=True)]
    for found, whole in zip(streamed, generate.sample(model, params, ragged(3, 11), **options), strict=True):
        np.testing.assert_allclose(found, whole.log_probabilities, atol=1e-4)


LONGROPE = dict(
    positions="rotary",
    rope=RopeConfig(
        scaling="longrope", factor=4.0, context=12, short_factors=(1.0,) * 4, long_factors=(2.0, 3.0, 4.0, 5.0)
    ),
)


def test_rules_count_the_tokens_before_the_angles_of_a_long_text():
    model, params = make(**LONGROPE)
    (prompt,) = ragged(8)
    plain = generate.sample(model, params, [prompt], 10, temperature=0)[0]
    # The text is read again after 5 tokens. The sixth is not suppressed there, and it may end after 7.
    rules = dict(begin_suppress_tokens=(plain[5],), min_new_tokens=7, eos_token_id=(plain[9],))
    assert plain[5] not in plain[:1] and plain[9] not in plain[:9]
    ruled = build(dataclasses.replace(model.config, generation=GenerationDefaults(**rules)))
    found, text = generate.sample(ruled, params, [prompt], 10, temperature=0)[0], [*prompt]
    for i in range(10):
        logits = np.array(apply(model, params, np.array([text]))[0][0, -1])
        logits[[*rules["begin_suppress_tokens"]] if i == 0 else []] = -np.inf
        logits[[*rules["eos_token_id"]] if i < 7 else []] = -np.inf
        text.append(int(logits.argmax()))
        if text[-1] in rules["eos_token_id"]:
            text.pop()
            break
    assert found == text[8:] == plain[:9]


def test_a_long_target_is_no_part_of_its_source():
    (model, params), (source,) = make(architecture="encoder_decoder", **LONGROPE), ragged(8)
    found = generate.sample(model, params, [source], 10, temperature=0, log_probabilities=1)[0]
    inputs = np.array([[0, *found.tokens[:-1]]])  # short texts, as the source
    logp = jax.nn.log_softmax(apply(model, params, inputs, source=np.array([source]))[0])[0]
    np.testing.assert_allclose(found.log_probabilities, logp[np.arange(10), np.array(found.tokens)], atol=1e-4)


def test_stream_stops_when_every_row_has_ended():
    model, params = make()
    prompts = ragged(4, 6)[:1]
    end = generate.sample(model, params, prompts, 1, temperature=0)[0][0]
    assert list(generate.stream(model, params, prompts, 40, temperature=0, eos_id=end, chunk=4)) == [[[]]]


FOR_ROWS = dict(
    max_new_tokens=[5, 12, 9],
    temperature=[0.0, 1.3, None],
    top_k=[0, 9, None],
    top_p=[None, 0.9, 0.8],
    repetition_penalty=[1.5, None, 1.0],
    rng=[3, 5, 2**31],
    logit_bias=[{}, {3: 5.0, 4: -100.0}, None],
)


def test_rows_of_a_batch_equal_prompts_with_their_settings_alone():
    model, params = make(2.0)
    prompts = ragged(3, 11, 6)
    options = FOR_ROWS | dict(eos_id=7, log_probabilities=2)
    together = generate.sample(model, params, prompts, **options)
    for i, prompt in enumerate(prompts):
        own = {name: values[i] for name, values in FOR_ROWS.items()}
        own |= dict(rng=jax.random.PRNGKey(own["rng"]), temperature=1.0 if i == 2 else own["temperature"])
        (alone,) = generate.sample(model, params, [prompt], **own, eos_id=7, log_probabilities=2)
        assert together[i].tokens == alone.tokens
        np.testing.assert_allclose(together[i].log_probabilities, alone.log_probabilities, atol=1e-5)
        assert list(map(list, together[i].alternatives)) == list(map(list, alone.alternatives))
    assert len(together[0].tokens) == 5 and [len(row.tokens) for row in together] != [5, 5, 5]
    assert 4 not in together[1].tokens
    pieces = list(generate.stream(model, params, prompts, chunk=4, **options))
    joined = [Scored(*(sum(x, []) for x in zip(*rows, strict=True))) for rows in zip(*pieces, strict=True)]
    assert joined == together


def test_a_limit_of_a_row_decides_where_its_last_token_is_forced():
    model, params = make()
    rules = GenerationDefaults(forced_eos_token_id=(5,))
    model = model.clone(config=dataclasses.replace(model.config, generation=rules))
    prompts = ragged(3, 3, 8)
    rows = generate.sample(model, params, prompts, [2, 6, 3], temperature=0)
    assert [row[-1] for row in rows] == [5, 5, 5] and list(map(len, rows)) == [2, 6, 3]
    pieces = generate.stream(model, params, prompts, [2, 6, 3], temperature=0, chunk=4)
    assert rows == [sum(row, []) for row in zip(*pieces, strict=True)]


def test_other_values_for_each_row_need_no_compilation(compilations):
    model, params = make(layers=1, dim=8, heads=2)
    run = lambda *limits, **options: generate.sample(model, params, ragged(3, 4), [*limits], **options)
    run(4, 2, rng=[1, 2], temperature=[1.0, 0.5], logit_bias=[{}, {3: 1.0}])
    with compilations() as names:
        run(1, 4, rng=[5, 6], temperature=[0.0, 0.3], top_k=[3, 0], top_p=0.5, logit_bias=[{1: 9.0}, {}])
        run(3, 4, rng=[5, 6], min_p=[0.0, 0.3], repetition_penalty=2.0, logit_bias=[{1: 9.0}, {}])
    assert not any("_sample" in name for name in names), names


def test_log_probabilities_are_those_of_given_texts():
    model, params = make(2.0)
    prompts = ragged(3, 11, 6)
    options = dict(temperature=2.0, top_k=5, rng=jax.random.PRNGKey(1), logit_bias={3: 2.0})
    drawn = generate.sample(model, params, prompts, 12, log_probabilities=4, **options)
    assert [row.tokens for row in drawn] == generate.sample(model, params, prompts, 12, **options)
    given = generate.score(model, params, prompts, [row.tokens for row in drawn], alternatives=4)
    for ours, theirs, prompt in zip(drawn, given, prompts, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-5)
        full = jax.nn.log_softmax(apply(model, params, np.array([prompt + ours.tokens]))[0])[0]
        for t, (a, b, row) in enumerate(
            zip(ours.alternatives, theirs.alternatives, full[len(prompt) - 1 : -1], strict=True)
        ):
            assert list(a) == list(b) == np.argsort(-row)[:4].tolist(), t
            np.testing.assert_allclose(list(a.values()), list(b.values()), atol=1e-5)
            np.testing.assert_allclose(list(a.values()), np.sort(row)[::-1][:4], atol=1e-5)
    none = generate.sample(model, params, prompts, 3, log_probabilities=0)[0]
    assert none.alternatives == [{}, {}, {}] and len(none.log_probabilities) == 3


def test_ids_of_a_padded_vocabulary_are_never_drawn():
    model, params = make()
    rows = generate.sample(model, params, ragged(3, 3, 3, 3), 40, temperature=5.0, vocab_size=20)
    assert max(map(max, rows)) < 20
    assert max(map(max, generate.sample(model, params, ragged(3, 3, 3, 3), 40, temperature=5.0))) >= 20


def test_repetition_penalty_counts_the_prompt_and_what_was_drawn():
    # So strong that no token comes twice, whatever the padding of the prompt holds.
    model, params = make()
    prompts = ragged(5, 9)
    for prompt, row in zip(
        prompts, generate.sample(model, params, prompts, 15, temperature=0, repetition_penalty=1e6), strict=True
    ):
        assert len(set(row)) == len(row) and not set(row) & set(prompt)
    # Padding (id 0) is not part of a prompt: a penalty of its own making would forbid it.
    tokens, lengths = pad_left([[5, 6]])
    start = jax.jit(sampling.start, static_argnums=(0, 4))
    written = start(model, params, tokens, lengths, 20, jax.random.PRNGKey(0), 20).written
    assert written.history.tolist() == [[-1] * 14 + [5, 6] + [-1] * 20]
    penalised = processors.process(
        jnp.ones((1, 29)), GenerationDefaults(), (), sampling.make_filters(repetition_penalty=2.0), written
    )
    assert np.flatnonzero(penalised[0] < 1).tolist() == [5, 6]


@pytest.mark.parametrize("n, expected", [(1, 16), (15, 16), (16, 16), (17, 32), (32, 32), (33, 64), (1000, 1024)])
def test_buckets_are_powers_of_two(n, expected):
    assert bucket(n) == expected


def test_twenty_prompt_lengths_compile_once_per_bucket(compilations):
    model, params = make(layers=1, dim=8, heads=2)
    lengths = range(2, 42, 2)
    parallel.compiled.cache_clear()  # a function that lived while jax.clear_caches() ran counts wrongly
    before = sampling.compiled(sampling._sample)._cache_size()
    with compilations() as names:
        for n in lengths:
            generate.sample(model, params, ragged(n), 4, temperature=0.5 + n / 100, top_k=n, rng=jax.random.PRNGKey(n))
    buckets = {bucket(n) for n in lengths}
    assert len(lengths) == 20 and len(buckets) == 3
    assert sampling.compiled(sampling._sample)._cache_size() - before == 3
    assert sum("_sample" in name for name in names) == 3
