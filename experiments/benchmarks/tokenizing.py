"""`benchmark tokenize`: making a token store, against SentencePiece's own batches, in text a second.

Both sides use all cores, in turn, in both orders. nanoflax reads .jsonl, tokenizes, writes shards and their checksums;
of SentencePiece only the encoding is counted, of texts that are in memory. The corpus is made of random lines of
pydocs, and is removed at the end.
"""

import functools
import json
import os
import pathlib
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import sentencepiece

from experiments.benchmarks import rounds
from nanoflax import data, report, tokenizers

DOCUMENT = 40  # lines
CHUNK = 1000  # documents that SentencePiece encodes at once


def write_corpus(path: pathlib.Path, size: int) -> int:
    """Writes documents with about `size` bytes of text; returns their bytes in UTF-8."""
    lines = [line for text in data.documents("pydocs", "all") for line in text.splitlines(keepends=True)]
    drawn, written = random.Random(0), 0
    with open(path, "w") as file:
        while written < size:
            text = "".join(drawn.choices(lines, k=DOCUMENT))
            written += len(text.encode())
            file.write(report.to_json({"text": text}) + "\n")
    return written


def chunks(path: pathlib.Path) -> Iterator[list[str]]:
    """Yields the texts of a corpus, CHUNK at a time."""
    chunk = []
    with open(path) as file:
        for line in file:
            chunk.append(json.loads(line)["text"])
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def encode(path: pathlib.Path, model: bytes) -> float:
    """The seconds of SentencePiece's batches."""
    processor, seconds = sentencepiece.SentencePieceProcessor(model_proto=model), 0.0
    for texts in chunks(path):
        begin = time.perf_counter()
        processor.encode(texts, num_threads=os.cpu_count())
        seconds += time.perf_counter() - begin
    return seconds


def build(path: pathlib.Path, tokenizer: tokenizers.SentencePieceTokenizer) -> float:
    """The seconds of a token store."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        engine = functools.partial(data.tokenize_parts, title=path.name)
        data.build_store(f"{directory}/store", data.Source(f"text:{path}"), tokenizer, "all", engine)
        return time.perf_counter() - begin


def measure_tokenizing(megabytes: int, num_rounds: int) -> None:
    """Print the rates, their paired ratio, and the memory. megabytes: of text."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "corpus.jsonl"
        size = write_corpus(path, megabytes * 10**6)
        tokenizer = tokenizers.train_sentencepiece(data.documents("pydocs", "all"), 4096)
        sides = {"nanoflax": lambda: build(path, tokenizer), "SentencePiece": lambda: encode(path, tokenizer.model)}
        found, before = {name: [] for name in sides}, rounds.processor_seconds([os.getpid()])
        for i in range(num_rounds):
            for name in rounds.in_turn([*sides], i):
                found[name].append(sides[name]())
        load = rounds.other_load(before, rounds.processor_seconds([os.getpid()]))
    cores = os.cpu_count() or 1
    print(f"tokenize: {report.format_bytes(size)} of text, BPE of {tokenizer.vocab_size:,} pieces, {cores} cores")
    for name, seconds in found.items():
        rate = size / statistics.median(seconds)
        print(f"  {name:13}  median {statistics.median(seconds):7.1f} s  {report.format_bytes(rate / cores)}/s a core")
    ratios = sorted(b / a for a, b in zip(found["nanoflax"], found["SentencePiece"], strict=True))
    print(f"  nanoflax has {statistics.median(ratios):.2f} of the rate ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    unit = 1 if sys.platform == "darwin" else 1024
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    print(f"  peak memory of a worker: {report.format_bytes(worker)}")
    if warning := rounds.load_warning({"other_load": load}):
        print(f"  {warning}")
