"""generation_config.json: the rules on tokens are those of Transformers' `generate`, one by one and together."""

import dataclasses
import json
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflax import generate, hf
from nanoflax.config import GenerationDefaults, ModelConfig, from_dict
from nanoflax.errors import UserError
from nanoflax.generate.processors import NO_EFFECT, Written, filtered, make_filters, process
from nanoflax.nn import build
from nanoflax.parallel import init
from nanoflax.runs.generation import GenerationSettings
from nanoflax.tokenizers import ByteTokenizer, cut, prompt_ids, specs
from nanoflax.tokenizers.huggingface import from_files
from tests.generate.beams_test import theirs_of
from tests.nn.models_test import randomize

V = 61
run_rules, run_filters = jax.jit(process, static_argnums=(1, 2)), jax.jit(filtered)


def drawn_rules(rng, length):
    """Random settings of generation_config.json. length: of the prompts."""
    token = lambda: rng.randrange(2, V)
    choices = {
        "eos_token_id": lambda: rng.choice([7, [7, 9], [7, 9, 30, 31]]),
        "bad_words_ids": lambda: [[token() for _ in range(rng.choice([1, 1, 2, 3]))] for _ in range(25)] + [[7]],
        "suppress_tokens": lambda: [token() for _ in range(20)],
        "begin_suppress_tokens": lambda: [token() for _ in range(20)],
        "forced_bos_token_id": token,
        "forced_eos_token_id": lambda: rng.choice([7, [7, 9]]),
        "min_length": lambda: rng.choice([3, length + 3, length + 7]),
        "min_new_tokens": lambda: rng.choice([1, 4]),
        "no_repeat_ngram_size": lambda: rng.choice([1, 2, 3]),
        "repetition_penalty": lambda: rng.choice([0.7, 1.3, 5.0]),
        "sequence_bias": lambda: [
            [[token() for _ in range(rng.choice([1, 1, 2, 3]))], rng.choice([-30.0, 0.5, 4.0])] for _ in range(25)
        ],
        "encoder_repetition_penalty": lambda: rng.choice([0.7, 1.3, 5.0]),
        "encoder_no_repeat_ngram_size": lambda: rng.choice([1, 2, 3]),
        "exponential_decay_length_penalty": lambda: (rng.choice([0, 2]), rng.choice([0.5, 1.7])),
        "remove_invalid_values": lambda: True,
    }
    kept = rng.sample(sorted(choices), rng.randrange(1, len(choices) + 1))
    found = {"eos_token_id": 7} | {name: choices[name]() for name in kept}
    forced = {found.get("forced_bos_token_id"), *np.atleast_1d(found.get("forced_eos_token_id", -1)).tolist()}
    for name in {"suppress_tokens", "begin_suppress_tokens"} & found.keys():  # Transformers refuses both for one token
        found[name] = [i for i in found[name] if i not in forced]
    return found


@pytest.mark.parametrize("source", [False, True])
def test_rules_equal_transformers_processors(source):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = theirs_of("bart" if source else "gpt2", 0)
    moved = 0
    for seed in range(30):
        rng, draw = random.Random(seed), np.random.default_rng(seed)
        B, N, P = 3, 9, 1 if source else rng.choice([1, 5])
        given, step = drawn_rules(rng, P), rng.randrange(9)
        few = rng.choice([3, V])  # few different tokens repeat often
        tokens = draw.integers(2, 2 + few - 2, (B, P + step)).astype(np.int32)
        logits = draw.integers(-6, 6, (B, V)).astype(np.float32) / 2
        if given.get("remove_invalid_values"):
            logits[draw.random((B, V)) < 0.3] = draw.choice([np.nan, np.inf, -np.inf])
        read = draw.integers(2, 2 + few - 2, (B, 6)) if source else tokens[:, :P]  # the prompts
        config = transformers.GenerationConfig(**given, max_length=P + N)
        config._eos_token_tensor = torch.tensor(np.atleast_1d(given["eos_token_id"]))
        if "min_new_tokens" in given:  # as `generate` does
            config.min_length = P + given["min_new_tokens"]
        processors = theirs._get_logits_processor(config, P, encoder_input_ids=torch.tensor(read).long())
        expected = processors(torch.tensor(tokens).long(), torch.tensor(logits)).numpy()

        ours = from_json(given)
        before = 0 if source else 16 - P
        history = np.pad(tokens, [(0, 0), (before, N - step)], constant_values=-1)
        written = Written(jnp.asarray(history), *map(jnp.int32, (before + P + step, step, N)))
        if source:
            written = written._replace(
                source=jnp.pad(jnp.asarray(read, jnp.int32), [(0, 0), (2, 0)], constant_values=-1)
            )
        if seed % 2:  # a value for each row
            written = written._replace(end=jnp.full(B, written.end), step=jnp.full(B, step), limit=jnp.full(B, N))
        found = run_rules(logits, ours, ours.eos_token_id, make_filters(defaults=ours), written)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f"{seed} {given}")
        moved += not np.array_equal(expected, logits)
    assert moved > 20


