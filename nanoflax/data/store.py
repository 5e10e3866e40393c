"""Token stores: documents as token ids in shards, on disk or in object storage, read at random positions.

    DIRECTORY/meta.json           the index, written last: counts, fingerprints, the facts of each shard in order
    DIRECTORY/part-00012.json     the record of part 12 of the source: its shards and its DataReport
    DIRECTORY/part-00012-003.bin  shard 3 of this part

A shard is a header, its tokens, zero bytes up to a multiple of 8, and the first position of each document and the
end, as int64. Numbers are little-endian. A file with its final name is complete.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int

from nanoflax.data.folders import Folder
from nanoflax.data.ranges import THREADS, Blocks, RemoteArray
from nanoflax.errors import UserError
from nanoflax.untrusted import json_object

HEADER = struct.Struct("<8sQQQQ16s8x")  # MAGIC, bytes per token, n_tokens, n_documents, n_bytes, fingerprint
MAGIC = b"nanoflx2"
OPEN_SHARDS = 256  # at once
HASHED_WHOLE = 1 << 30  # tokens; the fingerprint of a larger store depends on its shards


@dataclasses.dataclass(frozen=True)
class Shard:
    """The facts of a shard. name: of its file. n_bytes: of the text in UTF-8. fingerprint: of tokens and offsets; it
    proves the content of the file."""

    name: str
    n_tokens: int
    n_documents: int
    n_bytes: int
    fingerprint: str

    def offsets_at(self, itemsize: int) -> int:
        """Where in the file the positions of documents begin."""
        return HEADER.size + -(-self.n_tokens * itemsize // 8) * 8

    def size(self, itemsize: int) -> int:
        """The size of the file in bytes."""
        return self.offsets_at(itemsize) + 8 * (self.n_documents + 1)

    def header(self, itemsize: int) -> bytes:
        counts = self.n_tokens, self.n_documents, self.n_bytes
        return HEADER.pack(MAGIC, itemsize, *counts, bytes.fromhex(self.fingerprint))

    def arrays(self, content: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, offsets) in the content of the file, [size] uint8."""
        tokens = content[HEADER.size : HEADER.size + self.n_tokens * dtype.itemsize].view(dtype)
        return tokens, content[self.offsets_at(dtype.itemsize) : self.size(dtype.itemsize)].view(np.int64)

    @classmethod
    def of_header(cls, name: str, header: bytes) -> "Shard | None":
        """None if the header is not one of a shard."""
        if len(header) != HEADER.size or not header.startswith(MAGIC):
            return None
        _, _, n_tokens, n_documents, n_bytes, fingerprint = HEADER.unpack(header)
        return cls(name, n_tokens, n_documents, n_bytes, fingerprint.hex())


