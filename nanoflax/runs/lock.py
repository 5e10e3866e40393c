"""The lock of a run's directory: only one run writes it."""

import fcntl
import os
import pathlib
import socket
import time
from typing import Any, TypeAlias

from nanoflax import parallel
from nanoflax.errors import UserError

Path: TypeAlias = str | os.PathLike[str]
VISIBLE_SECONDS = 30  # until all hosts see a new file on a network file system


def make_writable(directory: Path) -> pathlib.Path:
    """The absolute path of a directory, which is made if absent. Raises: UserError if it cannot be written."""
    if "://" in str(directory):
        raise UserError(f"{directory} is not a local path: mount the bucket and give its path")
    path = pathlib.Path(directory).expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: choose another directory or change its mode")
    return path


class WorkdirLock:
    """An exclusive lock (flock) of a workdir. The kernel drops it when the process dies.

    Use as a context manager, or call `release()`. Process 0 takes the lock for all processes of a
    run; the others read its file, to check that their workdir is the same directory.

    Raises: UserError if another process holds the lock (its id and host are named), the lock cannot
    be written, or the processes do not share the workdir.
    """

    def __init__(self, directory: Path):
        self._file = None
        holder = parallel.run_on_main_process(lambda: self._take(directory))
        path, begin = pathlib.Path(directory).expanduser() / ".lock", time.monotonic()
        while not (seen := path.exists() and path.read_text() == holder):
            if time.monotonic() - begin > VISIBLE_SECONDS:
                break
            time.sleep(0.1)
        if others := [i for i, saw in enumerate(parallel.gather_from_processes(seen)) if not saw]:
            raise UserError(
                f"workdir {directory} of process {others[0]} is not that of process 0: "
                "hosts need one that they share, for the checkpoints"
            )

    def _take(self, directory: Path) -> str:
        """Takes the lock; returns the text of its file."""
        path = make_writable(directory) / ".lock"
        try:
            file = open(path, "a+")  # noqa: SIM115 (it stays open until the lock is released)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            holder = f"process {os.getpid()} on {socket.gethostname()}\n"
            file.write(holder)
            file.flush()
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"workdir {directory} is in use by {holder}: wait for it or stop it, or choose another --workdir"
            ) from error
        except OSError as error:
            raise UserError(f"{path} cannot be locked: {error.strerror}") from error
        self._file = file
        # A forked worker may outlive its parent: it must not keep the parent's lock.
        os.register_at_fork(after_in_child=self.release)
        return holder

    def release(self) -> None:
        """Drop the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "WorkdirLock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()
