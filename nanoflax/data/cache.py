"""The cache of token stores: text is tokenized once, and a store that was begun is continued.

Source --processes--> TokenStore in the cache --> Windows --> Batches[step]
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

from nanoflax.data.parts import plan
from nanoflax.data.processes import tokenize_parts
from nanoflax.data.source import Source, source_version
from nanoflax.data.store import TokenStore
from nanoflax.data.tokenizing import FORMAT, write_index
from nanoflax.errors import UserError
from nanoflax.report import to_json

ABANDONED = 7 * 24 * 3600  # seconds after which a store that was begun is removed from the cache


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

    The cache key is a hash of the source's version and the tokenizer. If the process is killed, the next call
    continues with the first shard that is missing. workers: processes for large corpora (default: one per core).
    Raises: UserError for a source or cache directory that cannot be used.
    """
    source = source if isinstance(source, Source) else Source(source)
    cache = pathlib.Path(cache_dir) if cache_dir else default_cache_dir()
    directory = cache / store_key(source, tokenizer, split)
    with contextlib.suppress(UserError):
        return TokenStore.open(directory)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        with _locked(f"{directory}.lock"):  # another process may build the same store
            with contextlib.suppress(UserError):
                return TokenStore.open(directory)
            return _build(directory, source, tokenizer, split, workers or os.cpu_count() or 1, progress)
    except OSError as error:
        raise UserError(
            f"cache directory {cache} cannot be written: {error.strerror}; choose another with $NANOFLAX_CACHE"
        ) from error


def store_key(source: Source, tokenizer: Any, split: str) -> str:
    """32 hexadecimal digits that change with the source's version, the tokenizer, the split and the files' format."""
    of_tokenizer = [tokenizer.fingerprint, dataclasses.astuple(tokenizer.framing)]
    parts = [FORMAT, dataclasses.asdict(source), split, of_tokenizer, source_version(source)]
    return hashlib.blake2b(to_json(parts).encode(), digest_size=16).hexdigest()


def _build(
    directory: pathlib.Path, source: Source, tokenizer: Any, split: str, workers: int, progress: bool
) -> TokenStore:
    planned = plan(source, split)
    directory.mkdir(exist_ok=True)
    try:
        for path in directory.glob("*.tmp"):  # of a process that was killed
            path.unlink(missing_ok=True)
        tokenize_parts(directory, planned, tokenizer, workers, f"{source.name} {split}" if progress else "")
        return write_index(directory, planned, tokenizer, {"source": dataclasses.asdict(source), "split": split})
    except BaseException:
        if not any(directory.glob("*.bin")):  # else the next call continues
            shutil.rmtree(directory, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(path: str | os.PathLike, wait: bool = True) -> Iterator[None]:
    """Holds a file lock. The system releases the lock when the process dies. Raises: BlockingIOError if another
    process holds the lock and `wait` is false."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _remove_abandoned(cache: pathlib.Path) -> None:
    """Removes stores without an index that nobody has written to for a week."""
    for path in {shard.parent for shard in cache.glob("*/part-*")}:
        if not (path / "meta.json").exists() and time.time() - path.stat().st_mtime > ABANDONED:
            with contextlib.suppress(BlockingIOError), _locked(f"{path}.lock", wait=False):
                shutil.rmtree(path, ignore_errors=True)