def from_json(given):
    """The GenerationDefaults of settings of generation_config.json."""
    as_lists = {name: [x] if name.endswith("eos_token_id") and isinstance(x, int) else x for name, x in given.items()}
    return from_dict(GenerationDefaults, as_lists)


def test_filters_keep_what_transformers_keep_where_many_are_equal():
    torch, hf_ = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for seed in range(150):
        draw = np.random.default_rng(seed)
        # Few different values, so that ties cross every border.
        logits = (draw.integers(0, draw.integers(1, 5) + 1, (4, 20)) * draw.choice([0.5, 1.0, 3.0])).astype(np.float32)
        temperature = float(draw.choice([1.0, 0.6]))
        top_k = int(draw.choice([0, 1, 3, 19, 50]))
        top_p = float(draw.choice([1.0, 0.1, 0.25, 0.5, 0.8, 0.95]))
        min_p = float(draw.choice([0.0, 0.3]))
        scores = torch.tensor(logits)
        for cls, value, off in [
            (hf_.TemperatureLogitsWarper, temperature, 1),
            (hf_.TopKLogitsWarper, top_k, 0),
            (hf_.TopPLogitsWarper, top_p, 1),
            (hf_.MinPLogitsWarper, min_p, 0),
        ]:
            scores = scores if value == off else cls(value)(None, scores)
        for_rows = [temperature] * len(logits) if seed % 2 else temperature
        found = run_filters(logits, make_filters(for_rows, top_k, top_p, min_p))
        message = f"{seed} {temperature} {top_k} {top_p} {min_p}"
        # Which of equal tokens remain is not defined there, as its sort is not stable; their number is.
        ordered = [np.sort(x, axis=-1) for x in (np.asarray(found), scores.numpy())]
        np.testing.assert_allclose(*ordered, rtol=1e-6, err_msg=message)


WARPERS = [  # in the order of `generate`: setting, class, values
    ("temperature", "TemperatureLogitsWarper", [0.6]), ("top_h", "TopHLogitsWarper", [0.2, 0.5, 0.93]),
    ("top_k", "TopKLogitsWarper", [1, 3, 19]), ("top_p", "TopPLogitsWarper", [0.3, 0.83]),
    ("min_p", "MinPLogitsWarper", [0.01, 0.3]), ("typical_p", "TypicalLogitsWarper", [0.2, 0.57, 0.93]),
    ("epsilon_cutoff", "EpsilonLogitsWarper", [0.003, 0.06]), ("eta_cutoff", "EtaLogitsWarper", [0.01, 0.2]),
]  # fmt: skip


@pytest.mark.parametrize("V", [20, 300])
def test_all_warpers_of_generate_one_by_one_and_together(V):
    torch, theirs = pytest.importorskip("torch"), theirs_of("gpt2", 0)
    transformers, moved = pytest.importorskip("transformers"), dict.fromkeys([name for name, *_ in WARPERS], 0)
    for seed in range(64):
        rng, draw = random.Random(seed), np.random.default_rng(seed)
        logits = draw.integers(0, 12, (4, V)).astype(np.float32) / np.float32(
            draw.choice([1, 3])
        )  # with many equal ones
        logits[draw.random((4, V)) < 0.2] = -np.inf
        chosen = [WARPERS[seed % 8]] if seed < 40 else rng.sample(WARPERS, rng.randrange(2, len(WARPERS)))
        given = {name: rng.choice(values) for name, _, values in chosen}
        config = transformers.GenerationConfig(**{"top_k": 0} | given, do_sample=True)
        expected = theirs._get_logits_processor(config, 1)(torch.zeros(4, 1).long(), torch.tensor(logits)).numpy()
        # The last row alone is filtered: the others turn all filters off.
        rows = {name: [NO_EFFECT[name] if name != "temperature" else 1] * 3 + [value] for name, value in given.items()}
        for filters, whole in ((make_filters(**given), True), (make_filters(**rows), False)):
            found = np.array(run_filters(logits, filters))
            if not whole:
                np.testing.assert_array_equal(found[:3], logits[:3])
                found[:3] = expected[:3]
            # Which of equal tokens remain is not defined there, as its sort is not stable; their number is.
            np.testing.assert_allclose(*(np.sort(x, axis=-1) for x in (found, expected)), rtol=1e-6, err_msg=f"{given}")
        for name in given if len(given) == 1 else ():
            moved[name] += not np.array_equal(expected, logits)
    assert min(moved.values()) > 0, moved


