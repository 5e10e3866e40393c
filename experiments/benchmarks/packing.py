"""`benchmark packing`: instruction tuning with packed rows, against rows padded to buckets, in real tokens a second.

The examples are the chats of `pychats`, of which few are as long as the longest. All sides train the same model on
them in one process, in turn, in both orders. A round is about as many real tokens on each side.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.benchmarks import rounds, sides
from nanoflax import config as configs
from nanoflax import data, parallel, runs, tasks, tokenizers, train

PADDED_STEPS = 16  # of a padded side in a round: ExampleBatches sorts the examples of so many batches by length


class RandomBatches:
    """Batches of rows in random order, padded to the bucket of the longest row: the usual padding."""

    def __init__(self, rows: Any, batch_size: int):
        self.rows, self.indices = rows, data.Batches(rows, batch_size).indices

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        return self.rows.batch(self.indices(step))


class Way(NamedTuple):
    """A way to make batches."""

    name: str
    batches: Any
    steps: int  # of a round
    examples: Callable[[int], Sequence[int]]  # step -> the numbers of the examples that it trains


def encoded_chats(job: sides.Job, examples: Sequence[Any] | None = None) -> tuple[Any, configs.ModelConfig]:
    """(the chats as Rows of at most T tokens, the model). examples: instead of those of pychats."""
    if examples is None:
        examples = tasks.load(tasks.examples_of(configs.ExampleData(train="pychats")), tasks.Chat).train
    *_, T, V, _ = job.sizes
    tokenizer = tokenizers.ByteTokenizer()
    if V >= 1024:
        texts = (message["content"] for chat in examples for message in chat.messages)
        tokenizer = tokenizers.train_sentencepiece(texts, min(V, 2048))
    model = dataclasses.replace(job.decoder, vocab_size=max(V, tokenizer.vocab_size))
    return tasks.encode(examples, tokenizer, T), model


def ways(rows: Any, B: int, mesh: Mesh) -> list[Way]:
    """B packed rows; as few packed rows as have the tokens of B padded ones; and B rows padded in two ways."""
    tokens = B * rows.mean_tokens  # of B examples
    few = B * tokens / tasks.PackedBatches(rows, B).tokens_per_step
    found = []
    for size in sorted({B, parallel.divisible_batch_size(max(1, round(few)), mesh)}, reverse=True):
        packed = tasks.PackedBatches(rows, size)
        steps = max(1, round(PADDED_STEPS * tokens / packed.tokens_per_step))
        found.append(
            Way(
                f"packed, {size} rows",
                packed,
                steps,
                lambda step, b=packed: [i for row in b.examples(step) for i in row],
            )
        )
    pooled, plain = tasks.ExampleBatches(rows, B), RandomBatches(rows, B)
    found.append(
        Way(f"padded, {B} rows, sorted in pools of {PADDED_STEPS} batches", pooled, PADDED_STEPS, pooled.indices)
    )
    return [*found, Way(f"padded, {B} rows, in random order", plain, PADDED_STEPS, plain.indices)]


def losses(model: Any, params: Any, rows: Any, number: int = 64) -> tuple[float, float]:
    """The mean loss of the first `number` examples in nats a token: (packed, each example in a batch of its own)."""
    rows = dataclasses.replace(rows, rows=rows.rows[:number], examples=rows.examples[:number])
    packed, found = tasks.PackedBatches(rows, 1), []
    alone = [rows.batch([i]) for i in range(len(rows))]
    compute = jax.jit(lambda batch: train.causal_lm(model, params, batch)[1:3])
    for batches in ([packed[step] for step in range(packed.num_rows)], alone):
        sums = np.sum([np.asarray(compute(batch), np.float64) for batch in batches], 0)
        found.append(float(sums[0] / sums[1]))
    return found[0], found[1]


def measure_packing(job: sides.Job, num_rounds: int, examples: Sequence[Any] | None = None) -> None:
    """Print the real tokens a second of each way, and how many times as fast packing is."""
    runs.setup_jax(trains=True)
    (rows, config), B = encoded_chats(job, examples), job.sizes[-1]
    model, mesh, state, _, step = sides.prepare_step(config, batch_size=B)
    compared, step = ways(rows, B, mesh), train.jit_step(step, state, mesh)
    lengths = np.array([rows.n_tokens(i) for i in range(len(rows))])
    print(
        f"packing: {len(rows):,} chats, mean {lengths.mean():.0f} tokens, median {np.median(lengths):.0f}, longest "
        f"{lengths.max()}; L={config.layers} D={config.dim} T={config.context}, on {jax.devices()[0].device_kind}",
        flush=True,
    )
    a, b = losses(model, state.params, rows)
    print(f"  loss of the same examples: {a:.7f} packed, {b:.7f} one by one; relative difference {abs(a / b - 1):.1e}")

    def run(way, first):
        """Seconds, real tokens and positions of way.steps steps from step `first`."""
        nonlocal state
        tokens = positions = 0
        begin = time.perf_counter()
        for i in range(first, first + way.steps):
            batch = way.batches[i]
            positions += batch["targets"].size
            state, metrics = step(state, parallel.put_batch(batch, mesh))
            tokens += int(lengths[way.examples(i)].sum())
        jax.block_until_ready(metrics)
        return time.perf_counter() - begin, tokens, positions

    for way in compared:  # compiles the shapes of all rounds
        shapes = {way.batches[i]["targets"].shape: i for i in range(way.steps * num_rounds)}
        for i in shapes.values():
            run(way._replace(steps=1), i)
    found, before = {way.name: [] for way in compared}, rounds.processor_seconds([os.getpid()])
    for i in range(num_rounds):
        for way in rounds.in_turn(compared, i):
            found[way.name].append(run(way, i * way.steps))
    summarise(found, rounds.other_load(before, rounds.processor_seconds([os.getpid()])))


def summarise(found: dict[str, list[tuple[float, int, int]]], other_load: float | None) -> None:
    """Print the medians, and the paired ratios of the first way to each other."""
    speeds = {name: [tokens / seconds for seconds, tokens, _ in of] for name, of in found.items()}
    first, *_ = speeds
    for name, speed in speeds.items():
        real = sum(tokens for _, tokens, _ in found[name]) / sum(positions for *_, positions in found[name])
        text = f"  {name:45} {statistics.median(speed):8,.0f} real tokens/s; {real:4.0%} of the positions are real"
        if name != first:
            ratios = sorted(a / b for a, b in zip(speeds[first], speed, strict=True))
            text += f"; {first}: {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(text)
    if warning := rounds.load_warning({"other_load": other_load}):
        print(f"  {warning}")
