"""Token files on disk: text is tokenized once, in parallel, and cached.

    documents --tokenizer--> TokenStore (memory-mapped) --> Windows --> Batches[step]

The files do not depend on the number of workers.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import os
import pathlib
import shutil
import signal
import threading
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from nanoflax.data.parts import documents
from nanoflax.data.report import DataReport
from nanoflax.data.source import Source, source_version
from nanoflax.errors import UserError
from nanoflax.report import ProgressBar, format_count, format_duration, to_json
from nanoflax.untrusted import json_object

FORMAT = 1  # version of the file format; part of the cache key
CHUNK = 1 << 20  # characters that a worker tokenizes at once
POOL_FROM = 4  # chunks; with less text, starting processes takes longer than tokenizing


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Tokens of one split on disk: documents in order, each followed by the end-of-sequence id.

    tokens: a memory map of uint16 or uint32. offsets: a memory map with the first position of each document, then
    n_tokens. meta: counts, the source, the tokenizer's fingerprint, the lines of the DataReport.
    """

    directory: pathlib.Path
    meta: dict[str, Any]
    tokens: Int[np.ndarray, " n_tokens"]
    offsets: Int[np.ndarray, " n_documents+1"]

    n_tokens = property(lambda self: self.meta["n_tokens"])
    n_bytes = property(lambda self: self.meta["n_bytes"])  # of the text in UTF-8
    n_documents = property(lambda self: self.meta["n_documents"])
    fingerprint = property(lambda self: self.meta["fingerprint"])  # of tokens and offsets
    report = property(lambda self: self.meta["report"])  # the lines of the DataReport

    def read(self, start: int, stop: int) -> Int[np.ndarray, " stop-start"]:
        """The tokens from position start to position stop - 1."""
        return self.tokens[start:stop]

    def document(self, positions: Any) -> Int[np.ndarray, "..."]:
        """The numbers of the documents at these positions. An end token is part of its document."""
        return np.searchsorted(self.offsets, positions, side="right") - 1

    def begin(self, documents: Any) -> Int[np.ndarray, "..."]:
        """The first positions of documents with these numbers; n_documents gives n_tokens."""
        return self.offsets[documents]

    @classmethod
    def open(cls, directory: str | os.PathLike) -> "TokenStore":
        """Raises: UserError for a directory without a complete token store."""
        directory = pathlib.Path(directory)
        try:
            meta = json_object((directory / "meta.json").read_bytes(), directory / "meta.json")
            tokens = np.memmap(directory / "tokens.bin", meta["dtype"], "r")
            offsets = np.memmap(directory / "offsets.bin", np.int64, "r")
            if (len(tokens), len(offsets)) != (meta["n_tokens"], meta["n_documents"] + 1):
                raise ValueError("sizes differ")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory} holds no complete token store: {error}") from error
        return cls(directory, meta, tokens, offsets)


def default_cache_dir() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("NANOFLAX_CACHE") or pathlib.Path(root) / "nanoflax")


def prepare(
    source: Source | str,
    tokenizer: Any,
    split: str = "train",
    cache_dir: str | os.PathLike | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> TokenStore:
    """The tokens of one split of a Source, or of the source with this name, from the cache if they are there.

    The cache key is a hash of the source's version and the tokenizer. A store is added to the cache atomically.
    workers: processes for large corpora (default: one per core). Raises: UserError for a source or cache directory
    that cannot be used.
    """
    source = source if isinstance(source, Source) else Source(source)
    cache = pathlib.Path(cache_dir) if cache_dir else default_cache_dir()
    key = _cache_key(source, tokenizer, split)
    with contextlib.suppress(UserError):
        return TokenStore.open(cache / key)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        with _locked(cache / f"{key}.lock"):  # another process may build the same store
            with contextlib.suppress(UserError):
                return TokenStore.open(cache / key)
            building = cache / f"{key}.{uuid.uuid4().hex}.tmp"
            try:
                building.mkdir()
                _build(building, source, tokenizer, split, workers or os.cpu_count() or 1, progress)
                shutil.rmtree(cache / key, ignore_errors=True)  # a damaged store, if any
                os.rename(building, cache / key)
                _sync(cache)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cache directory {cache} cannot be written: {error.strerror}; choose another with $NANOFLAX_CACHE"
        ) from error
    return TokenStore.open(cache / key)


