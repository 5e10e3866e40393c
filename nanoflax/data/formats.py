"""The formats of files with text: a table from the suffix of a name to the functions that read and cut such a file."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from nanoflax.data import files
from nanoflax.data.array_record import cut_records, read_records
from nanoflax.data.parquet import cut_parquet, read_parquet
from nanoflax.data.remote import file_size, open_binary
from nanoflax.data.report import DataReport
from nanoflax.data.tables import read_table
from nanoflax.errors import UserError

Texts = Iterator[tuple[str, str | bytes, float]]  # (place, text, share of the file or range that is read)
Ranges = list[tuple[int, int, int]]  # (begin, end, bytes)


@dataclasses.dataclass(frozen=True)
class Format:
    """read(path, begin, end, field, report) yields the texts of a range of a file; end 0 is the complete file.
    cut(path, size, field, part_bytes) gives the ranges of a file that is larger than part_bytes; [] if only one process
    can read it.
    """

    read: Callable[[str, int, int, str, DataReport], Texts]
    cut: Callable[[str, int, str, int], Ranges] = lambda path, size, field, part_bytes: []


def suffix(path: str) -> str:
    """The suffix that names a format: .jsonl of x.jsonl.gz, .array_record of x.array_record-00000-of-00002."""
    path = re.sub(r"-\d{5}-of-\d{5}$", "", path)
    return os.path.splitext(path.removesuffix(".gz").removesuffix(".zst"))[1]


def _read_all(path: str, begin: int, end: int, field: str, report: DataReport) -> Texts:
    with files.open_text(path) as file:
        yield path, files.decoded(file.read(), path, report), 1.0


def _read_table(path: str, begin: int, end: int, field: str, report: DataReport, delimiter: str) -> Texts:
    size = file_size(path) or 1
    with files.open_text(path) as file:
        for place, text, read in read_table(file, path, delimiter, field, report):
            yield place, text, read / size


def _cut_lines(path: str, size: int, field: str, part_bytes: int) -> Ranges:
    n = -(-size // part_bytes)
    edges = [i * size // n for i in range(n + 1)]
    return [(a, b, b - a) for a, b in zip(edges, edges[1:], strict=False)] if files.can_cut(path) else []


def _read_json_lines(path: str, begin: int, end: int, field: str, report: DataReport) -> Texts:
    if end:
        yield from _read_json_range(path, begin, end, field, report)
        return
    size = file_size(path) or 1
    with files.open_text(path) as file:
        for place, value in files.json_lines(file, path, report):
            if (text := _text_of(value, field, place, report)) is not None:
                yield place, text, files.bytes_read(file) / size


def _read_json_range(path: str, begin: int, end: int, field: str, report: DataReport) -> Texts:
    try:
        with open_binary(path) as file:
            for place, value in files.json_values(files.lines_of_range(file, path, begin, end, report), report):
                if (text := _text_of(value, field, place, report)) is not None:
                    yield place, text, (file.tell() - begin) / (end - begin)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_array_records(path: str, begin: int, end: int, field: str, report: DataReport) -> Texts:
    for place, value, share in read_records(path, begin, end, report):
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
    ".parquet": Format(read_parquet, cut_parquet),
    ".array_record": Format(_read_array_records, cut_records),
}
