"""Files by name, wherever they are: local paths, gs:// and s3:// (nanoflax.storage), and hf:// of the hub."""

import dataclasses
import errno
import glob
import io
import os
from typing import Any, BinaryIO, cast

from nanoflax import storage
from nanoflax.errors import UserError

HUB = "hf://datasets/"


@dataclasses.dataclass(frozen=True)
class File:
    """A file and what was known when it was found. version: JSON values that change when the file changes."""

    path: str
    size: int
    version: tuple[Any, ...]


def is_remote(path: str) -> bool:
    return path.startswith(HUB) or storage.is_remote(path)


def open_binary(path: str | os.PathLike) -> BinaryIO:
    """A binary file for reading, with peek and seek. Raises: OSError; UserError if storage does not answer."""
    path = os.fspath(path)
    if path.startswith(HUB):
        return cast(BinaryIO, io.BufferedReader(_HubFile(path), 2**20))
    if not storage.is_remote(path):
        return open(path, "rb", buffering=2**20)
    try:
        return storage.open_reader(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error


def find_files(pattern: str) -> list[File]:
    """The files that match a pattern, sorted by their names."""
    if not storage.is_remote(pattern):
        pattern = os.path.expanduser(pattern)
        # A name such as notes[1].txt is a pattern of other names.
        paths = sorted(glob.glob(pattern, recursive=True)) or [pattern]
        return [describe(path) for path in paths if os.path.isfile(path)]
    scheme = pattern.partition("://")[0]
    found = storage.retried(pattern, lambda: storage.filesystem(pattern).glob(pattern, detail=True))
    files = [(f"{scheme}://{name}", item) for name, item in sorted(found.items()) if item["type"] == "file"]
    marks = ("generation", "etag", "ETag", "LastModified", "mtime")
    return [
        File(path, item["size"], (path, item["size"], next((str(item[m]) for m in marks if item.get(m)), "")))
        for path, item in files
    ]


def describe(path: str) -> File:
    """The File of a local path, or of an hf:// name with a commit."""
    if path.startswith(HUB):
        return File(path, _hub().info(path)["size"], (path,))
    stat = os.stat(path)
    return File(path, stat.st_size, (os.path.abspath(path), stat.st_size, stat.st_mtime_ns))


def _hub() -> Any:
    import huggingface_hub

    return huggingface_hub.HfFileSystem()  # fsspec keeps it


class _HubFile(io.RawIOBase):
    """A file of the hub, read in ranges. Raises: OSError."""

    def __init__(self, path: str) -> None:
        self.file, self.path = self._call(lambda: _hub().open(path, "rb", block_size=2**23)), path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        content = self._call(lambda: self.file.read(len(buffer)))
        buffer[: len(content)] = content
        return len(content)

    def _call(self, function: Any) -> Any:
        try:
            return function()
        except (OSError, UserError):
            raise
        except Exception as error:  # huggingface_hub's HTTP library has its own exceptions
            raise OSError(f"the hub does not answer: {(str(error) or type(error).__name__).splitlines()[0]}") from error
