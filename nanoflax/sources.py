"""Where text comes from: a source named by one string, its documents, its validation split."""

import ast
import codecs
import collections
import contextlib
import dataclasses
import functools
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import logging
import os
import pathlib
import socket
import sys
import sysconfig
import threading
import urllib.parse
import urllib.request
import warnings
import zlib

from nanoflax.errors import UserError
from nanoflax.tokenizers import well_formed

FEW_DOCUMENTS = 100  # fewer have too few for a split by hash
SKIPPED_MODULES = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "pydoc_data",
                   "site-packages", "dist-packages", "__pycache__"}
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
            raise UserError(f"validation_fraction {self.validation_fraction}: must be between 0 "
                            "and 1")


class Report:
    """Counts of what was wrong with the text, with the first few places of each.

    `share`: how much of the source has been read, from 0 to 1.
    """

    share = 0.0

    def __init__(self):
        self.counts, self.places = collections.Counter(), collections.defaultdict(list)

    def add(self, problem, place):
        self.counts[problem] += 1
        if len(self.places[problem]) < 3:
            self.places[problem].append(place)

    def lines(self):
        """One line for each problem, for people."""
        return [f"{problem}: {count} ({', '.join(self.places[problem])}"
                f"{', ...' if count > len(self.places[problem]) else ''})"
                for problem, count in self.counts.items()]


# Sources of documents.


def documents(source, split="train", report=None):
    """Yields the documents (str, never empty) of a Source or its name, in a fixed order.

    Damaged text is counted in `report`. Raises UserError for what cannot be read at all.
    """
    source = source if isinstance(source, Source) else Source(source)
    report = Report() if report is None else report
    if split not in ("train", "validation", "all"):
        raise UserError(f"split {split!r}: choose train, validation or all")
    if split == "validation" and source.validation:
        return documents(dataclasses.replace(source, name=source.validation, validation=""),
                         "all", report)
    own = _dataset_splits(source)
    whole = split == "all" or source.validation or "validation" in own
    names = own.get(split if whole else "train")
    if whole:
        return _read(source, names, report)
    few = FEW_DOCUMENTS > sum(
        1 for _ in itertools.islice(_read(source, names, Report()), FEW_DOCUMENTS))
    return _split_documents(_read(source, names, report), split, source.validation_fraction, few)


def identity(source):
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
        elif chosen(text, fraction) == (split == "validation"):
            yield text


def chosen(text, fraction):
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"nanoflax split").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


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


def standard_modules(pattern, largest=None):
    """Yields (name, path, ast.Module) of the running Python's own source files, in order of their
    paths; of those under `largest` bytes alone, if given."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob(pattern)):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_MODULES & set(parts) or largest and path.stat().st_size >= largest:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of old escapes in the source
                module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # a template or a foreign file, no module of this Python
        yield ".".join(parts).removesuffix(".__init__"), path, module


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
        raise UserError(f"data source {source.name!r} matches {what} .txt, .md or .jsonl (or .gz "
                        "of these); a whole folder is text:FOLDER/**/*.txt")
    return files


def _suffix(path):
    return os.path.splitext(path.removesuffix(".gz"))[1]


def _read_text(files, field, report):
    size, before = sum(map(os.path.getsize, files)) or 1, 0
    for path in files:
        try:
            with (open(path, "rb") as raw,
                  gzip.open(raw) if path.endswith(".gz") else raw as file):
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


def json_lines(file, path, report):
    """Yields (place, value) of a binary file of JSON lines; malformed ones are counted."""
    for number, line in enumerate(file, 1):
        place = f"{path}:{number}"
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.isspace():
            continue
        try:
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                value = json.loads(line.decode("utf-8", "replace"))
                report.add("invalid UTF-8, read as U+FFFD", f"{place}, byte {error.start}")
        except (ValueError, RecursionError):
            report.add("malformed JSON lines, left out", place)
            continue
        yield place, value


def _no_warning_of_tfds(record):
    return record.levelno > logging.WARNING or "tensorflow_datasets" not in record.pathname


def _dataset(source):
    """The TFDS builder of a tfds: source, prepared, and its field."""
    import tensorflow_datasets as tfds

    words = source.name.removeprefix("tfds:").split(":")
    # NAME, NAME:FIELD, NAME:VERSION or NAME:VERSION:FIELD; a version starts with a digit.
    name = ":".join(words[:2] if len(words) > 1 and words[1][:1].isdigit() else words[:1])
    field = ":".join(words)[len(name) + 1:]
    builder = open_dataset(name, source.data_dir)
    features = builder.info.features
    texts = [k for k in features if isinstance(features[k], tfds.features.Text)]
    if field not in texts and (field or len(texts) != 1):
        raise UserError(f"{source.name}: name a text feature, as in tfds:{name}:FIELD; it has "
                        f"{', '.join(texts) or 'none'}")
    return builder, field or texts[0]


def open_dataset(name, data_dir=""):
    """The TFDS builder of NAME, with /CONFIG and :VERSION if need be, prepared. TensorFlow is not
    imported. Raises UserError where it is not prepared and cannot be."""
    import absl.logging
    import tensorflow_datasets as tfds

    # It warns of each folder that it looks into; what matters comes as an exception.
    absl.logging.get_absl_logger().addFilter(_no_warning_of_tfds)
    directory = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    hint = (f"prepare it once, where there is a network: tfds build {name} "
            f"--file_format=array_record --data_dir={directory or tfds.core.constants.DATA_DIR}")
    try:
        builder = tfds.builder(name, data_dir=directory)
        if not builder.is_prepared():
            if not _online():
                raise UserError(f"tfds:{name} is not prepared and there is no network; {hint}")
            builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise
    except Exception as error:  # TFDS raises of every kind, with pages of text
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"tfds:{name} is not prepared here: {message} {hint}") from error
    return builder


def _online(seconds=3):
    """Whether the host of prepared datasets, or the proxy on the way to it, answers in time."""
    proxy = urllib.parse.urlsplit(urllib.request.getproxies().get("https", ""))
    address = (proxy.hostname or "storage.googleapis.com", proxy.port or 443)
    answered = threading.Event()

    def connect():  # in a thread, because looking a name up has no time limit of its own
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=seconds).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _dataset_splits(source):
    """{"train": [name], "validation": [name] if it has one, "all": [names]}; {} if not of TFDS."""
    if not source.name.startswith("tfds:"):
        return {}
    return dataset_splits(_dataset(source)[0])


def dataset_splits(builder):
    """{"train": [name], "all": [names]}, with "validation": [name] if there is such or a test."""
    names = list(builder.info.splits)
    if "train" not in names:
        raise UserError(f"tfds:{builder.info.full_name} has no split named train, only "
                        f"{', '.join(names)}")
    held_out = [name for name in ("validation", "test") if name in names][:1]
    return {"train": ["train"], "all": names} | ({"validation": held_out} if held_out else {})


def _read_tfds(source, names, report):
    builder, field = _dataset(source)
    for part, name in enumerate(names):
        examples = dataset_examples(builder, name)
        for i, example in enumerate(_counted(examples, report, part, len(names))):
            if text := _clean(example[field], f"{name} example {i}", report):
                yield text


def dataset_examples(builder, split):
    """The examples of one split of a TFDS builder, at random access."""
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(f"tfds:{builder.info.full_name} is prepared as "
                        f"{builder.info.file_format.value}: prepare it again with "
                        "--file_format=array_record") from error
