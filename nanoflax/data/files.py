"""Reading and cleaning: files (plain or .gz), JSON lines, TFDS data sets and Python's own sources.

Damaged text is repaired or left out, and counted in a DataReport. A file that cannot be read raises UserError.
"""

import ast
import codecs
import collections
import contextlib
import gzip
import hashlib
import io
import itertools
import logging
import os
import pathlib
import re
import socket
import sysconfig
import threading
import unicodedata
import urllib.parse
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, cast

from nanoflax.errors import UserError
from nanoflax.tokenizers import well_formed
from nanoflax.untrusted import parse_json

SKIPPED_MODULES = set(
    "test tests idle_test idlelib lib2to3 turtledemo pydoc_data site-packages dist-packages __pycache__".split()
)


class DataReport:
    """Counts each kind of problem in the data and keeps the first three places of each kind.

    share: the part of the source that has been read, from 0 to 1.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self.counts, self.places = collections.Counter(), collections.defaultdict(list)

    def add(self, problem: str, place: str) -> None:
        self.counts[problem] += 1
        if len(self.places[problem]) < 3:
            self.places[problem].append(place)

    def lines(self) -> list[str]:
        """One readable line for each kind of problem."""
        return [
            f"{problem}: {count} ({', '.join(self.places[problem])}{', ...' * (count > 3)})"
            for problem, count in self.counts.items()
        ]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text is validation data. The hash of the text decides, so equal texts are in the same split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"nanoflax split").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


# Files.


_BYTE_ORDER_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MALFORMED = "malformed JSON lines (write one object on each line, or a list of objects), left out"


@contextlib.contextmanager
def open_text(path: str | os.PathLike) -> Iterator[io.TextIOWrapper]:
    """Opens a text file of a person: .gz is decompressed, a byte-order mark is removed and chooses UTF-16 or UTF-32.

    Other files are UTF-8; their invalid bytes become surrogates, which `decoded` reports. Lines end with \\n, or with
    \\r if the file has no \\n. Raises: UserError if the file cannot be opened or read, or is no text.
    """
    try:
        with open(path, "rb", buffering=2**20) as raw:
            zipped = cast(io.BufferedReader, raw).peek(2)[:2] == b"\x1f\x8b"
            with gzip.open(raw) if zipped else raw as file:
                head = cast(io.BufferedReader, file).peek(2**20)
                marked = [name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)]
                encoding = marked[0] if marked else "utf-8-sig"
                if not marked and _is_utf16(head):
                    raise UserError(
                        f"{path} is UTF-16 without a byte-order mark, or no text: it has zero bytes; convert it, as in "
                        f"iconv -f utf-16le -t utf-8 {path} > new.txt"
                    )
                errors = "strict" if marked else "surrogateescape"
                begin = head.decode(encoding, "ignore")
                newline = "\r" if "\r" in begin and "\n" not in begin else "\n"
                with io.TextIOWrapper(cast(BinaryIO, file), encoding, errors, newline) as text:
                    yield text
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', '') or error}") from error


def _is_utf16(head: bytes) -> bool:
    """Whether many bytes at even places, or many at odd places, are zero."""
    return max(head[::2].count(0), head[1::2].count(0)) > max(2, len(head) / 20)


def bytes_read(file: io.TextIOWrapper) -> int:
    """The number of bytes read from a file of open_text; for .gz, compressed bytes."""
    buffer: Any = file.buffer
    return getattr(buffer, "fileobj", buffer).tell()


def decode(text: bytes, place: str, report: DataReport | None) -> str:
    """Decodes UTF-8; each invalid byte becomes U+FFFD. Raises: UserError without a report."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        at = f"{place}, byte {error.start}"
        if report is None:
            raise UserError(f"{at} is not UTF-8; convert the file, as in iconv -f cp1252 -t utf-8") from None
        report.add("invalid UTF-8, read as U+FFFD", at)
        return text.decode("utf-8", "replace")


def decoded(text: str, place: str, report: DataReport | None) -> str:
    """A text of open_text with U+FFFD for invalid bytes. Raises: UserError for invalid bytes without a report."""
    return text if text.isascii() else decode(text.encode("utf-8", "surrogateescape"), place, report)


def text_lines(
    file: io.TextIOWrapper, path: str, report: DataReport | None = None, keep_ends: bool = False
) -> Iterator[tuple[str, str]]:
    """Yields (place, line) of a file of open_text, without line ends. See `decode` for invalid bytes."""
    for number, line in enumerate(file, 1):
        line = decoded(line, place := f"{path}:{number}", report).removeprefix("\ufeff")  # of files that were joined
        yield place, line if keep_ends else line.rstrip("\r\n")


