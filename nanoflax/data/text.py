"""Sources of text, each named by one string; their documents and validation splits."""

import ast
import dataclasses
import functools
import glob
import inspect
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from typing import Any

from nanoflax.config import TextData
from nanoflax.data import files
from nanoflax.data.files import DataReport
from nanoflax.errors import UserError
from nanoflax.tokenizers import well_formed

FEW_DOCUMENTS = 100  # with fewer documents a split by hash may be empty
HELP = "choose pydocs, text:GLOB or tfds:NAME[:FIELD]"


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of text and its splits "train" and "validation" ("all" is both).

    name: pydocs; text:GLOB of .txt, .md (one document per file) and .jsonl (one document per line, in `field`), each
      also .gz; tfds:NAME[:FIELD], where NAME may include /CONFIG and :VERSION.
    validation: another source, for the validation split. If empty, the data set's own split validation, or else
      test. Without such a split, documents chosen by hash, with probability `validation_fraction`. With fewer than
      100 documents, the last `validation_fraction` of each document, cut after a paragraph, line or word.
    data_dir: of TFDS; default $TFDS_DATA_DIR, or the default of TFDS.
    """

    name: str
    field: str = "text"
    validation: str = ""
    validation_fraction: float = 0.05
    data_dir: str = ""

    def __post_init__(self) -> None:
        for name in (self.name, self.validation or "pydocs"):
            scheme, _, rest = name.partition(":")
            if name != "pydocs" and not (scheme in ("text", "tfds") and rest):
                hint = f"write text:{name}, or " if os.path.exists(name) else ""
                raise UserError(f"data source {name!r} is not known; {hint}{HELP}")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction {self.validation_fraction}: must be between 0 and 1")


def source_of(config: TextData, name: str | None = None) -> Source:
    """The Source of a TextData. name: another source, read with the same settings."""
    return Source(name or config.train, config.field, "" if name else config.validation, config.validation_fraction)


def documents(source: Source | str, split: str = "train", report: DataReport | None = None) -> Iterator[str]:
    """Yields the non-empty documents of a Source, or of the source with this name, in a fixed order.

    `report` counts damaged text. Raises: UserError for a source that cannot be read.
    """
    source = source if isinstance(source, Source) else Source(source)
    report = DataReport() if report is None else report
    if split not in ("train", "validation", "all"):
        raise UserError(f"split {split!r}: choose train, validation or all")
    if split == "validation" and source.validation:
        return documents(dataclasses.replace(source, name=source.validation, validation=""), "all", report)
    dataset = files.dataset_splits(_dataset(source)[0]) if source.name.startswith("tfds:") else {}
    has_splits = split == "all" or source.validation or "validation" in dataset
    names = dataset.get(split if has_splits else "train", [])
    if has_splits:
        return _read(source, names, report)
    first = itertools.islice(_read(source, names, DataReport()), FEW_DOCUMENTS)
    few = sum(1 for _ in first) < FEW_DOCUMENTS
    return _split_documents(_read(source, names, report), split, source.validation_fraction, few)


def source_version(source: Source) -> list[Any]:
    """JSON values that change when the source changes: paths, sizes and times of files, versions of data sets and of
    Python. The text is not read. Raises: UserError for a source that does not exist."""

    def version(name: str) -> list[Any]:
        if name.startswith("text:"):
            stats = [(path, os.stat(path)) for path in _files(name)]
            return [[os.path.abspath(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        if name.startswith("tfds:"):
            builder, field = _dataset(dataclasses.replace(source, name=name))
            return [builder.info.full_name, str(builder.data_path), field]
        return [sys.version]

    return [version(source.name), source.validation and version(source.validation)]


def _split_documents(texts: Iterable[str], split: str, fraction: float, few: bool) -> Iterator[str]:
    for text in texts:
        if few:
            if part := _cut(text, fraction)[split == "validation"]:
                yield part
        elif files.is_held_out(text, fraction) == (split == "validation"):
            yield text


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """The text in two parts. The second is about `fraction` of the text and begins after a paragraph, line or word."""
    middle = int(len(text) * (1 - fraction))
    for end in ("\n\n", "\n", " "):
        at = text.rfind(end, len(text) // 2, middle) + len(end)
        if at >= len(text) // 2 + len(end):
            return text[:at], text[at:]
    return text[:middle], text[middle:]


def _read(source: Source, splits: Sequence[str], report: DataReport) -> Iterator[str]:
    """splits: names of splits of a TFDS data set; other sources ignore them."""
    if source.name == "pydocs":
        return _counted(_pydocs(), report)
    if source.name.startswith("text:"):
        return _read_files(_files(source.name), source.field, report)
    return _read_dataset(source, splits, report)


def _counted(items: Sequence[Any], report: DataReport, part: int = 0, parts: int = 1) -> Iterator[Any]:
    """Yields the items and updates report.share; the items are part number `part` of `parts` equal parts."""
    for i in range(len(items)):
        report.share = (part + i / len(items)) / parts
        yield items[i]


def _document(text: str | bytes, place: str, report: DataReport) -> str:
    """The text, repaired so that UTF-8 can encode it; "" for a blank text."""
    text = files.decode(text, place, report) if isinstance(text, bytes) else text
    text = files.clean(text, [files.REPAIR], place, report)
    if not text or text.isspace():
        report.add("empty documents", place)
        return ""
    return text


# Python's documentation.


@functools.cache  # 2 MB: collecting takes 2 to 3 s, and each split needs all
def _pydocs() -> list[str]:
    """The documentation of the running Python: its help topics, then the docstrings of its modules."""
    from pydoc_data.topics import topics

    found = [topics[name] for name in sorted(topics)]
    seen = set()
    for name, _, module in files.standard_modules("**/*.py"):
        if sections := list(_docstrings(module, name, "", seen)):
            found.append("\n\n".join(sections) + "\n")
    return found


def _docstrings(node: Any, heading: str, prefix: str, seen: set[str]) -> Iterator[str]:
    """Yields "name\\n\\ndocstring" of a module or class and its members; repeated docstrings only once."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    if text and text not in seen:
        seen.add(text)
        yield f"{heading}\n\n{well_formed(text)}"
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = prefix + child.name
                yield from _docstrings(child, name, name + ".", seen)


