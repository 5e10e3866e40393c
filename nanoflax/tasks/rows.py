"""Makes padded batches from rows of token ids. Lengths are rounded up, so that few shapes are compiled.

examples --encode--> Rows --> ExampleBatches[step] (shuffled, endless) or evaluation_batches (once)
"""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from nanoflax.tasks.noise import Noise
from nanoflax.tokenizers import bucket

SHORTEST = 16  # the smallest padded length of a batch
Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Encoded examples, one dict of arrays each, and the settings of their batches. See `encode`."""

    rows: list[Row]
    examples: list  # the example of each row
    pad_id: int
    length: int  # the largest number of tokens in a source or text
    target_length: int
    noise: Noise | None = None  # for rows that contain only a text; see `with_noise`
    ends: tuple[int, int] = (0, 0)  # numbers of ids at the start and end of a source or text that `shifted` keeps
    class_weights: Float[np.ndarray, " labels"] | None = None  # a factor for the weights of each class
    multi_label: bool = False  # a text may have several classes, or none

    def __len__(self) -> int:
        return len(self.rows)

    def n_tokens(self, i: int) -> int:
        return sum(len(a) for name, a in self.rows[i].items() if name in ("text", "tokens", "source", "targets"))

    @property
    def mean_tokens(self) -> float:
        """The mean number of tokens in a row, without padding."""
        return statistics.mean(map(self.n_tokens, range(len(self))))

    def with_noise(self, draws: Sequence[tuple[int, int]], seed: int = 0) -> "Rows":
        """The rows (row number, epoch), corrupted if there is noise; deterministic in (seed, epoch, row number)."""

        def corrupted(i, epoch):
            if self.noise is None:
                return self.rows[i]
            return self.noise(self.rows[i]["text"], np.random.default_rng((seed, epoch, i)))

        rows = [corrupted(*draw) for draw in draws]
        return dataclasses.replace(self, rows=rows, examples=[self.examples[i] for i, _ in draws], noise=None)

    def lengths(self, indices: Sequence[int]) -> dict[str, int]:
        """The padded lengths of a batch of these rows: {"tokens", "source" or "targets": length}."""
        limits = {"tokens": self.length, "source": self.length, "targets": self.target_length}
        rows = [self.rows[i] for i in indices if i < len(self)]
        return {
            name: min(limit, bucket(max(len(row[name]) for row in rows), SHORTEST))
            for name, limit in limits.items()
            if name in rows[0]
        }

    def batch(self, indices: Sequence[int], lengths: dict[str, int] | None = None) -> dict[str, np.ndarray]:
        """A batch of the rows with these numbers [B]. A number after the last row gives only padding.

        Classification: tokens [B, T] int32, padding_mask [B, T] bool (True for real tokens), label [B] int32 (of
        multi-label rows [B, labels] float32, 0 or 1), weights [B] float32.
        Tagging: tokens, padding_mask, tags [B, T] int32, weights [B, T] float32.
        Pair: source [B, S] int32, source_mask [B, S] bool, targets [B, T] int32, weights [B, T] float32.
        Chat and Text: first [B] int32, the token before the targets [B, T] int32, and weights [B, T] float32.
        Masking noise: tokens, padding_mask, targets [B, T] and weights [B, T]. Other noise: the same as Pair.
        Batches for prediction have no label, tags or targets. Weights are 0 for padding.
        lengths: the padded lengths by name; default `self.lengths(indices)`.
        """
        lengths = lengths or self.lengths(indices)
        empty = {
            name: array[:0] if array.ndim and name != "label" else np.zeros_like(array)
            for name, array in self.rows[0].items()
        }
        rows = [self.rows[i] if i < len(self) else empty for i in indices]

        def padded(name: str, length: int, value: int = 0) -> np.ndarray:
            result = np.full((len(rows), length), value, empty[name].dtype)
            for line, row in zip(result, rows, strict=True):
                line[: len(row[name])] = row[name]
            return result

        def real(name: str) -> Bool[np.ndarray, "B T"]:
            sizes = np.asarray([len(row[name]) for row in rows])
            return np.arange(lengths[name]) < sizes[:, None]

        batch = {name: padded(name, length, self.pad_id) for name, length in lengths.items()}
        for name, mask in (("source", "source_mask"), ("tokens", "padding_mask")):
            if name in batch:
                batch[mask] = real(name)
        if "weights" in empty:
            batch["weights"] = padded("weights", lengths["targets" if "targets" in lengths else "tokens"])
        elif "targets" in batch:
            batch["weights"] = real("targets").astype(np.float32)
        else:
            batch["weights"] = (np.asarray(indices) < len(self)).astype(np.float32)
        for name in ("first", "label"):
            if name in empty:
                batch[name] = np.stack([row[name] for row in rows])
        if "tags" in empty:
            batch["tags"] = padded("tags", lengths["tokens"])
        if self.class_weights is not None:
            batch["weights"] *= self.class_weights[batch["label" if "label" in batch else "tags"]]
        return batch

    def shifted(
        self, max_shift: int, probability: float, seed: tuple[int, ...], indices: Sequence[int] | None = None
    ) -> "Rows":
        """The rows `indices` (default: all). With this probability, `random_shift` changes the source or text of a row.

        Deterministic in (*seed, row number). If a row has a source, its target does not change. The targets of a text
        are its shifted tokens; inserted tokens have weight 0.
        """
        indices = range(len(self)) if indices is None else indices
        name = "source" if "source" in self.rows[0] else "targets"
        limit = self.length if name == "source" else self.target_length
        before, after = self.ends

        def shift(i):
            row, rng = self.rows[i], np.random.default_rng((*seed, i))
            n = len(row[name]) - before - after
            if n < 1 or rng.random() >= probability:
                return row
            origins, inserted = (a[: limit - before - after] for a in random_shift(n, max_shift, rng))
            positions = np.r_[:before, before + origins, before + n : len(row[name])]
            row = row | {name: row[name][positions]}
            if name == "targets":
                inserted = np.r_[np.zeros(before), inserted, np.zeros(after)]
                row["weights"] = np.where(inserted, 0, row["weights"][positions]).astype(np.float32)
            return row

        return dataclasses.replace(self, rows=[shift(i) for i in indices], examples=[self.examples[i] for i in indices])


def random_shift(
    n: int, max_shift: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
    """A random shift of n tokens by 1 to max_shift: random tokens of the text are inserted at one place, or successive
    tokens are dropped (never all), or the tokens are rotated to the left or right.

    Returns: for each token of the result, its position in the text, and whether it was inserted.
    """
    origins, inserted = np.arange(n), np.zeros(n, bool)
    shift, change = rng.integers(1, max_shift + 1), rng.integers(3)
    if change == 0:
        at = rng.integers(n + 1)
        return np.insert(origins, at, rng.integers(n, size=shift)), np.insert(inserted, at, [True] * shift)
    if change == 1:
        shift = min(shift, n - 1)
        window = np.s_[(at := rng.integers(n - shift + 1)) : at + shift]
        return np.delete(origins, window), np.delete(inserted, window)
    return np.roll(origins, shift * rng.choice([-1, 1])), inserted
