"""Rows of CSV and TSV files."""

import csv
import re
from collections.abc import Iterator

from nanoflax.data import DataReport, open_text, text_lines
from nanoflax.errors import UserError


def table_rows(path: str, delimiter: str, report: DataReport) -> Iterator[tuple[str, list[str]]]:
    """Yields (place, cells) of each row that is not empty; the place is that of its first line.

    A cell may be in quotes and then hold delimiters, line ends and doubled quotes, as the module csv writes it. A line
    with other quotes is read as it is, without a meaning of quotes, and reported. The delimiter of a CSV file is the
    semicolon if its first line has one and no comma, or the one that Excel's first line names ("sep=;").
    """
    csv.field_size_limit(2**31 - 1)
    with open_text(path) as file:
        lines = list(text_lines(file, path, report, keep_ends=True))
    if delimiter == "," and lines and "," not in lines[0][1] and ";" in lines[0][1]:
        delimiter = ";"
    named = re.fullmatch("sep=(.)[\r\n]*", lines[0][1]) if lines else None
    delimiter = named[1] if named else delimiter
    if delimiter in '"\r':
        raise UserError(f"{path}:1: sep={delimiter!r} cannot divide cells; write a comma, a semicolon or a tab")
    i = bool(named)
    while i < len(lines):
        (place, line), used = lines[i], 1
        if '"' in line:
            reader = csv.reader((lines[j][1] for j in range(i, len(lines))), delimiter=delimiter, strict=True)
            try:
                cells, used = next(reader), reader.line_num
            except csv.Error:
                report.add("lines with quotes that do not enclose a cell, read as they are", place)
                cells = line.rstrip("\r\n").split(delimiter)
            if used > 1 and any(delimiter in cell and "\n" in cell for cell in cells):
                report.add("quotes around delimiters and line ends, read as one cell", place)
        else:
            cells = line.rstrip("\r\n").split(delimiter)
        if line.strip("\r\n"):
            yield place, cells
        i += used
