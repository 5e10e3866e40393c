"""Examples to batches: tokens, what is trained among them, and padding to a few lengths.

    examples --encode--> Rows --> ExampleBatches[step] (shuffled, for ever) or evaluation (once)
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from nanoflax.config import read_class_weights
from nanoflax.encoding import align_tags, chat_ids, ends, show_mask
from nanoflax.errors import UserError
from nanoflax.examples import Chat, Classification, Pair, Tagging, Text
from nanoflax.sources import Report
from nanoflax.windows import Batches

POOL = 16  # batches that are cut together from examples sorted by length
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

    def __len__(self):
        return len(self.rows)

    def n_tokens(self, i):
        return sum(len(a) for name, a in self.rows[i].items()
                   if name in ("text", "tokens", "source", "targets"))

    def drawn(self, draws, seed=0):
        """The Rows of some draws, pairs (row number, epoch), under the noise of just this seed,
        epoch and row. What is drawn once stays as it is."""
        rows = [self.rows[i] if self.noise is None else
                self.noise(self.rows[i]["text"], np.random.default_rng((seed, epoch, i)))
                for i, epoch in draws]
        return dataclasses.replace(self, rows=rows, examples=[self.examples[i] for i, _ in draws],
                                   noise=None)

    def lengths(self, indices):
        """The lengths that a batch of these rows is padded to, by the name of the tokens."""
        limits = {"tokens": self.length, "source": self.length, "targets": self.target_length}
        rows = [self.rows[i] for i in indices if i < len(self)]
        return {name: min(limit, _bucket(max(len(row[name]) for row in rows)))
                for name, limit in limits.items() if name in rows[0]}

    def batch(self, indices, lengths=None):
        """[B] row numbers -> a dict of numpy arrays; a number past the end gives padding alone.

        Classification: tokens [B, T] int32, padding_mask [B, T] bool (True for real tokens),
        label [B] int32 (or [B, number of labels] float32, 0 or 1, of several), weights [B]
        float32. Tagging: tokens, padding_mask, tags [B, T] int32, weights [B, T] float32.
        Pair: source [B, S], source_mask [B, S], targets [B, T], weights [B, T].
        Chat and Text: first [B] int32, the token before the targets [B, T], and weights [B, T].
        Of denoising.Noise, masks: tokens, padding_mask, targets [B, T] and weights [B, T]; other
        noise: as a Pair. Weights are 0 for padding.
        lengths: those to pad to, by name; default `self.lengths(indices)`.
        """
        lengths = lengths or self.lengths(indices)
        nothing = {name: array[:0] if array.ndim and name != "label" else np.zeros_like(array)
                   for name, array in self.rows[0].items()}
        rows = [self.rows[i] if i < len(self) else nothing for i in indices]

        def padded(name, length, value=0):
            arrays = [row[name] for row in rows]
            result = np.full((len(rows), length), value, arrays[0].dtype)
            for line, array in zip(result, arrays):
                line[:len(array)] = array
            return result

        def real(name):
            sizes = np.asarray([len(row[name]) for row in rows])
            return np.arange(lengths[name]) < sizes[:, None]

        batch = {name: padded(name, length, self.pad_id) for name, length in lengths.items()}
        if "source" in batch:
            return batch | {"source_mask": real("source"),
                            "weights": real("targets").astype(np.float32)}
        if "label" in nothing:
            label = np.stack([row["label"] for row in rows])
            return batch | {"padding_mask": real("tokens"), "label": label,
                            "weights": (np.asarray(indices) < len(self)) * self._weights_of(label)}
        if "first" in nothing:
            return batch | {"first": np.stack([row["first"] for row in rows]),
                            "weights": padded("weights", lengths["targets"])}
        batch |= {"padding_mask": real("tokens"), "weights": padded("weights", lengths["tokens"])}
        if "tags" in nothing:
            batch["tags"] = padded("tags", lengths["tokens"])
            batch["weights"] *= self._weights_of(batch["tags"])
        return batch

    def _weights_of(self, classes):
        return np.float32(1) if self.class_weights is None else self.class_weights[classes]

    def shifted(self, max_shift, probability, seed, indices=None):
        """Rows (these `indices`, default all) whose source or text is `moved`, each with this
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
            place, new = moved(n, max_shift, rng)
            place, new = place[:limit - before - after], new[:limit - before - after]
            whole = np.r_[:before, before + place, before + n:len(row[name])]
            row = row | {name: row[name][whole]}
            if name == "targets":
                new = np.r_[np.zeros(before), new, np.zeros(after)]
                row["weights"] = np.where(new, 0, row["weights"][whole]).astype(np.float32)
            return row

        return dataclasses.replace(self, rows=[one(i) for i in indices],
                                   examples=[self.examples[i] for i in indices])


