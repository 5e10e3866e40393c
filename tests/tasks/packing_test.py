"""Packed rows: best fit against brute force, every example once, and the losses of the examples one by one."""

import random
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nanoflax
from nanoflax import hf, nn, peft, tasks, train
from nanoflax.config import (
    POSITIONS,
    TASK_KINDS,
    AnyTask,
    Config,
    Instruct,
    LanguageModel,
    LoRA,
    ModelConfig,
    PrefixTuning,
    PromptTuning,
    TrainConfig,
    from_dict,
    validate,
)
from nanoflax.errors import UserError
from nanoflax.tasks import Chat, Text
from nanoflax.tasks.packing import best_fit, packed_evaluation
from tests.closeness import assert_trees_close

BYTES = nanoflax.tokenizers.load("bytes")


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    return Chat(tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=False)))


def rows_of(sizes, length=48, kind="text"):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdef ", k=n)) for n in sizes]
    if kind == "chat":
        return tasks.encode([chat(text, text[::-1]) for text in texts], BYTES, length)
    return tasks.encode([Text(text, f"f:{i}") for i, text in enumerate(texts, 1)], BYTES, length)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 33), st.booleans())
def test_best_fit_is_what_a_search_of_all_rows_finds(lengths, capacity, decreasing):
    lengths = sorted(lengths, reverse=True) if decreasing else lengths
    filled = []
    for length in lengths:
        fitting = [row for row in filled if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            filled.append([length])
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(map(sum, filled))
    if decreasing:  # the bound of Johnson et al., with a lower bound of the optimum
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // capacity) + 4 or max(lengths) > capacity / 2


def test_rows_are_as_full_as_those_of_trl():
    import datasets
    from trl.data_utils import pack_dataset

    lengths = np.minimum(np.random.default_rng(0).lognormal(2.5, 1, 500).astype(int) + 1, 64).tolist()
    theirs = pack_dataset(datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths]}), 64, "bfd")
    lengths.sort(reverse=True)
    ours = best_fit(lengths, 64)
    assert sorted(sum(lengths[i] for i in row) for row in ours) == sorted(map(len, theirs["input_ids"]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 99))
