"""Sources of task examples, each named by one string; their records, with file and line.

A source is jsonl:FILE, parquet:FILE, csv:FILE, tsv:FILE, conll:FILE, pairs:SOURCE_FILE,TARGET_FILE, preferences:FILE
and problems:FILE (JSON lines), hub:OWNER/NAME[:CONFIG][:SPLIT], tfds:NAME, or built in (tasks.builtin): dates:en-fr,
wrong_dates:en-fr, pytags, pymodules, pychats, bible:kjv-web, arithmetic:2. Problems are also read as Text (prompt and
answer), Chat and Pair, and Pairs as Problem and Chat. Files may be .gz or .zst, and gs:// or s3:// names. Sources of
Text are also pydocs, text:GLOB (data.Source), and sources of Pair, of which both sides are read. The fields of each
kind of example are keys of a JSON line or columns of a table (CSV, TSV, Parquet):

    Classification   text, and label (one) or labels (several, or none)
    Tagging          tokens, tags (O, B-TYPE, I-TYPE)
    Pair             source, target
    Chat             messages, each with role and content (or tool_calls); tools, if there are any
    Preference       prompt, chosen, rejected, as texts or messages, or only chosen and rejected with the prompt in
                     both; tools and margin (how much better), if there are any
    Problem          prompt, a text or messages; answer, a text, number or list of lines, if the reward needs it; its
                     other fields are for the reward
    Text             text
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from nanoflax import data
from nanoflax.config import ExampleData
from nanoflax.data import DataReport, dataset_examples, dataset_splits, decode, hub_splits, is_held_out, open_dataset
from nanoflax.errors import UserError
from nanoflax.tasks import builtin
from nanoflax.tasks.columns import field_names, mapping_flag, missing_fields
from nanoflax.tasks.kinds import Pair, Preference, Problem, Tagging, Text
from nanoflax.tasks.problems import CONVERSIONS, converted
from nanoflax.tasks.readers import READERS, Records

HELP = (
    "choose jsonl:FILE, parquet:FILE, preferences:FILE, csv:FILE, tsv:FILE, conll:FILE, pairs:SOURCE_FILE,TARGET_FILE, "
    "problems:FILE, hub:OWNER/NAME, tfds:NAME, dates:en-fr, pytags, pymodules, pychats, wrong_dates:en-fr, "
    "bible:kjv-web, arithmetic:2, or for texts pydocs or text:GLOB"
)

# Features of some TFDS data sets. Translation data sets need no entry: their config name contains the two languages.
DATASETS = {
    "glue/sst2": {"text": "sentence"},
    "conll2003": {"tags": "ner"},
    "cnn_dailymail": {"source": "article", "target": "highlights"},
}


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
    if kind is Text and (source.name == "pydocs" or scheme in ("text", "hub")):
        return _documents(source, report, split)
    if kind is Text and (scheme == "pairs" or builtin.KINDS.get(scheme) is Pair):
        found = records(source, Pair, report, split)
        if "validation" not in found and not source.validation and split != "all":
            found = _split_pairs(source, found["train"])
        return {split: _both_sides(pairs) for split, pairs in found.items()}
    own = builtin.KINDS.get(scheme) or {"pairs": Pair, "problems": Problem}.get(scheme)
    if own and (own, kind) in CONVERSIONS:
        fraction = None if source.validation or split == "all" else source.validation_fraction
        clean = lambda text, place: source.clean(text, place, DataReport())  # problems are counted later
        return converted(records(source, own, report, split), own, kind, clean, fraction)
    if scheme in builtin.KINDS:
        if builtin.KINDS[scheme] is not kind:
            raise UserError(
                f"{source.name} has {builtin.KINDS[scheme].__name__} examples; this task needs {kind.__name__} ones"
            )
        return builtin.records(scheme, rest)
    renamed = source.renamed_fields(kind)
    if scheme == "tfds" and rest:
        return _dataset(source, rest, kind, report, split)
    if scheme == "hub" and rest:
        return _hub(source, kind, renamed, report, split)
    if scheme not in READERS or not rest:
        ending = _ending(source.name)
        hint = f"write {ending}:{source.name}, or " if ending in READERS and not rest else ""
        raise UserError(f"task data {source.name!r} is not known; {hint}{HELP}")
    if {"conll": Tagging, "pairs": Pair, "preferences": Preference, "problems": Problem}.get(scheme, kind) is not kind:
        raise UserError(f"{source.name}: {scheme} files do not hold {' and '.join(kind.fields)}")
    return {"train": READERS[scheme](rest, kind, renamed, report)}


def _documents(source: TaskSource, report: DataReport, split: str | None) -> dict[str, Records]:
    """The splits of a data.Source, the same as in pretraining."""
    field = source.renamed_fields().get("text", "text")
    texts = data.Source(source.name, field, validation_fraction=source.validation_fraction)

    def read(split, report):
        with data.field_flag("--config.data.fields", "text="):
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


# The hub.


def _hub(
    source: TaskSource, kind: type, renamed: dict[str, str], report: DataReport, only: str | None
) -> dict[str, Records]:
    def read(files):
        for file in files:
            reader = READERS.get(_ending(file))
            if reader is None:
                raise UserError(f"{source.name}: {file} holds no examples; choose a data set of {', '.join(READERS)}")
            yield from reader(file, kind, renamed, report)

    splits = hub_splits(source.name)
    names = ["all"] if only == "all" else [*splits.keys() - {"all"}] if only else ["train", "validation"]
    return {name: read(file.path for file in splits[name]) for name in sorted(names) if name in splits}


def _ending(path: str) -> str:
    """The name of the reader of a file: jsonl for x.json.gz."""
    ending = path.removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    return "jsonl" if ending == "json" else ending


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
        return {name: examples(name) for name in splits["all"]}
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
