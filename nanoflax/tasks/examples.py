"""Task data: the examples of a source, cleaned, checked and split, with every loss counted.

For the sources and the five kinds of examples see nanoflax.task_sources.
"""

import dataclasses
import hashlib
import itertools
import json
import re

from nanoflax.data import DataReport, is_held_out
from nanoflax.errors import UserError
from nanoflax.tasks.kinds import Chat, Classification, Pair, Tagging, Text
from nanoflax.tasks.sources import TaskSource, records


@dataclasses.dataclass(frozen=True)
class TaskData:
    """labels: the classes in order; for tags O, then B- and I- of each type. Of other kinds ()."""

    train: list
    validation: list
    labels: tuple
    report: DataReport

    @property
    def multi_label(self):
        return any(isinstance(example, Classification) and len(example.labels) != 1 for example in self.train)


def load(source, kind, labels=None):
    """Both splits of a TaskSource (or its name) as examples of `kind` -> TaskData.

    labels: those that a model already has; otherwise the training data's. Examples with others are
    left out and counted. Raises UserError if a split has nothing usable, or the data one class.
    """
    source = source if isinstance(source, TaskSource) else TaskSource(source)
    report = DataReport()
    splits = records(source, kind, report)
    train = _collect(source, kind, splits["train"], report)
    if not source.keep_duplicates:
        train = _without_duplicates(train, report)
    if source.validation:
        other = source.read_as(source.validation)
        validation = _collect(other, kind, _part(records(other, kind, report, "all"), other), report)
    elif "validation" in splits:
        validation = _collect(source, kind, splits["validation"], report)
    else:
        train, validation = _split(train, source.validation_fraction)
    train_inputs = {_digest(example.input) for example in train}
    for example in validation:
        if _digest(example.input) in train_inputs:
            report.add("validation examples whose input is in the training data too, kept", example.place)
    if kind in (Classification, Tagging):
        labels = tuple(labels) if labels else _label_names(train, kind)
        train, validation = (_known(part, kind, labels, report) for part in (train, validation))
    _check(source.name, "training", kind, train, report)
    _check(source.validation or source.name, "validation", kind, validation, report)
    _check_classes(source.name, kind, train)
    return TaskData(train, validation, labels or (), report)


def read(source, kind, labels=None, report=None, split="all"):
    """The examples of a TaskSource (or its name), as new data to evaluate on -> list.

    split: all of them, or train, validation or (of TFDS) test. Raises UserError if there is none.
    """
    source = source if isinstance(source, TaskSource) else TaskSource(source)
    report = DataReport() if report is None else report
    examples = _collect(source, kind, _part(records(source, kind, report, split), source, split), report)
    if labels:
        examples = _known(examples, kind, labels, report)
    _check(source.name, "evaluation", kind, examples, report)
    return examples


def _part(splits, source, split="all"):
    if split == "all":
        return itertools.chain.from_iterable(splits.values())
    if split not in splits:
        raise UserError(
            f"{source.name} has no split {split!r} of its own, only {', '.join(splits)}; all reads everything"
        )
    return splits[split]


def _collect(source, kind, records, report):
    make = {Classification: _classification, Tagging: _tagging, Pair: _pair, Chat: _chat, Text: _text}[kind]

    def clean(text, place):
        return source.clean(text, place, report)

    made = (make(record, place, clean, report) for place, record in records)
    return list(itertools.islice((e for e in made if e is not None), source.limit or None))


def _split(examples, fraction):
    parts = [], []
    for example in examples:
        parts[is_held_out(repr(example.input), fraction)].append(example)
    if not parts[1] and len(examples) > 1:  # of a few examples a hash may choose none
        parts[1].append(parts[0].pop())
    return parts


def _digest(value):
    return hashlib.blake2b(repr(value).encode(), digest_size=16).digest()


def _without_duplicates(examples, report):
    seen, kept = set(), []
    for example in examples:
        digest = _digest([getattr(example, f.name) for f in dataclasses.fields(example) if f.compare])
        if digest in seen:
            report.add("exact duplicates, left out", example.place)
        else:
            seen.add(digest)
            kept.append(example)
    return kept


def _label_names(examples, kind):
    if kind is Tagging:
        types = sorted({tag[2:] for example in examples for tag in example.tags if tag != "O"})
        return ("O", *(f"{prefix}-{name}" for name in types for prefix in "BI"))
    names = {label for example in examples for label in example.labels}
    return tuple(sorted(names, key=lambda s: (int(s) if re.fullmatch("[0-9]+", s) else -1, s)))


