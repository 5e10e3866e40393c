"""Reads the examples of a source, cleans, checks and splits them, and counts those that are left out."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from nanoflax.data import DataReport, is_held_out
from nanoflax.errors import UserError, listed
from nanoflax.tasks.classes import classes_after_training, match_labels
from nanoflax.tasks.kinds import Chat, Classification, Pair, Preference, Problem, Tagging, Text
from nanoflax.tasks.messages import Clean, has_reply, messages_of, tools_of
from nanoflax.tasks.preferences import preference
from nanoflax.tasks.problems import problem
from nanoflax.tasks.readers import Records
from nanoflax.tasks.sources import TaskSource, records
from nanoflax.tasks.tags import TAG, from_bio, to_bio


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Examples of a task. labels: the classes in order (of a new tagger O, then B- and I- of each type), or ()."""

    train: list
    validation: list
    labels: tuple[str, ...]
    report: DataReport

    @property
    def multi_label(self) -> bool:
        return any(isinstance(example, Classification) and len(example.labels or ()) != 1 for example in self.train)


def load(source: TaskSource | str, kind: type, labels: Sequence[str] | None = None, extend: bool = False) -> TaskData:
    """Both splits of a TaskSource, or of the source with this name, as examples of a kind.

    labels: the classes of the model (default: the labels of the training data). The labels of the data become their
    names, as `match_labels` finds them. Examples with other labels are left out and counted, or with `extend`, the
    other labels of the training data are more classes; see `classes_after_training`.
    Raises: UserError if a split has no usable example, or the training data have only one class.
    """
    source = source if isinstance(source, TaskSource) else TaskSource(source)
    report = DataReport()
    splits = records(source, kind, report)
    train = _examples(source, kind, splits["train"], report)
    _check_any(source.name, "training", kind, train, report)
    if not source.keep_duplicates:
        train = _without_duplicates(train, report)
    if source.validation:
        other = source.read_as(source.validation)
        validation = _examples(other, kind, _split_of(records(other, kind, report, "all"), other, "all"), report)
    elif "validation" in splits:
        validation = _examples(source, kind, splits["validation"], report)
    else:
        train, validation = _split(train, source.validation_fraction)
    train_inputs = {_digest(example.input) for example in train}
    for example in validation:
        if _digest(example.input) in train_inputs:
            report.add("validation examples that are also training inputs, kept", example.place)
    if kind in (Classification, Tagging):
        known = tuple(labels or ())
        train, validation = (_in_scheme(part, known) for part in (train, validation))
        found = _label_names(train)
        meaning = match_labels(occurring_labels([*train, *validation]), known)
        labels = known or found
        if extend:
            labels = classes_after_training(found, occurring_labels(train), known, meaning)
        train, validation = (_with_classes(part, labels, meaning, report) for part in (train, validation))
    _check_any(source.name, "training", kind, train, report)
    _check_any(source.validation or source.name, "validation", kind, validation, report)
    _check_classes(source.name, train)
    return TaskData(train, validation, tuple(labels or ()), report)


def read(
    source: TaskSource | str,
    kind: type,
    labels: Sequence[str] | None = None,
    report: DataReport | None = None,
    split: str = "all",
) -> list:
    """The examples of a TaskSource, or of the source with this name, for evaluation.

    labels: the classes of the model, as for `load`. split: all, train, validation or (TFDS, hub) test.
    Raises: UserError if there is no example.
    """
    source = source if isinstance(source, TaskSource) else TaskSource(source)
    report = DataReport() if report is None else report
    examples = _examples(source, kind, _split_of(records(source, kind, report, split), source, split), report)
    if labels and kind in (Classification, Tagging):
        examples = _in_scheme(examples, labels)
        examples = _with_classes(examples, labels, match_labels(occurring_labels(examples), labels), report)
    _check_any(source.name, "evaluation", kind, examples, report)
    return examples


def _split_of(splits: Mapping[str, Records], source: TaskSource, split: str) -> Records:
    if split == "all":
        return itertools.chain.from_iterable(splits.values())
    if split not in splits:
        raise UserError(f"{source.name} has no split {split!r}, only {', '.join(splits)}; choose one of these, or all")
    return splits[split]


