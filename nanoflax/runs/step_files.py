"""The directory of checkpoints: local, or in object storage, where nothing can be renamed.

local: a step is written as <step>.<something> and renamed when it is complete; a damaged one becomes damaged-<step>.
remote: a step has its name from the beginning and is complete when it holds commit_success.txt, which is written last
and deleted first; a damaged one gets an object damaged.txt.

The checkpoints of a remote run are found from its local copy (see `remote`) by the file checkpoints/.remote, which
holds their name. Only copies in the cache have such a file: in a run of a stranger it could name objects of the user.
"""

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, TypeAlias

import orbax.checkpoint as ocp

from nanoflax import data, storage, untrusted
from nanoflax.errors import UserError
from nanoflax.runs.lock import Path
from nanoflax.storage import RemotePath

AnyPath: TypeAlias = pathlib.Path | RemotePath
POINTER = ".remote"
MARKER = "commit_success.txt"  # orbax's name
DAMAGED = "damaged.txt"


def path_of(directory: Path | RemotePath) -> AnyPath:
    """The directory of checkpoints that has this name, or to which this local directory points."""
    if isinstance(directory, RemotePath) or storage.is_remote(str(directory)):
        return RemotePath(str(directory))
    path = pathlib.Path(directory)
    if os.path.lexists(path / POINTER):
        if not untrusted.is_inside(copies(), path / POINTER):
            raise UserError(f"{path / POINTER} is only for the cache of remote runs; give the name of the remote run")
        return RemotePath((path / POINTER).read_text())
    return path


def copies() -> pathlib.Path:
    """The directory of the local copies of remote directories."""
    return data.default_cache_dir() / "workdirs"


def point_to(directory: Path, name: str) -> None:
    """Make a local directory stand for the remote checkpoints `name`."""
    path = pathlib.Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    (path / POINTER).write_text(name)


def list_steps(path: AnyPath) -> list[int]:
    """Committed steps, ascending; [] if there is no such directory."""
    if isinstance(path, RemotePath):
        found = path.sizes()
        return sorted(s for s in _steps_in(found) if f"{s}/{MARKER}" in found and f"{s}/{DAMAGED}" not in found)
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit() and p.is_dir())


def list_damaged(path: AnyPath) -> list[str]:
    """The names of the steps that were found damaged."""
    if isinstance(path, RemotePath):
        found = path.sizes()
        return [str(s) for s in _steps_in(found) if f"{s}/{DAMAGED}" in found]
    return sorted(p.name for p in path.glob("damaged-*"))


def being_written(path: AnyPath, step: int) -> AnyPath:
    """The directory of a step that is complete but not committed."""
    if isinstance(path, RemotePath):
        return path / str(step)
    (found,) = path.glob(f"{step}.*")
    return found


def remove_unfinished(path: AnyPath) -> None:
    """Remove what a killed process has left."""
    if isinstance(path, RemotePath):
        found = path.sizes()
        for step in _steps_in(found):
            if f"{step}/{MARKER}" not in found and f"{step}/{DAMAGED}" not in found:
                (path / str(step)).rmtree()
        return
    for part in path.glob(f"*{ocp.path.step.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(part, ignore_errors=True)


def remove_step(path: RemotePath, step: int) -> None:
    """Delete a step, its marker first."""
    (path / str(step) / MARKER).unlink()
    (path / str(step)).rmtree()


def set_aside(path: AnyPath, step: int, log: Callable[[str], Any]) -> None:
    """Keep a damaged step under another name, or with a mark, so that no process reads it again."""
    if isinstance(path, RemotePath):
        (path / str(step) / DAMAGED).write_text("This step is damaged. Runs do not read it.\n")
        log(f"warning: {path}: step {step} was marked by {DAMAGED}")
        return
    target = path / f"damaged-{step}"
    while target.exists():
        target = target.with_name(target.name + "-again")
    (path / str(step)).rename(target)
    log(f"warning: {path}: step {step} was moved to {target.name}")


def _steps_in(found: dict[str, int]) -> list[int]:
    names = {name.partition("/")[0] for name in found if "/" in name}
    return sorted(int(name) for name in names if name.isdigit())
