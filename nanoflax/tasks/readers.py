"""The files that hold examples: JSON lines, Parquet, tables, CoNLL files, and pairs of files.

A reader is a function (path, kind of example, {our name of a field: its name in the file}, DataReport) -> records.
"""

import collections
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nanoflax.data import DataReport, json_lines, open_text, parquet_rows, table_rows, text_lines
from nanoflax.errors import UserError
from nanoflax.tasks.columns import mapping_flag, match_columns, missing_fields
from nanoflax.tasks.kinds import Chat, Classification, Problem, Tagging
from nanoflax.tasks.tags import TAG

Records = Iterable[tuple[str, dict[str, Any]]]  # (place, {field: value})
Renamed = dict[str, str]


def _lines(path: str, report: DataReport) -> Iterator[tuple[str, str]]:
    with open_text(path) as file:
        yield from text_lines(file, path, report)


def _jsonl(path: str, kind: type, renamed: Renamed, report: DataReport) -> Records:
    with open_text(path) as file:
        yield from _objects(path, kind, renamed, report, json_lines(file, path, report))


def _parquet(path: str, kind: type, renamed: Renamed, report: DataReport) -> Records:
    return _objects(path, kind, renamed, report, parquet_rows(path))


def _objects(path: str, kind: type, renamed: Renamed, report: DataReport, values: Iterable[tuple[str, Any]]) -> Records:
    found, seen = set(), {}
    for place, value in values:
        if not isinstance(value, dict):
            report.add("JSON lines that are not objects, left out", place)
            continue
        names = list(value)
        columns = match_columns(kind, renamed, names)
        found |= columns.keys()
        seen |= dict.fromkeys(names)
        record = {ours: value[names[column]] for ours, column in columns.items()}
        if kind is Problem:
            used = {names[column] for column in columns.values()}
            record["extra"] = {name: x for name, x in value.items() if name not in used}
        yield place, record
    if seen and (missing := missing_fields(kind, found)):
        raise UserError(
            f"{path}: no object has {' or '.join(renamed.get(name, name) for name in missing)}; their fields are "
            f"{', '.join(seen)}; say which is which, as in {mapping_flag(kind, [*seen])}"
        )


def _rows(path: str, delimiter: str, report: DataReport) -> Iterator[tuple[str, list[str]]]:
    with open_text(path) as file:
        yield from table_rows(file, path, delimiter, report)


def _table(path: str, kind: type, renamed: Renamed, report: DataReport, delimiter: str) -> Records:
    """The first line is a header if it names a field; a title or comments may precede one with all fields, and it may
    come again in joined files. Without a header, columns are in the order of the fields."""
    if kind is Chat:
        raise UserError(f"{path}: a table cannot hold messages; write them as JSON lines")
    rows = _rows(path, delimiter, report)
    ahead = list(itertools.islice(rows, 1000))
    name, other = {"\t": ("tsv", ","), ",": ("csv", "\t")}[delimiter]
    if ahead and len(ahead[0][1]) == 1 < len(kind.fields) and other in ahead[0][1][0]:
        right = {"\t": "tsv", ",": "csv"}[other]
        raise UserError(f"{ahead[0][0]} is not divided as {name}:{path} says; write {right}:{path}")
    ahead = _without_title(kind, renamed, ahead, report)
    columns = _header(kind, renamed, ahead)
    header = ahead[0][1] if columns else []
    rows = itertools.chain(ahead[bool(columns) :], rows)
    width = len(header or kind.fields)
    columns = columns or {name: i for i, name in enumerate(kind.fields)}
    between = "tabs" if delimiter == "\t" else "commas"
    for place, cells in rows:
        if cells == header:
            report.add("headers between the lines, left out", place)
            continue
        if len(cells) != width:
            report.add(f"lines without {width} columns between {between}, left out", f"{place} {len(cells)}")
            continue
        record: dict[str, Any] = {name: cells[i] for name, i in columns.items()}
        if "labels" in record:
            record["labels"] = [label for label in record["labels"].split(",") if label.strip()]
        if kind is Tagging:
            record |= {name: record[name].split() for name in kind.fields}
        yield place, record


def _without_title(kind: type, renamed: Renamed, rows: list, report: DataReport) -> list:
    """The rows from the header on, if one of the first rows names all fields; else all. Above it may be a title."""
    several = len(kind.fields) > 1
    named = (not missing_fields(kind, match_columns(kind, renamed, cells)) for _, cells in rows[:20] if several)
    top = next((i for i, has_all in enumerate(named) if has_all), 0)
    for place, _ in rows[:top]:
        report.add("lines above the header, left out", place)
    return rows[top:]


