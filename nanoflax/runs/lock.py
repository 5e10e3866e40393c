"""The directory of a run: that it can be written, and that one run alone writes it."""

import fcntl
import os
import pathlib
import socket
import time

from nanoflax import parallel
from nanoflax.errors import UserError

VISIBLE = 30  # seconds until all hosts see a new file on a network file system


def make_writable(directory):
    """The directory as an absolute path, made if need be. Raises UserError if that cannot be."""
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
    """One run per workdir: an flock, which the kernel drops when its holder dies.

    Use as a context manager, or `release()` it. Process 0 of a run takes it, for all; the others
    look into it, to see that their workdir is the same directory.

    Raises:
      UserError: another process holds it (its pid and host are named), it cannot be written, or
        the processes share no workdir.
    """

    def __init__(self, directory):
        self._file = None
        holder = parallel.run_on_main_process(lambda: self._take(directory))
        path, begin = pathlib.Path(directory).expanduser() / ".lock", time.monotonic()
        while not (seen := path.exists() and path.read_text() == holder):
            if time.monotonic() - begin > VISIBLE:
                break
            time.sleep(0.1)
        if others := [i for i, saw in enumerate(parallel.gather_from_processes(seen)) if not saw]:
            raise UserError(
                f"workdir {directory} of process {others[0]} is not that of process 0: "
                "hosts need one that they share, for the checkpoints"
            )

    def _take(self, directory):
        path = make_writable(directory) / ".lock"
        try:
            file = open(path, "a+")
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
        # A forked worker that outlives a killed parent must not go on holding its lock.
        os.register_at_fork(after_in_child=self.release)
        return holder

    def release(self):
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()
