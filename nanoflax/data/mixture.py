"""Mixtures of sources: NAME=SOURCE; NAME=SOURCE, with weights by stage, 0: web=0.8,code=0.2; 8000: web=0.5,code=0.5.

    the number of a row --Schedule--> (source, its n-th row) --permutation of its epoch--> (source, window)

Both arrows are O(1) functions of the position, so any number of processes reads the same rows, from any step on.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int

from nanoflax.data.batches import shuffled
from nanoflax.errors import UserError

MAX_BLOCK = 1000  # rows; weights that need more are rounded
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
WEIGHT = re.compile(r"\d{1,12}(\.\d{0,12})?|\.\d{1,12}|\d{1,12}/\d{1,12}")
Weights = Mapping[str, Fraction]


@dataclasses.dataclass(frozen=True)
class Stage:
    """From this step on, each block of rows has `counts[name]` rows of each source; the others have none."""

    step: int
    counts: Mapping[str, int]

    @property
    def block(self) -> int:
        return sum(self.counts.values())


def is_mixture(text: str) -> bool:
    """Whether data.train has the form NAME=SOURCE; NAME=SOURCE, not that of one source."""
    return bool(re.match(rf"\s*{NAME.pattern}\s*=", text))


def parse_names(text: str, setting: str) -> dict[str, str]:
    """{name: value} of NAME=VALUE; NAME=VALUE. A first VALUE without a name has the name "".

    setting: the name of the setting, for messages. Raises: UserError for any other form.
    """
    found = {}
    for i, entry in enumerate(filter(None, map(str.strip, text.split(";")))):
        name, equals, value = (x.strip() for x in entry.partition("="))
        if not (equals and NAME.fullmatch(name)) and i == 0 and not is_mixture(text):
            name, value = "", entry
        elif not (equals and NAME.fullmatch(name) and value):
            raise UserError(f"data.{setting}: {entry!r} is not NAME=VALUE; write NAME=VALUE; NAME=VALUE")
        if name in found:
            raise UserError(f"data.{setting}: the name {name} occurs twice; each source needs its own")
        found[name] = value
    return found


def parse_stages(text: str, names: Sequence[str], steps: int) -> list[Stage]:
    """The stages of data.mixture, such as 0: web=0.8,code=0.2; 8000: web=0.5,code=0.3,math=0.2.

    names: of all sources. steps: train.steps. A text without "0:" is one stage. Weights are decimal numbers or
    fractions (1/3); only their ratios matter. Raises: UserError for unknown or unused names, weights that are not
    positive, and steps that do not begin at 0, ascend and stay below train.steps.
    """
    stages: list[Stage] = []
    for i, entry in enumerate(filter(None, map(str.strip, text.split(";")))):
        before, colon, weights = entry.rpartition(":")
        if not (before.strip().isdecimal() and before.isascii() if colon else i == 0):
            raise UserError(f"data.mixture: {entry!r} is not STEP: NAME=WEIGHT,NAME=WEIGHT")
        step = int(before) if colon else 0
        if i == 0 and step:
            raise UserError(f"data.mixture: the first stage begins at step {step}; it must begin at step 0")
        if i and step <= stages[-1].step:
            raise UserError(f"data.mixture: step {step} comes after step {stages[-1].step}; the steps must ascend")
        if step >= steps:
            raise UserError(f"data.mixture: the stage at step {step} never begins: train.steps={steps}")
        where = f"data.mixture, stage at step {step}"
        stages.append(Stage(step, block_counts(_parse_weights(weights, names, where), where)))
    if unused := [name for name in names if not any(name in stage.counts for stage in stages)]:
        raise UserError(f"data.mixture: no stage uses {', '.join(unused)}; give a weight, or remove it from data.train")
    return stages


def _parse_weights(text: str, names: Sequence[str], where: str) -> dict[str, Fraction]:
    weights = {}
    for entry in map(str.strip, text.split(",")):
        name, _, weight = (x.strip() for x in entry.partition("="))
        if name not in names:
            raise UserError(f"{where}: {entry!r} is not NAME=WEIGHT with a name of data.train: {', '.join(names)}")
        if name in weights:
            raise UserError(f"{where}: {name} occurs twice")
        if not WEIGHT.fullmatch(weight) or weight.endswith("/0") or not Fraction(weight):
            raise UserError(f"{where}: the weight {weight!r} of {name} must be a positive number, such as 0.8 or 1/3")
        weights[name] = Fraction(weight)
    return weights


def block_counts(weights: Weights, where: str) -> dict[str, int]:
    """{name: rows in a block}: the smallest block in which the counts have exactly the ratios of the weights.

    If it is larger than MAX_BLOCK, a block has MAX_BLOCK rows, rounded by the largest remainders.
    Raises: UserError, which begins with `where`, if a weight gets no row.
    """
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    block = min(math.lcm(*(share.denominator for share in shares.values())), MAX_BLOCK)
    counts = {name: int(share * block) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name] * block)  # stable: ties by order
    for name in by_remainder[: block - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            raise UserError(
                f"{where}: {name} has a share of {float(shares[name]):.2g}, less than one row in {MAX_BLOCK:,}; give "
                "it a larger weight in data.mixture"
            )
    return counts


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
        count = int(np.count_nonzero(self.blocks[stage] == source))
        return source, int(self.read_before[stage][source]) + block * count + int(earlier[slot])

    def rows_before(self, position: int) -> Int[np.ndarray, " names"]:
        """The number of rows of each source before a position."""
        return self._rows_before(self._stage(position), position)

    def _stage(self, position: int) -> int:
        return int(np.searchsorted(self.begins, position, side="right")) - 1

    def _rows_before(self, stage: int, position: int) -> Int[np.ndarray, " names"]:
        before, order = self.read_before[stage], self.blocks[stage]
        blocks, rest = divmod(position - self.begins[stage], len(order))
        count = functools.partial(np.bincount, minlength=len(before))
        cut = self._shuffled_block(stage, blocks)[0][:rest]
        return before + blocks * count(order) + count(cut)

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
        found = []
        for row in self.host_rows:
            source, before = self.schedule(step * self.batch_size + row)
            n = len(self.windows[self.names[source]])
            epoch, i = divmod(before, n)
            found.append((source, shuffled(i, n, self.seed, epoch)))
        return found

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of Windows.batch, and source [B] int32: the number of each row's source."""
        sources, windows = np.asarray(self.indices(step)).T
        batch = {"source": sources.astype(np.int32)}
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


def by_size(windows: Mapping[str, Any]) -> Stage:
    """One stage, in which the share of each source is its share of all windows."""
    sizes = {name: Fraction(len(of_source)) for name, of_source in windows.items()}
    return Stage(0, block_counts(sizes, "sources by their sizes (data.mixture is empty)"))
