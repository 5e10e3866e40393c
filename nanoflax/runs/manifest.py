"""The manifest of a checkpoint: its metric, and the size and CRC-32 of every file of the step.

orbax does not check files: it reads an array with a flipped bit without an error.
"""

import concurrent.futures
import os
import pathlib
import stat
import zlib
from collections.abc import Iterable
from typing import Any

from nanoflax import report, storage, untrusted
from nanoflax.errors import UserError
from nanoflax.storage import RemotePath

NAME = "manifest.json"
THREADS = 16  # objects of a bucket are read at the same time
MAX_BYTES = 100_000_000  # of a manifest; a file of a step takes less than 100
WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # orbax writes these after the manifest


def write(path: pathlib.Path | RemotePath, step: int, metric: float | None) -> None:
    """Writes the manifest of a step into its directory `path`. metric: finite, or None.

    The files are read again: what is wrong later has changed after this moment.
    """
    sizes = {name: size for name, size in _sizes(path).items() if name not in WRITTEN_LATER}
    files = {name: [sizes[name], crc] for name, crc in _sums(path, sizes).items()}
    _write_body(path / NAME, {"step": step, "metric": metric, "files": files})


def _sizes(path: pathlib.Path | RemotePath) -> dict[str, int]:
    """{name: bytes} of the files under a directory, sorted."""
    if isinstance(path, RemotePath):
        return path.sizes()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def set_metric(path: pathlib.Path | RemotePath, metric: float) -> None:
    """Writes the metric of a step, atomically. Does nothing if its manifest is damaged."""
    if body := _read_body(path):
        if isinstance(path, RemotePath):
            return _write_body(path / NAME, body | {"metric": metric})
        _write_body(path / f"{NAME}.tmp", body | {"metric": metric})
        (path / f"{NAME}.tmp").rename(path / NAME)


def read_metric(path: pathlib.Path | RemotePath) -> float | None:
    """The metric of a step; None if it has none or its manifest is damaged."""
    body = _read_body(path)
    return body["metric"] if body else None


def find_damage(path: pathlib.Path | RemotePath) -> str | None:
    """The damage of the step in the directory `path`, in words, or None. Raises: UserError for an unreadable file."""
    if not isinstance(path, RemotePath):
        for file in (path, *path.rglob("*")):
            try:
                mode = file.lstat().st_mode
            except FileNotFoundError:  # another process removes the step
                continue
            if stat.S_ISLNK(mode):
                return f"{file.name} is a link, and links are not followed in a checkpoint"
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):  # a pipe would be read for ever
                return f"{file.name} is no file"
    body = _read_body(path)
    if body is None:
        return f"{NAME} is missing or damaged"
    if (step := body.get("step")) is not None and str(step) != path.name:  # older manifests have no step
        return f"it is a copy of step {step}"
    if isinstance(path, RemotePath):
        return _find_remote_damage(path, body["files"])
    for name, (size, crc) in body["files"].items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if _crc32_of_file(path / name) != crc:
                return f"{name} has changed since it was written"
        except PermissionError as error:
            raise UserError(f"{path / name} cannot be read: {error.strerror}") from error
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _find_remote_damage(path: RemotePath, files: dict[str, list[int]]) -> str | None:
    found = path.sizes()
    for name, (size, _) in files.items():
        if found.get(name) != size:
            return f"{name} has {found[name]} bytes, not {size}" if name in found else f"{name}: no such object"
    sums = _sums(path, files)
    return next((f"{name} has changed since it was written" for name in files if sums[name] != files[name][1]), None)


def _sums(path: pathlib.Path | RemotePath, names: Iterable[str]) -> dict[str, int]:
    """{name: CRC-32} of files of a step."""
    if not isinstance(path, RemotePath):
        return {name: _crc32_of_file(path / name) for name in names}
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _crc32_of_file(path / name), names), strict=True))


def _write_body(file: pathlib.Path | RemotePath, body: dict[str, Any]) -> None:
    file.write_text(report.to_json({"crc32": _crc32_of_json(body), **body}))


def _read_body(path: pathlib.Path | RemotePath) -> dict[str, Any] | None:
    """{"step": .., "metric": .., "files": ..}; None if the manifest is missing or damaged."""
    try:
        if not isinstance(path, RemotePath):
            found = os.lstat(path / NAME)
            if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
                return None
        text = (path / NAME).read_bytes()
    except PermissionError as error:
        raise UserError(f"{path / NAME} cannot be read: {error.strerror}") from error
    except OSError:
        return None
    try:
        body = untrusted.json_object(text, str(path / NAME))
    except UserError:
        return None
    is_sound = body.pop("crc32", None) == _crc32_of_json(body)
    match body:
        case {"metric": None | int() | float(), "files": dict(files)} if is_sound and all(
            map(_is_entry, files.items())
        ):
            return body
    return None


def _is_entry(entry: tuple[str, Any]) -> bool:
    """Whether this is (name of a file of the step, [size, CRC-32])."""
    name = pathlib.PurePosixPath(entry[0])
    match entry[1]:
        case [int(), int()]:
            return not name.is_absolute() and ".." not in name.parts
    return False


def _crc32_of_file(file: pathlib.Path | RemotePath) -> int:
    crc = 0
    with storage.open_reader(str(file)) if isinstance(file, RemotePath) else open(file, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _crc32_of_json(body: dict[str, Any]) -> int:
    return zlib.crc32(report.to_json(body, sort_keys=True).encode())