def test_filters_are_arguments_of_sample_for_all_prompts_or_for_each():
    config = ModelConfig(vocab_size=29, context=32, layers=1, dim=8, heads=2)
    params = init(build(config), jax.random.PRNGKey(0))
    prompts, given = [[3, 4, 5], [6]], dict(typical_p=0.3, encoder_repetition_penalty=5.0)
    own = build(dataclasses.replace(config, generation=GenerationDefaults(**given)))
    expected = generate.sample(own, params, prompts, 12, rng=[1, 2])
    free = generate.sample(build(config), params, prompts, 12, rng=[1, 2])
    assert generate.sample(build(config), params, prompts, 12, rng=[1, 2], **given) == expected
    some = {name: [value, NO_EFFECT[name]] for name, value in given.items()}
    assert generate.sample(build(config), params, prompts, 12, rng=[1, 2], **some) == [expected[0], free[1]]
    assert expected[0] != free[0] and expected[1] != free[1]


def test_a_new_value_of_a_filter_compiles_nothing():
    run, logits = jax.jit(filtered), jnp.zeros((2, 9))
    for value in (0.3, 0.4):
        names = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty")
        run(logits, make_filters(**dict.fromkeys(names, value)))
    assert run._cache_size() == 1
    with pytest.raises(TypeError, match="typical is not one of"):
        make_filters(typical=0.3)
    with pytest.raises(UserError, match="typical_p=1.5 must be in"):
        make_filters(typical_p=1.5)


def test_five_of_ten_equal_tokens_make_a_half():
    kept = np.isfinite(filtered(jnp.zeros((1, 10)), make_filters(1.0, None, 0.5)))
    assert kept.sum() == 5


def saved_model(family, seed, settings, directory):
    """A tiny model of Transformers whose generation_config.json has these settings, read back from the directory."""
    transformers = pytest.importorskip("transformers")
    if family == "marian":
        config = transformers.MarianConfig(
            vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
            pad_token_id=V - 1, eos_token_id=0, decoder_start_token_id=V - 1, scale_embedding=True)  # fmt: skip
        transformers.set_seed(seed)
        theirs = transformers.MarianMTModel(config)
    else:
        theirs = theirs_of(family, seed)
    randomize(theirs, seed, std=0.2)
    own = {} if family == "gpt2" else {"decoder_start_token_id": theirs.config.decoder_start_token_id}
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0, **own | settings)
    theirs.save_pretrained(directory)
    return type(theirs).from_pretrained(directory).eval()


CASES = [
    ("gpt2", dict(eos_token_id=[7, 9, 30], no_repeat_ngram_size=2, repetition_penalty=1.3)),
    ("marian", dict(eos_token_id=0, bad_words_ids=[[V - 1], [5], [8, 9]], forced_eos_token_id=0,
                    length_penalty=0.6, num_beams=3)),
    ("bart", dict(eos_token_id=2, forced_bos_token_id=0, forced_eos_token_id=2, min_length=6, no_repeat_ngram_size=3,
                  early_stopping=True, length_penalty=2.0, num_beams=3)),
    ("marian", dict(eos_token_id=0, encoder_repetition_penalty=3.0, encoder_no_repeat_ngram_size=2,
                    sequence_bias=[[[45, 45], -30.0], [[5], 2.0], [[20], -3.0]], remove_invalid_values=True)),
    ("gpt2", dict(eos_token_id=[7, 9], encoder_no_repeat_ngram_size=2, encoder_repetition_penalty=0.8,
                  exponential_decay_length_penalty=[3, 1.9], sequence_bias=[[[7], 1.0], [[9], 2.0]])),
    ("t5", dict(eos_token_id=1, suppress_tokens=[3, 59], begin_suppress_tokens=[16, 8], renormalize_logits=True,
                decoder_start_token_id=4)),
]  # fmt: skip


