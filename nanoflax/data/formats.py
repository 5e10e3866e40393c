"""The formats of files with text: a table from the suffix of a name to the functions that read and cut such a file."""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from nanoflax.data import files
from nanoflax.data.array_record import cut_records, read_records
from nanoflax.data.parquet import cut_parquet, read_parquet
from nanoflax.data.remote import open_binary
from nanoflax.data.report import DataReport
from nanoflax.data.tables import read_table
from nanoflax.errors import UserError

Texts = Iterator[tuple[str, str | bytes, float]]  # (place, text, share of the file or range that is read)
Ranges = list[tuple[int, int, int]]  # (begin, end, bytes)


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of a file, in the unit of its format; end 0: the complete file. size: in bytes."""

    path: str
    size: int
    begin: int = 0
    end: int = 0


@dataclasses.dataclass(frozen=True)
class Format:
    """read(range, field, report) yields its texts. cut(path, size, field, part_bytes) gives the ranges of a file that
    is larger than part_bytes; [] if only one process can read it.
    """

    read: Callable[[Range, str, DataReport], Texts]
    cut: Callable[[str, int, str, int], Ranges] = lambda path, size, field, part_bytes: []


def suffix(path: str) -> str:
    """The suffix that names a format: .jsonl of x.jsonl.gz, .array_record of x.array_record-00000-of-00002."""
    path = re.sub(r"-\d{5}-of-\d{5}$", "", path)
    return os.path.splitext(path.removesuffix(".gz").removesuffix(".zst"))[1]


def _read_all(piece: Range, field: str, report: DataReport) -> Texts:
    with files.open_text(piece.path) as file:
        yield piece.path, files.decoded(file.read(), piece.path, report), 1.0


def _read_table(piece: Range, field: str, report: DataReport, delimiter: str) -> Texts:
    with files.open_text(piece.path) as file:
        for place, text, read in read_table(file, piece.path, delimiter, field, report):
            yield place, text, read / piece.size


def _cut_lines(path: str, size: int, field: str, part_bytes: int) -> Ranges:
    n = -(-size // part_bytes)
    edges = [i * size // n for i in range(n + 1)]
    return [(a, b, b - a) for a, b in zip(edges, edges[1:], strict=False)] if files.can_cut(path) else []


def _read_json_lines(piece: Range, field: str, report: DataReport) -> Texts:
    with _json_values(piece, report) as (values, bytes_read):
        for place, value in values:
            if (text := _text_of(value, field, place, report)) is not None:
                yield place, text, bytes_read() / piece.size


@contextlib.contextmanager
def _json_values(piece: Range, report: DataReport) -> Iterator[tuple[Iterator[tuple[str, Any]], Callable[[], int]]]:
    """((place, value) of each line, the function that gives the bytes read)."""
    path = piece.path
    if not piece.end:
        with files.open_text(path) as file:
            yield files.json_lines(file, path, report), lambda: files.bytes_read(file)
        return
    try:
        with open_binary(path) as file:
            lines = files.lines_of_range(file, path, piece.begin, piece.end, report)
            yield files.json_values(lines, report), lambda: file.tell() - piece.begin
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_parquet(piece: Range, field: str, report: DataReport) -> Texts:
    return read_parquet(piece.path, piece.begin, piece.end, field, report)


def _read_array_records(piece: Range, field: str, report: DataReport) -> Texts:
    for place, value, share in read_records(piece.path, piece.begin, piece.end, report):
        text = value if isinstance(value, bytes) else _text_of(value, field, place, report, "records")
        if text is not None:
            yield place, text, share


def _text_of(value: Any, field: str, place: str, report: DataReport, what: str = "JSON lines") -> str | bytes | None:
    text = value.get(field) if isinstance(value, dict) else None
    if isinstance(text, str | bytes):
        return text
    report.add(f"{what} without text in field {field!r}, left out", place)
    for name, other in value.items() if isinstance(value, dict) else ():
        if isinstance(other, str | bytes):
            report.other_fields.setdefault(name, place)
    return None


FORMATS = {
    ".txt": Format(_read_all),
    ".md": Format(_read_all),
    ".jsonl": Format(_read_json_lines, _cut_lines),
    ".json": Format(_read_json_lines, _cut_lines),
    ".csv": Format(functools.partial(_read_table, delimiter=",")),
    ".tsv": Format(functools.partial(_read_table, delimiter="\t")),
    ".parquet": Format(_read_parquet, cut_parquet),
    ".array_record": Format(_read_array_records, cut_records),
}
