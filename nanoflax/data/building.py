"""Building the store of one split of a source in a directory, or completing it."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable
from typing import Any

from nanoflax.data.folders import Folder
from nanoflax.data.parts import Plan, plan
from nanoflax.data.source import Source, settings_of, source_version
from nanoflax.data.store import Shard, TokenStore, damaged
from nanoflax.data.tokenizing import FORMAT, read_record, token_dtype, write_index
from nanoflax.errors import UserError
from nanoflax.report import to_json
from nanoflax.untrusted import json_object

Engine = Callable[[str | os.PathLike, Plan, Any], None]  # (directory, plan, tokenizer): tokenizes the missing parts


def store_key(source: Source, tokenizer: Any, split: str) -> str:
    """32 hexadecimal digits that change with the source's version, the tokenizer, the split and the files' format."""
    of_tokenizer = [tokenizer.fingerprint, dataclasses.astuple(tokenizer.framing)]
    parts = [
        FORMAT,
        settings_of(source if split == "train" else source.without_segmentations()),
        split,
        of_tokenizer,
        source_version(source),
    ]
    return hashlib.blake2b(to_json(parts).encode(), digest_size=16).hexdigest()


def build_store(
    directory: str | os.PathLike, source: Source, tokenizer: Any, split: str, engine: Engine, check: bool = False
) -> TokenStore:
    """The TokenStore in a directory, on disk or in object storage. What is missing is built by `engine`.

    If the process is killed, the next call continues with the first shard that is missing. check: read all shards, and
    build those again that differ from their checksums.
    Raises: UserError for a source that cannot be read, and for a directory with the store of another source.
    """
    source = source if split == "train" else source.without_segmentations()
    folder, key = Folder(directory), store_key(source, tokenizer, split)
    check_segmentations(source, tokenizer)
    if not folder.is_remote:
        os.makedirs(os.path.dirname(os.path.abspath(folder.name)), exist_ok=True)
    with folder.locked():  # another process may build the same store
        folder.create()
        try:
            _check_same(folder, key, source)
            folder.delete_unfinished()
            if check:
                _delete_damaged(folder, token_dtype(tokenizer))
            with contextlib.suppress(UserError):
                return TokenStore.open(directory)
            planned = plan(source, split).segmented()
            engine(directory, planned, tokenizer)
            return write_index(directory, planned, tokenizer, {"source": settings_of(source), "split": split})
        finally:
            _remove_if_nothing_is_built(folder)


def check_segmentations(source: Source, tokenizer: Any = None, kind: str = "") -> None:
    """Raises: UserError if a source asks for random segmentations, and the tokenizer has none. kind: of a tokenizer
    that will be trained; see tokenizers.parse."""
    sampler = kind == "unigram" if tokenizer is None else getattr(tokenizer, "sampler", None)
    if source.segmentations and not sampler:
        raise UserError(
            f"data.segmentations={source.segmentations}: the tokenizer has no random segmentations; choose "
            "data.tokenizer=unigram:4096, or a SentencePiece model that is unigram, has all bytes and changes no text"
        )


def _remove_if_nothing_is_built(folder: Folder) -> None:
    names = folder.sizes()
    if not any(name.endswith(".bin") for name in names):
        for name in names:
            if name == "built.json" or name.startswith("part-"):
                folder.delete(name)
        with contextlib.suppress(OSError):  # files of the user
            os.rmdir(folder.name)


def _check_same(folder: Folder, key: str, source: Source) -> None:
    """Writes which store is in a directory, or compares it."""
    try:
        found = json_object(folder.read("built.json"), folder.path("built.json"))
    except FileNotFoundError:
        if names := sorted(folder.sizes()):
            raise UserError(f"{folder.name} holds {names[0]} and no token store; choose an empty directory") from None
        folder.write("built.json", to_json({"key": key, "source": source.name}).encode() + b"\n")
        return
    if found.get("key") != key:
        other = found.get("source")
        why = "its files, its settings or the tokenizer have changed" if other == source.name else f"of {other!r}"
        raise UserError(f"{folder.name} holds another store, not the one of {source.name!r} now: {why}; choose another")


def _delete_damaged(folder: Folder, dtype: Any) -> None:
    """Deletes the shards that differ from their checksums. Then their parts are no longer complete."""
    sizes = folder.sizes()
    records = [name for name in sizes if name.startswith("part-") and name.endswith(".json")]
    found = (read_record(folder, int(name[5:-5]), dtype, sizes.__getitem__) for name in sorted(records))
    shards: list[Shard] = [shard for record in found if record for shard in record[0]]
    if shards:
        for shard, is_damaged in damaged(TokenStore(folder.name, {"dtype": dtype.name}, shards)):
            if is_damaged:
                print(f"{folder.path(shard.name)} is damaged: it is built again")
                folder.delete(shard.name)