def _examples(source: TaskSource, kind: type, records: Records, report: DataReport) -> list:
    def clean(text: str, place: str) -> str:
        return source.clean(text, place, report)

    made = (_MAKE[kind](record, place, clean, report) for place, record in records)
    return list(itertools.islice((example for example in made if example is not None), source.limit or None))


def _split(examples: list, fraction: float) -> tuple[list, list]:
    parts = [], []
    for example in examples:
        parts[is_held_out(repr(example.input), fraction)].append(example)
    if not parts[1] and len(examples) > 1:  # with few examples, the hash may choose none for validation
        parts[1].append(parts[0].pop())
    return parts


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).digest()


def _without_duplicates(examples: list, report: DataReport) -> list:
    seen, kept = set(), []
    for example in examples:
        digest = _digest([getattr(example, field.name) for field in dataclasses.fields(example) if field.compare])
        if digest in seen:
            report.add("exact duplicates, left out", example.place)
        else:
            seen.add(digest)
            kept.append(example)
    return kept


def _labels_of(example: Any) -> tuple[str, ...]:
    return (example.tags if isinstance(example, Tagging) else example.labels) or ()


def _label_names(examples: list) -> tuple[str, ...]:
    names = occurring_labels(examples)
    if examples and isinstance(examples[0], Tagging):
        types = sorted({tag[2:] for tag in names - {"O"}})
        prefixes = ["B", "I", *sorted({tag[0] for tag in names} - {*"OBI"})]
        return ("O", *(f"{prefix}-{name}" for name in types for prefix in prefixes))
    return tuple(sorted(names, key=lambda name: (int(name) if re.fullmatch("[0-9]+", name) else -1, name)))


def occurring_labels(examples: list) -> set[str]:
    """The labels or tags in examples."""
    return {label for example in examples for label in _labels_of(example)}


def _in_scheme(examples: list, labels: Sequence[str]) -> list:
    """The examples; with a type of entity of these classes, their tags are in the scheme of the classes (as BIOES)."""
    if not any(isinstance(example, Tagging) for example in examples):
        return examples
    made = [dataclasses.replace(example, tags=tuple(from_bio(example.tags, labels))) for example in examples]
    return made if match_labels(occurring_labels(made) - {"O"}, labels) else examples


def _with_classes(examples: list, classes: Sequence[str], meaning: Mapping[str, str], report: DataReport) -> list:
    """The examples with the model's names of their classes. Examples with an unknown label are counted and left out."""
    known, kept = set(classes), []
    names = ", ".join(f"{label!r} is {name!r}" for label, name in sorted(meaning.items()) if label != name)
    for example in examples:
        given = _labels_of(example)
        labels = tuple(meaning.get(label, label) for label in given)
        unknown = next((label for label in labels if label not in known), None)
        if unknown is not None:
            report.add("examples with an unknown label, left out", f"{example.place} {unknown!r}")
            continue
        if labels != given:
            report.add(f"examples whose labels the model names otherwise ({names})", example.place)
            field = "tags" if isinstance(example, Tagging) else "labels"
            example = dataclasses.replace(example, **{field: labels})
        kept.append(example)
    return kept


def _check_any(name: str, split: str, kind: type, examples: list, report: DataReport) -> None:
    if not examples:
        found = listed(report.lines()) or "it is empty"
        raise UserError(f"{name}: no usable {split} example with {' and '.join(kind.fields)}: {found}")


def _check_classes(name: str, examples: list) -> None:
    first, others = examples[0], len(examples) - 1
    if isinstance(first, Tagging) and all(tag == "O" for example in examples for tag in example.tags):
        raise UserError(
            f"{name}: every word is tagged O ({first.place} and {others} more); tagging needs an entity to learn"
        )
    if isinstance(first, Classification) and len({example.labels for example in examples}) < 2:
        raise UserError(
            f"{name}: every example has the label {', '.join(first.labels or ())!r} ({first.place} and {others} "
            "more); classification needs two classes"
        )


