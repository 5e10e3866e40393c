"""The formats of files with text: a table from the suffix of a name to the functions that read and cut such a file."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from nanoflax.data import files
from nanoflax.data.parquet import cut_parquet, read_parquet
from nanoflax.data.report import DataReport
from nanoflax.data.tables import read_table
from nanoflax.errors import UserError

Texts = Iterator[tuple[str, str | bytes, float]]  # (place, text, share of the file or range that is read)
Ranges = list[tuple[int, int, int]]  # (begin, end, bytes)


@dataclasses.dataclass(frozen=True)
class Format:
    """read(path, begin, end, field, report) yields the texts of a range of a file; end 0 is the complete file.
    cut(path, field, part_bytes) gives the ranges of a file larger than part_bytes; [] if only one process can read it.
    """

    read: Callable[[str, int, int, str, DataReport], Texts]
    cut: Callable[[str, str, int], Ranges] = lambda path, field, part_bytes: []


def suffix(path: str) -> str:
    """The suffix that names the format of a file: .jsonl of x.jsonl.gz."""
    return os.path.splitext(path.removesuffix(".gz").removesuffix(".zst"))[1]


def _read_all(path: str, begin: int, end: int, field: str, report: DataReport) -> Texts:
    with files.open_text(path) as file:
        yield path, files.decoded(file.read(), path, report), 1.0


def _read_table(path: str, begin: int, end: int, field: str, report: DataReport, delimiter: str) -> Texts:
    size = os.path.getsize(path) or 1
    with files.open_text(path) as file:
        for place, text, read in read_table(file, path, delimiter, field, report):
            yield place, text, read / size


def _cut_lines(path: str, field: str, part_bytes: int) -> Ranges:
    size = os.path.getsize(path)
    n = -(-size // part_bytes)
    edges = [i * size // n for i in range(n + 1)]
    return [(a, b, b - a) for a, b in zip(edges, edges[1:], strict=False)] if files.can_cut(path) else []


def _read_json_lines(path: str, begin: int, end: int, field: str, report: DataReport) -> Texts:
    if end:
        yield from _read_json_range(path, begin, end, field, report)
        return
    size = os.path.getsize(path) or 1
    with files.open_text(path) as file:
        for place, value in files.json_lines(file, path, report):
            if (text := _text_of(value, field, place, report)) is not None:
                yield place, text, files.bytes_read(file) / size


def _read_json_range(path: str, begin: int, end: int, field: str, report: DataReport) -> Texts:
    try:
        with open(path, "rb", buffering=2**20) as file:
            for place, value in files.json_values(files.lines_of_range(file, path, begin, end, report), report):
                if (text := _text_of(value, field, place, report)) is not None:
                    yield place, text, (file.tell() - begin) / (end - begin)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _text_of(value: Any, field: str, place: str, report: DataReport) -> str | None:
    text = value.get(field) if isinstance(value, dict) else None
    if isinstance(text, str):
        return text
    report.add(f"JSON lines without text in field {field!r}, left out", place)
    for name, other in value.items() if isinstance(value, dict) else ():
        if isinstance(other, str):
            report.other_fields.setdefault(name, place)
    return None


FORMATS = {
    ".txt": Format(_read_all),
    ".md": Format(_read_all),
    ".jsonl": Format(_read_json_lines, _cut_lines),
    ".csv": Format(functools.partial(_read_table, delimiter=",")),
    ".tsv": Format(functools.partial(_read_table, delimiter="\t")),
    ".parquet": Format(read_parquet, cut_parquet),
}
