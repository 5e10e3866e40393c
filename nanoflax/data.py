"""Tokens to batches: a token file on disk, its windows, and their batches.

    documents --tokenizer--> TokenStore (memory-mapped) --> Windows --> Batches[step]

Every step is a value or a file that its inputs determine: the same source and tokenizer give the
same tokens whatever the number of workers, the same seed and step the same batch whatever the
number of hosts.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import queue
import shutil
import threading
import uuid

import numpy as np

from nanoflax.errors import UserError
from nanoflax.report import Bar, count, duration
from nanoflax.sources import Report, Source, documents, identity

FORMAT = 1  # of the files in the cache; part of their key
CHUNK = 1 << 20  # characters that a worker tokenizes at once
POOL_FROM = 4  # chunks; for less text, starting processes costs more than it saves
SMALL_EPOCH = 1 << 13  # windows


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

    The store lies in the cache under a hash of the source's identity (files by path, size and
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
        raise UserError(f"cache directory {cache} cannot be written: {error.strerror}; choose "
                        "another with $NANOFLAX_CACHE") from error
    return TokenStore.open(cache / key)


def _cache_key(source, tokenizer, split):
    parts = [FORMAT, dataclasses.asdict(source), split, tokenizer.fingerprint, identity(source)]
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
    report, digest, lengths_digest = Report(), hashlib.blake2b(), hashlib.blake2b()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    n_tokens = n_documents = n_bytes = 0
    chunks = _chunks(documents(source, split, report))
    with (open(directory / "tokens.bin", "wb") as tokens_file,
          open(directory / "offsets.bin", "wb") as offsets_file,
          _Tokenizing(f"{source.name} {split}") if progress else contextlib.nullcontext() as bar,
          contextlib.closing(_encode_all(chunks, tokenizer, workers)) as encoded):
        offsets_file.write(np.int64(0).tobytes())
        for ids, lengths, size in encoded:
            if ids.min() < 0 or ids.max() >= tokenizer.vocab_size:
                raise UserError(f"the tokenizer gave token id {ids.max()}, beyond its vocabulary "
                                f"of {tokenizer.vocab_size}")
            ends = n_tokens + np.cumsum(lengths, dtype=np.int64)
            for file, hashed, data in ((tokens_file, digest, ids.astype(dtype).tobytes()),
                                       (offsets_file, lengths_digest, ends.tobytes())):
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
    meta = {"source": dataclasses.asdict(source), "split": split, "dtype": dtype.name,
            "n_tokens": n_tokens, "n_documents": n_documents, "n_bytes": n_bytes,
            "fingerprint": digest.hexdigest()[:32], "tokenizer": tokenizer.fingerprint,
            "bos_id": tokenizer.bos_id, "report": report.lines()}
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
    return (np.concatenate(documents), [len(ids) for ids in documents],
            sum(len(text.encode()) for text in texts))


def _start_worker(tokenizer):
    import multiprocessing

    global _tokenizer
    _tokenizer = tokenizer
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
        with concurrent.futures.ProcessPoolExecutor(
                workers, context, _start_worker, (tokenizer,)) as pool:
            pending = collections.deque()
            for chunk in chunks:
                pending.append(pool.submit(_encode_in_worker, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError("a tokenizing process died: there was too little memory, or the program "
                        "has no `if __name__ == '__main__':`; workers=1 needs neither") from error


class _Tokenizing(Bar):
    """The bar of `prepare`; corpora that take less than a few seconds are done without a line."""

    quiet = 10.0

    def __init__(self, what, **options):
        super().__init__(1.0, **options)
        self.what, self.bytes, self.tokens = what, 0, 0

    def title(self):
        return f"tokenizing {self.what}"

    def status(self):
        seconds = self._clock() - self._begin
        parts = [f"{count(self.bytes)}B, {count(self.tokens)} tokens"]
        if seconds > 0 and self.bytes:
            parts.append(f"{count(self.bytes / seconds)}B/s")
        if self.done >= 1:
            parts.append(f"in {duration(seconds)}")
        elif self.done > 0:
            parts.append(f"{duration(seconds * (1 - self.done) / self.done)} left")
        return "  ".join(parts)


# From tokens to batches.


class Windows:
    """The stream of a TokenStore in windows of T = `length` targets, at random access.

    The last window may be partial: its rest has weight 0. With `isolated`, windows also carry
    segments, so that a document sees no other. bos_id: the token before the first one.
    """

    def __init__(self, store, length, isolated=False, bos_id=None):
        if length < 1:
            raise UserError(f"window length {length}: must be at least 1")
        self.store, self.length, self.isolated = store, length, isolated
        self.bos_id = store.meta["bos_id"] if bos_id is None else bos_id

    def __len__(self):
        return -(-self.store.n_tokens // self.length)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {name: array[0] for name, array in self.batch([index]).items()}

    def batch(self, indices):
        """[B] window numbers -> targets [B, T] int32; first [B] int32, the token before each
        window; weights [B, T] float32; if isolated, segments [B, T] int32: the window's documents
        from 1, and 0 for padding, and start [B] int32, the bos_id that each begins from. A number
        past the end gives a window of padding alone.
        """
        tokens, n = self.store.tokens, self.store.n_tokens
        starts = np.asarray(indices, np.int64) * self.length
        positions = starts[:, None] + np.arange(self.length)
        real = positions < n
        positions = np.minimum(positions, n - 1)
        before = tokens[np.clip(starts - 1, 0, n - 1)].astype(np.int32)
        batch = {"targets": np.where(real, tokens[positions], 0).astype(np.int32),
                 "first": np.where(starts == 0, self.bos_id, before).astype(np.int32),
                 "weights": real.astype(np.float32)}
        if self.isolated:
            document = self.document(positions)
            batch["segments"] = np.where(real, document - document[:, :1] + 1, 0).astype(np.int32)
            batch["start"] = np.full(len(starts), self.bos_id, np.int32)
            # A document that begins with the window owes nothing to the one before it either.
            begins = self.store.offsets[document[:, 0]] == starts
            batch["first"] = np.where(begins, self.bos_id, batch["first"]).astype(np.int32)
        return batch

    def document(self, positions):
        """Positions in the stream -> numbers of their documents; an end belongs to its own."""
        return np.searchsorted(self.store.offsets, positions, side="right") - 1

    def text(self, index, tokenizer):
        start = index * self.length
        return tokenizer.decode(self.store.tokens[start:start + self.length].tolist())


def _shuffled(i, n, seed, epoch):
    """Where a permutation of range(n), of its own for each seed and epoch, sends i: O(1)."""
    if n <= SMALL_EPOCH:  # index_shuffle walks a domain of 2^16 at least: slow for a small n
        return _small_permutation(n, seed, epoch)[i]
    from grain.python.experimental import index_shuffle

    return index_shuffle(i, n - 1, _epoch_seed(seed, epoch), 4)


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed, epoch):
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


@functools.lru_cache(maxsize=8)
def _small_permutation(n, seed, epoch):
    keys = np.random.SeedSequence((seed, epoch)).generate_state(n, np.uint64)
    return np.argsort(keys, kind="stable").tolist()


class Batches:
    """batches[step] -> Windows.batch of a step, or this process's rows of it.

    The position in the data is one integer, step * batch_size windows. Each epoch is a permutation
    of all windows, seeded by (seed, epoch); a batch may straddle two epochs. rows: those of every
    batch that this process reads (sharding.rows), None for all [batch_size]; the batch that all
    processes have together is the same for any number of them.
    """

    def __init__(self, windows, batch_size, seed=0, shuffle=True, rows=None):
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        if seed < 0:
            raise UserError(f"seed {seed}: must not be negative")
        self.windows, self.batch_size, self.seed, self.shuffle = windows, batch_size, seed, shuffle
        self.rows = range(batch_size) if rows is None else rows

    def indices(self, step):
        """The numbers of the windows of batches[step], in the order of `rows`."""
        position, n = step * self.batch_size, len(self.windows)
        places = [divmod(position + row, n) for row in self.rows]
        if not self.shuffle:
            return [i for _, i in places]
        return [_shuffled(i, n, self.seed, epoch) for epoch, i in places]

    def __getitem__(self, step):
        return self.windows.batch(self.indices(step))

    def where(self, step):
        """What all processes read at a step, to name a bad batch: [(window, first document, last
        one)]."""
        result, whole = [], Batches(self.windows, self.batch_size, self.seed, self.shuffle)
        for i in whole.indices(step):
            last = min((i + 1) * self.windows.length, self.windows.store.n_tokens) - 1
            ends = self.windows.document([i * self.windows.length, last])
            result.append((i, *map(int, ends)))
        return result


def evaluation_batches(windows, batch_size, rows=None):
    """Yields batches of every window once, in order; the last is filled up with weight 0.

    rows: as in Batches.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    for start in range(0, len(windows), batch_size):
        yield windows.batch(start + rows)


def prefetch(iterator, n=2):
    """Yields the items of `iterator`, which a thread takes up to n ahead; its errors come too."""
    items, closed = queue.Queue(n), threading.Event()

    def put(item):
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=0.1)

    def work():
        try:
            for item in iterator:
                put((item, None))
                if closed.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