class TokenStore:
    """Tokens of one split: documents in order, each with its end-of-sequence id (see `Framing.document`).

    directory: its path, or its name in object storage. meta: counts, the source, the tokenizer's fingerprint, the lines
    of the DataReport. Shards are opened when they are first read: memory maps, or ranges of objects.
    """

    def __init__(self, directory: str | os.PathLike, meta: dict[str, Any], shards: Sequence[Shard]) -> None:
        self.folder, self.meta, self.shards = Folder(directory), meta, tuple(shards)
        self.directory = self.folder.name if self.folder.is_remote else pathlib.Path(directory)
        self._blocks = Blocks(self.folder)
        self.dtype = np.dtype(meta["dtype"])
        self._tokens_before = np.cumsum([0, *(shard.n_tokens for shard in shards)])
        self._documents_before = np.cumsum([0, *(shard.n_documents for shard in shards)])
        self._arrays = functools.lru_cache(OPEN_SHARDS)(self._open_arrays)

    n_tokens = property(lambda self: self.meta["n_tokens"])
    n_bytes = property(lambda self: self.meta["n_bytes"])  # of the text in UTF-8
    n_documents = property(lambda self: self.meta["n_documents"])
    n_best_tokens = property(lambda self: self.meta.get("n_best_tokens", 0))  # first; then random segmentations
    fingerprint = property(lambda self: self.meta["fingerprint"])  # of tokens and offsets
    report = property(lambda self: self.meta["report"])  # lines for people about its text

    def read(self, start: int, stop: int) -> Int[np.ndarray, " stop-start"]:
        """The tokens from position start to position stop - 1, as uint16 or uint32."""
        pieces = []
        while start < stop:
            i = int(np.searchsorted(self._tokens_before, start, "right")) - 1
            before, end = int(self._tokens_before[i]), min(stop, int(self._tokens_before[i + 1]))
            pieces.append(self._arrays(i)[0][start - before : end - before])
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])

    def read_all(self, spans: Sequence[tuple[int, int]]) -> list[Int[np.ndarray, " _"]]:
        """`read` of each (start, stop); of a remote store several at once."""
        if not self.folder.is_remote or len(spans) < 2:
            return [self.read(start, stop) for start, stop in spans]
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda span: self.read(*span), spans))

    def document(self, positions: Any) -> Int[np.ndarray, "..."]:
        """The numbers of the documents at these positions. An end token is part of its document."""
        positions = np.asarray(positions)
        found = np.empty(positions.shape, np.int64)
        for i, chosen in self._shards_of(positions, self._tokens_before):
            inside = positions[chosen] - self._tokens_before[i]
            found[chosen] = self._documents_before[i] + self._arrays(i)[1].searchsorted(inside, "right") - 1
        return found

    def begin(self, documents: Any) -> Int[np.ndarray, "..."]:
        """The first positions of documents with these numbers; n_documents gives n_tokens."""
        documents = np.asarray(documents)
        found = np.empty(documents.shape, np.int64)
        for i, chosen in self._shards_of(documents, self._documents_before):
            found[chosen] = self._tokens_before[i] + self._arrays(i)[1][documents[chosen] - self._documents_before[i]]
        return found

    def _shards_of(self, numbers: np.ndarray, before: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (a shard, which of the numbers are in it)."""
        shards = np.minimum(np.searchsorted(before, numbers, "right") - 1, len(self.shards) - 1)
        for i in np.unique(shards):
            yield int(i), shards == i

    def _open_arrays(self, number: int) -> tuple[Any, Any]:
        """(tokens, offsets) of a shard."""
        shard, size = self.shards[number], self.dtype.itemsize
        if self.folder.is_remote:
            tokens = RemoteArray(self._blocks, shard.name, HEADER.size, self.dtype, shard.n_tokens)
            at = shard.offsets_at(size)
            return tokens, RemoteArray(self._blocks, shard.name, at, np.int64, shard.n_documents + 1)
        return shard.arrays(
            np.memmap(self.folder.path(shard.name), np.uint8, "r", shape=(shard.size(size),)), self.dtype
        )

    def arrays(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (tokens [n_tokens], offsets [n_documents+1] int64) of each shard; offsets count from its first."""
        for i, shard in enumerate(self.shards):
            if self.folder.is_remote:
                yield shard.arrays(np.frombuffer(self.folder.read(shard.name), np.uint8), self.dtype)
            else:
                yield self._open_arrays(i)

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "TokenStore":
        """Raises: UserError for a directory without a complete token store. Contents of shards: see `damaged`."""
        folder = Folder(directory)
        try:
            meta = json_object(folder.read("meta.json"), folder.path("meta.json"))
            store, sizes = cls(directory, meta, [Shard(*facts) for facts in meta["shards"]]), folder.sizes()
            if not store.shards or store._tokens_before[-1] != meta["n_tokens"]:
                raise ValueError("meta.json is damaged")
            if type(best := store.n_best_tokens) is not int or not 0 <= best <= store.n_tokens:
                raise ValueError("meta.json is damaged: n_best_tokens")
            for shard in store.shards:
                if shard.name not in sizes:
                    raise ValueError(f"{shard.name} is missing")
                if sizes[shard.name] != shard.size(store.dtype.itemsize):
                    raise ValueError(f"{shard.name} is damaged: it has {sizes[shard.name]} bytes")
        except FileNotFoundError:
            raise UserError(f"{folder.name} holds no complete token store: there is no meta.json") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder.name} holds no complete token store: {error}") from error
        return store


def damaged(store: TokenStore) -> Iterator[tuple[Shard, bool]]:
    """Yields (shard, whether its file differs from its fingerprint) for each shard of a store; reads all of them."""
    for shard, (tokens, offsets) in zip(store.shards, store.arrays(), strict=True):
        complete = len(tokens) == shard.n_tokens and len(offsets) == shard.n_documents + 1
        yield shard, not complete or Hasher().add(tokens, offsets[1:]).result() != shard.fingerprint or offsets[0] != 0


class Hasher:
    """The fingerprint of tokens and of the ends of their documents (int64)."""

    def __init__(self) -> None:
        self._tokens, self._ends = hashlib.blake2b(), hashlib.blake2b()

    def add(self, tokens: np.ndarray, ends: np.ndarray) -> "Hasher":
        self._tokens.update(tokens.data)
        self._ends.update(ends.data)
        return self

    def result(self) -> str:
        """32 hexadecimal digits."""
        both = self._tokens.copy()
        both.update(self._ends.digest())
        return both.hexdigest()[:32]


def fingerprint_of(store: TokenStore) -> str:
    """The fingerprint of a store: of its tokens and documents, however they are cut into shards. If it has more than
    HASHED_WHOLE tokens: of the fingerprints of its shards, because reading all tokens again would take long."""
    if len(store.shards) == 1:
        return store.shards[0].fingerprint
    if store.n_tokens > HASHED_WHOLE:
        return hashlib.blake2b(" ".join(shard.fingerprint for shard in store.shards).encode()).hexdigest()[:32]
    hasher, before = Hasher(), 0
    for tokens, offsets in store.arrays():
        hasher.add(tokens, offsets[1:] + before)
        before += len(tokens)
    return hasher.result()
