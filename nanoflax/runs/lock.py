"""The lock of a run's directory, so that only one run writes there."""

import contextlib
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO, TypeAlias

from nanoflax import parallel, storage
from nanoflax.errors import UserError

Path: TypeAlias = str | os.PathLike[str]
VISIBLE_SECONDS = 30  # largest delay until all hosts see a new file on a network file system


def make_writable(directory: Path) -> pathlib.Path:
    """Makes a directory if it does not exist; returns its absolute path. Raises: UserError if it is not writable."""
    storage.check_name(directory)
    if storage.is_remote(directory):
        raise UserError(f"{directory} is not a local path")
    path = pathlib.Path(directory).expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: choose another directory or change its mode")
    return path


def take_lock(directory: Path) -> tuple[TextIO, str]:
    """(the locked file .lock of a directory, its text). Closing the file releases the lock. Raises: UserError."""
    holder = f"process {os.getpid()} on {socket.gethostname()}\n"
    while True:
        path = make_writable(directory) / ".lock"
        try:
            file = open(path, "a+")  # noqa: SIM115 (it stays open until the lock is released)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                file.truncate(0)
                file.write(holder)
                file.flush()
                return file, holder
            file.close()
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(storage.in_use(directory, holder)) from error
        except FileNotFoundError:  # another process has failed, and has removed the directory that it made
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be locked: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """A context that holds the lock of a directory, in a process that must not start JAX. Raises: UserError."""
    with take_lock(directory)[0]:
        yield


def remove_lock(path: pathlib.Path) -> None:
    """Removes a lock file, if there is one. Raises: BlockingIOError if a process holds the lock."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):
            path.unlink()


def wait_until_free(directory: Path, log: Callable[[str], Any] = print) -> None:
    """Waits while a process holds the lock of a directory; says so once."""
    path, said = pathlib.Path(directory) / ".lock", False
    while path.exists():
        with contextlib.suppress(FileNotFoundError), open(path) as file:  # removed since: nobody holds it
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not said:
                    log(f"{directory}: waiting for {file.read().strip() or 'another process'}, which still runs")
        said = True
        time.sleep(0.5)


def _is_at(file: TextIO, path: pathlib.Path) -> bool:
    """Whether an open file still has this path: another process may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


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
        self._file, holder = take_lock(directory)
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
