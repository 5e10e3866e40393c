"""Token stores of both splits of a source in a directory that the user names; see experiments.tokenize."""

import functools
import os
from collections.abc import Callable
from typing import Any

from nanoflax import config as configs
from nanoflax import data, storage, tokenizers
from nanoflax.config import Config, TextData
from nanoflax.errors import UserError, listed
from nanoflax.report import to_json
from nanoflax.runs.vocabulary import get_tokenizer
from nanoflax.untrusted import json_object

SPLITS = ("train", "validation")
SETTINGS = "settings.json"  # in the directory; written after the tokenizer


def tokenize(
    config: Config, out: str, check: bool = False, engine: Callable[[str], Any] | None = None
) -> dict[str, data.TokenStore]:
    """{split: TokenStore} of data.train, in out/train and out/validation; the tokenizer is in out/tokenizer.

    out: a directory, or gs://... or s3://... The same call again continues, and is quick if nothing is missing.
    check: read all shards, and build those again that are damaged. engine: a function of a title that gives the
    `engine` of data.build_store; default: processes of this machine.
    Raises: UserError for a mistake of the user, or if `out` has the tokens of another source or tokenizer.
    """
    configs.validate(config)
    text = configs.as_kind(TextData, config.data)
    sources = data.sources_of(text)
    (source,) = sources.values() if len(sources) == 1 else (None,)
    if source is None or source.name.startswith("tokens:"):
        raise UserError(f"--data={text.train}: give one source of text; tokenize the sources of a mixture one by one")
    data.source_version(source)  # raises UserError for missing files
    kind, _ = tokenizers.parse(text.tokenizer)
    data.check_segmentations(source, tokenizers.load(text.tokenizer) if kind == "path" else None, kind)
    tokenizer = _tokenizer(text, source, out.rstrip("/"))
    if engine is None:
        engine = lambda title: functools.partial(data.tokenize_parts, workers=text.workers, title=title)
    stores = {}
    for split in SPLITS:
        title = f"{source.name} {split}"
        stores[split] = data.build_store(storage.join(out, split), source, tokenizer, split, engine(title), check)
    return stores


def _tokenizer(text: TextData, source: data.Source, out: str) -> Any:
    """The tokenizer in `out`, which an earlier call wrote, or a new one. Raises: UserError for other settings."""
    folder, directory = data.Folder(out), storage.join(out, "tokenizer")
    settings = {"tokenizer": text.tokenizer, "source": data.settings_of(source)}
    try:
        found = json_object(folder.read(SETTINGS), folder.path(SETTINGS))
    except (FileNotFoundError, NotADirectoryError):
        found = {}
        names = sorted(set(folder.sizes()) - {"train.lock"})
        names = [
            name for name in names if not name.startswith("tokenizer/")
        ]  # in a bucket, of a process that was killed
        if names:
            raise UserError(f"--out={out} holds {names[0]} and no token store; choose an empty directory") from None
    if found and any(data.Folder(storage.join(out, split)).sizes() for split in SPLITS):  # else nothing is built yet
        for name, value in settings.items():
            if to_json(found.get(name)) != to_json(value):
                changed = "; ".join(configs.diff({name: found.get(name)}, {name: value}))
                raise UserError(
                    f"--out={out} holds tokens of another {name} ({changed}); choose another --out, or give the same "
                    "settings"
                )
    if to_json(found) != to_json(settings):
        tokenizer = get_tokenizer(text, os.devnull, lambda: data.documents(source, "train"))
        try:
            folder.create()
            data.save_tokenizer(tokenizer, directory, replace=bool(found))
            folder.write(SETTINGS, to_json(settings, indent=1).encode() + b"\n")
        except OSError as error:
            raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from error
    return data.load_tokenizer(directory)


def check_stores(out: str) -> dict[str, data.TokenStore]:
    """{split: TokenStore} in a directory of `tokenize`, or {"": the TokenStore that it is}, after all shards have been
    compared with their checksums. Raises: UserError that names the damaged shards."""
    names = [split for split in SPLITS if data.Folder(storage.join(out, split)).sizes()]
    stores = {name: data.TokenStore.open(storage.join(out, name)) for name in names} or {"": data.TokenStore.open(out)}
    wrong = [
        store.folder.path(shard.name)
        for store in stores.values()
        for shard, is_damaged in data.damaged(store)
        if is_damaged
    ]
    if wrong:
        raise UserError(f"damaged: {listed(wrong)}; give --data, too, and they are built again")
    return stores
