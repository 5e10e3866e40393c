"""Reads, writes and lists objects. A missing object is FileNotFoundError; what lasts is a UserError; see `retried`."""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable
from typing import Any

from nanoflax.errors import UserError
from nanoflax.storage.filesystems import filesystem, join
from nanoflax.storage.retries import retried


def read_bytes(name: str) -> bytes:
    """The content of an object."""
    return retried(name, lambda: filesystem(name).cat_file(name))


def read_range(name: str, start: int, stop: int) -> bytes:
    """Bytes start to stop of an object, fewer if it ends before. 0 <= start <= stop."""
    if start == stop:
        return b""
    return retried(name, lambda: filesystem(name).cat_file(name, start=start, end=stop))


def write_bytes(name: str, content: bytes, only_if_absent: bool = False) -> None:
    """Write an object. Readers see the earlier object or this one, never a part.

    Raises: FileExistsError if only_if_absent and there is an object with another content. Of several writers of
    different contents at the same time one succeeds (GCS: ifGenerationMatch=0; S3: If-None-Match).
    """
    mode = "create" if only_if_absent else "overwrite"
    try:
        _written(name, lambda: filesystem(name).pipe_file(name, content, mode=mode))
    except FileExistsError:
        if read_bytes(name) != content:  # else the answer to an earlier attempt was lost
            raise


def _written(name: str, write: Callable[[], Any]) -> None:
    try:
        retried(name, write)
    except FileNotFoundError as error:
        raise UserError(f"{name}: there is no bucket {name.split('/')[2]}") from error


def exists(name: str) -> bool:
    """Whether an object, or a directory (a prefix with objects), has this name."""
    return _information(name) is not None


def is_directory(name: str) -> bool:
    """Whether objects have names that begin with name/."""
    found = _information(name)
    return found is not None and found["type"] == "directory"


def size(name: str) -> int:
    """The bytes of an object. Raises: FileNotFoundError."""
    found = _information(name)
    if found is None or found["type"] != "file":
        raise FileNotFoundError(name)
    return int(found["size"])


def _information(name: str) -> dict[str, Any] | None:
    try:
        return retried(name, lambda: filesystem(name).info(name))
    except FileNotFoundError:
        return None


def list_names(name: str) -> list[str]:
    """The names directly under a directory, without the directory's name, sorted; [] if there is none."""
    found = _found(name, withdirs=True, maxdepth=1)
    return sorted(found)


def list_sizes(name: str) -> dict[str, int]:
    """{name below the directory, such as "a/b.txt": bytes} of all objects under a directory, sorted; {} if none."""
    return {key: int(item["size"]) for key, item in sorted(_found(name).items()) if item["type"] == "file"}


def list_versions(name: str) -> dict[str, str]:
    """{name below the directory: a text that changes when the object is written} of all objects under a directory."""
    stamp = lambda item: f"{item['size']} {item.get('etag') or item.get('ETag')} {item.get('generation') or ''}".strip()
    return {key: stamp(item) for key, item in sorted(_found(name).items()) if item["type"] == "file"}


def _found(name: str, **options: Any) -> dict[str, dict[str, Any]]:
    """{name below the directory: fsspec's facts}. The directory itself, which some programs mark, is left out."""
    system = filesystem(name)
    root = system._strip_protocol(name).rstrip("/") + "/"
    try:
        found = retried(name, lambda: system.find(name, detail=True, **options))
    except FileNotFoundError:
        return {}
    names = {key: key.removeprefix(root).rstrip("/") for key in found if key.startswith(root)}
    return {short: found[key] for key, short in names.items() if short}


def delete(name: str) -> None:
    """Delete an object, if there is one."""

    def remove():
        with contextlib.suppress(FileNotFoundError):
            filesystem(name).rm_file(name)

    retried(name, remove)


def delete_all(name: str) -> None:
    """Delete every object under a directory."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: delete(join(name, key)), list_sizes(name)))


def upload(path: str | os.PathLike, name: str) -> None:
    """Write a local file as an object; a large one in parts."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is no file, so that it cannot be written to {name}")
    _written(name, lambda: filesystem(name).put_file(os.fspath(path), name))


def download(name: str, path: str | os.PathLike) -> None:
    """Write an object as a local file, which has its name when it is complete."""
    part = f"{os.fspath(path)}.part"
    retried(name, lambda: filesystem(name).get_file(name, part))
    os.replace(part, path)
