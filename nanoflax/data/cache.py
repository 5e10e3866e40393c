"""The cache of token stores: text is tokenized once, and a store that was begun is continued.

Source --processes--> TokenStore in the cache --> Windows --> Batches[step]
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from nanoflax import storage
from nanoflax.data.building import build_store, store_key
from nanoflax.data.folders import Folder, locked
from nanoflax.data.made import SCHEME, made_directory
from nanoflax.data.processes import tokenize_parts
from nanoflax.data.quality import Quality
from nanoflax.data.source import Source
from nanoflax.data.store import TokenStore
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
    """The tokens of one split of a Source, or of the source with this name, from the cache if they are there. Those of
    tokens:DIRECTORY are in this directory.

    The cache key is a hash of the source's version and the tokenizer. If the process is killed, the next call
    continues with the first shard that is missing. workers: processes for large corpora (default: one per core).
    Raises: UserError for a source or cache directory that cannot be used.
    """
    source = source if isinstance(source, Source) else Source(source)
    if _chosen_name(source, split).startswith(SCHEME):
        return _open_made(source, tokenizer, split)
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


def cached(name: str, parts: Any, make: Callable[[], bytes], cache_dir: str | os.PathLike | None = None) -> bytes:
    """What make() gives, or gave in an earlier call with the same name and parts, from the cache.

    parts: JSON values that decide what make() gives. A damaged file is made again; a cache that cannot be written only
    saves no time.
    """
    key = hashlib.blake2b(to_json(parts).encode(), digest_size=16).hexdigest()
    folder, file = Folder(cache_dir or default_cache_dir()), f"{name}-{key}"
    with contextlib.suppress(OSError):
        digest, content = (found := folder.read(file))[:16], found[16:]
        if digest == hashlib.blake2b(content, digest_size=16).digest():
            return content
    content = make()
    with contextlib.suppress(OSError):
        folder.create()
        folder.write(file, hashlib.blake2b(content, digest_size=16).digest() + content)
    return content


def _chosen_name(source: Source, split: str) -> str:
    """The name of the source that a split is read from."""
    return source.validation if split == "validation" and source.validation else source.name


def _open_made(source: Source, tokenizer: Any, split: str) -> TokenStore:
    """The store of a split (train, validation or all) of a source tokens:DIRECTORY. DIRECTORY may itself be a store.

    Raises: UserError if there is none, if another tokenizer made it, or if the source has settings for text.
    """
    name = _chosen_name(source, split)
    directory = made_directory(name)
    if "meta.json" in Folder(directory).sizes():
        if split == "validation" and not source.validation:
            raise UserError(f"{name} is the store of one split: name another source in data.validation")
    elif split == "all":
        raise UserError(f"{name} has splits: name one of them, as in {name}/validation")
    else:
        directory = storage.join(directory, split)
    settings = [f.name for f in dataclasses.fields(Quality) if getattr(source.quality, f.name) != f.default]
    settings += ["field"] * (source.field != "text")
    if settings and name == source.name:
        raise UserError(f"data.{settings[0]} is for text, but {name} holds tokens: set it in experiments.tokenize")
    store = TokenStore.open(directory)
    made_with = store.meta.get("tokenizer"), to_json(store.meta.get("framing"))
    if made_with != (tokenizer.fingerprint, to_json(dataclasses.astuple(tokenizer.framing))):
        raise UserError(
            f"{name} was made with another tokenizer than that of the run; its own is {made_directory(name)}/tokenizer"
        )
    return store


def _remove_abandoned(cache: pathlib.Path) -> None:
    """Removes stores without an index that nobody has written to for a week."""
    for path in {shard.parent for shard in cache.glob("*/part-*")}:
        if not (path / "meta.json").exists() and time.time() - path.stat().st_mtime > ABANDONED:
            with contextlib.suppress(BlockingIOError), locked(f"{path}.lock", wait=False):
                shutil.rmtree(path, ignore_errors=True)
