"""Sources of task examples, each named by one string; their records, with file and line.

A source is jsonl:FILE, csv:FILE, tsv:FILE, conll:FILE, pairs:SOURCE_FILE,TARGET_FILE, tfds:NAME, or built in
(tasks.builtin): dates:en-fr, pytags, pymodules, pychats, bible:kjv-web. Files may be .gz. Sources of Text are also
pydocs, text:GLOB (data.Source), and sources of Pair, of which both sides are read. The fields of each kind of example
are keys of a JSON line or columns of a table (CSV, TSV):

    Classification   text, and label (one) or labels (several, or none)
    Tagging          tokens, tags (O, B-TYPE, I-TYPE)
    Pair             source, target
    Chat             messages, each with role and content (or tool_calls); tools, if there are any
    Text             text
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nanoflax import data
from nanoflax.config import ExampleData
from nanoflax.data import (
    DataReport,
    dataset_examples,
    dataset_splits,
    decode,
    is_held_out,
    json_lines,
    open_dataset,
    open_text,
    text_lines,
)
from nanoflax.errors import UserError
from nanoflax.tasks import builtin
from nanoflax.tasks.columns import field_names, mapping_flag, match_columns, missing_fields
from nanoflax.tasks.kinds import Chat, Classification, Pair, Tagging, Text
from nanoflax.tasks.tables import table_rows
from nanoflax.tasks.tags import TAG

HELP = (
    "choose jsonl:FILE, csv:FILE, tsv:FILE, conll:FILE, pairs:SOURCE_FILE,TARGET_FILE, tfds:NAME, "
    "dates:en-fr, pytags, pymodules, pychats, bible:kjv-web, or for texts pydocs or text:GLOB"
)

# Features of some TFDS data sets. Translation data sets need no entry: their config name contains the two languages.
DATASETS = {
    "glue/sst2": {"text": "sentence"},
    "conll2003": {"tags": "ner"},
    "cnn_dailymail": {"source": "article", "target": "highlights"},
}

Records = Iterable[tuple[str, dict[str, Any]]]  # (place, {field: value})


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """A source of examples, its splits, and the settings of cleaning.

    name: see the docstring of this module.
    validation: another source, for the validation split. If empty, the data's own split (TFDS: validation, or else
      test). Without such a split, examples chosen by the hash of their input, with probability `validation_fraction`;
      no input is in both splits.
    data_dir: of TFDS.
    fields: the names of our fields in the file, as "text=sentence,label=stars"; for CoNLL the column numbers from 0,
      as "tokens=1,tags=3" (default: the first and the last column).
    unicode: NFC, NFKC, or "" for no change.
    whitespace: "trim" (at the ends of lines and text), "collapse" (each run to one space), or "" for no change.
    keep_duplicates: keep exact duplicates in the training data.
    limit: the largest number of examples from a split, because they are kept in memory; 0: all.
    """

    name: str
    validation: str = ""
    validation_fraction: float = 0.05
    data_dir: str = ""
    fields: str = ""
    unicode: str = "NFC"
    whitespace: str = "trim"
    keep_duplicates: bool = False
    limit: int = 0

    def __post_init__(self) -> None:
        for field, choices in (("unicode", data.UNICODE), ("whitespace", tuple(data.WHITESPACE))):
            if getattr(self, field) not in choices:
                raise UserError(f"{field} {getattr(self, field)!r}: choose {choices[0]}, {choices[1]} or nothing")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction {self.validation_fraction}: must be between 0 and 1")
        if self.limit < 0:
            raise UserError(f"limit {self.limit}: must not be negative; 0 is no limit")
        self.renamed_fields()

    def read_as(self, name: str) -> "TaskSource":
        """Another source with the same settings."""
        return dataclasses.replace(self, name=name, validation="")

    def clean(self, text: str, place: str, report: DataReport) -> str:
        """The cleaned text. The report counts each step that changes the text."""
        return data.clean(text, data.cleaning_steps(self.unicode, self.whitespace), place, report)

    def renamed_fields(self, kind: type | None = None) -> dict[str, str]:
        """The option `fields` as {our name: name in the file}. Raises: UserError for a name that is not of `kind`."""
        pairs = [pair.strip().split("=") for pair in self.fields.split(",")] if self.fields else []
        if not all(len(pair) == 2 and all(pair) for pair in pairs):
            raise UserError(f"fields {self.fields!r}: write OURS=THEIRS,..., as in text=sentence,label=stars")
        ours = field_names(kind) if kind else ()
        if kind and (unknown := [name for name, _ in pairs if name not in ours]):
            raise UserError(
                f"fields {self.fields!r}: {unknown[0]!r} is not a field of these examples, which have {', '.join(ours)}"
            )
        return dict(pairs)


def examples_of(config: ExampleData, name: str | None = None, fields: str | None = None) -> TaskSource:
    """The TaskSource of an ExampleData. name: another source, read completely, with the same settings.

    fields: instead of the configuration's.
    """
    return TaskSource(
        name or config.train,
        "" if name else config.validation,
        config.validation_fraction,
        fields=config.fields if fields is None else fields,
        unicode=config.unicode,
        whitespace=config.whitespace,
        keep_duplicates=config.keep_duplicates,
        limit=0 if name else config.limit,
    )


# From a source to its records.


def records(source: TaskSource, kind: type, report: DataReport, split: str | None = None) -> Mapping[str, Records]:
    """{"train": records}, and "validation" if the source has this split.

    split: train, validation, test or all: read only this, instead of the two splits for training.
    """
    scheme, _, rest = source.name.partition(":")
    if kind is Text and (source.name == "pydocs" or scheme == "text"):
        return _documents(source, report, split)
    if kind is Text and (scheme == "pairs" or builtin.KINDS.get(scheme) is Pair):
        found = records(source, Pair, report, split)
        if "validation" not in found and not source.validation and split != "all":
            found = _split_pairs(source, found["train"])
        return {split: _both_sides(pairs) for split, pairs in found.items()}
    if scheme in builtin.KINDS:
        if builtin.KINDS[scheme] is not kind:
            raise UserError(
                f"{source.name} has {builtin.KINDS[scheme].__name__} examples; this task needs {kind.__name__} ones"
            )
        return builtin.records(scheme, rest)
    source.renamed_fields(kind)
    if scheme == "tfds" and rest:
        return _dataset(source, rest, kind, report, split)
    if scheme not in READERS or not rest:
        ending = source.name.removesuffix(".gz").rpartition(".")[2]
        ending = "jsonl" if ending == "json" else ending
        hint = f"write {ending}:{source.name}, or " if ending in READERS and not rest else ""
        raise UserError(f"task data {source.name!r} is not known; {hint}{HELP}")
    if {"conll": Tagging, "pairs": Pair}.get(scheme, kind) is not kind:
        raise UserError(f"{source.name}: {scheme} files do not hold {' and '.join(kind.fields)}")
    return {"train": READERS[scheme](source, rest, kind, report)}


def _documents(source: TaskSource, report: DataReport, split: str | None) -> dict[str, Records]:
    """The splits of a data.Source, the same as in pretraining."""
    field = source.renamed_fields().get("text", "text")
    texts = data.Source(source.name, field, validation_fraction=source.validation_fraction)

    def read(split, report):
        for i, text in enumerate(data.documents(texts, split, report), 1):
            yield f"{source.name} {split}:{i}", {"text": text}

    if split in ("all", "train", "validation"):
        return {split: read(split, report)}
    if source.validation:
        return {"train": read("all", report)}
    # The second report is not used: both splits read the same files, and problems are counted once.
    return {"train": read("train", report), "validation": read("validation", DataReport())}


def _split_pairs(source: TaskSource, pairs: Records) -> Mapping[str, Records]:
    """Splits pairs by the hash of their sources, as translate does, so that denoising does not train on targets of
    the validation split of translate."""
    splits = {"train": [], "validation": []}
    for place, record in pairs:
        text = source.clean(record["source"], place, DataReport())  # problems are counted later
        held_out = is_held_out(repr(text), source.validation_fraction)
        splits["validation" if held_out else "train"].append((place, record))
    return splits


def _both_sides(pairs: Records) -> Records:
    for place, record in pairs:
        yield from ((place, {"text": record[name]}) for name in Pair.fields)


def _lines(path: str, report: DataReport) -> Iterator[tuple[str, str]]:
    with open_text(path) as file:
        yield from text_lines(file, path, report)


def _jsonl(source: TaskSource, path: str, kind: type, report: DataReport) -> Records:
    renamed, found, seen = source.renamed_fields(kind), set(), {}
    with open_text(path) as file:
        for place, value in json_lines(file, path, report):
            if not isinstance(value, dict):
                report.add("JSON lines that are not objects, left out", place)
                continue
            names = list(value)
            columns = match_columns(kind, renamed, names)
            found |= columns.keys()
            seen |= dict.fromkeys(names)
            yield place, {ours: value[names[column]] for ours, column in columns.items()}
    if seen and (missing := missing_fields(kind, found)):
        raise UserError(
            f"{path}: no object has {' or '.join(renamed.get(name, name) for name in missing)}; their fields are "
            f"{', '.join(seen)}; say which is which, as in {mapping_flag(kind, [*seen])}"
        )


def _table(source: TaskSource, path: str, kind: type, report: DataReport, delimiter: str) -> Records:
    """The first line is a header if it names a field; a title or comments may precede one with all fields, and it may
    come again in joined files. Without a header, columns are in the order of the fields."""
    if kind is Chat:
        raise UserError(f"{path}: a table cannot hold messages; write them as JSON lines")
    rows = table_rows(path, delimiter, report)
    ahead = list(itertools.islice(rows, 1000))
    other = {"\t": ",", ",": "\t"}[delimiter]
    if ahead and len(ahead[0][1]) == 1 < len(kind.fields) and other in ahead[0][1][0]:
        right = {"\t": "tsv", ",": "csv"}[other]
        raise UserError(f"{ahead[0][0]} is not divided as {source.name} says; write {right}:{path}")
    ahead = _without_title(source, kind, ahead, report)
    columns = _header(source, kind, ahead)
    header = ahead[0][1] if columns else []
    rows = itertools.chain(ahead[bool(columns) :], rows)
    width = len(header or kind.fields)
    columns = columns or {name: i for i, name in enumerate(kind.fields)}
    between = "tabs" if delimiter == "\t" else "commas"
    for place, cells in rows:
        if cells == header:
            report.add("headers between the lines, left out", place)
            continue
        if len(cells) != width:
            report.add(f"lines without {width} columns between {between}, left out", f"{place} {len(cells)}")
            continue
        record: dict[str, Any] = {name: cells[i] for name, i in columns.items()}
        if "labels" in record:
            record["labels"] = [label for label in record["labels"].split(",") if label.strip()]
        if kind is Tagging:
            record |= {name: record[name].split() for name in kind.fields}
        yield place, record


def _without_title(source: TaskSource, kind: type, rows: list, report: DataReport) -> list:
    """The rows from the header on, if one of the first rows names all fields; else all. Above it may be a title."""
    renamed, several = source.renamed_fields(kind), len(kind.fields) > 1
    named = (not missing_fields(kind, match_columns(kind, renamed, cells)) for _, cells in rows[:20] if several)
    top = next((i for i, has_all in enumerate(named) if has_all), 0)
    for place, _ in rows[:top]:
        report.add("lines above the header, left out", place)
    return rows[top:]


def _header(source: TaskSource, kind: type, rows: Sequence[tuple[str, list[str]]]) -> dict[str, int]:
    """{our name: column number} from the first row of a table; {} if it is no header.

    Raises: UserError if it lacks a field or has it twice, or if it has none, but looks like a header
    (`_looks_like_header`).
    """
    renamed = source.renamed_fields(kind)
    place, cells = rows[0] if rows else ("", [])
    columns = match_columns(kind, renamed, cells)
    if not (renamed or columns or _looks_like_header(kind, [cells for _, cells in rows])):
        return {}
    if missing := [renamed.get(name, name) for name in missing_fields(kind, columns)]:
        hint = "" if renamed or columns else "; if it is an example, write a header above it"
        raise UserError(
            f"{place}: the header {', '.join(cells)} lacks {' and '.join(missing)}; say which column is which, as in "
            f"{mapping_flag(kind, cells)}{hint}"
        )
    if twice := [cells[i] for i in columns.values() if cells.count(cells[i]) > 1]:
        raise UserError(f"{place}: the header has {twice[0]!r} twice; rename the one that is not meant")
    return columns


def _looks_like_header(kind: type, rows: Sequence[list[str]]) -> bool:
    """Whether the first row is different single words, and no other row is of words; or of 20 rows or more, the first
    has a label that no other has, and all other labels are repeated."""
    if len(rows) < 2 or not 1 < len(rows[0]) == len({*rows[0]}):
        return False
    words = [all(re.fullmatch(r"\s*[A-Za-z_][A-Za-z0-9_.-]*\s*", cell) for cell in row) for row in rows]
    labels = collections.Counter(row[1] for row in rows if len(row) == 2)
    alone = [label for label, count in labels.items() if count == 1]
    lonely = kind is Classification and len(rows) >= 20 and len(labels) > 2 and alone == rows[0][1:]
    return lonely or words[0] and not any(words[1:])


def _conll(source: TaskSource, path: str, kind: type, report: DataReport) -> Records:
    """Each line has a word, other columns and a tag: between tabs if the first line has tabs, else between blanks.

    Empty lines separate sentences. Before a sentence, a line that begins with # and has no tag is a comment.
    """
    renamed, width, separator = source.renamed_fields(kind), 0, ""
    try:
        word, tag = int(renamed.get("tokens", 0)), int(renamed.get("tags", -1))
    except ValueError as error:
        raise UserError(
            f"fields {source.fields!r}: for a CoNLL file, give column numbers, as in tokens=0,tags=3"
        ) from error
    rows, malformed = [], False
    for place, line in itertools.chain(_lines(path, report), [("", "")]):
        line = line.rstrip(" \t")
        cells = [cell.strip(" ") or cell for cell in re.split(separator or ("\t" if "\t" in line else "[ \t]+"), line)]
        if not line.strip() or cells[0] == "-DOCSTART-":
            if rows and not malformed:
                words, tags, places = map(list, zip(*rows, strict=True))
                yield places[0], {"tokens": words, "tags": tags, "places": places}
            rows, malformed = [], False
            continue
        fits = len(cells) == (width or len(cells)) and -len(cells) <= tag < len(cells)
        if line[0] == "#" and not rows and not malformed and not (fits and TAG.fullmatch(cells[tag])):
            continue
        if not width:
            width, separator = len(cells), "\t" if "\t" in line else "[ \t]+"
            if fits and width > 1 and not TAG.fullmatch(cells[tag]):
                report.add("first lines without a tag, read as a header", f"{place} {cells[tag]!r}")
                continue
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


def _pairs(source: TaskSource, paths: str, kind: type, report: DataReport) -> Records:
    names = paths.split(",")
    if len(names) != 2:
        raise UserError(f"{source.name}: name two files, as in pairs:train.en,train.fr")
    sides = [list(_lines(path, report)) for path in names]
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"{source.name}: {names[0]} has {len(sides[0])} lines and {names[1]} {len(sides[1])}; the numbers must be "
            "equal"
        )
    for (place, text), (_, other) in zip(*sides, strict=True):
        yield place, {"source": text, "target": other}


READERS = {
    "jsonl": _jsonl,
    "tsv": functools.partial(_table, delimiter="\t"),
    "csv": functools.partial(_table, delimiter=","),
    "conll": _conll,
    "pairs": _pairs,
}


# TFDS.


def _dataset(source: TaskSource, name: str, kind: type, report: DataReport, only: str | None) -> dict[str, Records]:
    builder = open_dataset(name, source.data_dir)
    names = _dataset_fields(source, builder, kind)
    features = builder.info.features

    def examples(split):
        for i, example in enumerate(dataset_examples(builder, split)):
            place = f"tfds:{name} {split}:{i}"
            yield (
                place,
                {ours: _value(example[theirs], features[theirs], place, report) for ours, theirs in names.items()},
            )

    splits = dataset_splits(builder)
    if only:
        return {name: examples(name) for name in splits["all"] if only in (name, "all")}
    return {split: examples(splits[split][0]) for split in ("train", "validation") if split in splits}


def _dataset_fields(source: TaskSource, builder: Any, kind: type) -> dict[str, str]:
    """{our name: name of the feature}, from equal names, from DATASETS, and from the option `fields`."""
    import tensorflow_datasets as tfds

    features, config = builder.info.features, builder.builder_config
    config = config.name if config else ""
    names = {name: name for name in field_names(kind)}
    if isinstance(features, tfds.features.Translation):
        names |= zip(Pair.fields, re.split("-|_to_", config), strict=True)
    names |= DATASETS.get(f"{builder.name}/{config}") or DATASETS.get(builder.name, {})
    names |= source.renamed_fields(kind)
    names = {ours: theirs for ours, theirs in names.items() if theirs in features}
    if missing := missing_fields(kind, names):
        raise UserError(
            f"{source.name}: which of {', '.join(features)} is {' and '.join(missing)}? Say so, as in "
            f"{mapping_flag(kind, [*features])}"
        )
    return names


def _value(raw: Any, feature: Any, place: str, report: DataReport) -> Any:
    """A TFDS value as a Python value. A class label becomes its name; a hidden label (-1) becomes None."""
    if isinstance(raw, (list, tuple)) or getattr(raw, "ndim", 0):
        return [_value(item, getattr(feature, "feature", feature), place, report) for item in raw]
    if hasattr(feature, "int2str"):  # a ClassLabel
        return feature.int2str(int(raw)) if raw >= 0 else None
    if isinstance(raw, bytes):
        return decode(raw, place, report)
    return raw.item() if hasattr(raw, "item") else raw
