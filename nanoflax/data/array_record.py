"""The texts of ArrayRecord files. Each record is a JSON object, a tf.train.Example or UTF-8 text; the first record of a
file decides which."""

import contextlib
from collections.abc import Iterator
from typing import Any

from nanoflax.data.report import DataReport
from nanoflax.errors import UserError
from nanoflax.untrusted import parse_json

BATCH = 64  # records that are read at once


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        from array_record.python import array_record_module  # type: ignore
    except ImportError as error:
        raise UserError(f"{path}: ArrayRecord files need array_record: pip install array_record") from error
    if "://" in path:
        raise UserError(f"{path}: ArrayRecord files are read from local disks only; copy it")
    try:
        reader = array_record_module.ArrayRecordReader(path)
        try:
            if not reader.ok():
                reader.read([0])  # raises what is wrong
            yield reader
        finally:
            reader.close()
    except (RuntimeError, IndexError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as ArrayRecord: {str(error).strip().splitlines()[0]}") from error


def cut_records(path: str, size: int, field: str, part_bytes: int) -> list[tuple[int, int, int]]:
    """Ranges (begin, end, size) of records of about part_bytes. size: of the file."""
    with _opened(path) as reader:
        n = reader.num_records()
    pieces = max(1, min(n, -(-size // part_bytes)))
    edges = [i * n // pieces for i in range(pieces + 1)]
    return [(begin, end, size // pieces or 1) for begin, end in zip(edges, edges[1:], strict=False)]


def read_records(path: str, begin: int, end: int, report: DataReport) -> Iterator[tuple[str, Any, float]]:
    """Yields (place, value, share of the range that is read); the place names the record, from 0.

    The value is a JSON value, {name: bytes} of the features of an Example with one value, or the bytes of a text.
    """
    with _opened(path) as reader:
        end = end or reader.num_records()
        parse = _parser(reader.read([0])[0]) if end else _text
        for at in range(begin, end, BATCH):
            for i, record in enumerate(reader.read(at, min(at + BATCH, end)), at):
                place = f"{path} record {i}"
                try:
                    value = parse(record, place)
                except (UserError, ValueError):
                    report.add("malformed records (the first of a file decides their kind), left out", place)
                else:
                    yield place, value, (i - begin) / (end - begin)


def _parser(first: bytes) -> Any:
    for parse in (_json, _example):
        with contextlib.suppress(UserError, ValueError):
            parse(first, "")
            return parse
    return _text


def _text(record: bytes, place: str) -> bytes:
    return record


def _json(record: bytes, place: str) -> dict[str, Any]:
    value = parse_json(record, place)
    if not isinstance(value, dict):
        raise ValueError
    return value


def _example(record: bytes, place: str) -> dict[str, Any]:
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature  # type: ignore
    except DecodeError as error:
        raise ValueError from error
    if not features:
        raise ValueError
    return {name: x.bytes_list.value[0] for name, x in features.items() if len(x.bytes_list.value) == 1}