@pytest.mark.parametrize("family, settings", CASES, ids=[f"{family}-{[*x][1]}" for family, x in CASES])
def test_generation_equals_transformers(family, settings, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = saved_model(family, 3, settings, tmp_path)
    config, params = hf.load(tmp_path)
    model, draw, N = build(config), np.random.default_rng(0), 10
    prompts = [draw.integers(10, 50, n).tolist() for n in (5, 1, 9, 12)]
    ends = np.atleast_1d(settings["eos_token_id"]).tolist()

    def expected(prompt, beams):
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=N, num_beams=beams, do_sample=False)[0]
        return cut(out[len(prompt) if family == "gpt2" else 1 :].tolist(), ends)

    greedy = generate.sample(model, params, prompts, N, temperature=0)
    assert greedy == [expected(p, 1) for p in prompts]
    assert generate.beam_search(model, params, prompts, 3, N) == [expected(p, 3) for p in prompts]
    if family == "bart":
        streamed = zip(*generate.stream(model, params, prompts, N, temperature=0, chunk=3), strict=True)
        assert [sum(pieces, []) for pieces in streamed] == greedy

    # What is written is what was read, also without a tokenizer.
    hf.save(tmp_path / "again", config, params)
    assert hf.load_config(tmp_path / "again").generation == config.generation
    theirs = type(theirs).from_pretrained(tmp_path / "again").eval()
    assert greedy == [expected(p, 1) for p in prompts]
    start = getattr(theirs.config, "decoder_start_token_id", None)
    theirs.generation_config = type(theirs.generation_config)(pad_token_id=0, decoder_start_token_id=start)
    assert greedy != [expected(p, 1) for p in prompts], "the settings changed nothing"


def test_settings_that_are_not_computed_are_refused_by_name(tmp_path):
    theirs = saved_model("gpt2", 0, {}, tmp_path)
    path = tmp_path / "generation_config.json"
    for name, value in dict(
        penalty_alpha=0.6, guidance_scale=2.0, watermarking_config={"bias": 2.5}, force_words_ids=[[3]], max_time=2.0
    ).items():
        path.write_text(json.dumps({name: value}))
        config, params = hf.load(tmp_path)  # the model can still be measured and trained
        for call in (generate.sample, generate.beam_search):
            with pytest.raises(UserError, match=f"{name}.*not compute"):
                call(build(config), params, [[1, 2]], max_new_tokens=1)
        hf.save(tmp_path / "again", config, params)
        assert json.loads((tmp_path / "again/generation_config.json").read_text())[name] == value
    path.write_text('{"penalty_alpha": 0, "typical_p": 1.0, "use_cache": true}')
    assert not hf.load_config(tmp_path).generation.unsupported
    # Without the file, config.json has them, as in version 4.
    path.unlink()
    old = json.loads((tmp_path / "config.json").read_text()) | {"bad_words_ids": [[5]], "num_beams": 4}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert hf.load_config(tmp_path).generation.bad_words_ids == ((5,),)
    assert type(theirs).from_pretrained(tmp_path).generation_config.bad_words_ids == [[5]]


