"""The cache of token stores: text is tokenized once, and a store that was begun is continued.

Source --processes--> TokenStore in the cache --> Windows --> Batches[step]
"""

import contextlib
import functools
import os
import pathlib
import shutil
import time
from typing import Any

from nanoflax.data.building import build_store, store_key
from nanoflax.data.folders import locked
from nanoflax.data.processes import tokenize_parts
from nanoflax.data.source import Source
from nanoflax.data.store import TokenStore
from nanoflax.errors import UserError

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
    title = f"{source.name} {split}" if progress else ""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        engine = functools.partial(tokenize_parts, workers=workers, title=title)
        return build_store(directory, source, tokenizer, split, engine)
    except OSError as error:
        raise UserError(
            f"cache directory {cache} cannot be written: {error.strerror}; choose another with $NANOFLAX_CACHE"
        ) from error


def _remove_abandoned(cache: pathlib.Path) -> None:
    """Removes stores without an index that nobody has written to for a week."""
    for path in {shard.parent for shard in cache.glob("*/part-*")}:
        if not (path / "meta.json").exists() and time.time() - path.stat().st_mtime > ABANDONED:
            with contextlib.suppress(BlockingIOError), locked(f"{path}.lock", wait=False):
                shutil.rmtree(path, ignore_errors=True)
