"""A checkpoint's manifest: the metric, and the size and CRC-32 of every file of a step.

orbax checks nothing that it reads: one flipped bit in an array's file loads without an error.
"""

import json
import zlib

from nanoflax.errors import UserError

NAME = "manifest.json"
WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # by orbax; restoring reads neither


def write(path, metric):
    """Writes the manifest of the step whose directory is `path`. metric: a finite float or None."""
    files = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        if name not in WRITTEN_LATER:
            files[name] = [file.stat().st_size, _crc32(file)]
    _write(path / NAME, {"metric": metric, "files": files})


def set_metric(path, metric):
    """Gives a sound step a metric, at once or not at all."""
    if body := _read(path):
        _write(path / f"{NAME}.tmp", body | {"metric": metric})
        (path / f"{NAME}.tmp").rename(path / NAME)


def read_metric(path):
    """The metric of a step; None where it has none or its manifest is not sound."""
    manifest = _read(path)
    return manifest["metric"] if manifest else None


def find_damage(path):
    """What is wrong with a step, or None."""
    manifest = _read(path)
    if manifest is None:
        return f"{NAME} is missing or damaged"
    for name, (size, crc) in manifest["files"].items():
        try:
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if _crc32(path / name) != crc:
                return f"{name} has changed since it was written"
        except PermissionError as error:
            raise UserError(f"{path / name} cannot be read: {error.strerror}") from error
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def _write(file, body):
    file.write_text(json.dumps({"crc32": _crc32_of(body), **body}))


def _crc32(file):
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _crc32_of(body):
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _read(path):
    """{"metric", "files"} of a step, or None where the manifest is missing or damaged."""
    try:
        body = json.loads((path / NAME).read_bytes())
        return body if body.pop("crc32") == _crc32_of(body) else None
    except PermissionError as error:
        raise UserError(f"{path / NAME} cannot be read: {error.strerror}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
