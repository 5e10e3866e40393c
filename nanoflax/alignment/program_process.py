"""The process that runs a generated program and its tests, for `rewards.passes_tests`; standard library only.

A model writes the program, so it may do anything. The operating system limits time, memory and the size of files, and
gives the process a network without connections where it may; a hook of Python refuses sockets, other programs and
writing. This stops accidents and simple tricks, not a program that attacks the interpreter itself: for untrusted
models run the training in a container.

The request is JSON on stdin; the answer is the mark of the request on stdout, if all tests pass.
"""

import contextlib
import json
import os
import resource
import signal
import sys

REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
    "os.utime", "shutil.", "ctypes.", "pty.", "signal.", "webbrowser.", "urllib.", "ftplib.", "smtplib.",
)  # fmt: skip
NEW_NETWORK, NEW_USER = 0x40000000, 0x10000000  # Linux's CLONE_NEWNET and CLONE_NEWUSER


def without_network() -> None:
    """On Linux, a network namespace of its own, if the system allows that."""
    with contextlib.suppress(Exception):
        import ctypes

        libc = ctypes.CDLL(None)
        if libc.unshare(NEW_NETWORK):
            libc.unshare(NEW_NETWORK | NEW_USER)


def refuse(event: str, arguments: tuple) -> None:
    """An audit hook. Raises: PermissionError for what a program must not do."""
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not allowed")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise PermissionError("writing files is not allowed")


def main() -> None:
    """Read the request, run program and tests under limits, answer."""
    request = json.load(sys.stdin)
    mark, seconds, memory = request["mark"], request["seconds"], request["memory"]
    answer, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    without_network()
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process
    for what, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0),
                        (resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_CORE, 0)):  # fmt: skip
        with contextlib.suppress(OSError, ValueError):  # macOS has no limit of memory
            resource.setrlimit(what, (limit, limit))
    sys.addaudithook(refuse)
    names = {"__name__": "program"}
    exec(compile(request["program"], "program", "exec"), names)
    exec(compile(request["tests"], "tests", "exec"), names)
    os.write(answer, mark.encode())


if __name__ == "__main__":
    main()
