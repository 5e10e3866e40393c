"""The manifest of a checkpoint: its metric, and the size and CRC-32 of every file of the step.

orbax does not check files: it reads an array with a flipped bit without an error.
"""

import pathlib
import zlib
from typing import Any

from nanoflax import report, untrusted
from nanoflax.errors import UserError

NAME = "manifest.json"
WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # orbax writes these after the manifest


def write(path: pathlib.Path, step: int, metric: float | None) -> None:
    """Writes the manifest of a step into its directory `path`. metric: finite, or None."""
    files = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        if name not in WRITTEN_LATER:
            files[name] = [file.stat().st_size, _crc32_of_file(file)]
    _write_body(path / NAME, {"step": step, "metric": metric, "files": files})


def set_metric(path: pathlib.Path, metric: float) -> None:
    """Writes the metric of a step, atomically. Does nothing if its manifest is damaged."""
    if body := _read_body(path):
        _write_body(path / f"{NAME}.tmp", body | {"metric": metric})
        (path / f"{NAME}.tmp").rename(path / NAME)


def read_metric(path: pathlib.Path) -> float | None:
    """The metric of a step; None if it has none or its manifest is damaged."""
    body = _read_body(path)
    return body["metric"] if body else None


def find_damage(path: pathlib.Path) -> str | None:
    """The damage of the step in the directory `path`, in words, or None. Raises: UserError for an unreadable file."""
    body = _read_body(path)
    if body is None:
        return f"{NAME} is missing or damaged"
    if (step := body.get("step")) is not None and str(step) != path.name:  # older manifests have no step
        return f"it is a copy of step {step}"
    if link := next((p for p in (path, *path.rglob("*")) if p.is_symlink()), None):
        return f"{link.name} is a link, and links are not followed in a checkpoint"
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


def _write_body(file: pathlib.Path, body: dict[str, Any]) -> None:
    file.write_text(report.to_json({"crc32": _crc32_of_json(body), **body}))


def _read_body(path: pathlib.Path) -> dict[str, Any] | None:
    """{"step": .., "metric": .., "files": ..}; None if the manifest is missing or damaged."""
    try:
        body = untrusted.json_object((path / NAME).read_bytes(), path / NAME)
    except PermissionError as error:
        raise UserError(f"{path / NAME} cannot be read: {error.strerror}") from error
    except (OSError, UserError):
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


def _crc32_of_file(file: pathlib.Path) -> int:
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _crc32_of_json(body: dict[str, Any]) -> int:
    return zlib.crc32(report.to_json(body, sort_keys=True).encode())
