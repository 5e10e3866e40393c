"""Shift training: the output delay in every way of decoding, and examples whose tokens move."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflax import generate, hf, tasks
from nanoflax.config import TASK_KINDS, AnyTask, Config, ModelConfig, PromptTuning, TrainConfig, from_dict, validate
from nanoflax.errors import UserError
from nanoflax.nn import build
from nanoflax.parallel import init, make_mesh
from nanoflax.planning import flops_per_token
from nanoflax.tasks import Text, rows
from nanoflax.tasks.kinds import Pair
from nanoflax.tokenizers import trained
from tests.compiled import apply
from tests.nn.models_test import scaled

TINY = dict(vocab_size=29, context=32, layers=1, dim=16, heads=2, tied=False, start_id=2, logit_scale=0.7)
KINDS = {"decoder": {}, "encoder_decoder": dict(positions="relative"), "lstm": dict(embed_scale=5.0)}
BYTES = trained.ByteTokenizer()


def make(architecture, delay, **fields):
    model = build(ModelConfig(**TINY | KINDS[architecture] | fields, architecture=architecture, output_delay=delay))
    params = scaled(init(model, jax.random.PRNGKey(0)))
    if delay:  # which begins as zeros
        params["delay"] = {"kernel": jax.random.normal(jax.random.PRNGKey(1), (16, 16))}
    return model, params


def source_of(architecture, rows=1):
    source = np.random.default_rng(9).integers(0, 29, (rows, 6)).astype(np.int32)
    return {} if architecture == "decoder" else {"source": source}


def tokens_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, 29, shape).astype(np.int32)


def without(model, params):
    """The same model without its delay."""
    params = {name: p for name, p in params.items() if name != "delay"}
    return build(dataclasses.replace(model.config, output_delay=0)), params


@partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens, **rest):
    return apply(model, params, tokens, **rest)[0]


def written_by(model, params, prompt, new):
    """The logits [len(new), V] of the full pass, in which a delay and a cache have no part."""
    decoder = model.config.architecture == "decoder"
    inputs = [*(prompt if decoder else [model.config.start_id]), *new[:-1]]
    rest = (
        {}
        if decoder
        else {"source": np.array([prompt + [0] * (8 - len(prompt))]), "source_mask": np.arange(8)[None] < len(prompt)}
    )
    padded = np.array([inputs + [0] * (16 - len(inputs))])
    return logits_of(model, params, padded, **rest)[0, len(inputs) - len(new) : len(inputs)]


# The output delay.


@pytest.mark.parametrize("architecture", KINDS)
def test_the_delay_is_its_formula(architecture):
    # By torch: x_t + GELU(W x_{t-3}) of the states of the model without it.
    model, params = make(architecture, 3)
    tokens, source = tokens_of(0, 2, 9), source_of(architecture, 2)
    plain, rest = without(model, params)
    x = np.asarray(apply(plain, rest, tokens, **source, method="hidden")[0])
    before = torch.tensor(np.concatenate([np.zeros((2, 3, 16), np.float32), x[:, :-3]], 1))
    kernel = torch.tensor(np.asarray(params["delay"]["kernel"]))
    expected = torch.tensor(x) + torch.nn.functional.gelu(before @ kernel)
    found = apply(model, params, tokens, **source, method="hidden")[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found[:, 3:] - x[:, 3:]).max() > 0.1


@pytest.mark.parametrize("architecture", KINDS)
def test_a_delay_that_reaches_before_the_text_or_is_new_changes_no_bit(architecture):
    tokens, source = tokens_of(0, 2, 9), source_of(architecture, 2)
    for delay, fresh in ((9, False), (12, False), (2, True)):
        model, params = make(architecture, delay)
        if fresh:
            params["delay"] = init(model, jax.random.PRNGKey(0))["delay"]
        plain, rest = without(model, params)
        with jax.disable_jit():  # each operation alone, the same in both: a compiler may round two programs differently
            found, expected = (logits_of(*each, tokens, **source) for each in ((model, params), (plain, rest)))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("architecture", KINDS)
def test_causality_by_gradient(architecture):
    T, t, n = 8, 5, 3
    model, params = make(architecture, n)
    source = source_of(architecture)

    def logits(table):
        return model.apply(
            {"params": params | {"embed": {"embedding": table}}}, jnp.arange(10, 10 + T)[None], **source
        )[0][0, t]

    reach = np.abs(jax.jit(jax.jacrev(logits))(params["embed"]["embedding"])).max((0, 2))
    assert (reach[10 : 10 + t + 1] > 0).all()
    seen = np.setdiff1d(np.arange(10 + t + 1, 29), source.get("source", np.array([], int)))
    assert len(seen) > 3 and (reach[seen] == 0).all()


def test_only_the_state_n_steps_before_is_added():
    # No layer mixes positions here: a window of one token.
    model, params = make("decoder", 3, window=1, positions="none")
    tokens = tokens_of(0, 1, 8)
    logits = logits_of(model, params, tokens)[0]
    for at in range(8):
        changed = tokens.copy()
        changed[0, at] = (changed[0, at] + 1) % 29
        other = logits_of(model, params, changed)[0]
        differs = np.flatnonzero(np.abs(logits - other).max(-1) > 1e-6)
        assert differs.tolist() == [i for i in (at, at + 3) if i < 8]


@pytest.mark.parametrize("delay", [1, 3, 7])
def test_packed_documents_do_not_leak(delay):
    model, params = make("decoder", delay)
    segments = np.array([[1] * 5 + [2] * 7], np.int32)
    first, second, other = tokens_of(0, 1, 5), tokens_of(1, 1, 7), tokens_of(2, 1, 5)
    apply = lambda *parts: np.asarray(
        logits_of(  # noqa: E731
            model, params, np.concatenate(parts, 1), segments=segments
        )
    )
    both = apply(first, second)
    np.testing.assert_array_equal(both[:, 5:], apply(other, second)[:, 5:])
    alone = logits_of(model, params, second)
    np.testing.assert_allclose(both[:, 5:], alone, atol=1e-5)


@pytest.mark.parametrize("delay", [3, 20])
def test_cached_decoding_equals_the_full_pass(delay):
    # Rows of 12, 9 and 2 tokens padded on the left, in pieces shorter and longer than the delay.
    model, params = make("decoder", delay)
    tokens, lengths, P = tokens_of(1, 3, 12), [12, 9, 2], 12
    cache, parts = model.empty_cache(3, 16, start=P - jnp.array(lengths)), []
    decode = jax.jit(model.decode)
    for a, b in ((0, 7), (7, 9), (9, 10), (10, 11), (11, 12)):
        logits, cache = decode(params, tokens[:, a:b], cache)
        parts.append(logits)
    found = np.concatenate(parts, 1)
    for row, length in enumerate(lengths):
        alone = np.roll(tokens[row : row + 1], length, axis=1)
        whole = logits_of(model, params, alone)[0, :length]
        np.testing.assert_allclose(found[row, P - length :], whole, atol=1e-4)


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("delay", [1, 4])
def test_what_is_written_is_what_the_full_pass_would_write(architecture, delay):
    # Greedily and by beams; prompts shorter than the delay, of unequal lengths.
    model, params = make(architecture, delay)
    prompts = [tokens_of(i, n).tolist() for i, n in enumerate((5, 1, 2))]
    greedy = generate.sample(model, params, prompts, 8, temperature=0)
    best = generate.beam_search(model, params, prompts, 3, 8, n_best=3)
    for prompt, row, pairs in zip(prompts, greedy, best, strict=True):
        assert written_by(model, params, prompt, row).argmax(-1).tolist() == row
        for new, score in pairs:
            logp = jax.nn.log_softmax(written_by(model, params, prompt, new))
            assert logp[np.arange(8), np.array(new)].mean() == pytest.approx(score, abs=1e-3)
        plain = written_by(*without(model, params), prompt, row)
        assert np.abs(plain - written_by(model, params, prompt, row))[delay:].max() > 0.01


def test_virtual_tokens_are_before_the_delay():
    from nanoflax import peft

    model, params = make("decoder", 2)
    params = peft.add(params, PromptTuning(virtual_tokens=3), jax.random.PRNGKey(0))
    prompt = tokens_of(0, 4).tolist()
    (new,) = generate.sample(model, params, [prompt], 6, temperature=0)
    assert written_by(model, params, prompt, new).argmax(-1).tolist() == new


def test_a_delay_is_counted_refused_by_transformers_and_by_models_without_order(tmp_path):
    model, params = make("decoder", 2)
    assert flops_per_token(model.config) - flops_per_token(without(model, params)[0].config) == (
        6 * params["delay"]["kernel"].size
    )
    plain = ModelConfig(vocab_size=29, layers=1, dim=16, heads=2, context=32, output_delay=2)
    with pytest.raises(UserError, match="model.output_delay=2"):
        hf.save(tmp_path, plain, init(build(plain), jax.random.PRNGKey(0)))
    with pytest.raises(UserError, match="model.output_delay=2 needs model.head='lm'"):
        build(dataclasses.replace(plain, architecture="encoder", head="mlm"))


# Tokens that move.


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 10**6))
def test_a_move_is_an_insertion_a_dropped_window_or_a_rotation(n, most, seed):
    place, new = rows.random_shift(n, most, np.random.default_rng(seed))
    kept = place[~new].tolist()
    assert len(place) and set(place.tolist()) <= set(range(n))
    if new.any():  # one run of at most so many
        runs = np.flatnonzero(np.diff(np.r_[0, new, 0]))
        assert kept == list(range(n)) and len(runs) == 2 and runs[1] - runs[0] <= most
    elif len(place) < n:
        gone = sorted({*range(n)} - {*kept})
        assert kept == sorted(kept) and len(gone) <= most and gone[-1] - gone[0] == len(gone) - 1
    else:
        by = kept.index(0)
        assert np.roll(range(n), by).tolist() == kept
        assert min(by, n - by) <= most


def test_all_three_moves_come_as_often():
    rng, counts = np.random.default_rng(0), {}
    for _ in range(3000):
        place, new = rows.random_shift(20, 3, rng)
        how = (bool(new.any()), len(place))
        counts[how] = counts.get(how, 0) + 1
    kinds = [
        sum(c for (new, n), c in counts.items() if chosen(new, n))
        for chosen in (lambda new, n: new, lambda new, n: n < 20, lambda new, n: not new and n == 20)
    ]
    assert all(900 < k < 1100 for k in kinds)
    assert {n for _, n in counts} == {17, 18, 19, 20, 21, 22, 23}


PAIRS = [Pair("abcdefghij"[: 3 + i % 8], f"target {i}") for i in range(40)]
TEXTS = [Text("abcdefghijklmnop"[: 5 + i % 9]) for i in range(40)]


def test_a_moved_source_keeps_its_ends_and_its_target():
    rows = tasks.encode(PAIRS, BYTES, 10)
    moved = rows.shifted(3, 1.0, (0,))
    for row, old in zip(moved.rows, rows.rows, strict=True):
        assert row["targets"] is old["targets"]
        assert row["source"][-1] == BYTES.eos_id and len(row["source"]) <= 10
        assert BYTES.eos_id not in row["source"][:-1] and set(row["source"]) <= set(old["source"])
    assert (
        sum(row["source"].tolist() != old["source"].tolist() for row, old in zip(moved.rows, rows.rows, strict=True))
        > 35
    )
    half = rows.shifted(3, 0.5, (0,))
    assert 8 < sum(row is old for row, old in zip(half.rows, rows.rows, strict=True)) < 32
    assert all(row is old for row, old in zip(rows.shifted(3, 0.0, (0,)).rows, rows.rows, strict=True))


def test_targets_follow_the_inputs_of_a_moved_text():
    # What is put in is read and not asked for; all else is asked for where it now stands.
    rows = tasks.encode(TEXTS, BYTES, 14)
    moved = rows.shifted(3, 1.0, (0,))
    inserted = 0
    for row, old in zip(moved.rows, rows.rows, strict=True):
        assert row["first"] == old["first"] and row["targets"][-1] == old["targets"][-1]
        assert len(row["targets"]) == len(row["weights"]) <= 14
        asked = row["targets"][row["weights"] > 0]
        assert set(row["weights"]) <= {0.0, 1.0} and len(asked) <= len(old["targets"])
        inserted += (row["weights"] == 0).any()
        if len(row["targets"]) < 14 and (row["weights"] == 0).any():
            assert asked.tolist() == old["targets"].tolist()
    assert inserted > 5
    assert {name: a.dtype for name, a in moved.rows[0].items()} == {name: a.dtype for name, a in rows.rows[0].items()}


def test_batches_move_anew_at_each_step_and_the_same_after_a_resumption_on_any_hosts():
    rows = tasks.encode(PAIRS, BYTES, 16)
    make_ = lambda *own: tasks.ExampleBatches(  # noqa: E731
        rows, 8, 3, True, *own, shift=(3, 0.7)
    )
    batches, plain = make_(), tasks.ExampleBatches(rows, 8, 3)
    later, halves = make_(), [make_(range(4)), make_(range(4, 8))]
    for step in (5, 0, 17):
        for name, array in batches[step].items():
            np.testing.assert_array_equal(array, later[step][name])
            np.testing.assert_array_equal(array, np.concatenate([half[step][name] for half in halves]))
        np.testing.assert_array_equal(batches[step]["targets"], plain[step]["targets"])
        assert not np.array_equal(batches[step]["source"], plain[step]["source"])
    # A row that comes again in another epoch is moved in another way.
    seen = {}
    for step in range(40):
        for i, line in zip(batches.indices(step), batches[step]["source"], strict=True):
            seen.setdefault(i, set()).add(tuple(line[line != BYTES.pad_id]))
    assert all(len(ways) > 2 for ways in seen.values())


def test_an_evaluator_measures_clean_and_shifted_rows_always_alike():
    model = build(ModelConfig(vocab_size=BYTES.vocab_size, layers=1, dim=16, heads=2, context=32))
    params = scaled(init(model, jax.random.PRNGKey(0)))
    rows = tasks.encode(TEXTS, BYTES, 16)

    def evaluated(most, kind="language_model", rows=rows):
        config = Config(task=TASK_KINDS[kind](max_shift=most), train=TrainConfig(batch_size=8))
        return tasks.Evaluator(model, config, BYTES, rows, make_mesh("-1,1,1"))(params)[0]

    clean, both = evaluated(0), evaluated(3)
    assert {*clean} == {"validation_loss", "perplexity", "bits_per_byte"}
    assert both == clean | {k: both[k] for k in ("validation_loss_shifted", "perplexity_shifted")}
    assert both == evaluated(3)
    moved = evaluated(0, rows=rows.shifted(3, 1.0, (0,)))
    assert moved["validation_loss"] == both["validation_loss_shifted"] != clean["validation_loss"]


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            dict(max_shift=2, kind="classify"),
            "task.max_shift is a field of task.kind=translate or language_model, not of classify",
        ),
        (dict(max_shift=-1), "task.max_shift=-1 must be at least 0"),
        (dict(shift_probability=0.5), "needs task.max_shift of at least 1"),
        (dict(max_shift=2, shift_probability=1.5), "must be in [0, 1]"),
    ],
)
def test_bad_fields_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        validate(Config(task=from_dict(AnyTask, {"kind": "language_model"} | fields, "task")))
    assert words in str(caught.value)
