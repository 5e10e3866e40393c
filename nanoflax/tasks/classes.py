"""Which class of a model a label of the data means."""

import collections
import re
from collections.abc import Collection, Iterable, Sequence


def match_labels(labels: Iterable[str], classes: Sequence[str]) -> dict[str, str]:
    """{label of the data: class of the model with the same name}; labels without a class are left out.

    Names may differ in capitals, spaces and underscores, if they are still different names without these. If no label
    is the name of a class and all are numbers (3 or LABEL_3), the class with this number, from 0, is meant. Of a tagger
    without any B-, an I- class is meant by its B- tag too.
    """
    labels = set(labels)
    numbers = [re.fullmatch("(?:LABEL_)?([0-9]{1,6})", label) for label in labels]
    if labels.isdisjoint(classes) and all(number and int(number[1]) < len(classes) for number in numbers):
        return {number[0]: classes[int(number[1])] for number in numbers if number}
    found = {label: label for label in labels.intersection(classes)}
    near = _unambiguous(classes)
    for plain, label in _unambiguous(labels).items():
        if plain in near:
            found.setdefault(label, near[plain])
    if not any(name.startswith("B-") for name in classes):
        found |= {f"B-{name[2:]}": name for name in classes if name.startswith("I-") and f"B-{name[2:]}" in labels}
    return found


def _unambiguous(names: Iterable[str]) -> dict[str, str]:
    """{name without capitals, spaces and underscores: name} of the names that stay different from all others."""
    plain = {name: re.sub(r"[\s_]+", " ", name).strip().casefold() for name in names}
    counts = collections.Counter(plain.values())
    return {short: name for name, short in plain.items() if counts[short] == 1}


def classes_after_training(
    labels: Sequence[str], occurring: Collection[str], known: Sequence[str], meaning: dict[str, str]
) -> tuple[str, ...]:
    """The classes of a model with the classes `known` that is fine-tuned on data with these labels.

    Known classes stay first and in their order, also without examples, so that the model's head can be kept; labels
    that mean none of them follow. If no label means a known class (of tags: except O), there are only the labels.
    occurring: the labels of the examples; of tags, `labels` also has the B- and I- that do not occur.
    """
    if not set(meaning.values()) - {"O"}:
        return tuple(labels)
    types = {name[2:] for name in (*known, *meaning)}
    new = [
        name
        for name in labels
        if name not in meaning and name not in known and (name in occurring or name[2:] not in types)
    ]
    return (*known, *new)
