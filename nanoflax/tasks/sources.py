"""Where task data comes from: a source named by one string, and its records with their places.

A source is jsonl:FILE, tsv:FILE, conll:FILE, pairs:SOURCE_FILE,TARGET_FILE, tfds:NAME, or one that
needs no download (nanoflax.builtin): dates:en-fr, pytags, pymodules, pychats, bible:kjv-web. Files
may be .gz. Texts also come from pydocs and text:GLOB (nanoflax.sources), and are either side of
pairs. Examples are of one of five kinds, each with its fields in a JSON line or a TSV column:

    Classification   text, and label (one) or labels (several, or none)
    Tagging          tokens, tags (O, B-TYPE, I-TYPE)
    Pair             source, target
    Chat             messages, each with role and content
    Text             text
"""

import dataclasses
import itertools
import re
import unicodedata

from nanoflax.data import (
    DataReport,
    Source,
    dataset_examples,
    dataset_splits,
    documents,
    is_held_out,
    json_lines,
    open_dataset,
    read_binary,
    text_lines,
)
from nanoflax.errors import UserError
from nanoflax.tasks import builtin
from nanoflax.tasks.kinds import Chat, Classification, Pair, Tagging, Text
from nanoflax.tokenizers import well_formed

HELP = (
    "choose jsonl:FILE, tsv:FILE, conll:FILE, pairs:SOURCE_FILE,TARGET_FILE, tfds:NAME, "
    "dates:en-fr, pytags, pymodules, pychats, bible:kjv-web, or for texts pydocs or text:GLOB"
)


# \x1c-\x1e and \x85 are line ends to Python, so whitespace.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufeff]")
_WHITESPACE = {
    "trim": lambda text: "\n".join(line.rstrip() for line in text.splitlines()).strip(),
    "collapse": lambda text: " ".join(text.split()),
    "": lambda text: text,
}

# Of well-known TFDS data sets; those of translations name their two languages in their configs.
DATASETS = {
    "glue/sst2": {"text": "sentence"},
    "conll2003": {"tags": "ner"},
    "cnn_dailymail": {"source": "article", "target": "highlights"},
}


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """Where examples come from, how they split and how they are cleaned.

    name: see the head of this file. validation: another source, all of it the validation split.
      Otherwise the data's own (TFDS: validation, or else test); otherwise each example whose input
      hashes under `validation_fraction`, so that no input is in both.
    fields: what the file calls our fields, as "text=sentence,label=stars"; for CoNLL the numbers
      of the columns from 0, as "tokens=1,tags=3" (by default the first and the last).
    unicode: NFC, NFKC, or "" to leave characters as they are.
    whitespace: "trim" it at the ends of lines and text, "collapse" each run to one space, or "".
    keep_duplicates: exact duplicates of an example stay in the training data.
    limit: examples of a split to read at most, 0 for all: they are held in memory.
    """

    name: str
    validation: str = ""
    validation_fraction: float = 0.05
    data_dir: str = ""  # of TFDS
    fields: str = ""
    unicode: str = "NFC"
    whitespace: str = "trim"
    keep_duplicates: bool = False
    limit: int = 0

    def __post_init__(self):
        for field, choices in (("unicode", ("NFC", "NFKC", "")), ("whitespace", ("trim", "collapse", ""))):
            if getattr(self, field) not in choices:
                raise UserError(f"{field} {getattr(self, field)!r}: choose {choices[0]}, {choices[1]} or nothing")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction {self.validation_fraction}: must be between 0 and 1")
        if self.limit < 0:
            raise UserError(f"limit {self.limit}: must not be negative; 0 is no limit")
        _renamed(self)

    def read_as(self, name):
        return dataclasses.replace(self, name=name, validation="")

    def clean(self, text, place, report):
        """The cleaned text; each step that changes it is counted in the report."""
        for name, step in (
            ("unpaired surrogates, read as U+FFFD", well_formed),
            (
                f"texts normalized to {self.unicode}",
                lambda text: unicodedata.normalize(self.unicode, text) if self.unicode else text,
            ),
            ("texts with control characters, removed", lambda text: _CONTROL.sub("", text)),
            (f"texts with whitespace to {self.whitespace}", _WHITESPACE[self.whitespace]),
        ):
            new = step(text)
            if new != text:
                report.add(name, place)
            text = new
        return text


# From a source to its records.


