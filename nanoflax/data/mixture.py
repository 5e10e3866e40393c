"""Mixtures of sources: NAME=SOURCE; NAME=SOURCE, with weights by stage, 0: web=0.8,code=0.2; 8000: web=0.5,code=0.5.

    the number of a row --Schedule--> (source, its n-th row) --permutation of its epoch--> (source, window)

Both arrows are O(1) functions of the position, so any number of processes reads the same rows, from any step on.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int

from nanoflax.data.batches import shuffled
from nanoflax.data.parts import documents, plan
from nanoflax.data.source import Source
from nanoflax.data.stages import Stage, block_counts, field_of_source


class Schedule:
    """Which source each row of a run reads. Rows have positions: step * batch_size + row in the batch.

    In a stage, each block of rows contains the rows of each source exactly as often as Stage.counts says, in an order
    that (seed, stage, block) shuffles. The last block of a stage may be cut. A source continues where it was when a
    later stage uses it again.
    """

    def __init__(self, names: Sequence[str], stages: Sequence[Stage], batch_size: int, seed: int = 0) -> None:
        self.seed = seed
        self.begins = [stage.step * batch_size for stage in stages]  # positions
        self.blocks = [np.repeat(np.arange(len(names)), [s.counts.get(name, 0) for name in names]) for s in stages]
        self.counts = [np.bincount(block, minlength=len(names)) for block in self.blocks]  # of each source
        self.read_before = [np.zeros(len(names), np.int64)]  # rows of each source before each stage
        for stage in range(1, len(stages)):
            self.read_before.append(self._rows_before(stage - 1, self.begins[stage]))
        self._block = functools.lru_cache(maxsize=64)(self._shuffled_block)

    def __call__(self, position: int) -> tuple[int, int]:
        """(the number of the source, the number of rows that were read from this source before)."""
        stage = self._stage(position)
        block, slot = divmod(position - self.begins[stage], len(self.blocks[stage]))
        sources, earlier = self._block(stage, block)
        source = int(sources[slot])
        return source, int(self.read_before[stage][source] + block * self.counts[stage][source] + earlier[slot])

    def rows_before(self, position: int) -> Int[np.ndarray, " names"]:
        """The number of rows of each source before a position."""
        return self._rows_before(self._stage(position), position)

    def _stage(self, position: int) -> int:
        return int(np.searchsorted(self.begins, position, side="right")) - 1

    def _rows_before(self, stage: int, position: int) -> Int[np.ndarray, " names"]:
        before, counts = self.read_before[stage], self.counts[stage]
        block, rest = divmod(position - self.begins[stage], len(self.blocks[stage]))
        cut = self._shuffled_block(stage, block)[0][:rest]
        return before + block * counts + np.bincount(cut, minlength=len(counts))

    def _shuffled_block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each row in a block: (its source, the number of earlier rows of that source in the block)."""
        order = self.blocks[stage]
        keys = np.random.SeedSequence((self.seed, stage, block, len(order))).generate_state(len(order), np.uint64)
        sources = order[np.argsort(keys, kind="stable")]
        earlier = np.empty_like(sources)
        # Sorted by source again, the rows are `order`, where searchsorted finds the first row of each source.
        earlier[np.argsort(sources, kind="stable")] = np.arange(len(order)) - np.searchsorted(order, order)
        return sources, earlier


