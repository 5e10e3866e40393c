"""Examples to rows of token ids."""

import dataclasses

import numpy as np

from nanoflax.config import read_class_weights
from nanoflax.data import DataReport
from nanoflax.errors import UserError
from nanoflax.tasks.kinds import Chat, Classification, Pair, Tagging, Text
from nanoflax.tasks.rows import Rows
from nanoflax.tokenizers import align_tags, chat_ids, ends, show_mask


def encode(
    examples,
    tokenizer,
    length,
    labels=(),
    multi_label=False,
    truncate=True,
    target_length=None,
    report=None,
    noise=None,
):
    """Examples of one kind -> Rows, in order.

    A long Text becomes several rows, counted in `report`, with each of its tokens in just one.

    Args:
      length: tokens of a row at most, with the special ones; target_length: of a Pair's target
        (default: length).
      labels: the class names, for Classification and Tagging (examples.TaskData.labels).
      multi_label: a row may have several labels, or none. An example whose label is None has none in its row.
      truncate: a longer example is cut (its special tokens stay), and counted in `report`;
        otherwise longer ones are refused.
      noise: a noise.Noise for Texts, whose rows are then drawn anew in each epoch.
    Raises: UserError naming the examples that are too long, or if no row is left.
    """
    report, target_length = DataReport() if report is None else report, target_length or length
    prefix, suffix = ends(tokenizer)
    least = len(prefix) + len(suffix) + 1
    if min(length, target_length) < least:
        raise UserError(
            f"length {min(length, target_length)}: must be at least {least}, for the special tokens and one more"
        )
    number, too_long = {name: i for i, name in enumerate(labels)}, DataReport()
    around = len(prefix) + len(suffix)
    encode_target = getattr(tokenizer, "encode_target", tokenizer.encode)  # Marian has two

    def cut(values, limit, place, what="texts", room=0):
        if len(values) + room > limit:
            (report if truncate else too_long).add(
                f"{what} longer than {limit} tokens, {'cut' if truncate else 'refused'}", place
            )
        return values[: limit - room]

    def framed(ids, *limit):
        return np.asarray([*prefix, *cut(ids, *limit, room=around), *suffix], np.int32)

    def classification(example):
        if example.labels is None:
            return {"tokens": framed(tokenizer.encode(example.text), length, example.place)}
        if not multi_label and len(example.labels) != 1:
            report.add("examples without just one label, left out", example.place)
            return None
        label = (
            np.isin(labels, example.labels).astype(np.float32)
            if multi_label
            else np.asarray(number[example.labels[0]], np.int32)
        )
        ids = tokenizer.encode(example.text)
        return {"tokens": framed(ids, length, example.place), "label": label}

    def tagging(example):
        known = example.tags is not None
        numbers = [number[tag] for tag in example.tags] if known else [0] * len(example.tokens)
        ids, tags, weights = align_tags(example.tokens, numbers, tokenizer)
        inner = slice(length - around)
        before, after = [0] * len(prefix), [0] * len(suffix)
        row = {
            "tokens": framed(ids, length, example.place),
            "weights": np.asarray([*before, *weights[inner], *after], np.float32),
        }
        return row | ({"tags": np.asarray([*before, *tags[inner], *after], np.int32)} if known else {})

    def pair(example):
        row = {"source": framed(tokenizer.encode(example.source), length, example.place, "sources")}
        if example.target is not None:
            row["targets"] = framed(encode_target(example.target), target_length, example.place, "targets")
        return row

    def following(ids, weights):
        return {
            "first": np.asarray(ids[0], np.int32),
            "targets": np.asarray(ids[1:], np.int32),
            "weights": np.asarray(weights[1:], np.float32),
        }

    def chat(example):
        try:
            ids, weights = chat_ids(tokenizer, example.messages)
        except UserError as error:
            report.add(f"chats left out: {error}", example.place)
            return None
        ids, weights = cut(ids, length, example.place), weights[:length]
        if not any(weights[1:]):
            report.add(f"chats without a reply in the first {length} tokens, left out", example.place)
            return None
        return following(ids, weights)

    def texts(example):
        """Yields the rows of a Text, each with its part of it."""
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        ids, room, before = tokenizer.encode(example.text), noise and noise.max_ids, 0
        if not noise:  # the token before the targets stands before each part
            ids, room, before = [first, *ids, tokenizer.eos_id], length - 1, 1
        parts = [ids[at - before : at + room] for at in range(before, len(ids), room)]
        if not parts:
            report.add("texts that are nothing to the tokenizer, left out", example.place)
        if len(parts) > 1:
            (report if truncate else too_long).add(
                f"texts longer than {room + before} tokens, {'read in several rows' if truncate else 'refused'}",
                example.place,
            )
        for part in parts:
            row = {"text": np.asarray(part, np.int32)} if noise else following(part, [1.0] * len(part))
            yield (
                row,
                example if len(parts) == 1 else dataclasses.replace(example, text=tokenizer.decode(part[before:])),
            )

    make = {Classification: classification, Tagging: tagging, Pair: pair, Chat: chat}
    made = [
        both
        for example in examples
        for both in (texts(example) if type(example) is Text else [(make[type(example)](example), example)])
    ]
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
    return Rows(rows, kept, tokenizer.pad_id, length, target_length, noise, edges, multi_label=multi_label)


def weigh_classes(rows, labels, class_weights):
    """The Rows with weights by class, for training: the mean of their losses is then that of
    torch's CrossEntropyLoss(weight).

    labels: the class names; class_weights: as in config.Classify. "balanced" gives a class n / (classes
    times its count), of n examples or words, as scikit-learn does.
    Raises: UserError for names that are no classes, and for several labels.
    """
    name = "tags" if "tags" in rows.rows[0] else "label"
    if rows.rows[0][name].dtype != np.int32:
        raise UserError(f"task.class_weights={class_weights!r} does not go with several labels")
    if class_weights == "balanced":
        found = np.concatenate(
            [np.atleast_1d(row[name])[np.atleast_1d(row.get("weights", 1)) > 0] for row in rows.rows]
        )
        counts = np.bincount(found, minlength=len(labels))
        weights = len(found) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    else:
        given = read_class_weights(class_weights)
        if unknown := given.keys() - set(labels):
            raise UserError(
                f"task.class_weights names {', '.join(sorted(unknown))}; the classes are {', '.join(labels)}"
            )
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