def records(source, kind, report, split=None):
    """{"train": records} and perhaps "validation": iterables of (place, record).

    split: what is to be read, if it is not the two for training: one of them, test, or all.
    """
    scheme, _, rest = source.name.partition(":")
    if kind is Text and (source.name == "pydocs" or scheme == "text"):
        return _documents(source, report, split)
    if kind is Text and (scheme == "pairs" or builtin.KINDS.get(scheme) == "Pair"):
        found = records(source, Pair, report, split)
        if "validation" not in found and not source.validation and split != "all":
            found = _split(source, found["train"])
        return {split: _sides(pairs) for split, pairs in found.items()}
    if scheme in builtin.KINDS:
        kinds = {"Classification": Classification, "Tagging": Tagging, "Pair": Pair, "Chat": Chat}
        if kinds[builtin.KINDS[scheme]] is not kind:
            raise UserError(f"{source.name} has {builtin.KINDS[scheme]} examples; this task needs {kind.__name__} ones")
        return builtin.records(scheme, rest)
    readers = {"jsonl": _jsonl, "tsv": _tsv, "conll": _conll, "pairs": _pairs}
    _renamed(source, kind)
    if scheme == "tfds" and rest:
        return _tfds(source, rest, kind, split)
    if scheme not in readers or not rest:
        raise UserError(f"task data {source.name!r} is not known; {HELP}")
    if {"conll": Tagging, "pairs": Pair}.get(scheme, kind) is not kind:
        raise UserError(f"{source.name}: {scheme} files do not hold {' and '.join(kind.fields)}")
    return {"train": readers[scheme](source, rest, kind, report)}


def _documents(source, report, split):
    """The splits of a nanoflax.sources.Source, which pretraining makes too."""
    texts = Source(source.name, _renamed(source).get("text", "text"), validation_fraction=source.validation_fraction)

    def of(split, report):
        for i, text in enumerate(documents(texts, split, report), 1):
            yield f"{source.name} {split}:{i}", {"text": text}

    if split in ("all", "train", "validation"):
        return {split: of(split, report)}
    if source.validation:
        return {"train": of("all", report)}
    return {"train": of("train", report), "validation": of("validation", DataReport())}  # counted once


def _split(source, pairs):
    """Pairs by the hash of their sources: as translate splits them, so that denoising trains on no
    target that it is to be measured by."""
    parts = {"train": [], "validation": []}
    for place, record in pairs:
        text = source.clean(record["source"], place, DataReport())  # counted later
        held_out = is_held_out(repr(text), source.validation_fraction)
        parts["validation" if held_out else "train"].append((place, record))
    return parts


def _sides(pairs):
    for place, record in pairs:
        yield from ((place, {"text": record[name]}) for name in Pair.fields)


def _renamed(source, kind=None):
    """The option `fields` as a dict {our name: the file's}; of a kind of examples, if given."""
    pairs = [pair.strip().split("=") for pair in source.fields.split(",")] if source.fields else []
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise UserError(f"fields {source.fields!r}: write our names and the file's, as in text=sentence,label=stars")
    if kind and (unknown := [ours for ours, _ in pairs if ours not in _ours(kind)]):
        raise UserError(
            f"fields {source.fields!r}: {unknown[0]!r} is none of our names, which are {', '.join(_ours(kind))} here"
        )
    return dict(pairs)


def _ours(kind):
    return (*kind.fields, *(["labels"] if kind is Classification else []))


def _jsonl(source, path, kind, report):
    names = {ours: _renamed(source).get(ours, ours) for ours in _ours(kind)}
    for place, value in read_binary(path, lambda file: json_lines(file, path, report)):
        if not isinstance(value, dict):
            report.add("JSON lines that are no object, left out", place)
            continue
        yield place, {ours: value.get(theirs) for ours, theirs in names.items()}