def _known(examples, kind, labels, report):
    known, kept = set(labels), []
    for example in examples:
        own = example.tags if kind is Tagging else example.labels
        unknown = next((label for label in own if label not in known), None)
        if unknown is None:
            kept.append(example)
        else:
            report.add("examples with an unknown label, left out", f"{example.place} {unknown!r}")
    return kept


def _check(name, split, kind, examples, report):
    if not examples:
        found = "; ".join(report.lines()) or "it is empty"
        raise UserError(f"{name}: no usable {split} example with {' and '.join(kind.fields)}: {found}")


def _check_classes(name, kind, examples):
    if kind is Tagging and all(tag == "O" for example in examples for tag in example.tags):
        raise UserError(
            f"{name}: every word is tagged O ({examples[0].place} and "
            f"{len(examples) - 1} more); tagging needs an entity to learn"
        )
    if kind is Classification and len({example.labels for example in examples}) < 2:
        raise UserError(
            f"{name}: every example has the label {', '.join(examples[0].labels)!r} "
            f"({examples[0].place} and {len(examples) - 1} more); classification "
            "needs two classes"
        )


# From a record, a dict by our names for the fields, to an example; None, and counted, if it is bad.


def _sides(record, names, place, clean, report):
    """The cleaned texts of some fields, or None."""
    texts = []
    for name in names:
        text = record.get(name)
        if not isinstance(text, str):
            report.add(f"examples without text in {name!r}, left out", place)
            return None
        texts.append(clean(text, place))
    for name, text in zip(names, texts):
        if not text or text.isspace():
            report.add(f"examples with an empty {name!r}, left out", place)
            return None
    return texts


def _text(record, place, clean, report):
    sides = _sides(record, Text.fields, place, clean, report)
    return sides and Text(*sides, place)


def _pair(record, place, clean, report):
    sides = _sides(record, Pair.fields, place, clean, report)
    return sides and Pair(*sides, place)


def _classification(record, place, clean, report):
    if record.get("labels") is not None:
        labels = record["labels"] if isinstance(record["labels"], list) else [None]
    else:
        labels = [record.get("label")]
    labels = [clean(label, place).strip() if isinstance(label, str) else label for label in labels]
    if any(label in (None, "") or isinstance(label, (list, dict)) for label in labels):
        report.add("examples without a label, left out", place)
        return None
    sides = _sides(record, ["text"], place, clean, report)
    names = (label if isinstance(label, str) else json.dumps(label) for label in labels)
    return sides and Classification(*sides, tuple(dict.fromkeys(names)), place)


def _tagging(record, place, clean, report):
    words, tags = record.get("tokens"), record.get("tags")
    if not all(
        isinstance(column, list) and all(isinstance(value, str) for value in column) for column in (words, tags)
    ):
        report.add("examples without lists of text in 'tokens' and 'tags', left out", place)
        return None
    if len(words) != len(tags):
        report.add(
            "examples with unequal numbers of tokens and tags, left out", f"{place} {len(words)} and {len(tags)}"
        )
        return None
    places = record.get("places", [place] * len(words))
    words = [clean(word, at) for word, at in zip(words, places)]
    if not words or not all(words):
        report.add("examples with an empty token, left out", places[words.index("")] if words else place)
        return None
    before, checked = "O", []
    for tag, at in zip(tags, places):
        tag = clean(tag, at).strip()
        if not re.fullmatch("O|[BI]-.+", tag):
            report.add("examples with a tag that is not BIO (O, B-X or I-X), left out", f"{at} {tag!r}")
            return None
        if tag[0] == "I" and before[2:] != tag[2:]:
            report.add("I- tags that continue nothing, read as B-", f"{at} {tag!r}")
            tag = f"B-{tag[2:]}"
        checked.append(tag)
        before = tag
    return Tagging(tuple(words), tuple(checked), place)


def _chat(record, place, clean, report):
    messages = record.get("messages")
    if not (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
    ):
        report.add("examples without messages of role and content, left out", place)
        return None
    messages = [message | {"content": clean(message["content"], place)} for message in messages]
    if not all(message["content"] for message in messages):
        report.add("examples with an empty message, left out", place)
        return None
    if all(message["role"] != "assistant" for message in messages):
        report.add("examples without a reply of the role 'assistant', left out", place)
        return None
    return Chat(tuple(messages), place)