def json_lines(file: io.TextIOWrapper, path: str, report: DataReport) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) of a file of JSON lines, or of a file that is one list."""
    lines = text_lines(file, path, report)
    first = next(lines, ("", ""))
    lines = itertools.chain([first], lines)
    if first[1].lstrip().startswith("["):
        lines = list(lines)
        with contextlib.suppress(UserError):
            values = parse_json("\n".join(line for _, line in lines), path)
            yield from ((f"{path} item {number}", value) for number, value in enumerate(values, 1))
            return
    for place, line in lines:
        if line and not line.isspace():
            try:
                value = parse_json(line, place)
            except UserError:
                report.add(MALFORMED, place)
            else:
                yield place, value


# Cleaning: a list of steps, each (words for the report if the text changes, function).

REPAIR = ("unpaired surrogates, read as U+FFFD", well_formed)  # UTF-8 cannot encode unpaired surrogates
# Not \x1c-\x1e and \x85: Python treats them as line ends, so the whitespace step handles them.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufeff]")
WHITESPACE = {
    "trim": lambda text: "\n".join(line.rstrip() for line in text.splitlines()).strip(),
    "collapse": lambda text: " ".join(text.split()),
    "": lambda text: text,
}
UNICODE = ("NFC", "NFKC", "")
CleaningStep = tuple[str, Callable[[str], str]]


def _normalize(form: Any, text: str) -> str:
    return unicodedata.normalize(form, text) if form else text


def cleaning_steps(unicode: str, whitespace: str) -> list[CleaningStep]:
    """The steps for examples. unicode: one of UNICODE; whitespace: a key of WHITESPACE; "" for no change."""
    return [
        REPAIR,
        (f"texts normalized to {unicode}", lambda text: _normalize(unicode, text)),
        ("texts with control characters, removed", lambda text: _CONTROL.sub("", text)),
        (f"texts with whitespace to {whitespace}", WHITESPACE[whitespace]),
    ]


def clean(text: str, steps: Iterable[CleaningStep], place: str, report: DataReport) -> str:
    """The text after all steps. The report counts each step that changes the text."""
    for problem, step in steps:
        changed = step(text)
        if changed != text:
            report.add(problem, place)
        text = changed
    return text


# Data sets of TFDS.


def _not_a_tfds_warning(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING or "tensorflow_datasets" not in record.pathname


def open_dataset(name: str, data_dir: str = "") -> Any:
    """The builder of the prepared TFDS data set NAME[/CONFIG][:VERSION]. TensorFlow is not imported.

    data_dir: default $TFDS_DATA_DIR, or the default of TFDS. Raises: UserError if preparing the data set fails.
    """
    import absl.logging
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import constants

    directory = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    hint = (
        f"prepare it once, on a machine with a network: tfds build {name} "
        f"--file_format=array_record --data_dir={directory or constants.DATA_DIR}"
    )
    # TFDS logs a warning for each folder that it searches. Real errors are exceptions.
    logger = absl.logging.get_absl_logger()
    logger.addFilter(_not_a_tfds_warning)
    try:
        builder = tfds.builder(name, data_dir=directory)
        if not builder.is_prepared():
            if not _online():
                raise UserError(f"tfds:{name} is not prepared and there is no network; {hint}")
            builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise
    except Exception as error:  # TFDS raises many classes of exceptions, with long texts
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"tfds:{name} is not prepared here: {message} {hint}") from error
    finally:
        logger.removeFilter(_not_a_tfds_warning)
    return builder


def _online(seconds: float = 3) -> bool:
    """Whether the server of prepared data sets, or the proxy, answers within `seconds`."""
    proxy = urllib.parse.urlsplit(urllib.request.getproxies().get("https", ""))
    address = (proxy.hostname or "storage.googleapis.com", proxy.port or 443)
    answered = threading.Event()

    def connect():  # runs in a thread, because a DNS lookup has no timeout
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=seconds).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def dataset_splits(builder: Any) -> dict[str, list[str]]:
    """{"train": [name], "all": [names]}; also "validation": [name] if the split validation, or else test, exists."""
    names = list(builder.info.splits)
    if "train" not in names:
        raise UserError(f"tfds:{builder.info.full_name} has no split named train, only {', '.join(names)}")
    held_out = [name for name in ("validation", "test") if name in names][:1]
    return {"train": ["train"], "all": names} | ({"validation": held_out} if held_out else {})


def dataset_examples(builder: Any, split: str) -> Any:
    """The examples of one split of a TFDS builder, with random access."""
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"tfds:{builder.info.full_name} is prepared as {builder.info.file_format.value}: prepare it again with "
            "--file_format=array_record"
        ) from error


# Python's sources.


def standard_modules(pattern: str, largest: int | None = None) -> Iterator[tuple[str, pathlib.Path, ast.Module]]:
    """Yields (name, path, syntax tree) of the source files of the running Python, sorted by path.

    largest: in bytes; files of this size or larger are left out.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob(pattern)):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_MODULES & set(parts) or largest and path.stat().st_size >= largest:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # about outdated escape sequences
                module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # a template or a file for another Python
        yield ".".join(parts).removesuffix(".__init__"), path, module