# Files.


def _files(name: str) -> list[str]:
    pattern = os.path.expanduser(name.removeprefix("text:"))
    matches = [path for path in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(path)]
    found = [path for path in matches if _suffix(path) in (".txt", ".md", ".jsonl")]
    if not found:
        what = f"{len(matches)} files, none of them" if matches else "no file, so no"
        raise UserError(
            f"data source {name!r} matches {what} .txt, .md or .jsonl (or .gz of these); for all files in a folder "
            "write text:FOLDER/**/*.txt"
        )
    return found


def _suffix(path: str) -> str:
    return os.path.splitext(path.removesuffix(".gz"))[1]


def _read_files(paths: Sequence[str], field: str, report: DataReport) -> Iterator[str]:
    size, before, found, others = sum(map(os.path.getsize, paths)) or 1, 0, False, {}
    for path in paths:
        with files.open_text(path) as file:
            if _suffix(path) == ".jsonl":
                texts = _read_json_lines(file, path, field, others, report)
            else:
                texts = [_document(files.decoded(file.read(), path, report), path, report)]
            for text in texts:
                report.share = (before + files.bytes_read(file)) / size
                found = True
                if text:
                    yield text
            before += files.bytes_read(file)
    if others and not found:
        raise UserError(
            f"{others[next(iter(others))]}: no JSON line has text in field {field!r}; choose one of "
            f"{', '.join(others)}, as in --config.data.field={next(iter(others))}"
        )


def _read_json_lines(
    file: TextIOWrapper, path: str, field: str, others: dict[str, str], report: DataReport
) -> Iterator[str]:
    """Yields the texts. `others` receives {name of another field with text: its first place}."""
    for place, value in files.json_lines(file, path, report):
        text = value.get(field) if isinstance(value, dict) else None
        if isinstance(text, str):
            yield _document(text, place, report)
        else:
            report.add(f"JSON lines without text in field {field!r}, left out", place)
            for name, other in value.items() if isinstance(value, dict) else ():
                if isinstance(other, str):
                    others.setdefault(name, place)


# TFDS.


def _dataset(source: Source) -> tuple[Any, str]:
    """(builder, field) of a tfds: source; the data set is prepared."""
    import tensorflow_datasets as tfds

    words = source.name.removeprefix("tfds:").split(":")
    # NAME, NAME:FIELD, NAME:VERSION or NAME:VERSION:FIELD; a version starts with a digit.
    name = ":".join(words[:2] if len(words) > 1 and words[1][:1].isdigit() else words[:1])
    field = ":".join(words)[len(name) + 1 :]
    builder = files.open_dataset(name, source.data_dir)
    features = builder.info.features
    texts = [key for key in features if isinstance(features[key], tfds.features.Text)]
    if field not in texts and (field or len(texts) != 1):
        raise UserError(
            f"{source.name}: name a text feature, as in tfds:{name}:FIELD; it has {', '.join(texts) or 'none'}"
        )
    return builder, field or texts[0]


def _read_dataset(source: Source, splits: Sequence[str], report: DataReport) -> Iterator[str]:
    builder, field = _dataset(source)
    for part, name in enumerate(splits):
        examples = files.dataset_examples(builder, name)
        for i, example in enumerate(_counted(examples, report, part, len(splits))):
            if text := _document(example[field], f"{name} example {i}", report):
                yield text
