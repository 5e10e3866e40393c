"""Data sets of the Hugging Face hub: which files hold which split.

The library datasets reads the data set's card and file names; our own readers read the files.
"""

import dataclasses
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

from nanoflax import untrusted
from nanoflax.data.formats import FORMATS, suffix
from nanoflax.data.remote import HUB, File, describe
from nanoflax.errors import UserError

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


def hub_splits(source: str) -> dict[str, list[File]]:
    """{split: files} of its splits, with "all"; if it has no validation, that is its split test.

    source: hub:owner/name[:config][:split], or a folder with the same layout instead of owner/name. With a split, only
    its files, as "train" and "all". The files are hf:// names with a commit, or without a network those of the hub's
    cache. Raises: UserError for a data set that is not found, or has files of other formats.
    """
    path, *words = source.removeprefix("hub:").split(":")
    where, revision = _located(path, source)
    configs = _called(source, lambda datasets: datasets.get_dataset_config_names(where, revision=revision))
    config = words.pop(0) if words and (words[0] in configs or len(words) == 2) else None
    with tempfile.TemporaryDirectory() as cache:
        builder = _called(
            source, lambda datasets: datasets.load_dataset_builder(where, config, revision=revision, cache_dir=cache)
        )
    _check_settings(source, builder.config)
    splits: dict[str, list[File]] = {}
    for split, names in (builder.config.data_files or {}).items():
        _check_inside(source, where, names)
        _check_files(source, names)
        splits[str(split)] = _called(source, lambda datasets, names=names: [_file(name) for name in names])
    if words:
        if words[0] not in splits:
            of_configs = f", and the configs {', '.join(configs)}" if len(configs) > 1 else ""
            raise UserError(f"{source}: {words[0]!r} is not known; it has the splits {', '.join(splits)}{of_configs}")
        return {"train": splits[words[0]], "all": splits[words[0]]}
    if "train" not in splits:
        raise UserError(f"{source} has no split train; name one, as in {source}:{next(iter(splits), 'SPLIT')}")
    held_out = next((splits[name] for name in ("validation", "test") if name in splits), None)
    every = list(dict.fromkeys(file for files in splits.values() for file in files))
    return splits | {"all": every} | ({"validation": held_out} if held_out else {})


def _file(path: str) -> File:
    """The File of a file of the hub, or of its cache, whose version is the commit and the name in the repository."""
    file, found = describe(path), re.search(r"(?:@|/snapshots/)([0-9a-f]{40})/(.*)", path)
    return dataclasses.replace(file, version=found.groups()) if found else file


def _located(path: str, source: str) -> tuple[str, str | None]:
    """(what datasets opens, commit)."""
    if os.path.isdir(path):
        return path, None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(f"{source}: write hub:OWNER/NAME[:CONFIG][:SPLIT]")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError(f"{source} needs the hub's libraries: pip install 'nanoflax[data]'") from error
    try:
        return path, huggingface_hub.HfApi().repo_info(path, repo_type="dataset", timeout=10).sha
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise UserError(f"{source}: the hub answers {_first_line(error)}") from error
    except Exception:  # no network: every HTTP library has its own exceptions
        pass
    try:
        return huggingface_hub.snapshot_download(path, repo_type="dataset", local_files_only=True), None
    except Exception as error:
        raise UserError(
            f"{source}: the hub does not answer, and its cache has no such data set; on a machine with a network: "
            f"hf download {path} --repo-type=dataset"
        ) from error


def _called(source: str, function: Any) -> Any:
    """The result of a function of the library datasets, whose errors become one line."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source} needs the hub's libraries: pip install 'nanoflax[data]'") from error
    try:
        return function(datasets)
    except Exception as error:  # it raises many classes of exceptions
        raise UserError(f"{source} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_settings(source: str, config: Any) -> None:
    """Raises: UserError if the card of the data set changes how its files are read."""
    ours = {"name", "version", "data_dir", "data_files", "description", "features"}
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name not in ours and (value := getattr(config, field.name)) != default:
            raise UserError(
                f"{source}: its card sets {field.name}={value!r}, which is not supported; convert it to Parquet"
            )


def _check_inside(source: str, where: str, names: Sequence[str]) -> None:
    """Raises: UserError for files outside the data set: its card can name any path, repository and address."""
    own = re.compile(rf"{HUB}([\w.-]+/)?{re.escape(where)}@(?!.*/\.\./)", re.IGNORECASE)  # squad is rajpurkar/squad
    is_own = (lambda name: untrusted.is_inside(where, name)) if os.path.isdir(where) else own.match
    if foreign := [name for name in names if not is_own(name)]:
        raise UserError(f"{source}: its card names {foreign[0]}, which is outside the data set; read that by itself")


def _check_files(source: str, names: Sequence[str]) -> None:
    other = [name for name in names if suffix(name) not in FORMATS]
    if other or not names:
        what = f"{os.path.basename(other[0])}, which is not" if other else "no file"
        raise UserError(f"{source} has {what} {', '.join(FORMATS)} (or .gz or .zst of these)")
    here = {name for name in names if not name.startswith(HUB)}
    for name in here:
        if shard := _SHARD.search(name):
            n = int(shard[2])
            every = {f"{name[: shard.start()]}-{i:05}-of-{shard[2]}.{name[shard.end() :]}" for i in range(n)}
            if missing := sorted(every - here):
                raise UserError(
                    f"{source}: {len(missing)} of {n} files are not here, such as {os.path.basename(missing[0])}; "
                    "download the data set again, completely"
                )
