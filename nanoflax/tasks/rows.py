"""Examples to batches: tokens, what is trained among them, and padding to a few lengths.

examples --encode--> Rows --> ExampleBatches[step] (shuffled, for ever) or evaluation (once)
"""

import dataclasses
from collections.abc import Callable

import numpy as np

SHORTEST = 16  # the smallest length that batches are padded to


# Examples to rows.


@dataclasses.dataclass(frozen=True)
class Rows:
    """Encoded examples, one dict of arrays each, and how they become a batch. See `encode`."""

    rows: list
    examples: list  # what each row was made of
    pad_id: int
    length: int
    target_length: int
    noise: Callable | None = None  # (text, a Generator) -> a row, of rows that hold a text alone
    ends: tuple = (0, 0)  # ids at the two ends of a source or text that `shifted` leaves there
    class_weights: np.ndarray | None = None  # [labels] float32, factors of the weights by class
    multi_label: bool = False  # a text may have several classes, or none

    def __len__(self):
        return len(self.rows)

    def n_tokens(self, i):
        return sum(len(a) for name, a in self.rows[i].items() if name in ("text", "tokens", "source", "targets"))

    def with_noise(self, draws, seed=0):
        """The Rows of some draws, pairs (row number, epoch), under the noise of just this seed,
        epoch and row. What is drawn once stays as it is."""
        rows = [
            self.rows[i]
            if self.noise is None
            else self.noise(self.rows[i]["text"], np.random.default_rng((seed, epoch, i)))
            for i, epoch in draws
        ]
        return dataclasses.replace(self, rows=rows, examples=[self.examples[i] for i, _ in draws], noise=None)

    def lengths(self, indices):
        """The lengths that a batch of these rows is padded to, by the name of the tokens."""
        limits = {"tokens": self.length, "source": self.length, "targets": self.target_length}
        rows = [self.rows[i] for i in indices if i < len(self)]
        return {
            name: min(limit, _bucket(max(len(row[name]) for row in rows)))
            for name, limit in limits.items()
            if name in rows[0]
        }

    def batch(self, indices, lengths=None):
        """[B] row numbers -> a dict of numpy arrays; a number past the end gives padding alone.

        Classification: tokens [B, T] int32, padding_mask [B, T] bool (True for real tokens),
        label [B] int32 (or [B, number of labels] float32, 0 or 1, of several), weights [B]
        float32. Tagging: tokens, padding_mask, tags [B, T] int32, weights [B, T] float32.
        Pair: source [B, S], source_mask [B, S], targets [B, T], weights [B, T].
        Chat and Text: first [B] int32, the token before the targets [B, T], and weights [B, T].
        Of noise.Masking: tokens, padding_mask, targets [B, T] and weights [B, T]; other
        noise: as a Pair. Weights are 0 for padding. Without labels: no label, tags or targets.
        lengths: those to pad to, by name; default `self.lengths(indices)`.
        """
        lengths = lengths or self.lengths(indices)
        nothing = {
            name: array[:0] if array.ndim and name != "label" else np.zeros_like(array)
            for name, array in self.rows[0].items()
        }
        rows = [self.rows[i] if i < len(self) else nothing for i in indices]

        def padded(name, length, value=0):
            arrays = [row[name] for row in rows]
            result = np.full((len(rows), length), value, arrays[0].dtype)
            for line, array in zip(result, arrays):
                line[: len(array)] = array
            return result

        def real(name):
            sizes = np.asarray([len(row[name]) for row in rows])
            return np.arange(lengths[name]) < sizes[:, None]

        batch = {name: padded(name, length, self.pad_id) for name, length in lengths.items()}
        for name, mask in (("source", "source_mask"), ("tokens", "padding_mask")):
            if name in batch:
                batch[mask] = real(name)
        if "weights" in nothing:
            batch["weights"] = padded("weights", lengths["targets" if "targets" in lengths else "tokens"])
        elif "targets" in batch:
            batch["weights"] = real("targets").astype(np.float32)
        else:
            batch["weights"] = (np.asarray(indices) < len(self)).astype(np.float32)
        for name in ("first", "label"):
            if name in nothing:
                batch[name] = np.stack([row[name] for row in rows])
        if "tags" in nothing:
            batch["tags"] = padded("tags", lengths["tokens"])
        if self.class_weights is not None:
            batch["weights"] *= self.class_weights[batch["label" if "label" in batch else "tags"]]
        return batch

    def shifted(self, max_shift, probability, seed, indices=None):
        """Rows (these `indices`, default all) whose source or text is shifted by `random_shift`, each with this
        probability, drawn from (*seed, its number): a text's targets follow what it has become, and
        tokens put in are no targets; a source's target stays as it is."""
        indices = range(len(self)) if indices is None else indices
        name = "source" if "source" in self.rows[0] else "targets"
        limit = self.length if name == "source" else self.target_length
        before, after = self.ends

        def one(i):
            row, rng = self.rows[i], np.random.default_rng((*seed, i))
            n = len(row[name]) - before - after
            if n < 1 or rng.random() >= probability:
                return row
            place, new = random_shift(n, max_shift, rng)
            place, new = place[: limit - before - after], new[: limit - before - after]
            whole = np.r_[:before, before + place, before + n : len(row[name])]
            row = row | {name: row[name][whole]}
            if name == "targets":
                new = np.r_[np.zeros(before), new, np.zeros(after)]
                row["weights"] = np.where(new, 0, row["weights"][whole]).astype(np.float32)
            return row

        return dataclasses.replace(self, rows=[one(i) for i in indices], examples=[self.examples[i] for i in indices])


def random_shift(n, max_shift, rng):
    """Where each of n tokens stood, once up to max_shift of them are moved.

    One of three, with 1 to max_shift tokens: copies of any put in at one place; a window dropped
    (never all); or the whole rotated, either way. rng: a numpy Generator.
    Returns ([n'] int places before, [n'] bool, True for tokens put in).
    """
    place, new = np.arange(n), np.zeros(n, bool)
    shift, how = rng.integers(1, max_shift + 1), rng.integers(3)
    if how == 0:
        at = rng.integers(n + 1)
        return np.insert(place, at, rng.integers(n, size=shift)), np.insert(new, at, [True] * shift)
    if how == 1:
        shift = min(shift, n - 1)
        window = np.s_[(at := rng.integers(n - shift + 1)) : at + shift]
        return np.delete(place, window), np.delete(new, window)
    return np.roll(place, shift * rng.choice([-1, 1])), new


def _bucket(length):
    """The next power of two: a compiled step for each of a few lengths."""
    return max(SHORTEST, 1 << (length - 1).bit_length())
