"""Text to batches: sources of documents, a token file on disk, its windows, and their batches.

    documents --tokenizer--> TokenStore (memory-mapped) --> Windows --> Batches[step]

Every step is a value or a file that its inputs determine: the same source and tokenizer give the
same tokens whatever the number of workers, the same seed and step the same batch whatever the
number of hosts.
"""

import ast
import codecs
import collections
import contextlib
import dataclasses
import fcntl
import functools
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import os
import pathlib
import queue
import shutil
import socket
import sys
import sysconfig
import threading
import time
import urllib.parse
import urllib.request
import uuid
import warnings
import zlib

import numpy as np

from nanoflax.errors import UserError
from nanoflax.tokenizers import well_formed

FORMAT = 1  # of the files in the cache; part of their key
CHUNK = 1 << 20  # characters that a worker tokenizes at once
POOL_FROM = 4  # chunks; for less text, starting processes costs more than it saves
SMALL_EPOCH = 1 << 13  # windows
FEW_DOCUMENTS = 100  # fewer have too few for a split by hash
SKIPPED_MODULES = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "pydoc_data",
                   "site-packages", "dist-packages", "__pycache__"}
HELP = "choose pydocs, text:GLOB or tfds:NAME[:FIELD]"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where text comes from and how it splits into "train" and "validation" ("all" is both).

    name: pydocs; text:GLOB of .txt, .md (a document each) and .jsonl (a document a line, under
      `field`), each also .gz; tfds:NAME[:FIELD], NAME perhaps with /CONFIG and :VERSION.
    validation: another source, all of it the validation split. Otherwise a dataset's own splits
      (validation, or else test); otherwise each document whose hash falls under
      `validation_fraction`. Of fewer than 100 documents a hash may choose none: there the last
      `validation_fraction` of each one, cut where a paragraph, line or word ends, is validation.
    """

    name: str
    field: str = "text"
    validation: str = ""
    validation_fraction: float = 0.05
    data_dir: str = ""  # of TFDS; default $TFDS_DATA_DIR, or where TFDS keeps its data

    def __post_init__(self):
        for name in (self.name, self.validation or "pydocs"):
            kind, _, rest = name.partition(":")
            if name != "pydocs" and not (kind in ("text", "tfds") and rest):
                raise UserError(f"data source {name!r} is not known; {HELP}")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction {self.validation_fraction}: must be between 0 "
                            "and 1")


class Report:
    """Counts of what was wrong with the text, with the first few places of each."""

    def __init__(self):
        self.counts, self.places = collections.Counter(), collections.defaultdict(list)

    def add(self, problem, place):
        self.counts[problem] += 1
        if len(self.places[problem]) < 3:
            self.places[problem].append(place)

    def lines(self):
        """One line for each problem, for people."""
        return [f"{problem}: {count} ({', '.join(self.places[problem])}"
                f"{', ...' if count > len(self.places[problem]) else ''})"
                for problem, count in self.counts.items()]


# Sources of documents.


def documents(source, split="train", report=None):
    """Yields the documents (str, never empty) of a Source or its name, in a fixed order.

    Damaged text is counted in `report`. Raises UserError for what cannot be read at all.
    """
    source = source if isinstance(source, Source) else Source(source)
    report = Report() if report is None else report
    if split not in ("train", "validation", "all"):
        raise UserError(f"split {split!r}: choose train, validation or all")
    if split == "validation" and source.validation:
        return documents(dataclasses.replace(source, name=source.validation, validation=""),
                         "all", report)
    own = _dataset_splits(source)
    whole = split == "all" or source.validation or "validation" in own
    names = own.get(split if whole else "train")
    if whole:
        return _read(source, names, report)
    few = FEW_DOCUMENTS > sum(
        1 for _ in itertools.islice(_read(source, names, Report()), FEW_DOCUMENTS))
    return _split_documents(_read(source, names, report), split, source.validation_fraction, few)


def _split_documents(texts, split, fraction, few):
    for text in texts:
        if few:
            if part := _cut(text, fraction)[split == "validation"]:
                yield part
        elif _chosen(text, fraction) == (split == "validation"):
            yield text


def _chosen(text, fraction):
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"nanoflax split").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _cut(text, fraction):
    """Head and tail; the tail is about `fraction` of the text and starts after an end of sorts."""
    middle = int(len(text) * (1 - fraction))
    for end in ("\n\n", "\n", " "):
        at = text.rfind(end, len(text) // 2, middle) + len(end)
        if at >= len(text) // 2 + len(end):
            return text[:at], text[at:]
    return text[:middle], text[middle:]


def _read(source, names, report):
    if source.name == "pydocs":
        return iter(_pydocs())
    if source.name.startswith("text:"):
        return _read_text(_files(source), source.field, report)
    return _read_tfds(source, names, report)


def _clean(text, place, report):
    """str or bytes -> str that UTF-8 can write, or "" for a blank document; counts the damage."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            report.add("invalid UTF-8, read as U+FFFD", f"{place}, byte {error.start}")
            text = text.decode("utf-8", "replace")
    clean = well_formed(text)
    if clean is not text:
        report.add("unpaired surrogates, read as U+FFFD", place)
    if not clean or clean.isspace():
        report.add("empty documents", place)
        return ""
    return clean