def test_an_epoch_reads_each_example_once_at_any_step_on_any_number_of_hosts(sizes, half, seed):
    rows, B = rows_of(sizes), 2 * half
    batches = tasks.PackedBatches(rows, B, seed)
    M = len(batches._packed)
    stream = [row for step in range(-(-3 * M // B)) for row in batches.examples(step)]
    for epoch in range(3):
        read = [i for row in stream[epoch * M : (epoch + 1) * M] for i in row]
        assert sorted(read) == list(range(len(rows)))
    for row in stream:
        assert sum(len(rows.rows[i]["targets"]) for i in row) <= rows.length
    for own in (range(half), range(1, B, 2)):
        part = tasks.PackedBatches(rows, B, seed, own)  # with random access, as after a resumption
        for step in (7, 0, 3):
            for name, array in batches[step].items():
                np.testing.assert_array_equal(part[step][name], array[list(own)])


def test_rows_are_full_and_change_places_with_the_epoch_and_the_seed():
    rng = np.random.default_rng(0)
    rows = rows_of(np.minimum(rng.lognormal(3, 1, 2000), 300).astype(int), 256)
    begin = time.perf_counter()
    batches, other = (tasks.PackedBatches(rows, 4, seed) for seed in (0, 1))
    assert batches[10**6]["targets"].shape == (4, 256) and time.perf_counter() - begin < 2
    lengths = np.array([len(row["targets"]) for row in rows.rows])
    M = len(batches._packed)
    assert lengths.sum() / (M * 256) > 0.97
    assert batches.tokens_per_step == 4 * lengths.sum() / M
    real = sum((batches[step]["segments"] > 0).sum() for step in range(M))  # 4 epochs
    assert real == 4 * lengths.sum()
    assert batches.summary(M) == (
        f"packed: {len(rows):,} examples in {M} rows of 256 tokens, {lengths.sum() / (M * 256):.1%} of them real; "
        f"{M} steps of 4 rows read each example 4 times"
    )
    of_epoch = lambda b, e: {tuple(sorted(row)) for s in range(M // 4) for row in b.examples(e * M // 4 + s)}  # noqa: E731
    first, second, seeded = of_epoch(batches, 0), of_epoch(batches, 4), of_epoch(other, 0)
    assert len(first & second) < M / 2 and len(first & seeded) < M / 2, "neighbours change"
    assert batches.describe(0).startswith("f:") and batches.describe(0).count("f:") >= 4


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_batch_is_its_examples_one_after_another(kind):
    rows = rows_of([3, 9, 1, 14, 60, 2, 5], 64, kind)
    batches = tasks.PackedBatches(rows, 2)
    batch = batches[0]
    assert {n: (a.dtype.name, a.shape) for n, a in batch.items()} == {
        "targets": ("int32", (2, 64)),
        "weights": ("float32", (2, 64)),
        "segments": ("int32", (2, 64)),
        "start": ("int32", (2, 64)),
        "first": ("int32", (2,)),
    }
    inputs = np.asarray(nn.shift_right(batch["targets"], batch["first"], batch["segments"], batch["start"]))
    for line, examples in enumerate(batches.examples(0)):
        for number, i in enumerate(examples, 1):
            row, part = rows.rows[i], batch["segments"][line] == number
            assert batch["targets"][line, part].tolist() == row["targets"].tolist()
            assert batch["weights"][line, part].tolist() == row["weights"].tolist()
            assert inputs[line, part].tolist() == [int(row["first"]), *row["targets"][:-1]]
        padding = batch["segments"][line] == 0
        assert not batch["weights"][line, padding].any() and (batch["targets"][line, padding] == BYTES.pad_id).all()
        assert sum(len(rows.rows[i]["targets"]) for i in examples) == 64 - padding.sum()


# The loss of a packed batch.

# A text longer than a row is read in parts; a part begins after the last token of the part before, so `first` differs.
SIZES = [3, 11, 1, 19, 120, 2, 5, 30, 8]


def model_and_params(**fields):
    config = ModelConfig(**dict(vocab_size=BYTES.vocab_size, context=48, layers=1, dim=32, heads=2) | fields)
    model = nanoflax.build(config)
    return model, jax.tree.map(lambda p: p * 3, nanoflax.init(model, jax.random.PRNGKey(0)))


def assert_packed_equals_one_by_one(model, params, rows, rest=None, gradients=True):
    """The loss and its gradient, of a packed batch and summed over batches of one example each."""

    def sums(params, batch):
        found = train.causal_lm(model, params if rest is None else peft.join(params, rest), batch)
        return found.loss, found.weight

    compute = jax.jit(jax.value_and_grad(sums, has_aux=True) if gradients else lambda *args: (sums(*args), 0.0))
    batches = tasks.PackedBatches(rows, 4)
    examples = [i for row in batches.examples(0) for i in row]
    assert len(examples) > 4
    alone = [compute(params, rows.batch([i], {"targets": rows.length})) for i in examples]
    alone = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), 0), *alone)
    (loss, weight), gradient = compute(params, batches[0])
    assert float(loss) == pytest.approx(alone[0][0], rel=1e-6) and weight == alone[0][1]
    if gradients:
        assert_trees_close(gradient, jax.tree.map(np.float32, alone[1]), 2e-5)


MODELS = {
    **{positions: dict(positions=positions) for positions in POSITIONS},
    "window": dict(positions="rotary", window=5),
    "learned window": dict(positions="learned", window=3),
    "delay": dict(positions="none", output_delay=2),
    "grouped": dict(positions="rotary", kv_heads=1, norm="rmsnorm", qk_norm="head", tied=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_the_examples_one_by_one(name):
    model, params = model_and_params(**MODELS[name])
    assert_packed_equals_one_by_one(model, params, rows_of(SIZES), gradients=name in ("learned", "window"))


def test_without_segments_the_loss_is_another():
    model, params = model_and_params(positions="rotary")
    batch = tasks.PackedBatches(rows_of(SIZES), 4)[0]
    loss = jax.jit(lambda batch: train.causal_lm(model, params, batch).loss)
    naive = {name: x for name, x in batch.items() if name not in ("segments", "start")}
    first = batch | {"start": batch["first"]}  # one token before all examples of a row
    assert abs(loss(naive) / loss(batch) - 1) > 1e-3 and abs(loss(first) / loss(batch) - 1) > 1e-4


ADAPTERS = [LoRA(rank=2), PromptTuning(virtual_tokens=3), PrefixTuning(virtual_tokens=3)]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
def test_adapters_and_virtual_tokens_serve_each_example_alike(adapter):
    model, params = model_and_params(positions="rotary", window=5)
    params = peft.add(params, adapter, jax.random.PRNGKey(1))
    trained, rest = peft.split(params, peft.trainable(params, adapter))
    trained = jax.tree.map(lambda p: p + 0.1, trained)
    assert_packed_equals_one_by_one(model, trained, rows_of(SIZES, kind="chat"), rest)


@pytest.mark.parametrize("fields", [dict(positions="learned"), dict(positions="rotary", norm="rmsnorm", gated=True,
                                    activation="silu", bias=False, tied=False)], ids=["gpt2", "llama"])  # fmt: skip
def test_the_loss_is_that_of_transformers_on_each_example_alone(fields, tmp_path):
    import torch
    import transformers

    model, params = model_and_params(layers=2, **fields)
    hf.save(tmp_path, model.config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    rows = rows_of(SIZES, kind="chat")
    batches, total = tasks.PackedBatches(rows, 4), 0.0
    for i in (i for row in batches.examples(0) for i in row):
        row = rows.rows[i]
        ids = torch.tensor([[int(row["first"]), *row["targets"].tolist()]])
        with torch.no_grad():
            logits = theirs(ids[:, :-1]).logits[0].double()
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total += float((nll * torch.tensor(row["weights"])).sum())
    loss = jax.jit(train.causal_lm, static_argnums=0)(model, params, batches[0]).loss
    assert float(loss) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("kind", ["language_model", "instruct"])
def test_the_evaluation_measures_the_same_examples_packed_and_one_in_a_row(kind):
    model, params = model_and_params(positions="rotary")
    mesh, rows = (
        nanoflax.parallel.make_mesh("1,1,1"),
        rows_of([*SIZES, *SIZES[:6]], 48, "chat" if kind == "instruct" else "text"),
    )
    found = []
    for packing in ("none", "best_fit"):
        config = Config(
            model=model.config, task=TASK_KINDS[kind](length=48, packing=packing), train=TrainConfig(batch_size=3)
        )
        evaluator = tasks.Evaluator(model, config, BYTES, rows, mesh)
        number = len(rows) // 3 * 3 - 3
        found.append((evaluator(params)[0], evaluator._measure(params, number)[0]))
    (plain, part), (packed, packed_part) = found
    assert packed == pytest.approx(plain, rel=1e-6) and packed_part == pytest.approx(part, rel=1e-6)
    assert plain["validation_loss"] != part["validation_loss"]
    hosts = [list(packed_evaluation(rows, number, 4, own)) for own in ([0, 1], [2, 3], range(4))]
    for one, two, both in zip(*hosts, strict=True):
        for name, array in both.items():
            np.testing.assert_array_equal(np.concatenate([one[name], two[name]]), array)
    real = sum(len(row["targets"]) for row in rows.rows[:number])
    assert sum(int((batch["segments"] > 0).sum()) for batch in hosts[2]) == real


# Misuse.


@pytest.mark.parametrize(
    "kind, fields, words",
    [
        ("classify", dict(packing="best_fit"), "task.packing is a field of task.kind=instruct, language_model"),
        ("instruct", dict(packing="first_fit"), "task.packing='first_fit' is not one of none, best_fit"),
        (
            "language_model",
            dict(packing="best_fit", max_shift=2, shift_probability=0.5),
            "task.packing='best_fit' does not work with task.shift_probability=0.5",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_by_name(kind, fields, words):
    with pytest.raises(UserError) as caught:
        validate(Config(task=from_dict(AnyTask, {"kind": kind} | fields, "task")))
    assert words in str(caught.value)
    validate(Config(task=LanguageModel(packing="best_fit", max_shift=2)))  # shifts in the evaluation alone


def test_virtual_tokens_before_relative_positions_are_refused():
    config = Config(
        model=ModelConfig(positions="relative"),
        peft=PromptTuning(),
        task=Instruct(packing="best_fit", length=48),
        train=TrainConfig(batch_size=4),
    )
    with pytest.raises(UserError, match="packing='best_fit' does not work with peft.kind='prompt'.*relative"):
        tasks.training_batches(rows_of([3], kind="chat"), config)