def test_wrong_values_are_refused_only_where_they_are_read(tmp_path):
    saved_model("gpt2", 0, {}, tmp_path)
    path, prompts = tmp_path / "generation_config.json", [[1, 2]]
    config, params = hf.load(tmp_path)
    greedy = generate.sample(build(config), params, prompts, 5, temperature=0)
    refused = lambda **given: pytest.raises(
        UserError, match=re.escape(", ".join(f"{x}={y!r}" for x, y in given.items()))
    )
    for name, value in [
        ("top_p", 0), ("top_k", -1), ("top_k", 50.0), ("temperature", "hot"), ("min_p", 2), ("top_h", [1]),
        ("epsilon_cutoff", "a"), ("typical_p", 0),
    ]:  # fmt: skip
        path.write_text(json.dumps({"do_sample": False, name: value}))
        g = hf.load_config(tmp_path).generation
        model = build(dataclasses.replace(config, generation=g))
        assert generate.sample(model, params, prompts, 5, temperature=0) == greedy
        warm = {} if name == "temperature" else {"temperature": 0.5}
        with refused(**{name: value}):
            generate.sample(model, params, prompts, 1, **warm)
        right = NO_EFFECT[name] if name != "temperature" else 1.0
        generate.sample(model, params, prompts, 1, **{"temperature": 0.5, name: right})
        GenerationSettings.of({}, {}, g)  # do_sample is false
        with refused(**{name: value}):
            GenerationSettings.of({}, {}, dataclasses.replace(g, do_sample=True))
    for name, value in [
        ("sequence_bias", [[[3, -1], 1.0]]), ("sequence_bias", [[[], 1.0]]), ("sequence_bias", [[1.0, [3]]]),
        ("sequence_bias", {"3": 1.0}), ("sequence_bias", [[[3], [4]]]), ("exponential_decay_length_penalty", [3]),
        ("exponential_decay_length_penalty", [1.5, 1.1]), ("exponential_decay_length_penalty", [1, 0]),
        ("exponential_decay_length_penalty", [2**40, 1.1]), ("exponential_decay_length_penalty", [1, 10**400]),
        ("sequence_bias", [[[2**40], 1.0]]), ("sequence_bias", [[[5], 10**400]]), ("bad_words_ids", [[2**40]]),
        ("encoder_repetition_penalty", 0), ("eos_token_id", [-3]), ("num_beams", 0), ("suppress_tokens", "all"),
    ]:  # fmt: skip
        path.write_text(json.dumps({name: value}))
        model = build(hf.load_config(tmp_path))
        for call in (generate.sample, generate.beam_search):
            with pytest.raises(UserError, match=f"model.generation has {name}="):
                call(model, params, prompts, max_new_tokens=1)
    for name in ("max_length", "max_new_tokens"):
        path.write_text(json.dumps({name: 0}))
        model = build(hf.load_config(tmp_path))
        assert generate.sample(model, params, prompts, 5, temperature=0) == greedy
        assert GenerationSettings(max_new_tokens=3).limit(model.config, prompts) == 3
        with refused(**{name: 0}):
            GenerationSettings().limit(model.config, prompts)


