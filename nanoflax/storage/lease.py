"""A lease: of several processes, on any hosts, one writes a directory of object storage.

An object cannot be locked, but of several processes that create the same object only one succeeds. A lease is a row of
objects .lease/00000001, .lease/00000002, ... The holder is the one who created the last of them. It renews its lease,
and another process takes the lease over, by creating the next number; who fails to do so has lost. The last object
is never deleted, so that a number is not used twice; a released lease is a last object that says so.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from nanoflax.errors import UserError
from nanoflax.storage import objects
from nanoflax.storage.filesystems import join

PERIOD_SECONDS = 60.0  # a lease that has not changed for so long is taken over; NANOFLAX_LEASE_SECONDS changes it
IN_USE = "is in use by"  # of the error, which a sweep looks for


class Lease:
    """The lease of a directory, held from its construction to `release`. A thread renews it.

    on_renewal: called by that thread after each renewal. log: receives a line if this process waits for a lease that
    may be of a dead process.
    Raises: UserError if another process holds the lease.
    """

    def __init__(self, directory: str, log: Callable[[str], Any] = print, on_renewal: Callable[[], Any] | None = None):
        self.directory, self.period = directory, float(os.environ.get("NANOFLAX_LEASE_SECONDS", PERIOD_SECONDS))
        self._folder, self._owner, self._lost = (
            join(directory, ".lease"),
            f"{_this_process()}\n{secrets.token_hex(8)}",
            "",
        )
        self._lock, self._stop, self._on_renewal = threading.Lock(), threading.Event(), on_renewal
        self._number = self._wait_until_free(log)
        if not self._advance():
            raise UserError(self._in_use(self._read_last()[1]))
        self._check_conditions(log)
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Renew now. Raises: UserError if another process has taken the lease: this one must write nothing more."""
        with self._lock:
            if not self._lost and not self._advance():
                self._lost = self._in_use(self._read_last()[1])
        if self._lost:
            raise UserError(f"{self._lost}; this run has lost its lease and stops")

    def release(self) -> None:
        """Give the lease back, if it is still held."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            if not self._lost:
                self._lost = "the lease is released"
                self._advance(released=True)

    def _renew(self) -> None:
        while not self._stop.wait(self.period / 4):
            try:
                self.check()
                if self._on_renewal:
                    self._on_renewal()
            except (UserError, OSError):
                # Lost: `check` of the training raises it. No answer, or a file that is being replaced: the next round
                # tries again.
                if self._lost:
                    return

    def _advance(self, released: bool = False) -> bool:
        """Creates the next object. False if another process did so first."""
        number = self._number + 1
        name, text = self._object(number), f"{self._owner}\n{'released' if released else 'held'}"
        try:
            objects.write_bytes(name, text.encode(), only_if_absent=True)  # the same text: an attempt without an answer
        except FileExistsError:
            return False
        self._number = number
        found = self._numbers()
        if max(found, default=number) > number:  # this process was asleep, and the numbers went on without it
            objects.delete(name)
            return False
        for old in found:
            if old < number - 1:
                objects.delete(self._object(old))
        return True

    def _check_conditions(self, log: Callable[[str], Any]) -> None:
        """Says so if the storage lets a second process create the same object, as some S3-compatible ones do."""
        try:
            objects.write_bytes(self._object(self._number), b"a second process", only_if_absent=True)
        except FileExistsError:
            return
        log(
            f"warning: {self.directory}: this storage ignores the condition that an object must be new "
            "(If-None-Match), so nothing keeps a second run from writing there"
        )

    def _wait_until_free(self, log: Callable[[str], Any]) -> int:
        """The last number of a lease that may be taken over. Raises: UserError if its holder renews it."""
        number, text = self._read_last()
        begin, said = time.monotonic(), False
        while not _is_free(text):
            waited = time.monotonic() - begin
            if waited > self.period:
                break
            if waited > 1 and not said:
                said = True
                log(f"{self.directory}: waiting up to {self.period:g} s: {_holder(text)} may have died")
            time.sleep(min(1.0, self.period / 20))
            now = self._read_last()
            if now[0] != number and not _is_free(now[1]):
                raise UserError(self._in_use(now[1]))
            number, text = now
        return number

    def _read_last(self) -> tuple[int, str]:
        """(the last number, its text); (0, "") if there was never a lease."""
        while numbers := self._numbers():
            try:
                return max(numbers), objects.read_bytes(self._object(max(numbers))).decode(errors="replace")
            except FileNotFoundError:  # a later one has replaced it
                continue
        return 0, ""

    def _numbers(self) -> list[int]:
        return [int(name) for name in objects.list_names(self._folder) if name.isdigit()]

    def _object(self, number: int) -> str:
        return join(self._folder, f"{number:08d}")

    def _in_use(self, text: str) -> str:
        return in_use(self.directory, _holder(text))


def in_use(directory: Any, holder: str) -> str:
    """The message that another process writes a run's directory, here or in object storage."""
    return f"workdir {directory} {IN_USE} {holder}: wait for it or stop it, or choose another --workdir"


def _this_process() -> str:
    """process ID on HOST, and facts that tell whether it still runs."""
    return f"process {os.getpid()} on {socket.gethostname()}\n{_machine()} {_start_of(os.getpid())}"


def _holder(text: str) -> str:
    return text.partition("\n")[0] or "another process"


def _is_free(text: str) -> bool:
    """Whether a lease is released, was never taken, or was taken by a process of this machine that has ended."""
    lines = text.split("\n")
    if len(lines) != 4:
        return not text
    machine, _, start = lines[1].rpartition(" ")
    process = lines[0].split()[1]
    ended = machine == _machine() and process.isdigit() and _start_of(int(process)) != start
    return lines[3] == "released" or ended


def _machine() -> str:
    """This boot of this machine, and the numbering of its processes (a container has its own)."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: only time tells whether a process has ended
        return secrets.token_hex(8)


def _start_of(process: int) -> str:
    """When a process was started, in ticks since the boot; "" if there is no such process, or it only waits to be
    collected."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
