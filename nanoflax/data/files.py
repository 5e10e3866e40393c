"""Reading files of people: JSON lines, TFDS data sets, the sources of Python; what is damaged is counted."""

import ast
import codecs
import collections
import contextlib
import gzip
import hashlib
import json
import logging
import os
import pathlib
import socket
import sysconfig
import threading
import urllib.parse
import urllib.request
import warnings
import zlib

from nanoflax.errors import UserError

SKIPPED_MODULES = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


class DataReport:
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
        return [
            f"{problem}: {count} ({', '.join(self.places[problem])}"
            f"{', ...' if count > len(self.places[problem]) else ''})"
            for problem, count in self.counts.items()
        ]


def is_held_out(text, fraction):
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"nanoflax split").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


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


def open_dataset(name, data_dir=""):
    """The TFDS builder of NAME, with /CONFIG and :VERSION if need be, prepared. TensorFlow is not
    imported. Raises UserError where it is not prepared and cannot be."""
    import absl.logging
    import tensorflow_datasets as tfds

    # It warns of each folder that it looks into; what matters comes as an exception.
    absl.logging.get_absl_logger().addFilter(_no_warning_of_tfds)
    directory = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    hint = (
        f"prepare it once, where there is a network: tfds build {name} "
        f"--file_format=array_record --data_dir={directory or tfds.core.constants.DATA_DIR}"
    )
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


def dataset_splits(builder):
    """{"train": [name], "all": [names]}, with "validation": [name] if there is such or a test."""
    names = list(builder.info.splits)
    if "train" not in names:
        raise UserError(f"tfds:{builder.info.full_name} has no split named train, only {', '.join(names)}")
    held_out = [name for name in ("validation", "test") if name in names][:1]
    return {"train": ["train"], "all": names} | ({"validation": held_out} if held_out else {})


def dataset_examples(builder, split):
    """The examples of one split of a TFDS builder, at random access."""
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"tfds:{builder.info.full_name} is prepared as "
            f"{builder.info.file_format.value}: prepare it again with "
            "--file_format=array_record"
        ) from error


def read_binary(path, read):
    """Yields what read(file) yields; .gz is unpacked."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            yield from read(file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def text_lines(path, report):
    """Yields (place, line without its end) of a file of UTF-8."""

    def read(file):
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                report.add("invalid UTF-8, read as U+FFFD", f"{place}, byte {error.start}")
                text = line.decode("utf-8", "replace")
            yield place, text.rstrip("\r\n")

    return read_binary(path, read)