def test_values_that_transformers_ignores_are_ignored(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = saved_model("gpt2", 0, {}, tmp_path)
    ignored = dict(suppress_tokens=[-1], begin_suppress_tokens=[-1], top_p=1.5, typical_p=2.0, epsilon_cutoff=-1.0)
    ignored |= dict(eta_cutoff=3.0, no_repeat_ngram_size=-1, encoder_no_repeat_ngram_size=-2, min_length=-1)
    (tmp_path / "generation_config.json").write_text(json.dumps(ignored))
    assert hf.load_config(tmp_path).generation == GenerationDefaults()
    made = transformers.GenerationConfig(**ignored, do_sample=True, top_k=0)
    made._eos_token_tensor = torch.tensor([7])
    logits = torch.randn(2, V)
    assert torch.equal(theirs._get_logits_processor(made, 3)(torch.ones(2, 3).long(), logits), logits)


def test_an_export_keeps_the_bytes_of_the_file(tmp_path):
    saved_model("gpt2", 0, {}, tmp_path)
    vocabulary = {"</s>": 0} | {chr(97 + i): i + 1 for i in range(V - 1)}
    spec = {"added_tokens": [specs.added_token("</s>", 0)], "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    settings = b'{"top_k":50.0, "do_sample" : false,\n "suppress_tokens": [-1], "eos_token_id": 0, "top_p": 0}'
    (tmp_path / "generation_config.json").write_bytes(settings)
    files = {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": b'{"eos_token": "</s>"}'}
    tokenizer = from_files(files | {"generation_config.json": settings}, "test")
    config, params = hf.load(tmp_path)
    hf.save(tmp_path / "again", config, params, tokenizer)
    assert (tmp_path / "again/generation_config.json").read_bytes() == settings
    hf.save(tmp_path / "alone", config, params)
    alone = hf.load_config(tmp_path / "alone").generation
    assert alone == config.generation and alone.not_computed() == {"top_k": 50.0, "top_p": 0}
    changed = dataclasses.replace(config, generation=GenerationDefaults(eos_token_id=(0,), top_k=3))
    hf.save(tmp_path / "changed", changed, params, tokenizer)
    assert hf.load_config(tmp_path / "changed").generation == changed.generation


def test_rules_at_the_edges_of_numbers_are_no_nan():
    w = Written(jnp.array([[1, 2, 3]]), jnp.int32(3), jnp.int32(3), jnp.int32(9))
    rules = GenerationDefaults(
        bad_words_ids=((2,),), exponential_decay_length_penalty=(0, 1e30), sequence_bias=(((4,), 1.0),)
    )
    found = run_rules(jnp.array([[0.0, 0, 3, -jnp.inf, 1, 0]]), rules, (5,), make_filters(), w)
    assert found.tolist() == [[0, 0, -jnp.inf, -jnp.inf, 2, 0]]


# Prompts of `sample`.


@pytest.mark.parametrize("as_given", [
    lambda ids: ids[0], lambda ids: np.array(ids), lambda ids: jnp.array(ids), lambda ids: np.array(ids[0]),
    lambda ids: [np.array(row) for row in ids], lambda ids: tuple(map(tuple, ids)), lambda ids: list(np.array(ids[0])),
])  # fmt: skip
def test_prompts_may_be_arrays_or_lists(as_given):
    model = build(ModelConfig(vocab_size=29, context=32, layers=1, dim=8, heads=2))
    params = init(model, jax.random.PRNGKey(0))
    ids = [[3, 4, 5]]
    expected = generate.sample(model, params, ids, 4, temperature=0)
    assert generate.sample(model, params, as_given(ids), 4, temperature=0, top_k=0, top_p=1, min_p=0) == expected


def test_prompts_may_be_texts_where_a_tokenizer_is_given():
    tokenizer = ByteTokenizer()
    model = build(ModelConfig(vocab_size=tokenizer.vocab_size, context=32, layers=1, dim=8, heads=2))
    params = init(model, jax.random.PRNGKey(0))
    ids = [prompt_ids(tokenizer, text) for text in ("ab", "c")]
    ends = dict(eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    expected = generate.sample(model, params, ids, 4, **ends)
    assert generate.sample(model, params, ["ab", "c"], 4, tokenizer=tokenizer) == expected
    assert len(generate.sample(model, params, "ab", 4, tokenizer=tokenizer)) == 1


@pytest.mark.parametrize("prompts, words", [
    ("the", "prompts='the' is a text; give a tokenizer"), (["a", "b"], "is a text"), (3, "must be token ids"),
    ([[1.5]], "prompt 0 has 1.5, which is no token id"), (np.array([[1.0]]), "prompt 0 has 1.0"), ([[True]], "True"),
    (np.zeros((1, 1, 1), int), "prompt 0 has [0], which is no token id"), (None, "must be token ids"),
    ([[1], []], "prompt 1 is empty"), ([], "prompts is empty"), ([[29]], "outside the model's vocabulary of 29"),
])  # fmt: skip
def test_other_prompts_are_refused_in_a_line(prompts, words):
    model = build(ModelConfig(vocab_size=29, context=32, layers=1, dim=8, heads=2))
    for call in (generate.sample, generate.beam_search):
        with pytest.raises(UserError) as caught:
            call(model, {}, prompts, max_new_tokens=1)
        assert words in str(caught.value)


def test_tiny_temperatures_draw_as_in_float64():
    """float32 has no 1e-40, and logits over 1e-37 exceed it: those are greedy, which float64 cannot tell apart."""
    logits = np.random.default_rng(0).normal(0, 30, (4, 50)).astype(np.float32)
    logits[:, ::7] = -np.inf
    logits[1, 30] = np.nextafter(np.float32(logits[1].max()), np.float32(np.inf))
    logits[2, 20] = logits[2, 40] = 1e4
    draw = jax.jit(jax.vmap(generate.processors.choose, (None, 0, None)))
    keys, previous = jax.random.split(jax.random.PRNGKey(0), 100), set()
    for temperature in (1e-40, 1e-38, 1e-37, 1e-30, 1e-20, 1e-3, 100.0):
        exact = (logits.astype(np.float64) - logits.max(-1, keepdims=True)) / temperature
        p = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
        for given in (temperature, [temperature] * 4, [temperature, 1.0, temperature, 0]):
            filters, rows = make_filters(given), [0, 2] if given != temperature and 0 in given else range(4)
            tokens = np.array(draw(jnp.asarray(logits), keys, filters))[:, rows]
            assert all(p[row, tokens[:, i]].min() > 1e-9 for i, row in enumerate(rows)), (temperature, given)
            if filters.temperature is not None and temperature >= 1e-20:
                found = np.array(jax.nn.softmax(run_filters(logits, filters), axis=-1))
                np.testing.assert_allclose(found[rows], p[rows], rtol=1e-4, atol=1e-7)
        previous.add(len(np.unique(tokens[:, 0])))
    assert min(previous) == 1 and max(previous) > 5  # the last one does draw
