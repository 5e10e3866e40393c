"""The lock of a run's directory, so that only one run writes there."""

import errno
import fcntl
import os
import pathlib
import socket
import time
from typing import Any, TypeAlias

from nanoflax import parallel
from nanoflax.errors import UserError

Path: TypeAlias = str | os.PathLike[str]
# Errors of a disk that is full, read-only or broken: the run stops with one line.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
VISIBLE_SECONDS = 30  # largest delay until all hosts see a new file on a network file system


def make_writable(directory: Path) -> pathlib.Path:
    """Makes a directory if it does not exist; returns its absolute path. Raises: UserError if it is not writable."""
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
    """An exclusive lock (flock) of a workdir. The kernel releases the lock when the process dies.

    Use as a context manager, or call `release()`. Process 0 takes the lock for all processes of a
    run. The others read the lock file to check that their workdir is the same directory.

    Raises: UserError if another process holds the lock (the message gives its id and host), the lock
    file cannot be written, or the processes do not share the workdir.
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
                f"workdir {directory} of process {others[0]} is not the directory of process 0: "
                "all hosts must share one workdir, for the checkpoints"
            )

    def _take(self, directory: Path) -> str:
        """Takes the lock; returns the text of the lock file."""
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