def _cache_key(source: Source, tokenizer: Any, split: str) -> str:
    of_tokenizer = [tokenizer.fingerprint, dataclasses.astuple(tokenizer.framing)]
    parts = [FORMAT, dataclasses.asdict(source), split, of_tokenizer, source_version(source)]
    return hashlib.blake2b(to_json(parts).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _locked(path: pathlib.Path, wait: bool = True) -> Iterator[None]:
    """Holds a file lock. The system releases the lock when the process dies. Raises: BlockingIOError if another
    process holds the lock and `wait` is false."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _remove_abandoned(cache: pathlib.Path) -> None:
    for path in cache.glob("*.tmp"):  # if its process was killed, the lock is free
        lock = cache / f"{path.name.partition('.')[0]}.lock"
        with contextlib.suppress(BlockingIOError), _locked(lock, wait=False):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _build(directory: pathlib.Path, source: Source, tokenizer: Any, split: str, workers: int, progress: bool) -> None:
    report, digest, lengths_digest = DataReport(), hashlib.blake2b(), hashlib.blake2b()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    n_tokens = n_documents = n_bytes = 0
    chunks = _chunks(documents(source, split, report))
    with (
        open(directory / "tokens.bin", "wb") as tokens_file,
        open(directory / "offsets.bin", "wb") as offsets_file,
        _Tokenizing(f"{source.name} {split}") if progress else contextlib.nullcontext() as bar,
        contextlib.closing(_encode_all(chunks, tokenizer, workers)) as encoded,
    ):
        offsets_file.write(np.int64(0).tobytes())
        for ids, lengths, size in encoded:
            if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
                raise UserError(
                    f"the tokenizer gave token id {ids.max()}, beyond its vocabulary of {tokenizer.vocab_size}"
                )
            ends = n_tokens + np.cumsum(lengths, dtype=np.int64)
            for file, hashed, data in (
                (tokens_file, digest, ids.astype(dtype).tobytes()),
                (offsets_file, lengths_digest, ends.tobytes()),
            ):
                file.write(data)
                hashed.update(data)
            n_tokens, n_documents, n_bytes = int(ends[-1]), n_documents + len(ends), n_bytes + size
            if bar:
                bar.bytes, bar.tokens = n_bytes, n_tokens
                bar.advance(min(report.share, 0.99))  # not 1: reading ends before tokenizing
        if bar and n_tokens:
            bar.advance(1.0)
    if not n_tokens:
        found = "; ".join(report.lines()) or "the source has no document"
        raise UserError(f"data source {source.name!r} has no text for its {split} split: {found}")
    digest.update(lengths_digest.digest())
    meta = {
        "source": dataclasses.asdict(source),
        "split": split,
        "dtype": dtype.name,
        "n_tokens": n_tokens,
        "n_documents": n_documents,
        "n_bytes": n_bytes,
        "fingerprint": digest.hexdigest()[:32],
        "tokenizer": tokenizer.fingerprint,
        "bos_id": tokenizer.framing.first_id,
        "report": report.lines(),
    }
    (directory / "meta.json").write_text(to_json(meta, indent=1) + "\n")
    for path in (*directory.iterdir(), directory):
        _sync(path)


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


def _encode(tokenizer: Any, texts: Sequence[str]) -> tuple[Int[np.ndarray, " ids"], list[int], int]:
    """(the ids of all documents, the number of ids of each, the size of all texts in bytes)."""
    encoded = [np.asarray(tokenizer.framing.document(tokenizer.encode(text))) for text in texts]
    return np.concatenate(encoded), [len(ids) for ids in encoded], sum(len(text.encode()) for text in texts)


def _start_worker(tokenizer: Any) -> None:
    import multiprocessing

    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process stops the workers
    if parent := multiprocessing.parent_process():  # the worker exits if the parent process is killed
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_in_worker(texts: Sequence[str]) -> tuple[Int[np.ndarray, " ids"], list[int], int]:
    return _encode(_tokenizer, texts)


def _encode_all(
    chunks: Iterator[list[str]], tokenizer: Any, workers: int
) -> Generator[tuple[Int[np.ndarray, " ids"], list[int], int], None, None]:
    """Yields _encode of each chunk, in order. Worker processes compute it if there are many chunks."""
    head = list(itertools.islice(chunks, POOL_FROM))
    chunks = itertools.chain(head, chunks)
    if workers == 1 or len(head) < POOL_FROM:
        yield from (_encode(tokenizer, chunk) for chunk in chunks)
        return
    import concurrent.futures.process
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,)) as pool:
            pending = collections.deque()
            for chunk in chunks:
                pending.append(pool.submit(_encode_in_worker, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a tokenizing process died: either there was too little memory, or the program has no "
            "`if __name__ == '__main__':`; workers=1 avoids both problems"
        ) from error


class _Tokenizing(ProgressBar):
    """The progress bar of `prepare`. It prints no plain lines in the first ten seconds."""

    quiet = 10.0

    def __init__(self, what: str, **options: Any) -> None:
        super().__init__(1.0, **options)
        self.what, self.bytes, self.tokens = what, 0, 0

    def title(self) -> str:
        return f"tokenizing {self.what}"

    def status(self) -> str:
        seconds = self._clock() - self._begin
        parts = [f"{format_count(self.bytes)}B, {format_count(self.tokens)} tokens"]
        if seconds > 0 and self.bytes:
            parts.append(f"{format_count(self.bytes / seconds)}B/s")
        if self.done >= 1:
            parts.append(f"in {format_duration(seconds)}")
        elif self.done > 0:
            parts.append(f"{format_duration(seconds * (1 - self.done) / self.done)} left")
        return "  ".join(parts)