@functools.cache  # two megabytes, two or three seconds to collect, read for each split
def _pydocs():
    """The English in the running Python: its help topics, then its modules' docstrings."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    root, seen = pathlib.Path(sysconfig.get_paths()["stdlib"]), set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_MODULES & set(parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of old escapes in the source
                module = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # a template or a foreign file, no module of this Python
        name = ".".join(parts).removesuffix(".__init__")
        if sections := list(_docstrings(module, name, "", seen)):
            documents.append("\n\n".join(sections) + "\n")
    return documents


def _docstrings(node, heading, prefix, seen):
    """Yields "name\\n\\ndocstring" of a module or class and its members, each docstring once."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    if text and text not in seen:
        seen.add(text)
        yield f"{heading}\n\n{well_formed(text)}"
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = prefix + child.name
                yield from _docstrings(child, name, name + ".", seen)


def _files(source):
    pattern = os.path.expanduser(source.name.removeprefix("text:"))
    matches = [p for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
    files = [p for p in matches if _suffix(p) in (".txt", ".md", ".jsonl")]
    if not files:
        what = f"{len(matches)} files, none of them" if matches else "no file, so no"
        raise UserError(f"data source {source.name!r} matches {what} .txt, .md or .jsonl (or .gz "
                        "of these); a whole folder is text:FOLDER/**/*.txt")
    return files


def _suffix(path):
    return os.path.splitext(path.removesuffix(".gz"))[1]


def _read_text(files, field, report):
    for path in files:
        try:
            with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
                if _suffix(path) == ".jsonl":
                    yield from _read_jsonl(file, path, field, report)
                elif text := _clean(file.read().removeprefix(codecs.BOM_UTF8), path, report):
                    yield text
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {error}") from error


def _read_jsonl(file, path, field, report):
    for number, line in enumerate(file, 1):
        place = f"{path}:{number}"
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.isspace():
            continue
        try:
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                value = json.loads(line.decode("utf-8", "replace"))
                report.add("invalid UTF-8, read as U+FFFD", f"{place}, byte {error.start}")
        except (ValueError, RecursionError):
            report.add("malformed JSON lines, left out", place)
            continue
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            report.add(f"JSON lines without text in field {field!r}, left out", place)
        elif text := _clean(text, place, report):
            yield text


def _dataset(source):
    """The TFDS builder of a tfds: source, prepared, and its field. TensorFlow is not imported."""
    import tensorflow_datasets as tfds

    words = source.name.removeprefix("tfds:").split(":")
    # NAME, NAME:FIELD, NAME:VERSION or NAME:VERSION:FIELD; a version starts with a digit.
    name = ":".join(words[:2] if len(words) > 1 and words[1][:1].isdigit() else words[:1])
    field = ":".join(words)[len(name) + 1:]
    directory = source.data_dir or os.environ.get("TFDS_DATA_DIR") or None
    hint = (f"prepare it once, where there is a network: tfds build {name} "
            f"--file_format=array_record --data_dir={directory or tfds.core.constants.DATA_DIR}")
    try:
        builder = tfds.builder(name, data_dir=directory)
        if not builder.is_prepared():
            if not _online():
                raise UserError(f"{source.name} is not prepared and there is no network; {hint}")
            builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise
    except Exception as error:  # TFDS raises of every kind, with pages of text
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source.name} is not prepared here: {message} {hint}") from error
    features = builder.info.features
    texts = [k for k in features if isinstance(features[k], tfds.features.Text)]
    if field not in texts and (field or len(texts) != 1):
        raise UserError(f"{source.name}: name a text feature, as in tfds:{name}:FIELD; it has "
                        f"{', '.join(texts) or 'none'}")
    return builder, field or texts[0]


