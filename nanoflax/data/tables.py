"""Rows of CSV and TSV files."""

import collections
import csv
import io
import re
from collections.abc import Iterator

from nanoflax.data.files import bytes_read, text_lines
from nanoflax.data.report import DataReport, FieldError
from nanoflax.errors import UserError

MAX_CELL = 1 << 26  # characters of a cell in quotes; a quote that is never closed takes no more memory than this


def table_rows(
    file: io.TextIOWrapper, path: str, delimiter: str, report: DataReport, long_cells: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Yields (place, cells) of each row of a file of open_text that is not empty; the place is that of its first line.

    A cell may be in quotes and then hold delimiters, line ends and doubled quotes, as the module csv writes it. A line
    with other quotes is read as it is, without a meaning of quotes, and reported. The delimiter of a CSV file is the
    semicolon if its first line has one and no comma, or the one that Excel's first line names ("sep=;").

    long_cells: whether cells with delimiters and line ends are usual; if not, they are reported.
    """
    csv.field_size_limit(2**31 - 1)
    lines = _Lines(text_lines(file, path, report, keep_ends=True))
    first = next(lines, ("", ""))[1]
    if delimiter == "," and "," not in first and ";" in first:
        delimiter = ";"
    if named := re.fullmatch("sep=(.)[\r\n]*", first):
        delimiter = named[1]
        if delimiter in '"\r':
            raise UserError(f"{path}:1: sep={delimiter!r} cannot divide cells; write a comma, a semicolon or a tab")
    else:
        lines.again()
    for place, line in lines:
        if '"' in line:
            lines.again()
            try:
                cells = next(csv.reader(lines.until(MAX_CELL), delimiter=delimiter, strict=True))
            except csv.Error:
                lines.again()
                next(lines)
                report.add("lines with quotes that do not enclose a cell, read as they are", place)
                cells = line.rstrip("\r\n").split(delimiter)
            if not long_cells and len(lines.taken) > 1 and any(delimiter in cell and "\n" in cell for cell in cells):
                report.add("quotes around delimiters and line ends, read as one cell", place)
        else:
            cells = line.rstrip("\r\n").split(delimiter)
        if line.strip("\r\n"):
            yield place, cells


class _Lines(Iterator[tuple[str, str]]):
    """(place, line) of a file. The lines since the last row, `taken`, can be read again."""

    def __init__(self, lines: Iterator[tuple[str, str]]) -> None:
        self.lines, self.waiting, self.taken = lines, collections.deque(), []

    def __next__(self) -> tuple[str, str]:
        self.taken = [self.waiting.popleft() if self.waiting else next(self.lines)]
        return self.taken[0]

    def until(self, size: int) -> Iterator[str]:
        """The next lines, of about `size` characters together."""
        self.taken = []
        while size > 0 and (item := self.waiting.popleft() if self.waiting else next(self.lines, None)):
            self.taken.append(item)
            size -= len(item[1])
            yield item[1]

    def again(self) -> None:
        self.waiting.extendleft(reversed(self.taken))
        self.taken = []


def read_table(
    file: io.TextIOWrapper, path: str, delimiter: str, field: str, report: DataReport
) -> Iterator[tuple[str, str, float]]:
    """Yields (place, text, bytes read) of the column `field` of a table with a header."""
    rows = table_rows(file, path, delimiter, report, long_cells=True)
    header = next(rows, ("", []))[1]
    names = [name.strip() for name in header]
    if header and names.count(field) != 1:
        what = "more than one column" if field in names else "no column"
        other = {",": "\t", "\t": ","}.get(delimiter)
        if len(header) == 1 and other and other in header[0]:
            right = {",": ".csv", "\t": ".tsv"}[other]
            raise UserError(f"{path}: its first line is not divided as its name says; name the file {right}")
        lengths = dict(zip(names, map(len, next(rows, ("", header))[1]), strict=False))
        choices = sorted((name for name in names if name and names.count(name) == 1), key=lambda n: -lengths.get(n, 0))
        problem = f"{path}: {what} {field!r}; its first line has {', '.join(names)}"
        raise FieldError(problem, choices) if choices else UserError(f"{problem}; give each column its own name")
    for place, cells in rows:
        if cells == header:
            report.add("headers between the lines, left out", place)
        elif len(cells) != len(header):
            report.add(f"rows without {len(header)} columns, left out", f"{place} {len(cells)}")
        else:
            yield place, cells[names.index(field)], bytes_read(file)