def moved(n, max_shift, rng):
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
        window = np.s_[(at := rng.integers(n - shift + 1)):at + shift]
        return np.delete(place, window), np.delete(new, window)
    return np.roll(place, shift * rng.choice([-1, 1])), new


def _bucket(length):
    """The next power of two: a compiled step for each of a few lengths."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def encode(examples, tokenizer, length, labels=(), multi_label=False, truncate=True,
           target_length=None, report=None, noise=None):
    """Examples of one kind -> Rows, in order.

    A long Text becomes several rows, counted in `report`, with each of its tokens in just one.

    Args:
      length: tokens of a row at most, with the special ones; target_length: of a Pair's target
        (default: length).
      labels: the class names, for Classification and Tagging (examples.TaskData.labels).
      multi_label: a row may have several labels, or none.
      truncate: a longer example is cut (its special tokens stay), and counted in `report`;
        otherwise longer ones are refused.
      noise: a denoising.Noise for Texts, whose rows are then drawn anew in each epoch.
    Raises: UserError naming the examples that are too long, or if no row is left.
    """
    report, target_length = Report() if report is None else report, target_length or length
    prefix, suffix = ends(tokenizer)
    least = len(prefix) + len(suffix) + 1
    if min(length, target_length) < least:
        raise UserError(f"length {min(length, target_length)}: must be at least {least}, for the "
                        "special tokens and one more")
    number, too_long = {name: i for i, name in enumerate(labels)}, Report()
    around = len(prefix) + len(suffix)
    encode_target = getattr(tokenizer, "encode_target", tokenizer.encode)  # Marian has two

    def cut(values, limit, place, what="texts", room=0):
        if len(values) + room > limit:
            (report if truncate else too_long).add(
                f"{what} longer than {limit} tokens, {'cut' if truncate else 'refused'}", place)
        return values[:limit - room]

    def framed(ids, *limit):
        return np.asarray([*prefix, *cut(ids, *limit, room=around), *suffix], np.int32)

    def classification(example):
        if not multi_label and len(example.labels) != 1:
            report.add("examples without just one label, left out", example.place)
            return None
        label = (np.isin(labels, example.labels).astype(np.float32) if multi_label
                 else np.asarray(number[example.labels[0]], np.int32))
        ids = tokenizer.encode(example.text)
        return {"tokens": framed(ids, length, example.place), "label": label}

    def tagging(example):
        ids, tags, weights = align_tags(example.tokens, [number[tag] for tag in example.tags],
                                        tokenizer)
        inner = slice(length - around)
        before, after = [0] * len(prefix), [0] * len(suffix)
        return {"tokens": framed(ids, length, example.place),
                "tags": np.asarray([*before, *tags[inner], *after], np.int32),
                "weights": np.asarray([*before, *weights[inner], *after], np.float32)}

    def pair(example):
        source, target = tokenizer.encode(example.source), encode_target(example.target)
        return {"source": framed(source, length, example.place, "sources"),
                "targets": framed(target, target_length, example.place, "targets")}

    def following(ids, weights):
        return {"first": np.asarray(ids[0], np.int32), "targets": np.asarray(ids[1:], np.int32),
                "weights": np.asarray(weights[1:], np.float32)}

    def chat(example):
        try:
            ids, weights = chat_ids(tokenizer, example.messages)
        except UserError as error:
            report.add(f"chats left out: {error}", example.place)
            return None
        ids, weights = cut(ids, length, example.place), weights[:length]
        if not any(weights[1:]):
            report.add(f"chats without a reply in the first {length} tokens, left out",
                       example.place)
            return None
        return following(ids, weights)

    def texts(example):
        """Yields the rows of a Text, each with its part of it."""
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        ids, room, before = tokenizer.encode(example.text), noise and noise.room, 0
        if not noise:  # the token before the targets stands before each part
            ids, room, before = [first, *ids, tokenizer.eos_id], length - 1, 1
        parts = [ids[at - before:at + room] for at in range(before, len(ids), room)]
        if not parts:
            report.add("texts that are nothing to the tokenizer, left out", example.place)
        if len(parts) > 1:
            (report if truncate else too_long).add(
                f"texts longer than {room + before} tokens, "
                f"{'read in several rows' if truncate else 'refused'}", example.place)
        for part in parts:
            row = ({"text": np.asarray(part, np.int32)} if noise else
                   following(part, [1.0] * len(part)))
            yield row, example if len(parts) == 1 else dataclasses.replace(
                example, text=tokenizer.decode(part[before:]))

    make = {Classification: classification, Tagging: tagging, Pair: pair, Chat: chat}
    made = [both for example in examples for both in (
        texts(example) if type(example) is Text else [(make[type(example)](example), example)])]
    rows, kept = ([both[i] for both in made if both[0] is not None] for i in (0, 1))
    if too_long.counts:
        raise UserError(f"{'; '.join(too_long.lines())}; raise the length, or ask to truncate them")
    if not rows:
        raise UserError(f"no example is left: {'; '.join(report.lines()) or 'there was none'}")
    edges = len(prefix), len(suffix)
    if "first" in rows[0]:  # a text of its own, not the answer to a source
        target_length, edges = length, (0, 1)
    if noise:
        target_length = noise.target_length
    return Rows(rows, kept, tokenizer.pad_id, length, target_length, noise, edges)


def weigh_classes(rows, labels, class_weights):
    """The Rows with weights by class, for training: the mean of their losses is then that of
    torch's CrossEntropyLoss(weight).

    labels: the class names; class_weights: as in TaskConfig. "balanced" gives a class n / (classes
    times its count), of n examples or words, as scikit-learn does.
    Raises: UserError for names that are no classes, and for several labels.
    """
    name = "tags" if "tags" in rows.rows[0] else "label"
    if rows.rows[0][name].dtype != np.int32:
        raise UserError(f"task.class_weights={class_weights!r} does not go with several labels")
    if class_weights == "balanced":
        found = np.concatenate([np.atleast_1d(row[name])[np.atleast_1d(row.get("weights", 1)) > 0]
                                for row in rows.rows])
        counts = np.bincount(found, minlength=len(labels))
        weights = len(found) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    else:
        given = read_class_weights(class_weights)
        if unknown := given.keys() - set(labels):
            raise UserError(f"task.class_weights names {', '.join(sorted(unknown))}; the classes "
                            f"are {', '.join(labels)}")
        weights = [given.get(label, 1) for label in labels]
    return dataclasses.replace(rows, class_weights=np.asarray(weights, np.float32))


def show_row(rows, tokenizer):
    """The first of the Rows as show_mask has it, or None where all of its tokens are trained."""
    row = rows.rows[0]
    if "weights" not in row or row["weights"].all():
        return None
    if "first" in row:
        return show_mask(tokenizer, [int(row["first"]), *row["targets"]], [0, *row["weights"]])
    return show_mask(tokenizer, row["tokens"], row["weights"])


# Rows to batches.


class ExampleBatches:
    """batches[step] -> Rows.batch of a step, or this process's part of it.

    As windows.Batches: each epoch is a permutation by (seed, epoch), any step is found at once, and
    the batch that all processes have together is the same for any number of them. Of every 16
    batches the rows are sorted by length and dealt out, so that a batch holds rows of like length
    and little padding.
    own: the rows of every batch that this process reads (sharding.rows), None for all.
    shift: (max_shift, probability) of Rows.shifted, drawn anew at every step, or None.
    """

    def __init__(self, rows, batch_size, seed=0, shuffle=True, own=None, shift=None):
        self._pools = Batches(rows, POOL * batch_size, seed, shuffle)
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle
        self.own, self.shift = range(batch_size) if own is None else own, shift

    def draws(self, step):
        """(number, epoch) of each row of batches[step], of all processes together, [batch_size]."""
        pool, i = divmod(step, POOL)
        first = pool * POOL * self.batch_size
        draws = [(row, (first + k) // len(self.rows))
                 for k, row in enumerate(self._pools.indices(pool))]
        if self.shuffle:
            draws.sort(key=lambda draw: self.rows.n_tokens(draw[0]))
            i = np.random.default_rng((self.seed, pool)).permutation(POOL)[i]
        return draws[i * self.batch_size:(i + 1) * self.batch_size]

    def indices(self, step):
        """The numbers of the rows of batches[step], of all processes together, [batch_size]."""
        return [row for row, _ in self.draws(step)]

    def __getitem__(self, step):
        rows = self.rows.drawn(self.draws(step), self.seed)
        if self.shift:
            rows = rows.shifted(*self.shift, (self.seed, step))
        return rows.batch(self.own, rows.lengths(range(self.batch_size)))


def evaluation(rows, batch_size, own=None):
    """Yields batches of every row once, in order; the last is filled up with rows of weight 0.

    own: as in ExampleBatches.
    """
    own = range(batch_size) if own is None else own
    for start in range(0, len(rows), batch_size):
        indices = range(start, start + batch_size)
        yield rows.batch([indices[i] for i in own], rows.lengths(indices))
