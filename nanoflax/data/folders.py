"""The directory of a token store, on disk or in object storage. A file in it has its name when it is complete."""

import contextlib
import fcntl
import os
import pathlib
import tempfile
import uuid
from collections.abc import Iterator

from nanoflax import storage


class Folder:
    """A directory by its path, or by its name in object storage, such as gs://bucket/a."""

    def __init__(self, name: str | os.PathLike) -> None:
        storage.check_name(name)
        self.name = os.fspath(name)
        self.is_remote = storage.is_remote(self.name)

    def path(self, file: str) -> str:
        return storage.join(self.name, file)

    def create(self) -> None:
        if not self.is_remote:
            os.makedirs(self.name, exist_ok=True)

    def read(self, file: str, stop: int | None = None) -> bytes:
        """The content of a file, or its first `stop` bytes. Raises: FileNotFoundError."""
        if self.is_remote:
            path = self.path(file)
            return storage.read_bytes(path) if stop is None else storage.read_range(path, 0, stop)
        with open(self.path(file), "rb") as opened:
            return opened.read(stop)

    def size(self, file: str) -> int:
        """Bytes. Raises: FileNotFoundError."""
        return storage.size(self.path(file)) if self.is_remote else os.path.getsize(self.path(file))

    def sizes(self) -> dict[str, int]:
        """{name: bytes} of all complete files, by one listing."""
        if self.is_remote:
            return storage.list_sizes(self.name)
        if not os.path.isdir(self.name):
            return {}
        with os.scandir(self.name) as found:
            return {x.name: x.stat().st_size for x in found if x.is_file() and not x.name.endswith(".tmp")}

    def write(self, file: str, content: bytes) -> None:
        if self.is_remote:
            storage.write_bytes(self.path(file), content)
            return
        new = self.new_file(file)
        try:
            new.path.write_bytes(content)
            new.publish()
        finally:
            new.discard()

    def new_file(self, file: str) -> "NewFile":
        return NewFile(self, file)

    def delete(self, file: str) -> None:
        if self.is_remote:
            storage.delete(self.path(file))
        else:
            pathlib.Path(self.path(file)).unlink(missing_ok=True)

    def delete_unfinished(self) -> None:
        """Deletes what killed processes left. Only for the process that holds the lock."""
        if not self.is_remote:
            for path in pathlib.Path(self.name).glob("*.tmp"):
                path.unlink(missing_ok=True)

    def sync(self) -> None:
        """Makes the names of the files survive a loss of power."""
        if not self.is_remote:
            _sync(self.name)

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Holds the lock of a local directory. There is none for object storage: two builders write the same bytes."""
        return contextlib.nullcontext() if self.is_remote else locked(f"{self.name}.lock")


class NewFile:
    """A local `path` to write to, which becomes a file of a Folder. Two processes may write the same file at the same
    time: the last one remains."""

    def __init__(self, folder: Folder, file: str) -> None:
        self._folder, self._file = folder, file
        self.path = pathlib.Path(
            tempfile.gettempdir() if folder.is_remote else folder.name, f"{file}.{uuid.uuid4().hex}.tmp"
        )

    def publish(self) -> None:
        if self._folder.is_remote:
            storage.upload(self.path, self._folder.path(self._file))
            self.discard()
        else:
            _sync(self.path)
            os.replace(self.path, self._folder.path(self._file))

    def discard(self) -> None:
        """Deletes what was not published."""
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike, wait: bool = True) -> Iterator[None]:
    """Holds a file lock. The system releases the lock when the process dies. Raises: BlockingIOError if another
    process holds the lock and `wait` is false."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _sync(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