def _tsv(source, path, kind, report):
    """Columns by a header if the first line names one of them, else in the order of our fields."""
    if kind is Chat:
        raise UserError(f"{path}: a TSV file cannot hold messages; write them as JSON lines")
    renamed, columns, width = _renamed(source), None, None
    theirs = {renamed.get(ours, ours): ours for ours in _ours(kind)}
    for place, line in text_lines(path, report):
        cells = line.split("\t")
        if columns is None:
            header = renamed or theirs.keys() & set(cells)
            columns = (
                {theirs[cell]: i for i, cell in enumerate(cells) if cell in theirs}
                if (header)
                else {ours: i for i, ours in enumerate(kind.fields)}
            )
            missing = [
                name for name in kind.fields if name not in columns and not (name == "label" and "labels" in columns)
            ]
            if missing:
                raise UserError(
                    f"{place}: the header {cells} lacks "
                    f"{', '.join(renamed.get(name, name) for name in missing)}; name "
                    "the columns, as in fields=text=sentence,label=stars"
                )
            width = len(cells) if header else len(kind.fields)
            if header:
                continue
        if not line:
            continue
        if len(cells) != width:
            report.add(f"lines without {width} columns between tabs, left out", f"{place} {len(cells)}")
            continue
        record = {ours: cells[i] for ours, i in columns.items()}
        if "labels" in record:
            record["labels"] = [label for label in record["labels"].split(",") if label.strip()]
        if kind is Tagging:
            record |= {name: record[name].split() for name in kind.fields}
        yield place, record


def _conll(source, path, kind, report):
    """Sentences between empty lines: a word, other columns, and its tag, between blanks."""
    renamed, width = _renamed(source), None
    try:
        word, tag = int(renamed.get("tokens", 0)), int(renamed.get("tags", -1))
    except ValueError as error:
        raise UserError(
            f"fields {source.fields!r}: of a CoNLL file give numbers of columns, as in tokens=0,tags=3"
        ) from error
    rows, malformed = [], False

    def sentence():
        words, tags, places = map(list, zip(*rows))
        return places[0], {"tokens": words, "tags": tags, "places": places}

    for place, line in itertools.chain(text_lines(path, report), [("", "")]):
        cells = line.split()
        if not cells or cells[0] == "-DOCSTART-":
            if rows and not malformed:
                yield sentence()
            rows, malformed = [], False
            continue
        width = width or len(cells)
        if not all(-width <= column < width for column in (word, tag)):
            raise UserError(f"fields {source.fields!r}: {place} has {width} columns, from 0 to {width - 1}")
        if len(cells) != width or width < 2:
            report.add(
                "malformed CoNLL lines (the first line sets the number of columns), their sentences left out",
                f"{place} {len(cells)} columns",
            )
            malformed = True
        else:
            rows.append((cells[word], cells[tag], place))


def _pairs(source, paths, kind, report):
    paths = paths.split(",")
    if len(paths) != 2:
        raise UserError(f"{source.name}: name two files, as in pairs:train.en,train.fr")
    sides = [list(text_lines(path, report)) for path in paths]
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{source.name}: {paths[0]} has {len(sides[0])} lines and {paths[1]} "
            f"{len(sides[1])}; line for line they must be the same"
        )
    for (place, text), (_, other) in zip(*sides):
        yield place, {"source": text, "target": other}


def _tfds(source, name, kind, only):
    import tensorflow_datasets as tfds

    builder = open_dataset(name, source.data_dir)
    features, config = builder.info.features, builder.builder_config
    config = config.name if config else ""
    names = {ours: ours for ours in _ours(kind)}
    if isinstance(features, tfds.features.Translation):
        names |= zip(Pair.fields, re.split("-|_to_", config))
    names |= DATASETS.get(f"{builder.name}/{config}") or DATASETS.get(builder.name, {})
    names |= _renamed(source)
    names = {ours: theirs for ours, theirs in names.items() if theirs in features}
    missing = [ours for ours in kind.fields if ours not in names and not (ours == "label" and "labels" in names)]
    if missing:
        raise UserError(
            f"{source.name}: which of {', '.join(features)} is {' and '.join(missing)}?"
            f" Say so, as in fields={missing[0]}={next(iter(features))}"
        )

    def value(raw, feature):
        if isinstance(raw, (list, tuple)) or getattr(raw, "ndim", 0):
            return [value(item, getattr(feature, "feature", feature)) for item in raw]
        if isinstance(feature, tfds.features.ClassLabel):
            return feature.names[int(raw)] if raw >= 0 else None  # -1 is a hidden label
        if isinstance(raw, bytes):
            return raw.decode("utf-8", "replace")
        return raw.item() if hasattr(raw, "item") else raw

    def of(split):
        for i, example in enumerate(dataset_examples(builder, split)):
            yield (
                f"tfds:{name} {split}:{i}",
                {ours: value(example[theirs], features[theirs]) for ours, theirs in names.items()},
            )

    splits = dataset_splits(builder)
    if only:  # by its own names
        return {name: of(name) for name in splits["all"] if only in (name, "all")}
    return {split: of(splits[split][0]) for split in ("train", "validation") if split in splits}