# Each function makes an example from a record, {our name of a field: value}. It counts a bad record and returns None.


def _texts(
    record: dict[str, Any], names: Sequence[str], place: str, clean: Clean, report: DataReport
) -> list[str] | None:
    """The cleaned texts of some fields."""
    texts = []
    for name in names:
        text = record.get(name)
        if not isinstance(text, str):
            report.add(f"examples without text in {name!r}, left out", place)
            return None
        texts.append(clean(text, place))
    for name, text in zip(names, texts, strict=True):
        if not text or text.isspace():
            report.add(f"examples with an empty {name!r}, left out", place)
            return None
    return texts


def _text(record: dict[str, Any], place: str, clean: Clean, report: DataReport) -> Text | None:
    texts = _texts(record, Text.fields, place, clean, report)
    return Text(texts[0], place) if texts else None


def _pair(record: dict[str, Any], place: str, clean: Clean, report: DataReport) -> Pair | None:
    texts = _texts(record, Pair.fields, place, clean, report)
    return Pair(texts[0], texts[1], place) if texts else None


def _classification(record: dict[str, Any], place: str, clean: Clean, report: DataReport) -> Classification | None:
    labels = record.get("labels")
    if labels is None:
        labels = [record.get("label")]
    elif not isinstance(labels, list):
        labels = [None]
    labels = [clean(label, place).strip() if isinstance(label, str) else label for label in labels]
    if any(label in (None, "") or isinstance(label, (list, dict)) or _not_finite(label) for label in labels):
        report.add("examples without a label, left out", place)
        return None
    texts = _texts(record, ["text"], place, clean, report)
    names = (label if isinstance(label, str) else json.dumps(label) for label in labels)
    return Classification(texts[0], tuple(dict.fromkeys(names)), place) if texts else None


def _not_finite(label: Any) -> bool:
    """Whether a label is NaN or infinite, as pandas writes a missing one."""
    return isinstance(label, float) and not math.isfinite(label)


def _tagging(record: dict[str, Any], place: str, clean: Clean, report: DataReport) -> Tagging | None:
    words, tags = record.get("tokens"), record.get("tags")
    if not (_is_list_of_text(words) and _is_list_of_text(tags)):
        report.add("examples without lists of text in 'tokens' and 'tags', left out", place)
        return None
    if len(words) != len(tags):
        report.add(
            "examples with unequal numbers of tokens and tags, left out", f"{place} {len(words)} and {len(tags)}"
        )
        return None
    places = record.get("places", [place] * len(words))
    words = [clean(word, at) for word, at in zip(words, places, strict=True)]
    if not words or not all(words):
        report.add("examples with an empty token, left out", places[words.index("")] if words else place)
        return None
    tags = [clean(tag, at).strip() for tag, at in zip(tags, places, strict=True)]
    if bad := [f"{at} {tag!r}" for tag, at in zip(tags, places, strict=True) if not TAG.fullmatch(tag)]:
        report.add("examples with a tag that is not BIO (O, B-X or I-X), BIOES or BILOU, left out", bad[0])
        return None
    bio, begins = to_bio(tags)
    for i in begins:
        report.add("I- tags without a tag before, read as B-", f"{places[i]} {tags[i]!r}")
    other = [i for i, tag in enumerate(tags) if tag[0] not in "OBI"]
    if other:
        report.add("sentences with tags of BIOES or BILOU, read as BIO", f"{places[other[0]]} {tags[other[0]]!r}")
    return Tagging(tuple(words), tuple(bio), place)


def _is_list_of_text(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _chat(record: dict[str, Any], place: str, clean: Clean, report: DataReport) -> Chat | None:
    messages = messages_of(record.get("messages"), place, clean, report)
    tools = tools_of(record, place, report)
    if messages is None or tools is None:
        return None
    if not has_reply(messages):
        report.add("examples without a reply of the role 'assistant', left out", place)
        return None
    return Chat(messages, place, tools or None)


_MAKE = {
    Classification: _classification,
    Tagging: _tagging,
    Pair: _pair,
    Chat: _chat,
    Text: _text,
    Preference: preference,
    Problem: problem,
}
