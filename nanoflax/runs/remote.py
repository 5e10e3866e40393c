"""A run in object storage: gs://BUCKET/DIRECTORY or s3://BUCKET/DIRECTORY.

Its checkpoints are read and written there directly. Its other files are small: config.json, tokenizer/, metrics.jsonl,
pictures, ... They have a local copy in the cache. The copy is made anew when a run starts, and what has changed is
written back before each checkpoint is committed, every few seconds, and at the end; config.json is last. So a run that
was killed continues on any machine. While a run writes, it holds a lease (`storage.Lease`).
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any, cast

import jax

from nanoflax import data, parallel, report, storage
from nanoflax.errors import UserError
from nanoflax.runs import step_files
from nanoflax.storage import RemotePath

DIRECTORIES = ("tokenizer", "tensorboard", "final", "adapter", "profile", "wandb", "previous")
CONFIG = "config.json"
VERSIONS = ".versions.json"
_writing: dict[str, "Copy"] = {}  # local directory -> its copy, for the runs that this process writes


class Copy:
    """The local copy of the small files of a remote directory, or of all files if it is no run.

    purpose: the folder of the cache; a process that writes and the processes that read do not share a copy.
    """

    def __init__(self, url: str, purpose: str):
        self.url, self.lease = url.rstrip("/"), cast(storage.Lease | None, None)
        scheme, _, rest = self.url.partition("://")
        parts = [urllib.parse.quote(part, safe=" ") for part in rest.split("/")]
        if any(part in ("", ".", "..") for part in parts):
            raise UserError(f"{url}: an empty part, . and .. are no names of object storage here")
        self.local = step_files.copies() / purpose / scheme / pathlib.Path(*parts)
        self.local.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._known: dict[str, list] = {}  # name -> [version in the storage, size and time of the local file]

    def pull(self, wanted: dict[str, str]) -> None:
        """Make the local files those of the storage. wanted: {name: version}."""
        path = self.local / VERSIONS
        with contextlib.suppress(OSError, ValueError):
            self._known = json.loads(path.read_text())
        for name in self._files():
            if name not in wanted:
                (self.local / name).unlink()
        new = [name for name, version in wanted.items() if self._known.get(name) != [version, *self._state(name)]]
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(self._download, new))
        self._known = {name: [version, *self._state(name)] for name, version in wanted.items()}
        report.write_atomically(path, report.to_json(self._known).encode())

    def _download(self, name: str) -> None:
        if any(part in ("", ".", "..", step_files.POINTER) for part in name.split("/")):
            raise UserError(f"{self.url}: the name {name!r} is of no file inside a directory")
        (self.local / name).parent.mkdir(parents=True, exist_ok=True)
        storage.download(storage.join(self.url, name), self.local / name)

    def push(self) -> None:
        """Write the files that have changed to the storage, config.json last, and delete those that are gone."""
        with self._lock:
            now = {name: self._state(name) for name in self._files()}
            changed = [name for name, state in now.items() if self._known.get(name, [None])[1:] != state and state]
            changed.sort(key=lambda name: (name.endswith(CONFIG), name == CONFIG))
            for name in changed:
                with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
                    content = (self.local / name).read_bytes()
                    storage.write_bytes(storage.join(self.url, name), content)
                    self._known[name] = [None, *now[name]]
            for name in self._known.keys() - now.keys():
                storage.delete(storage.join(self.url, name))
                del self._known[name]

    def point_to_checkpoints(self, found: dict[str, Any]) -> None:
        """Let checkpoints/ and final/checkpoints/ of the copy stand for those of the storage."""
        for run in ("", "final/"):
            step_files_there = any(name.startswith(f"{run}checkpoints/") for name in found)
            if not run or step_files_there and f"{run}{CONFIG}" in found:
                step_files.point_to(self.local / run / "checkpoints", storage.join(self.url, f"{run}checkpoints"))
            else:
                shutil.rmtree(self.local / run, ignore_errors=True)

    def _files(self) -> list[str]:
        paths = (path.relative_to(self.local).as_posix() for path in self.local.rglob("*") if path.is_file())
        return sorted(filter(is_small, paths))

    def _state(self, name: str) -> list[int]:
        try:
            found = (self.local / name).stat()
        except FileNotFoundError:
            return []
        return [found.st_size, found.st_mtime_ns]


def is_small(name: str) -> bool:
    """Whether a file of a run's directory belongs to its local copy: no checkpoint, no unfinished file, and not of
    another run below."""
    parts = name.split("/")
    known = len(parts) == 1 or parts[0].rpartition("-")[0] in DIRECTORIES or parts[0] in DIRECTORIES
    return known and "checkpoints" not in parts and not any(part.startswith(".") for part in parts)


@contextlib.contextmanager
def writing(url: str) -> Iterator[str]:
    """A context that holds the lease of a remote run; gives the directory of its local copy.

    Raises: UserError if another process writes there, or the storage cannot be used.
    """
    copy = Copy(url, "writing" if jax.process_index() == 0 else f"writing-{jax.process_index()}")
    parallel.run_on_main_process(lambda: _take_lease(copy))
    try:
        found = storage.list_versions(copy.url)
        copy.pull({name: version for name, version in found.items() if is_small(name)})
        copy.point_to_checkpoints(found)
        _writing[str(copy.local)] = copy
        try:
            yield str(copy.local)
        except UserError as error:
            raise UserError(str(error).replace(str(copy.local), copy.url)) from error
        finally:
            if copy.lease:
                copy.lease.check()
                copy.push()
    finally:
        _writing.pop(str(copy.local), None)
        if copy.lease:
            copy.lease.release()


def _take_lease(copy: Copy) -> None:
    copy.lease = storage.Lease(copy.url, on_renewal=lambda: copy.push() if str(copy.local) in _writing else None)


def before_commit(directory: Any) -> None:
    """Called before a step is committed: writes the small files of the run. Raises: UserError if its lease is lost."""
    for copy in list(_writing.values()):
        if isinstance(directory, RemotePath) and str(directory).startswith(f"{copy.url}/") and copy.lease:
            copy.push()
            copy.lease.check()


def is_copy(path: str | os.PathLike) -> bool:
    """Whether a path is in the local copy of a remote run that this process writes."""
    return any(pathlib.Path(local) in pathlib.Path(path).absolute().parents for local in _writing)


def shown(path: str) -> str:
    """The remote name of a path in such a copy; other paths as they are."""
    return next((copy.url + path[len(local) :] for local, copy in _writing.items() if path.startswith(local)), path)


def begin_export(part: str, path: str) -> None:
    """Before a run is written to `part`, which then gets the name `path`, in a copy: its checkpoints are written to
    the storage at once, in place of earlier ones. All processes must call it."""
    if not is_copy(path):
        return
    name = shown(path)
    if parallel.is_main_process():
        storage.delete(storage.join(name, CONFIG))  # now it is no run
        storage.delete_all(name)
    parallel.gather_from_processes("removed")
    step_files.point_to(os.path.join(part, "checkpoints"), storage.join(name, "checkpoints"))


def local_copy(source: str) -> str:
    """A local directory to read a remote run, or any remote directory or .gguf file, from; other sources as they are.

    Raises: UserError if there is nothing.
    """
    if not storage.is_remote(source):
        return source
    if storage.is_remote(source) and source.endswith(".gguf"):
        folder, _, file = source.rpartition("/")
        copy = Copy(folder, "reading")
        wanted = {name: version for name, version in storage.list_versions(folder).items() if name == file}
    else:
        copy, file = Copy(source, "reading"), ""
        found = wanted = storage.list_versions(copy.url)
        if is_run(source):
            wanted = {name: version for name, version in found.items() if is_small(name)}
    if not wanted:
        raise UserError(f"{source} holds nothing")
    with data.locked(copy.local / ".pull.lock"):  # another process may read the same run
        copy.pull(wanted)
        if not file and len(wanted) < len(found):
            copy.point_to_checkpoints(found)
    return str(copy.local / file)


def is_run(url: str) -> bool:
    """Whether a remote directory is the directory of a run."""
    return storage.is_directory(storage.join(url, "checkpoints"))


@contextlib.contextmanager
def filled(url: str) -> Iterator[str]:
    """A context that fills a new remote directory; gives a local directory to write to. config.json is last.

    Raises: UserError if the remote directory is not empty.
    """
    if storage.list_names(url):
        raise UserError(f"{url} exists and is not empty; choose another")
    copy = Copy(url, "export")
    shutil.rmtree(copy.local)
    try:
        yield str(copy.local)
        files = sorted(path for path in copy.local.rglob("*") if path.is_file())
        names = {path.relative_to(copy.local).as_posix(): path for path in files}
        for name in sorted(names, key=lambda name: name == CONFIG):
            if name == CONFIG:
                for step in (path for path in copy.local.glob("checkpoints/*") if path.name.isdigit()):
                    marker = storage.join(url, "checkpoints", step.name, step_files.MARKER)
                    storage.write_bytes(marker, b"complete")
            storage.upload(names[name], storage.join(url, name))
    finally:
        shutil.rmtree(copy.local, ignore_errors=True)
