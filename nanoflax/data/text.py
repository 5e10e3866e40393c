"""Where text comes from: a source named by one string, its documents, its validation split."""

import ast
import codecs
import dataclasses
import functools
import glob
import gzip
import inspect
import itertools
import os
import sys
import zlib

from nanoflax.data.files import (
    DataReport,
    dataset_examples,
    dataset_splits,
    is_held_out,
    json_lines,
    open_dataset,
    standard_modules,
)
from nanoflax.errors import UserError
from nanoflax.tokenizers import well_formed

FEW_DOCUMENTS = 100  # fewer have too few for a split by hash
HELP = "choose pydocs, text:GLOB or tfds:NAME[:FIELD]"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where text comes from and how it splits into "train" and "validation" ("all" is both).

    name: pydocs; text:GLOB of .txt, .md (a document each) and .jsonl (a document a line, under
      `field`), each also .gz; tfds:NAME[:FIELD], NAME perhaps with /CONFIG and :VERSION.
    validation: another source, all of it the validation split. Otherwise a dataset's own splits
      (validation, or else test); otherwise each document whose hash falls under
      `validation_fraction`. Of fewer than 100 documents a hash may choose none: there the last
      `validation_fraction` of each one, cut where a paragraph, line or word ends, is validation.
    """

    name: str
    field: str = "text"
    validation: str = ""
    validation_fraction: float = 0.05
    data_dir: str = ""  # of TFDS; default $TFDS_DATA_DIR, or where TFDS keeps its data

    def __post_init__(self):
        for name in (self.name, self.validation or "pydocs"):
            kind, _, rest = name.partition(":")
            if name != "pydocs" and not (kind in ("text", "tfds") and rest):
                raise UserError(f"data source {name!r} is not known; {HELP}")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction {self.validation_fraction}: must be between 0 and 1")


# Sources of documents.


def documents(source, split="train", report=None):
    """Yields the documents (str, never empty) of a Source or its name, in a fixed order.

    Damaged text is counted in `report`. Raises UserError for what cannot be read at all.
    """
    source = source if isinstance(source, Source) else Source(source)
    report = DataReport() if report is None else report
    if split not in ("train", "validation", "all"):
        raise UserError(f"split {split!r}: choose train, validation or all")
    if split == "validation" and source.validation:
        return documents(dataclasses.replace(source, name=source.validation, validation=""), "all", report)
    own = _dataset_splits(source)
    whole = split == "all" or source.validation or "validation" in own
    names = own.get(split if whole else "train")
    if whole:
        return _read(source, names, report)
    few = FEW_DOCUMENTS > sum(1 for _ in itertools.islice(_read(source, names, DataReport()), FEW_DOCUMENTS))
    return _split_documents(_read(source, names, report), split, source.validation_fraction, few)


def source_version(source):
    """What tells, without reading the text, that a source is still the same, as JSON values."""

    def of(name):
        if name.startswith("text:"):
            files = _files(dataclasses.replace(source, name=name))
            return [[os.path.abspath(p), (s := os.stat(p)).st_size, s.st_mtime_ns] for p in files]
        if name.startswith("tfds:"):
            builder, field = _dataset(dataclasses.replace(source, name=name))
            return [builder.info.full_name, str(builder.data_path), field]
        return [sys.version]

    return [of(source.name), source.validation and of(source.validation)]


def _split_documents(texts, split, fraction, few):
    for text in texts:
        if few:
            if part := _cut(text, fraction)[split == "validation"]:
                yield part
        elif is_held_out(text, fraction) == (split == "validation"):
            yield text


def _cut(text, fraction):
    """Head and tail; the tail is about `fraction` of the text and starts after an end of sorts."""
    middle = int(len(text) * (1 - fraction))
    for end in ("\n\n", "\n", " "):
        at = text.rfind(end, len(text) // 2, middle) + len(end)
        if at >= len(text) // 2 + len(end):
            return text[:at], text[at:]
    return text[:middle], text[middle:]


def _read(source, names, report):
    if source.name == "pydocs":
        return _counted(_pydocs(), report)
    if source.name.startswith("text:"):
        return _read_text(_files(source), source.field, report)
    return _read_tfds(source, names, report)


def _counted(items, report, part=0, parts=1):
    """Yields items[0], items[1], ... and keeps report.share; they are one of several parts."""
    for i in range(len(items)):
        report.share = (part + i / len(items)) / parts
        yield items[i]


def _clean(text, place, report):
    """str or bytes -> str that UTF-8 can write, or "" for a blank document; counts the damage."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            report.add("invalid UTF-8, read as U+FFFD", f"{place}, byte {error.start}")
            text = text.decode("utf-8", "replace")
    clean = well_formed(text)
    if clean is not text:
        report.add("unpaired surrogates, read as U+FFFD", place)
    if not clean or clean.isspace():
        report.add("empty documents", place)
        return ""
    return clean


