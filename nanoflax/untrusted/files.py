"""Files of a stranger's directory: plain names, no links out of it, and a limit of their size."""

import os
import pathlib

from nanoflax.errors import UserError

MAX_BYTES = 500_000_000  # of a file that is read completely; the largest tokenizers have 35 MB


def locate(directory: str | os.PathLike, name: str) -> pathlib.Path:
    """The path of the file `name` in a directory.

    Raises:
      UserError: not a plain file name, no such file, or a link. Links of the Hugging Face cache are
        allowed: REPOSITORY/snapshots/REVISION/name links to REPOSITORY/blobs, which in newer versions
        links to blobs/HA/HASH, shared by all repositories of the cache.
    """
    path = pathlib.Path(directory, name)
    if name != pathlib.PureWindowsPath(name).name:  # knows both kinds of slash
        raise UserError(f"{name!r} must be a plain file name, inside {directory}")
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        raise UserError(f"{name!r} is not a file that can be read in {directory}")
    if path.is_symlink() and not _is_blob(path.parent.resolve().parent, path.resolve()):
        raise UserError(f"{path} is a link out of its directory; put the file itself there")
    return path


def is_inside(directory: str | os.PathLike, path: str | os.PathLike) -> bool:
    """Whether a path is in a directory or in a folder below it, so that no `..` and no link leads out of the directory,
    except the links of the Hugging Face cache; see `locate`."""
    root, target = pathlib.Path(directory).resolve(), pathlib.Path(path).resolve()
    return root in target.parents or _is_blob(root.parent, target)


def _is_blob(snapshots: pathlib.Path, target: pathlib.Path) -> bool:
    """Whether a link from a revision below REPOSITORY/snapshots may have this target."""
    shared = snapshots.parent.parent / "blobs" / target.name[:2]
    return snapshots.name == "snapshots" and target.parent in (snapshots.parent / "blobs", shared)


def read_bytes(directory: str | os.PathLike, name: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of the file that `locate` finds. Raises: UserError, also for more than max_bytes."""
    path = locate(directory, name)
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > max_bytes:
                raise UserError(f"{path} cannot be read: its {size} bytes are more than {max_bytes}")
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
