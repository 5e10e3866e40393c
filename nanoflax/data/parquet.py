"""Parquet files: the texts of one column, by groups of rows, and complete rows."""

import contextlib
from collections.abc import Iterator
from typing import Any

from nanoflax.data.remote import is_remote, open_binary
from nanoflax.data.report import DataReport, FieldError
from nanoflax.errors import UserError
from nanoflax.untrusted import parse_json

BATCH = 128  # rows that are decoded at once


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: Parquet files need pyarrow: pip install 'nanoflax[data]'") from error
    try:
        place: Any = open_binary(path) if is_remote(path) else path
        # Without pre_buffer, a group of rows is not read at once: groups of some writers have gigabytes.
        with pq.ParquetFile(place, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = str(getattr(error, "strerror", "") or error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as Parquet: {message}") from error


def cut_parquet(path: str, size: int, field: str, part_bytes: int) -> list[tuple[int, int, int]]:
    """Ranges (begin, end, size) of groups of rows whose texts have about part_bytes in the file of `size` bytes."""
    with _opened(path) as file:
        column = _column(file, path, field)
        ranges, begin, read = [], 0, 0
        for i in range(file.metadata.num_row_groups):
            read += file.metadata.row_group(i).column(column).total_compressed_size
            if read >= part_bytes or i == file.metadata.num_row_groups - 1:
                ranges.append((begin, i + 1, max(read, 1)))
                begin, read = i + 1, 0
    return ranges


def read_parquet(path: str, begin: int, end: int, field: str, report: DataReport) -> Iterator[tuple[str, bytes, float]]:
    """Yields (place, text, share of the range that is read); the place names the row, from 0.

    begin, end: groups of rows; end 0: all. Only the column `field` is read, at most a part of a group at a time.
    """
    with _opened(path) as file:
        import pyarrow as pa

        column, metadata = _column(file, path, field), file.metadata
        groups = range(begin, end or metadata.num_row_groups)
        sizes = [metadata.row_group(i).num_rows for i in range(groups.stop)]
        row, first, total = sum(sizes[:begin]), sum(sizes[:begin]), max(sum(sizes[begin:]), 1)
        name = metadata.schema.column(column).path
        for batch in file.iter_batches(BATCH, [*groups], [name], use_threads=False) if groups else ():
            texts = batch.column(0)
            if pa.types.is_dictionary(texts.type):
                texts = texts.dictionary_decode()
            for text in texts.cast(pa.large_binary()).to_pylist():  # decoded later, where invalid bytes are reported
                if text is None:
                    report.add(f"rows without a value in column {field!r}, left out", f"{path} row {row}")
                else:
                    yield f"{path} row {row}", text, (row - first) / total
                row += 1


def parquet_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, {column: JSON value}) of all rows; the place names the row, from 0.

    Bytes are read as UTF-8, and dates, decimals and the like become text. The number of a class becomes its name, and
    -1 None, if the file has the names, as the library datasets writes them.
    """
    with _opened(path) as file:
        row, classes = 0, _classes(file.schema_arrow.metadata or {})
        for batch in file.iter_batches(BATCH, use_threads=False):
            for value in batch.to_pylist():
                for name, names in classes.items():
                    if isinstance(number := value.get(name), int) and number < len(names):
                        value[name] = names[number] if number >= 0 else None
                yield f"{path} row {row}", _json_value(value)
                row += 1


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {name: _json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):  # a map is a list of pairs
        return [_json_value(item) for item in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _classes(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """{column: names of its classes}."""
    with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):
        features = parse_json(metadata[b"huggingface"], "")["info"]["features"]
        return {name: x["names"] for name, x in features.items() if isinstance(x.get("names"), list)}
    return {}


def _column(file: Any, path: str, field: str) -> int:
    """The number of the column with this name. Raises: FieldError if it does not exist or holds no text."""
    import pyarrow as pa

    def holds_text(type: Any) -> bool:
        type = type.value_type if pa.types.is_dictionary(type) else type
        return any(
            is_type(type)
            for is_type in (
                pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary,
                pa.types.is_large_binary, pa.types.is_binary_view,
            )
        )  # fmt: skip

    schema, columns = file.schema_arrow, file.metadata.schema
    sizes = _column_sizes(file.metadata)
    texts = sorted((x.name for x in schema if holds_text(x.type)), key=lambda name: -sizes.get(name, 0))
    texts = [name for name in texts if schema.names.count(name) == 1]
    if schema.names.count(field) != 1:
        what = "more than one column" if field in schema.names else "no column"
        raise FieldError(f"{path}: {what} {field!r}; its columns are {', '.join(schema.names)}", texts)
    if field not in texts:
        raise FieldError(f"{path}: column {field!r} holds {schema.field(field).type}, not text", texts)
    return next(i for i in range(len(columns)) if columns.column(i).path == field)


def _column_sizes(metadata: Any) -> dict[str, int]:
    """{column: bytes} of the first group of rows."""
    group = metadata.row_group(0) if metadata.num_row_groups else None
    columns = [group.column(i) for i in range(group.num_columns)] if group else []
    return {column.path_in_schema: column.total_uncompressed_size for column in columns}
