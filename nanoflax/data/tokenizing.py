"""Building a token store: any process tokenizes any part of a Plan, and one process writes the index.

    tokenize_part(directory, plan, number, tokenizer)   each of missing_parts, anywhere, in any order, even twice
    write_index(directory, plan, tokenizer, identity)   once, after all parts

The bytes of every file depend only on the plan and the tokenizer. A file appears under its final name when it is
complete, so a part that is tokenized twice, even at the same time, changes nothing.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from nanoflax import tokenizers
from nanoflax.data.folders import Folder
from nanoflax.data.parts import Plan, check_field, read
from nanoflax.data.report import DataReport
from nanoflax.data.store import HEADER, Hasher, Shard, TokenStore, fingerprint_of
from nanoflax.errors import UserError
from nanoflax.report import to_json
from nanoflax.untrusted import json_object

FORMAT = 2  # part of the cache key; changes with the files, with SHARD_TOKENS and with parts.PART_BYTES
SHARD_TOKENS = 1 << 27  # a shard ends with the first document that reaches this number
CHUNK = 1 << 20  # characters that are tokenized at once


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Documents as ids. ids: of all documents. lengths: the number of ids of each. sizes: of each text in bytes."""

    ids: Int[np.ndarray, " n_ids"]
    lengths: Int[np.ndarray, " n_documents"]
    sizes: Int[np.ndarray, " n_documents"]

    def split(self, at: int) -> tuple["Encoded", "Encoded"]:
        """The first `at` documents, and the others."""
        n = int(self.lengths[:at].sum())
        return (
            Encoded(self.ids[:n], self.lengths[:at], self.sizes[:at]),
            Encoded(self.ids[n:], self.lengths[at:], self.sizes[at:]),
        )


@dataclasses.dataclass
class Progress:
    """What has been done of one part. share: from 0 to 1. n_bytes: of text."""

    share: float = 0.0
    n_bytes: int = 0
    n_tokens: int = 0


def encode(tokenizer: Any, texts: Sequence[str], segmentation: tokenizers.Segmentation | None = None) -> Encoded:
    """The ids of documents, each with its end."""
    framing = tokenizer.framing
    if segmentation:
        encoded = [tokenizer.sampler.sample(text, segmentation) for text in texts]
    else:
        encoded = tokenizers.encode_batch(tokenizer, texts)
    around = np.asarray(framing.document(()), np.int64)
    before, after = np.split(around, [len(framing.start) - 1 if framing.start else 0])
    ids = np.concatenate([part for of_text in encoded for part in (before, np.asarray(of_text, np.int64), after)])
    if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
        raise UserError(f"the tokenizer gave token id {ids.max()}, beyond its vocabulary of {tokenizer.vocab_size}")
    lengths = np.asarray([len(of_text) for of_text in encoded], np.int64) + len(around)
    sizes = np.asarray([len(text.encode()) for text in texts], np.int64)
    return Encoded(ids.astype(token_dtype(tokenizer)), lengths, sizes)


