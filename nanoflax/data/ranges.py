"""Arrays inside objects of object storage, read in blocks; the blocks that were used last stay in memory."""

import bisect
import collections
import threading
from typing import Any

import numpy as np

from nanoflax.data.folders import Folder
from nanoflax.errors import UserError

BLOCK = 1 << 16  # bytes that one request reads; a window of a shuffled epoch needs a few kilobytes
CACHED_BLOCKS = 1 << 10  # of all shards of a store together
THREADS = 16  # requests at once
SEARCHED = 1 << 10  # positions of documents that are read at once


class Blocks:
    """Bytes of the files of a remote Folder, through a cache of bounded size. Several threads may read."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._found, self._lock = folder, collections.OrderedDict(), threading.Lock()

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Raises: UserError if the file is shorter."""
        numbers = range(start // BLOCK, -(-stop // BLOCK))
        content = b"".join(self._block(file, number) for number in numbers)
        content = content[start - numbers.start * BLOCK : stop - numbers.start * BLOCK]
        if len(content) != stop - start:
            raise UserError(f"{self._folder.path(file)} is damaged: it has no byte {stop - 1}")
        return content

    def _block(self, file: str, number: int) -> bytes:
        from nanoflax import storage

        key = file, number
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        try:
            block = storage.read_range(self._folder.path(file), number * BLOCK, (number + 1) * BLOCK)
        except FileNotFoundError:
            raise UserError(f"{self._folder.path(file)} is missing") from None
        with self._lock:
            self._found[key] = block
            if len(self._found) > CACHED_BLOCKS:
                self._found.popitem(last=False)
        return block


class RemoteArray:
    """An array inside a file: slices, items and `searchsorted` as of numpy. at: its first byte."""

    def __init__(self, blocks: Blocks, file: str, at: int, dtype: Any, n: int) -> None:
        self._blocks, self._file, self._at, self._dtype, self._n = blocks, file, at, np.dtype(dtype), n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._n)
            size, stop = self._dtype.itemsize, max(start, stop)
            content = self._blocks.read(self._file, self._at + start * size, self._at + stop * size)
            return np.frombuffer(content, self._dtype)
        if np.ndim(index):
            return np.asarray([self[int(i)] for i in np.ravel(index)], self._dtype).reshape(np.shape(index))
        return self[int(index) : int(index) + 1][0]

    def searchsorted(self, values: Any, side: str) -> np.ndarray:
        """As of numpy, for side "right". Reads only near the values."""
        assert side == "right"
        flat = np.ravel(values)
        order = np.argsort(flat, kind="stable")
        ordered, found, i = flat[order], np.empty(len(flat), np.int64), 0
        while i < len(flat):
            low = bisect.bisect_right(self, ordered[i])
            near = self[low : low + SEARCHED]
            end = len(flat) if low + len(near) == self._n else int(np.searchsorted(ordered, near[-1]))
            found[order[i:end]] = low + np.searchsorted(near, ordered[i:end], "right")
            i = end
        return found.reshape(np.shape(values))
