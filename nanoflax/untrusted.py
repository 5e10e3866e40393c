"""Reading of files that a stranger may have written: their size, their JSON, and the files that they name."""

import collections
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from nanoflax.errors import UserError, listed

MAX_DEPTH = 64  # levels of lists and objects in JSON; functions that call themselves for each level need a limit
MAX_BYTES = 500_000_000  # of a file that is read completely; the largest tokenizers have 35 MB


def locate(directory: str | os.PathLike, name: str) -> pathlib.Path:
    """The path of the file `name` in a directory.

    Raises:
      UserError: not a plain file name, no such file, or a link. Links of the Hugging Face cache are
        allowed: REPOSITORY/snapshots/REVISION/name links to REPOSITORY/blobs, which in newer versions
        links to blobs/HA/HASH, shared by all repositories of the cache.
    """
    path = pathlib.Path(directory, name)
    if name != pathlib.PureWindowsPath(name).name:  # knows both kinds of slash
        raise UserError(f"{name!r} must be a plain file name, inside {directory}")
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        raise UserError(f"{name!r} is not a file that can be read in {directory}")
    if path.is_symlink():
        target, snapshots = path.resolve(), path.parent.resolve().parent
        shared = snapshots.parent.parent / "blobs" / target.name[:2]
        blobs = (snapshots.parent / "blobs", shared)
        if snapshots.name != "snapshots" or target.parent not in blobs:
            raise UserError(f"{path} is a link out of its directory; put the file itself there")
    return path


def read_bytes(directory: str | os.PathLike, name: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of the file that `locate` finds. Raises: UserError, also for more than max_bytes."""
    path = locate(directory, name)
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > max_bytes:
                raise UserError(f"{path} cannot be read: its {size} bytes are more than {max_bytes}")
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of JSON text, in UTF-8. Raises: UserError that names `where`, also for more than MAX_DEPTH levels."""
    return _parse(text, where, dict)


def json_object(text: bytes, where: object, repeats: bool = True) -> dict[str, Any]:
    """The object in JSON text, whose strings UTF-8 can encode.

    repeats: whether a name may be there twice in an object, so that the last value counts, as in Transformers.
    Raises: UserError that names `where`.
    """
    repeated: list[str] = []

    def without_repeats(pairs):
        table = dict(pairs)
        if len(table) < len(pairs):
            repeated.extend(name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1)
        return table

    value = _parse(text, where, dict if repeats else without_repeats)
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold an object, not {type(value).__name__}")
    if repeated:
        raise UserError(f"{where}: {listed([f'{name!r} is there twice' for name in repeated], 20)}")
    if b"\\ud" in text.lower() and (wrong := [x for x in _strings(value) if any("\ud800" <= c <= "\udfff" for c in x)]):
        raise UserError(f"{where}: {wrong[0][:80]!r} has an unpaired surrogate, which no text can contain")
    return value


def _parse(text, where, from_pairs):
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=None if from_pairs is dict else from_pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    level, depth = [value], 0
    while level := [x for x in level if isinstance(x, dict | list)]:
        if (depth := depth + 1) > MAX_DEPTH:
            raise UserError(f"{where} is not JSON that can be read: more than {MAX_DEPTH} levels of lists and objects")
        level = [child for x in level for child in (x.values() if isinstance(x, dict) else x)]
    return value


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    for child in (
        [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _strings(child)