@functools.cache  # two megabytes, two or three seconds to collect, read for each split
def _pydocs():
    """The English in the running Python: its help topics, then its modules' docstrings."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    seen = set()
    for name, _, module in standard_modules("**/*.py"):
        if sections := list(_docstrings(module, name, "", seen)):
            documents.append("\n\n".join(sections) + "\n")
    return documents


def _docstrings(node, heading, prefix, seen):
    """Yields "name\\n\\ndocstring" of a module or class and its members, each docstring once."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    if text and text not in seen:
        seen.add(text)
        yield f"{heading}\n\n{well_formed(text)}"
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = prefix + child.name
                yield from _docstrings(child, name, name + ".", seen)


def _files(source):
    pattern = os.path.expanduser(source.name.removeprefix("text:"))
    matches = [p for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
    files = [p for p in matches if _suffix(p) in (".txt", ".md", ".jsonl")]
    if not files:
        what = f"{len(matches)} files, none of them" if matches else "no file, so no"
        raise UserError(
            f"data source {source.name!r} matches {what} .txt, .md or .jsonl (or .gz "
            "of these); a whole folder is text:FOLDER/**/*.txt"
        )
    return files


def _suffix(path):
    return os.path.splitext(path.removesuffix(".gz"))[1]


def _read_text(files, field, report):
    size, before = sum(map(os.path.getsize, files)) or 1, 0
    for path in files:
        try:
            with open(path, "rb") as raw, gzip.open(raw) if path.endswith(".gz") else raw as file:
                if _suffix(path) == ".jsonl":
                    texts = _read_jsonl(file, path, field, report)
                else:
                    texts = [_clean(file.read().removeprefix(codecs.BOM_UTF8), path, report)]
                for text in texts:
                    report.share = (before + raw.tell()) / size
                    if text:
                        yield text
                before += raw.tell()
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {error}") from error


def _read_jsonl(file, path, field, report):
    for place, value in json_lines(file, path, report):
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            report.add(f"JSON lines without text in field {field!r}, left out", place)
        else:
            yield _clean(text, place, report)


def _dataset(source):
    """The TFDS builder of a tfds: source, prepared, and its field."""
    import tensorflow_datasets as tfds

    words = source.name.removeprefix("tfds:").split(":")
    # NAME, NAME:FIELD, NAME:VERSION or NAME:VERSION:FIELD; a version starts with a digit.
    name = ":".join(words[:2] if len(words) > 1 and words[1][:1].isdigit() else words[:1])
    field = ":".join(words)[len(name) + 1 :]
    builder = open_dataset(name, source.data_dir)
    features = builder.info.features
    texts = [k for k in features if isinstance(features[k], tfds.features.Text)]
    if field not in texts and (field or len(texts) != 1):
        raise UserError(
            f"{source.name}: name a text feature, as in tfds:{name}:FIELD; it has {', '.join(texts) or 'none'}"
        )
    return builder, field or texts[0]


def _dataset_splits(source):
    """{"train": [name], "validation": [name] if it has one, "all": [names]}; {} if not of TFDS."""
    if not source.name.startswith("tfds:"):
        return {}
    return dataset_splits(_dataset(source)[0])


def _read_tfds(source, names, report):
    builder, field = _dataset(source)
    for part, name in enumerate(names):
        examples = dataset_examples(builder, name)
        for i, example in enumerate(_counted(examples, report, part, len(names))):
            if text := _clean(example[field], f"{name} example {i}", report):
                yield text


def source_of(config, name=None):
    """The Source of a TextData (or of another source string, read the same way)."""

    return Source(name or config.train, config.field, "" if name else config.validation, config.validation_fraction)