class Mixture:
    """batches[step] of several sources: the same interface as Batches, to which a mixture of one source is equal.

    windows: {name: Windows, or any object with a length and `batch`}, whose batches have equal shapes. stages: None:
    one stage, in which each source has rows by its number of windows. host_rows: see Batches.
    """

    def __init__(
        self,
        windows: Mapping[str, Any],
        stages: Sequence[Stage] | None,
        batch_size: int,
        seed: int = 0,
        host_rows: Sequence[int] | None = None,
    ) -> None:
        self.windows, self.batch_size, self.seed = dict(windows), batch_size, seed
        self.names, self.stages = list(windows), stages or [by_size(windows)]
        self.schedule = Schedule(self.names, self.stages, batch_size, seed)
        self.host_rows = range(batch_size) if host_rows is None else host_rows

    def indices(self, step: int) -> list[tuple[int, int]]:
        """The (number of the source, number of the window) of each row of batches[step], in the order of host_rows."""
        return [(source, window) for source, _, window in self.places(step)]

    def places(self, step: int) -> list[tuple[int, int, int]]:
        """As `indices`, with the epoch: (number of the source, how often it was read before, number of the window)."""
        found = []
        for row in self.host_rows:
            source, before = self.schedule(step * self.batch_size + row)
            n = len(self.windows[self.names[source]])
            epoch, i = divmod(before, n)
            found.append((source, epoch, shuffled(i, n, self.seed, epoch)))
        return found

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of Windows.batch, and source_number [B] int32: the number of each row's source."""
        sources, windows = np.asarray(self.indices(step)).T
        batch = {"source_number": sources.astype(np.int32)}
        for k in np.unique(sources).tolist():
            of_source = sources == k
            for name, array in self.windows[self.names[k]].batch(windows[of_source]).items():
                whole = batch.setdefault(name, np.empty((len(sources), *array.shape[1:]), array.dtype))
                whole[of_source] = array
        return batch

    def describe(self, step: int) -> list[tuple[str, int, int, int]]:
        """The (source, window, first document, last document) of each row of a step, of all processes."""
        whole = Mixture(self.windows, self.stages, self.batch_size, self.seed)
        named = [(self.names[source], window) for source, window in whole.indices(step)]
        return [(name, window, *self.windows[name].documents(window)) for name, window in named]

    def epochs(self, step: int) -> dict[str, float]:
        """{name: how many times the windows of a source were read before this step}."""
        rows = self.schedule.rows_before(step * self.batch_size).tolist()
        return {name: n / len(self.windows[name]) for name, n in zip(self.names, rows, strict=True)}


def mixed_documents(sources: Mapping[str, Source], stages: Sequence[Stage] | None, steps: int) -> Iterator[str]:
    """Yields the training documents of several sources, to train a tokenizer: the numbers of characters have the ratios
    of the rows of a run of `steps` steps, or without stages of the sizes of the sources."""
    if stages:
        rows = Schedule(list(sources), stages, 1).rows_before(steps).tolist()
        weights = dict(zip(sources, rows, strict=True))
    else:
        weights = {name: plan(source, "all").size for name, source in sources.items()}

    def read(name: str) -> Iterator[str]:
        with field_of_source(sources, name):
            yield from documents(sources[name])

    return interleave({name: functools.partial(read, name) for name in sources if weights[name]}, weights)


def interleave(readers: Mapping[str, Callable[[], Iterable[str]]], weights: Mapping[str, float]) -> Iterator[str]:
    """Yields the texts of several readers, so that the numbers of characters have the ratios of the weights.

    readers: {name: a function that begins to read}. A reader that ends begins again, until all have ended or half of
    the text is a repetition.
    """
    streams, ended = {name: iter(read()) for name, read in readers.items()}, set()
    characters, once, repeated = dict.fromkeys(readers, 0), 0, 0
    while len(ended) < len(streams) and repeated <= once:
        name = min(characters, key=lambda name: characters[name] / weights[name])
        text = next(streams[name], None)
        if text is None:
            if not characters[name]:  # an empty source, which `prepare` refuses
                del streams[name], characters[name]
                continue
            ended.add(name)
            streams[name] = iter(readers[name]())
            continue
        characters[name] += len(text)
        if name in ended:
            repeated += len(text)
        else:
            once += len(text)
        yield text


def by_size(windows: Mapping[str, Any]) -> Stage:
    """One stage, in which the share of each source is its share of all windows."""
    sizes = {name: Fraction(len(of_source)) for name, of_source in windows.items()}
    return Stage(0, block_counts(sizes, "sources by their sizes (data.mixture is empty)"))
