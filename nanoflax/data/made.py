"""Sources tokens:DIRECTORY: token stores that experiments.tokenize made, on disk or in object storage.

DIRECTORY/train, DIRECTORY/validation   the stores of the splits
DIRECTORY/tokenizer                     their tokenizer
"""

import os
import pathlib
import tempfile
from typing import Any

from nanoflax import storage
from nanoflax.data.folders import Folder
from nanoflax.data.store import TokenStore
from nanoflax.errors import UserError

SCHEME = "tokens:"


def made_version(name: str) -> list[str]:
    """The fingerprints of the stores of a source tokens:DIRECTORY. Raises: UserError if there is no store."""
    directory = made_directory(name)
    if "meta.json" in Folder(directory).sizes():
        return [TokenStore.open(directory).fingerprint]
    splits = [storage.join(directory, split) for split in ("train", "validation")]
    found = [split for split in splits if "meta.json" in Folder(split).sizes()]
    if not found:
        raise UserError(f"{name}: neither {directory} nor {splits[0]} is a complete token store")
    return [TokenStore.open(split).fingerprint for split in found]


def made_tokenizer(name: str) -> Any:
    """The tokenizer of a source tokens:DIRECTORY, or tokens:DIRECTORY/SPLIT. Raises: UserError if there is none."""
    directory = made_directory(name).rstrip("/")
    for parent in (directory, os.path.dirname(directory)):
        if Folder(storage.join(parent, "tokenizer")).sizes():
            return load_tokenizer(storage.join(parent, "tokenizer"))
    raise UserError(f"{name}: there is no {storage.join(directory, 'tokenizer')}")


def load_tokenizer(directory: str) -> Any:
    """The tokenizer in a directory, on disk or in object storage."""
    from nanoflax import tokenizers

    folder = Folder(directory)
    if not folder.is_remote:
        return tokenizers.load(directory)
    with tempfile.TemporaryDirectory() as local:
        for file in folder.sizes():
            pathlib.Path(local, file).write_bytes(folder.read(file))
        return tokenizers.load(local)


def save_tokenizer(tokenizer: Any, directory: str, replace: bool) -> None:
    """Write a tokenizer to a directory, on disk or in object storage.

    Raises: UserError if the directory holds anything else, unless `replace`.
    """
    folder = Folder(directory)
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save(local)
        files = {path.name: path.read_bytes() for path in pathlib.Path(local).iterdir()}
    for name in folder.sizes():
        if not replace and (name not in files or folder.read(name) != files[name]):
            raise UserError(f"{folder.path(name)} is not of this tokenizer: move it, or choose another --out")
    folder.create()
    for name, content in files.items():
        folder.write(name, content)


def made_directory(name: str) -> str:
    """The directory of a source tokens:DIRECTORY."""
    return os.path.expanduser(name.removeprefix(SCHEME))
