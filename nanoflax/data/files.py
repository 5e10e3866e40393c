"""Opening and decoding the text files of a person, plain, .gz or .zst, and reading their lines.

Damaged text is repaired or left out, and counted in a DataReport. A file that cannot be read raises UserError.
"""

import codecs
import contextlib
import gzip
import io
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, cast

from nanoflax.data.remote import open_binary
from nanoflax.data.report import DataReport
from nanoflax.errors import UserError
from nanoflax.untrusted import parse_json

_BYTE_ORDER_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MALFORMED = "malformed JSON lines (write one object on each line, or a list of objects), left out"


@contextlib.contextmanager
def open_text(path: str | os.PathLike) -> Iterator[io.TextIOWrapper]:
    """Opens a text file of a person. A byte-order mark is removed and chooses UTF-16 or UTF-32.

    .gz and .zst are decompressed: the first bytes decide, not the name. Other files are UTF-8; their invalid bytes
    become surrogates, which `decoded` reports. Lines end with \\n, or with \\r if the file has no \\n. Raises:
    UserError if the file cannot be opened or read, or is no text.
    """
    try:
        with open_binary(path) as raw:
            begin = cast(io.BufferedReader, raw).peek(4)
            kind = next((mark for mark in _DECOMPRESS if begin.startswith(mark)), b"")
            with _DECOMPRESS[kind](raw, path) if kind else raw as file:
                head = cast(io.BufferedReader, file).peek(2**20)
                marked = [name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)]
                encoding = marked[0] if marked else "utf-8-sig"
                if not marked and _is_utf16(head):
                    raise UserError(
                        f"{path} is UTF-16 without a byte-order mark, or no text: it has zero bytes; convert it, as in "
                        f"iconv -f utf-16le -t utf-8 {path} > new.txt"
                    )
                errors = "strict" if marked else "surrogateescape"
                first = head.decode(encoding, "ignore")
                newline = "\r" if "\r" in first and "\n" not in first else "\n"
                with io.TextIOWrapper(cast(BinaryIO, file), encoding, errors, newline) as text:
                    yield text
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', '') or error}") from error


def _is_utf16(head: bytes) -> bool:
    """Whether many bytes at even places, or many at odd places, are zero."""
    return max(head[::2].count(0), head[1::2].count(0)) > max(2, len(head) / 20)


class _Zstd(io.BufferedReader):
    """The decompressed bytes of a .zst file, all frames. fileobj: the file."""

    def __init__(self, file: Any, path: Any) -> None:
        try:
            import pyarrow
        except ImportError as error:
            raise UserError(f"{path}: .zst files need pyarrow: pip install 'nanoflax[data]'") from error
        super().__init__(pyarrow.CompressedInputStream(file, "zstd"), 2**20)
        self.fileobj = file


_DECOMPRESS = {  # by the first bytes of a file
    b"\x1f\x8b": lambda file, path: gzip.GzipFile(fileobj=file),
    b"\x28\xb5\x2f\xfd": _Zstd,
}


def bytes_read(file: io.TextIOWrapper) -> int:
    """The number of bytes read from a file of open_text; of a compressed file, its own bytes."""
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
    yield from json_values(lines, report)


def json_values(lines: Iterable[tuple[str, str]], report: DataReport) -> Iterator[tuple[str, Any]]:
    """Yields (place, value) of lines with their places. Malformed lines are left out and reported."""
    for place, line in lines:
        if line and not line.isspace():
            try:
                value = parse_json(line, place)
            except UserError:
                report.add(MALFORMED, place)
            else:
                yield place, value


def can_cut(path: str) -> bool:
    """Whether a file has lines of UTF-8, so that any process can read a range of its bytes with lines_of_range: it is
    not compressed, has no other encoding, ends its lines with \\n and is not one JSON list."""
    try:
        with open_binary(path) as file:
            head = file.read(2**20)
    except OSError:
        return False  # the reader says why
    marks = [*_DECOMPRESS, *_BYTE_ORDER_MARKS, codecs.BOM_UTF8]
    return b"\n" in head and not (head.startswith(tuple(marks)) or _is_utf16(head) or head.lstrip().startswith(b"["))


def lines_of_range(file: BinaryIO, path: str, begin: int, end: int, report: DataReport) -> Iterator[tuple[str, str]]:
    """Yields (place, line) of the lines that begin in a range of bytes of a file.

    The place of a line names its first byte: the number of the line is not known without reading all bytes before it.
    """
    file.seek(max(begin - 1, 0))
    at = begin and begin - 1 + len(file.readline())
    while at < end and (line := file.readline()):
        place = f"{path} line at byte {at}"
        at += len(line)
        yield place, decode(line, place, report).removeprefix("\ufeff").rstrip("\r\n")
