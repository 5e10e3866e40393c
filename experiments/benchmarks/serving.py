"""`benchmark serve`: 64 requests at random times to the engine, against `nanoflax.sample` for one after another.

Prompts and replies have mixed lengths, and settings: greedy, and sampled with and without filters. Both sides run in
one process, in turn, and give the same tokens.
"""

import os
import queue
import statistics
import time
from typing import Any

import jax
import numpy as np

import nanoflax
from experiments.benchmarks import rounds, sides
from nanoflax import parallel, runs, serve, tokenizers

REQUESTS = 64
GAP = 0.05  # seconds between two requests, in the mean
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
)


def make_requests(vocab_size: int, context: int, seed: int = 0) -> list[tuple[float, serve.Request]]:
    """(the second of its arrival, the request) of each."""
    rng, now, found = np.random.default_rng(seed), 0.0, []
    for i in range(REQUESTS):
        prompt = rng.integers(0, vocab_size, rng.integers(4, min(129, context // 2))).tolist()
        new = min(int(rng.choice([16, 32, 64])), context // 2)
        found.append((now, serve.Request(prompt, new, seed=i, **SETTINGS[i % len(SETTINGS)])))
        now += rng.exponential(GAP)
    return found


def together(engine: serve.Engine, requests: list[tuple[float, serve.Request]]) -> tuple[list, list[list[float]]]:
    """(the tokens of each reply, the seconds from each request's arrival to each of its tokens)."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    tokens, times, begin = [[] for _ in requests], [[] for _ in requests], time.perf_counter()
    for i, (at, request) in enumerate(requests):
        time.sleep(max(0.0, begin + at - time.perf_counter()))
        engine.submit(request, lambda event, i=i: events.put((i, event, time.perf_counter())))
    left = len(requests)
    while left:
        i, event, now = events.get()
        if isinstance(event, serve.Finish):
            left -= 1
        else:
            tokens[i].append(event.id)
            times[i].append(now - begin - requests[i][0])
    return tokens, times


def one_by_one(model: Any, params: Any, requests: list[tuple[float, serve.Request]]) -> list[list[int]]:
    """The tokens of each reply."""
    names, found = ("temperature", "top_k", "top_p"), []
    for _, r in requests:
        settings: dict[str, Any] = {name: [getattr(r, name)] for name in names}
        found += nanoflax.sample(model, params, [r.prompt], r.max_new_tokens, rng=[r.seed], **settings)
    return found


def measure_serving(job: sides.Job, num_rounds: int, slots: int) -> None:
    """Print the tokens per second of both sides, and the engine's times."""
    runs.setup_jax(trains=False)
    config = job.decoder
    model = nanoflax.build(config)
    params = nanoflax.init(model, jax.random.PRNGKey(0))
    requests = make_requests(config.vocab_size, config.context)
    read, count = (sum(of) for of in zip(*((len(r.prompt), r.max_new_tokens) for _, r in requests), strict=True))
    print(
        f"serve: {REQUESTS} requests in {requests[-1][0]:.1f} s, {read:,} + {count:,} "
        f"tokens; L={config.layers} D={config.dim}, {model.compute_dtype}, {slots} slots, "
        f"on {jax.devices()[0].device_kind}",
        flush=True,
    )
    begin = time.perf_counter()
    with serve.Engine(model, params, None, slots, prefixes=0) as engine:
        print(f"  the engine starts in {time.perf_counter() - begin:.1f} s", flush=True)
        shapes = {(tokenizers.bucket(len(r.prompt)), r.max_new_tokens): (at, r) for at, r in requests}
        one_by_one(model, params, [*shapes.values()])  # compiles
        before, seconds, found = rounds.processor_seconds([os.getpid()]), {"together": [], "one by one": []}, []
        for i in range(num_rounds):
            for name in rounds.in_turn([*seconds], i):
                begin, compiled = time.perf_counter(), parallel.compile_seconds()
                if name == "together":
                    tokens, times = together(engine, requests)
                    found += times
                else:
                    expected = one_by_one(model, params, requests)
                assert parallel.compile_seconds() == compiled
                seconds[name].append(time.perf_counter() - begin)
            equal = sum(a == b for a, b in zip(tokens, expected, strict=True))
            print(f"  round {i + 1}: {equal} of {REQUESTS} replies are equal", flush=True)
        after = rounds.processor_seconds([os.getpid()])
    ratios = sorted(a / b for a, b in zip(seconds["one by one"], seconds["together"], strict=True))
    first, last = ([t[i] for t in found] for i in (0, -1))
    speeds = [(len(t) - 1) / (t[-1] - t[0]) for t in found]
    for name, of in seconds.items():
        print(f"  {name:12} {count / statistics.median(of):8,.1f} tokens/s; {statistics.median(of):.1f} s a round")
    print(f"  together is {statistics.median(ratios):.2f} times as fast ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    for name, values, unit in (
        ("time to the first token", first, "s"),
        ("time to the last token", last, "s"),
        ("speed of a reply", speeds, "tokens/s"),
    ):
        low, middle, high = np.percentile(values, [10, 50, 90])
        print(f"  {name:24} median {middle:7.2f} {unit}; 10% below {low:.2f}, 10% above {high:.2f}")
    if warning := rounds.load_warning({"other_load": rounds.other_load(before, after)}):
        print(f"  {warning}")