def token_dtype(tokenizer: Any) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def tokenize_part(
    directory: str | os.PathLike,
    plan: Plan,
    number: int,
    tokenizer: Any,
    encode_all: Callable[[Iterator[list[str]], Any], Iterable[Encoded]] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Writes the shards of one part and its record, part-NUMBER.json; what is already there is not written again.

    encode_all: yields `encode` of each list of texts with a Segmentation or None, in order; default: in this process.
    on_progress is called after each list; an exception of it ends the work, and the next call begins with the first
    shard that is missing.
    """
    folder, dtype, name = Folder(directory), token_dtype(tokenizer), f"part-{number:05}"
    if record := read_record(folder, number, dtype):
        shards, _ = record
        on_progress(Progress(1.0, sum(s.n_bytes for s in shards), sum(s.n_tokens for s in shards)))
        return
    done = Progress()
    shards = list(_first_shards(folder, name, dtype))
    for shard in shards:
        done = Progress(0.0, done.n_bytes + shard.n_bytes, done.n_tokens + shard.n_tokens)
    report = DataReport()
    texts = itertools.islice(read(plan, number, report), sum(shard.n_documents for shard in shards), None)
    encode_all = encode_all or (lambda chunks, how: (encode(tokenizer, chunk, how) for chunk in chunks))
    writer = None
    try:
        for encoded in encode_all(_chunks(texts), plan.parts[number].segmentation):
            done = Progress(report.share, done.n_bytes + int(encoded.sizes.sum()), done.n_tokens + len(encoded.ids))
            while len(encoded.lengths):
                writer = writer or _ShardWriter(folder, f"{name}-{len(shards):03}.bin", dtype)
                fits, encoded = encoded.split(writer.room(encoded.lengths))
                writer.add(fits)
                if writer.n_tokens >= SHARD_TOKENS:
                    shards.append(writer.finish())
                    writer = None
            on_progress(done)
        if writer:
            shards.append(writer.finish())
            writer = None
    finally:
        if writer:
            writer.discard()
    record = {"shards": [dataclasses.astuple(shard) for shard in shards], "report": report.to_dict()}
    folder.write(record_name(number), to_json(record).encode() + b"\n")
    on_progress(Progress(1.0, done.n_bytes, done.n_tokens))


def record_name(number: int) -> str:
    return f"part-{number:05}.json"


def read_record(
    folder: Folder, number: int, dtype: np.dtype, size: Callable[[str], int] | None = None
) -> tuple[list[Shard], DataReport] | None:
    """The shards and the DataReport of a part; None if it is not complete. size: gives the bytes of a file."""
    name, size = record_name(number), size or folder.size
    try:
        record = json_object(folder.read(name), folder.path(name))
        shards = [Shard(*facts) for facts in record["shards"]]
        complete = all(size(shard.name) == shard.size(dtype.itemsize) for shard in shards)
        return (shards, DataReport.from_dict(record["report"])) if complete else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def missing_parts(directory: str | os.PathLike, plan: Plan, tokenizer: Any) -> list[int]:
    """The numbers of the parts that `tokenize_part` has not completed."""
    folder, dtype = Folder(directory), token_dtype(tokenizer)
    sizes = folder.sizes()
    return [i for i in range(len(plan.parts)) if not read_record(folder, i, dtype, sizes.__getitem__)]


def write_index(directory: str | os.PathLike, plan: Plan, tokenizer: Any, identity: dict[str, Any]) -> TokenStore:
    """Writes meta.json of a store whose parts are all there. identity: further values for it.

    directory: of `tokenize_part`. Raises: UserError if a part is missing, or if the source has no text.
    """
    folder, dtype = Folder(directory), token_dtype(tokenizer)
    shards, report, sizes, best = [], DataReport(), folder.sizes(), 0
    for number in range(len(plan.parts)):
        record = read_record(folder, number, dtype, sizes.__getitem__)
        if record is None:
            raise UserError(f"{folder.name}: part {number} of {len(plan.parts)} is missing; tokenize it again")
        shards += record[0]
        if plan.parts[number].segmentation is None:  # the others read the same text
            report.merge(record[1])
            best += sum(shard.n_tokens for shard in record[0])
    check_field(plan.source, report)
    last = plan.parts[-1].segmentation if plan.parts else None
    repeated = [f"each document in its best pieces and {last.number} times in random ones"] if last else []
    if not shards:
        found = "; ".join(report.lines()) or "the source has no document"
        split = f" for its {identity['split']} split" if "split" in identity else ""
        raise UserError(f"data source {plan.source.name!r} has no text{split}: {found}")
    meta = {
        "format": FORMAT,
        **identity,
        "dtype": dtype.name,
        **{name: sum(getattr(shard, name) for shard in shards) for name in ("n_tokens", "n_documents", "n_bytes")},
        **({"n_best_tokens": best} if last else {}),
        "fingerprint": "",
        "tokenizer": tokenizer.fingerprint,
        "framing": dataclasses.astuple(tokenizer.framing),
        "bos_id": tokenizer.framing.first_id,
        "report": [*repeated, *report.lines()],
        "shards": [dataclasses.astuple(shard) for shard in shards],
    }
    store = TokenStore(directory, meta, shards)
    meta["fingerprint"] = fingerprint_of(store)
    folder.write("meta.json", to_json(meta, indent=1).encode() + b"\n")
    folder.sync()
    return store


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups documents into lists of at least CHUNK characters; the last list may be shorter."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _first_shards(folder: Folder, name: str, dtype: np.dtype) -> Iterator[Shard]:
    """The complete shards at the beginning of a part, up to the first one that is missing or damaged."""
    for i in itertools.count():
        file = f"{name}-{i:03}.bin"
        try:
            shard = Shard.of_header(file, folder.read(file, HEADER.size))
            if shard is None or folder.size(file) != shard.size(dtype.itemsize) or shard.n_tokens < SHARD_TOKENS:
                return  # the last shard of a part is shorter; it is written again, which takes no longer than a proof
        except FileNotFoundError:
            return
        yield shard


class _ShardWriter:
    """Writes one shard: `add` documents, then `finish` or `discard`."""

    def __init__(self, folder: Folder, name: str, dtype: np.dtype) -> None:
        self._name, self._dtype, self._new = name, dtype, folder.new_file(name)
        self._file = open(self._new.path, "wb")  # noqa: SIM115 (`finish` and `discard` close it)
        self._file.write(bytes(HEADER.size))
        self._hasher, self._offsets = Hasher(), [np.zeros(1, np.int64)]
        self.n_tokens = self._n_bytes = 0

    def room(self, lengths: np.ndarray) -> int:
        """How many of the next documents, with these lengths, belong to this shard."""
        return int(np.searchsorted(self.n_tokens + np.cumsum(lengths), SHARD_TOKENS)) + 1

    def add(self, encoded: Encoded) -> None:
        ids = np.ascontiguousarray(encoded.ids, self._dtype)
        ends = self.n_tokens + np.cumsum(encoded.lengths, dtype=np.int64)
        self._file.write(ids.data)
        self._hasher.add(ids, ends)
        self._offsets.append(ends)
        self.n_tokens = int(ends[-1])
        self._n_bytes += int(encoded.sizes.sum())

    def finish(self) -> Shard:
        offsets = np.concatenate(self._offsets)
        shard = Shard(self._name, self.n_tokens, len(offsets) - 1, self._n_bytes, self._hasher.result())
        with self._file as file:
            file.write(bytes(-self._dtype.itemsize * self.n_tokens % 8))
            file.write(offsets.data)
            file.seek(0)
            file.write(shard.header(self._dtype.itemsize))
        self._new.publish()
        return shard

    def discard(self) -> None:
        self._file.close()
        self._new.discard()