def _header(kind: type, renamed: Renamed, rows: Sequence[tuple[str, list[str]]]) -> dict[str, int]:
    """{our name: column number} from the first row of a table; {} if it is no header.

    Raises: UserError if it lacks a field or has it twice, or if it has none, but looks like a header
    (`_looks_like_header`).
    """
    place, cells = rows[0] if rows else ("", [])
    columns = match_columns(kind, renamed, cells)
    if not (renamed or columns or _looks_like_header(kind, [cells for _, cells in rows])):
        return {}
    if missing := [renamed.get(name, name) for name in missing_fields(kind, columns)]:
        hint = "" if renamed or columns else "; if it is an example, write a header above it"
        raise UserError(
            f"{place}: the header {', '.join(cells)} lacks {' and '.join(missing)}; say which column is which, as in "
            f"{mapping_flag(kind, cells)}{hint}"
        )
    if twice := [cells[i] for i in columns.values() if cells.count(cells[i]) > 1]:
        raise UserError(f"{place}: the header has {twice[0]!r} twice; rename the one that is not meant")
    return columns


def _looks_like_header(kind: type, rows: Sequence[list[str]]) -> bool:
    """Whether the first row is different single words, and no other row is of words; or of 20 rows or more, the first
    has a label that no other has, and all other labels are repeated."""
    if len(rows) < 2 or not 1 < len(rows[0]) == len({*rows[0]}):
        return False
    words = [all(re.fullmatch(r"\s*[A-Za-z_][A-Za-z0-9_.-]*\s*", cell) for cell in row) for row in rows]
    labels = collections.Counter(row[1] for row in rows if len(row) == 2)
    alone = [label for label, count in labels.items() if count == 1]
    lonely = kind is Classification and len(rows) >= 20 and len(labels) > 2 and alone == rows[0][1:]
    return lonely or words[0] and not any(words[1:])


def _conll(path: str, kind: type, renamed: Renamed, report: DataReport) -> Records:
    """Each line has a word, other columns and a tag: between tabs if the first line has tabs, else between blanks.

    Empty lines separate sentences. Before a sentence, a line that begins with # and has no tag is a comment.
    """
    width, separator, fields = 0, "", ",".join(map("=".join, renamed.items()))
    try:
        word, tag = int(renamed.get("tokens", 0)), int(renamed.get("tags", -1))
    except ValueError as error:
        raise UserError(f"fields {fields!r}: for a CoNLL file, give column numbers, as in tokens=0,tags=3") from error
    rows, malformed = [], False
    for place, line in itertools.chain(_lines(path, report), [("", "")]):
        line = line.rstrip(" \t")
        cells = [cell.strip(" ") or cell for cell in re.split(separator or ("\t" if "\t" in line else "[ \t]+"), line)]
        if not line.strip() or cells[0] == "-DOCSTART-":
            if rows and not malformed:
                words, tags, places = map(list, zip(*rows, strict=True))
                yield places[0], {"tokens": words, "tags": tags, "places": places}
            rows, malformed = [], False
            continue
        fits = len(cells) == (width or len(cells)) and -len(cells) <= tag < len(cells)
        if line[0] == "#" and not rows and not malformed and not (fits and TAG.fullmatch(cells[tag])):
            continue
        if not width:
            width, separator = len(cells), "\t" if "\t" in line else "[ \t]+"
            if fits and width > 1 and not TAG.fullmatch(cells[tag]):
                report.add("first lines without a tag, read as a header", f"{place} {cells[tag]!r}")
                continue
        if not all(-width <= column < width for column in (word, tag)):
            raise UserError(f"fields {fields!r}: {place} has {width} columns, from 0 to {width - 1}")
        if len(cells) != width or width < 2:
            report.add(
                "malformed CoNLL lines (the first line sets the number of columns), their sentences left out",
                f"{place} {len(cells)} columns",
            )
            malformed = True
        else:
            rows.append((cells[word], cells[tag], place))


def _pairs(paths: str, kind: type, renamed: Renamed, report: DataReport) -> Records:
    names = paths.split(",")
    if len(names) != 2:
        raise UserError(f"pairs:{paths}: name two files, as in pairs:train.en,train.fr")
    sides = [list(_lines(path, report)) for path in names]
    if len(sides[0]) != len(sides[1]):
        raise UserError(
            f"pairs:{paths}: {names[0]} has {len(sides[0])} lines and {names[1]} {len(sides[1])}; the numbers must be "
            "equal"
        )
    for (place, text), (_, other) in zip(*sides, strict=True):
        yield place, {"source": text, "target": other}


READERS = {
    "jsonl": _jsonl,
    "parquet": _parquet,
    "tsv": functools.partial(_table, delimiter="\t"),
    "csv": functools.partial(_table, delimiter=","),
    "conll": _conll,
    "pairs": _pairs,
    "preferences": _jsonl,
    "problems": _jsonl,
}
