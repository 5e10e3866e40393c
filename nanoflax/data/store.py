"""Token stores: documents as token ids in shards on disk, read at random positions.

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
from typing import Any

import numpy as np
from jaxtyping import Int

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

    @classmethod
    def of_header(cls, name: str, header: bytes) -> "Shard | None":
        """None if the header is not one of a shard."""
        if len(header) != HEADER.size or not header.startswith(MAGIC):
            return None
        _, _, n_tokens, n_documents, n_bytes, fingerprint = HEADER.unpack(header)
        return cls(name, n_tokens, n_documents, n_bytes, fingerprint.hex())


class TokenStore:
    """Tokens of one split: documents in order, each followed by the end-of-sequence id.

    meta: counts, the source, the tokenizer's fingerprint, the lines of the DataReport. Shards are opened when they are
    first read.
    """

    def __init__(self, directory: str | os.PathLike, meta: dict[str, Any], shards: Sequence[Shard]) -> None:
        self.directory, self.meta, self.shards = pathlib.Path(directory), meta, tuple(shards)
        self.dtype = np.dtype(meta["dtype"])
        self._tokens_before = np.cumsum([0, *(shard.n_tokens for shard in shards)])
        self._documents_before = np.cumsum([0, *(shard.n_documents for shard in shards)])
        self._arrays = functools.lru_cache(OPEN_SHARDS)(self._open_arrays)

    n_tokens = property(lambda self: self.meta["n_tokens"])
    n_bytes = property(lambda self: self.meta["n_bytes"])  # of the text in UTF-8
    n_documents = property(lambda self: self.meta["n_documents"])
    fingerprint = property(lambda self: self.meta["fingerprint"])  # of tokens and offsets
    report = property(lambda self: self.meta["report"])  # the lines of the DataReport

    def read(self, start: int, stop: int) -> Int[np.ndarray, " stop-start"]:
        """The tokens from position start to position stop - 1, as uint16 or uint32."""
        pieces = []
        while start < stop:
            i = int(np.searchsorted(self._tokens_before, start, "right")) - 1
            before, end = int(self._tokens_before[i]), min(stop, int(self._tokens_before[i + 1]))
            pieces.append(self._arrays(i)[0][start - before : end - before])
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])

    def document(self, positions: Any) -> Int[np.ndarray, "..."]:
        """The numbers of the documents at these positions. An end token is part of its document."""
        positions = np.asarray(positions)
        found = np.empty(positions.shape, np.int64)
        for i, chosen in self._shards_of(positions, self._tokens_before):
            inside = positions[chosen] - self._tokens_before[i]
            found[chosen] = self._documents_before[i] + np.searchsorted(self._arrays(i)[1], inside, "right") - 1
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

    def _open_arrays(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, offsets) of a shard: memory maps."""
        shard, itemsize = self.shards[number], self.dtype.itemsize
        data = np.memmap(self.directory / shard.name, np.uint8, "r", shape=(shard.size(itemsize),))
        tokens = data[HEADER.size : HEADER.size + shard.n_tokens * itemsize].view(self.dtype)
        return tokens, data[shard.offsets_at(itemsize) :].view(np.int64)

    def arrays(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (tokens [n_tokens], offsets [n_documents+1] int64) of each shard; offsets count from its first."""
        return (self._open_arrays(i) for i in range(len(self.shards)))

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "TokenStore":
        """Raises: UserError for a directory without a complete token store. Contents of shards: see `damaged`."""
        directory = pathlib.Path(directory)
        try:
            meta = json_object((directory / "meta.json").read_bytes(), directory / "meta.json")
            shards = [Shard(*facts) for facts in meta["shards"]]
            store = cls(directory, meta, shards)
            if not shards or store._tokens_before[-1] != meta["n_tokens"]:
                raise ValueError("meta.json is damaged")
            for shard in shards:
                if os.path.getsize(directory / shard.name) != shard.size(store.dtype.itemsize):
                    raise ValueError(f"{shard.name} is damaged: its size is wrong")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory} holds no complete token store: {error}") from error
        return store


def damaged(store: TokenStore) -> Iterator[tuple[Shard, bool]]:
    """Yields (shard, whether its file differs from its fingerprint) for each shard of a store; reads all of them."""
    for shard, (tokens, offsets) in zip(store.shards, store.arrays(), strict=True):
        yield shard, Hasher().add(tokens, offsets[1:]).result() != shard.fingerprint or offsets[0] != 0


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
