"""A file object over ranged reads."""

import io

from nanoflax.storage import objects

BLOCK = 8 << 20  # bytes


def open_reader(name: str) -> io.BufferedReader:
    """A binary file of an object, for reading and seeking; reads 8 MiB at a time, each with retries.

    Raises: FileNotFoundError.
    """
    return io.BufferedReader(_Ranges(name), BLOCK)


class _Ranges(io.RawIOBase):
    """Reads each request with one ranged read."""

    def __init__(self, name: str) -> None:
        self.name, self._size, self._position = name, objects.size(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"{self.name}: negative position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        stop = min(self._position + len(buffer), self._size)
        found = objects.read_range(self.name, self._position, max(stop, self._position))
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)
