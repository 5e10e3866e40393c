"""Text to tokens: a token file on disk, tokenized once, in parallel, and cached.

    documents --tokenizer--> TokenStore (memory-mapped) --> windows.Windows --> Batches[step]

The same source and tokenizer give the same tokens whatever the number of workers.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import threading
import uuid

import numpy as np

from nanoflax.data.files import DataReport
from nanoflax.data.text import Source, documents, source_version
from nanoflax.errors import UserError
from nanoflax.report import ProgressBar, format_count, format_duration

FORMAT = 1  # of the files in the cache; part of their key
CHUNK = 1 << 20  # characters that a worker tokenizes at once
POOL_FROM = 4  # chunks; for less text, starting processes costs more than it saves


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Tokens of one split on disk: documents in order, each followed by the end-of-sequence id.

    tokens: [n_tokens] uint16 or uint32 memmap. offsets: [n_documents + 1] int64 memmap, where each
    document starts, and n_tokens. meta: also the source, the tokenizer's fingerprint, the report.
    """

    directory: pathlib.Path
    meta: dict
    tokens: np.ndarray
    offsets: np.ndarray

    n_tokens = property(lambda self: self.meta["n_tokens"])
    n_bytes = property(lambda self: self.meta["n_bytes"])  # of the text in UTF-8
    n_documents = property(lambda self: self.meta["n_documents"])
    fingerprint = property(lambda self: self.meta["fingerprint"])  # of tokens and offsets
    report = property(lambda self: self.meta["report"])  # lines for people

    @classmethod
    def open(cls, directory):
        """Raises UserError for a directory without a whole token store."""
        directory = pathlib.Path(directory)
        try:
            meta = json.loads((directory / "meta.json").read_text())
            tokens = np.memmap(directory / "tokens.bin", meta["dtype"], "r")
            offsets = np.memmap(directory / "offsets.bin", np.int64, "r")
            if (len(tokens), len(offsets)) != (meta["n_tokens"], meta["n_documents"] + 1):
                raise ValueError("sizes differ")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directory} holds no whole token store: {error}") from error
        return cls(directory, meta, tokens, offsets)


def default_cache_dir():
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("NANOFLAX_CACHE") or pathlib.Path(root) / "nanoflax")


def prepare(source, tokenizer, split="train", cache_dir=None, workers=None, progress=True):
    """Tokenizes one split of a Source (or its name) once -> TokenStore.

    The store lies in the cache under a hash of the source's source_version (files by path, size and
    time) and the tokenizer, and appears there whole or not at all. workers: processes for large
    corpora (default: one a core); their number does not change the files. Raises UserError for
    an unusable source or cache directory.
    """
    source = source if isinstance(source, Source) else Source(source)
    cache = pathlib.Path(cache_dir) if cache_dir else default_cache_dir()
    key = _cache_key(source, tokenizer, split)
    with contextlib.suppress(UserError):
        return TokenStore.open(cache / key)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        with _locked(cache / f"{key}.lock"):  # another process may be at the same work
            with contextlib.suppress(UserError):
                return TokenStore.open(cache / key)
            building = cache / f"{key}.{uuid.uuid4().hex}.tmp"
            try:
                building.mkdir()
                _build(building, source, tokenizer, split, workers or os.cpu_count(), progress)
                shutil.rmtree(cache / key, ignore_errors=True)  # there only if it is damaged
                os.rename(building, cache / key)
                _sync(cache)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cache directory {cache} cannot be written: {error.strerror}; choose another with $NANOFLAX_CACHE"
        ) from error
    return TokenStore.open(cache / key)


def _cache_key(source, tokenizer, split):
    parts = [FORMAT, dataclasses.asdict(source), split, tokenizer.fingerprint, source_version(source)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


@contextlib.contextmanager
def _locked(path, wait=True):
    """Holds a file lock, which the system frees when its process dies; BlockingIOError if held."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _remove_abandoned(cache):
    for path in cache.glob("*.tmp"):  # of a killed process: nobody holds its lock
        lock = cache / f"{path.name.partition('.')[0]}.lock"
        with contextlib.suppress(BlockingIOError), _locked(lock, wait=False):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _build(directory, source, tokenizer, split, workers, progress):
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
                bar.advance(min(report.share, 0.99))  # workers lag behind what is read
        if bar and n_tokens:
            bar.advance(1.0)
    if not n_tokens:
        found = "; ".join(report.lines()) or "the source has no such document"
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
        "bos_id": tokenizer.bos_id,
        "report": report.lines(),
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    for path in (*directory.iterdir(), directory):
        _sync(path)


def _chunks(texts):
    """Groups documents into lists of about CHUNK characters; a longer document is one list."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer, texts):
    """-> ids [sum of lengths] int64, lengths [documents], the text's size in bytes."""
    documents = [np.asarray([*tokenizer.encode(text), tokenizer.eos_id]) for text in texts]
    return (np.concatenate(documents), [len(ids) for ids in documents], sum(len(text.encode()) for text in texts))


def _start_worker(tokenizer):
    import multiprocessing

    global _tokenizer
    _tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells
    parent = multiprocessing.parent_process()  # a killed parent must not leave workers behind
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _encode_in_worker(texts):
    return _encode(_tokenizer, texts)


def _encode_all(chunks, tokenizer, workers):
    """Yields _encode of each chunk in order, from processes if there are many of them."""
    head = list(itertools.islice(chunks, POOL_FROM))
    chunks = itertools.chain(head, chunks)
    if workers == 1 or len(head) < POOL_FROM:
        yield from (_encode(tokenizer, chunk) for chunk in chunks)
        return
    import concurrent.futures
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
            "a tokenizing process died: there was too little memory, or the program "
            "has no `if __name__ == '__main__':`; workers=1 needs neither"
        ) from error


class _Tokenizing(ProgressBar):
    """The bar of `prepare`; corpora that take less than a few seconds are done without a line."""

    quiet = 10.0

    def __init__(self, what, **options):
        super().__init__(1.0, **options)
        self.what, self.bytes, self.tokens = what, 0, 0

    def title(self):
        return f"tokenizing {self.what}"

    def status(self):
        seconds = self._clock() - self._begin
        parts = [f"{format_count(self.bytes)}B, {format_count(self.tokens)} tokens"]
        if seconds > 0 and self.bytes:
            parts.append(f"{format_count(self.bytes / seconds)}B/s")
        if self.done >= 1:
            parts.append(f"in {format_duration(seconds)}")
        elif self.done > 0:
            parts.append(f"{format_duration(seconds * (1 - self.done) / self.done)} left")
        return "  ".join(parts)
