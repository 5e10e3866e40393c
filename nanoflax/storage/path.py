"""A name of object storage with the methods of pathlib.Path that checkpoints use."""

from collections.abc import Iterator

from nanoflax.storage import objects
from nanoflax.storage.filesystems import filesystem, join


class RemotePath:
    """The name of an object or of a directory. Nothing is cached: each method asks the storage."""

    def __init__(self, name: str) -> None:
        filesystem(name)  # raises UserError for a name without a bucket
        self._name = name.rstrip("/")

    def __str__(self) -> str:
        return self._name

    __repr__ = __str__

    def __truediv__(self, part: str) -> "RemotePath":
        return RemotePath(join(self._name, part))

    @property
    def name(self) -> str:
        return self._name.rpartition("/")[2]

    def iterdir(self) -> Iterator["RemotePath"]:
        return (self / name for name in objects.list_names(self._name))

    def exists(self) -> bool:
        return objects.exists(self._name)

    def is_dir(self) -> bool:
        return objects.is_directory(self._name)

    def sizes(self) -> dict[str, int]:
        """{name below this directory: bytes} of all objects in it."""
        return objects.list_sizes(self._name)

    def read_bytes(self) -> bytes:
        return objects.read_bytes(self._name)

    def write_text(self, text: str) -> None:
        objects.write_bytes(self._name, text.encode())

    def rmtree(self) -> None:
        """Delete every object in this directory."""
        objects.delete_all(self._name)

    def unlink(self) -> None:
        objects.delete(self._name)