def _online(seconds=3):
    """Whether the host of prepared datasets, or the proxy on the way to it, answers in time."""
    proxy = urllib.parse.urlsplit(urllib.request.getproxies().get("https", ""))
    address = (proxy.hostname or "storage.googleapis.com", proxy.port or 443)
    answered = threading.Event()

    def connect():  # in a thread, because looking a name up has no time limit of its own
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=seconds).close()
            answered.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _dataset_splits(source):
    """{"train": [name], "validation": [name] if it has one, "all": [names]}; {} if not of TFDS."""
    if not source.name.startswith("tfds:"):
        return {}
    names = list(_dataset(source)[0].info.splits)
    if "train" not in names:
        raise UserError(f"{source.name} has no split named train, only {', '.join(names)}")
    held_out = [name for name in ("validation", "test") if name in names][:1]
    return {"train": ["train"], "all": names} | ({"validation": held_out} if held_out else {})


def _read_tfds(source, names, report):
    builder, field = _dataset(source)
    for name in names:
        try:
            examples = builder.as_data_source(split=name)
        except NotImplementedError as error:
            raise UserError(f"{source.name} is prepared as {builder.info.file_format.value}: "
                            "prepare it again with --file_format=array_record") from error
        for i in range(len(examples)):
            if text := _clean(examples[i][field], f"{name} example {i}", report):
                yield text


# From documents to a token file.


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
    def identity(name):
        if name.startswith("text:"):
            files = _files(dataclasses.replace(source, name=name))
            return [[os.path.abspath(p), (s := os.stat(p)).st_size, s.st_mtime_ns] for p in files]
        if name.startswith("tfds:"):
            builder, field = _dataset(dataclasses.replace(source, name=name))
            return [builder.info.full_name, str(builder.data_path), field]
        return [sys.version]

    parts = [FORMAT, dataclasses.asdict(source), split, tokenizer.fingerprint,
             identity(source.name), source.validation and identity(source.validation)]
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
          _progress(f"{source.name} {split}", progress) as show,
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
            show(n_bytes, n_tokens)
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


@contextlib.contextmanager
def _progress(title, on):
    """Gives show(n_bytes, n_tokens): a moving bar on a terminal, else a line now and then."""
    def text(n_bytes, n_tokens):
        return f"tokenizing {title}: {n_bytes / 1e6:.1f} MB, {n_tokens / 1e6:.2f}M tokens"

    if not on:
        yield lambda *counts: None
    elif sys.stderr.isatty():
        from rich import console, progress

        columns = (progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
                   progress.TimeElapsedColumn())
        with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
            task = bar.add_task(f"tokenizing {title}", total=None)
            yield lambda *counts: bar.update(task, description=text(*counts))
    else:
        last = time.monotonic()

        def show(*counts):
            nonlocal last
            if time.monotonic() - last > 10:
                last = time.monotonic()
                print(text(*counts), file=sys.stderr, flush=True)

        yield show


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
        from 1, and 0 for padding. A number past the end gives a window of padding alone.
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
    """batches[step] -> this process's [batch_size / process_count, ...] rows of Windows.batch.

    The position in the data is one integer, step * batch_size windows. Each epoch is a permutation
    of all windows, seeded by (seed, epoch); a batch may straddle two epochs. The global batch of a
    step is the same for any process_count; a process takes its contiguous rows of it.
    """

    def __init__(self, windows, batch_size, seed=0, shuffle=True, process_index=0,
                 process_count=1):
        if batch_size < 1 or batch_size % process_count:
            raise UserError(f"batch_size {batch_size}: must be a positive multiple of the number "
                            f"of processes, {process_count}")
        if seed < 0:
            raise UserError(f"seed {seed}: must not be negative")
        self.windows, self.batch_size, self.seed, self.shuffle = windows, batch_size, seed, shuffle
        self.rows = batch_size // process_count
        self.offset = process_index * self.rows

    def indices(self, step):
        """The numbers of the windows of batches[step], [rows]."""
        position, n = step * self.batch_size + self.offset, len(self.windows)
        places = [divmod(p, n) for p in range(position, position + self.rows)]
        if not self.shuffle:
            return [i for _, i in places]
        return [_shuffled(i, n, self.seed, epoch) for epoch, i in places]

    def __getitem__(self, step):
        return self.windows.batch(self.indices(step))

    def where(self, step):
        """What batches[step] holds, to name a bad batch: [(window, first document, last one)]."""
        result = []
        for i in self.indices(step):
            last = min((i + 1) * self.windows.length, self.windows.store.n_tokens) - 1
            ends = self.windows.document([i * self.windows.length, last])
            result.append((i, *map(int, ends)))
        return result


def evaluation_batches(windows, batch_size, process_index=0, process_count=1):
    """Yields batches of every window once, in order; the last is filled up with weight 0."""
    rows = Batches(windows, batch_size, 0, False, process_index, process_count).rows
    for start in range(0, len(windows), batch_size):
        first = start + process_index * rows
        yield windows.batch(np.arange(first, first + rows))


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
