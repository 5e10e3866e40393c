"""The processes of one run on several hosts: how they join, agree, and end when one of them dies.

They exchange values through JAX's coordination service. Unlike a collective, such an exchange does
not wait for queued training steps, and has no timeout of 30 s as gloo has. A run of one process
exchanges nothing.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from nanoflax.config import diff
from nanoflax.errors import UserError, listed

BARRIER_SECONDS = 24 * 3600  # timeout of an exchange; long, because one process may tokenize for hours
SHUTDOWN_SECONDS = 20  # for the other processes to shut down before this one exits

_exchanges = itertools.count(1)  # numbers the calls of gather_from_processes
_watchdog_seconds = 0.0


def join_processes(
    coordinator: str = "",
    processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
    heartbeat: int = 50,
) -> None:
    """Join the processes of this run, before JAX is first used. Does nothing for a single process.

    coordinator: HOST:PORT of process 0. JAX finds absent values in the environment of Cloud TPU,
    Slurm's srun or Open MPI. timeout: seconds in which all processes must join. heartbeat: seconds
    of silence after which JAX considers a process dead, and ends the others.
    Raises: UserError for arguments that do not fit together, or if processes cannot be joined. If a
    process does not answer in time, this process prints a message and exits with status 2.
    """
    if not coordinator:
        if (processes, process_id) != (None, None):
            raise UserError("--processes and --process_id need --coordinator=HOST:PORT")
        if "1" in (os.environ.get("SLURM_NTASKS"), os.environ.get("OMPI_COMM_WORLD_SIZE")):
            return
    elif not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, of process 0")
    elif processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id} must be from 0 to --processes={processes} - 1")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would intercept SIGTERM
    # This timer ends before JAX's own timeout, at which JAX would abort with a traceback.
    deadline = threading.Timer(timeout, _exit_unanswered, [coordinator, timeout])
    deadline.daemon = True
    deadline.start()
    try:
        jax.distributed.initialize(
            coordinator or None,
            processes,
            process_id,
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=heartbeat,
        )
    except RuntimeError as error:
        raise UserError(f"the processes of the run could not be joined: {error}") from error
    except (ValueError, OSError) as error:  # JAX found no cluster, or a TPU without its metadata
        if coordinator:
            raise UserError(
                f"--coordinator={coordinator} needs --processes and --process_id "
                f"where neither Slurm nor Open MPI gives them: {error}"
            ) from error
    finally:
        deadline.cancel()


def _exit_unanswered(coordinator, timeout):
    print(
        f"{os.path.basename(sys.argv[0])}: not all processes of the run have answered within "
        f"{timeout} s (--join_seconds). Check that --coordinator={coordinator or '(found by JAX)'} "
        "is the address of process 0, and that every process was started.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def gather_from_processes(value: Any) -> list[Any]:
    """The values of all processes, in the order of the processes, on every process.

    All processes must call it, in the same order. value: anything that JSON can hold; floats are
    exact.
    """
    if jax.process_count() == 1:
        return [value]
    from jax._src.distributed import global_state  # JAX has no public access to this service

    client, number = global_state.client, next(_exchanges)
    assert client is not None  # join_processes made it
    client.key_value_set(f"nanoflax/{number}/{jax.process_index():06}", json.dumps(value))
    client.wait_at_barrier(f"nanoflax/{number}", BARRIER_SECONDS * 1000)
    answers = sorted(client.key_value_dir_get(f"nanoflax/{number}/"))
    if jax.process_index() == 0:  # every process has read the previous exchange
        client.key_value_delete(f"nanoflax/{number - 1}/")
    return [json.loads(text) for _, text in answers]


def run_on_main_process(function: Callable[[], Any]) -> Any:
    """Call function() on process 0 only. Returns its result (JSON-compatible) on every process.

    Raises: on every process, the UserError that function raised.
    """
    result, problem = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except UserError as error:
            if jax.process_count() == 1:
                raise
            problem = str(error)
    result, problem = gather_from_processes([result, problem])[0]
    if problem is not None:
        raise UserError(problem)
    return result


def check_processes_agree(what: str, value: dict[str, Any]) -> None:
    """Raises: UserError with the differences, on every process, if the processes have different dicts."""
    values = gather_from_processes(value)
    lines = [
        f"process {i} has {', '.join(diff(values[0], other))}" for i, other in enumerate(values) if other != values[0]
    ]
    if lines:
        raise UserError(f"the processes differ in {what} (value of process 0 -> own value): {listed(lines)}")


class HostPoll:
    """Asks all processes for a value about once a second, at steps that all processes agree on.

    A signal may reach one process only; all of them must stop at the same step.
    """

    def __init__(self, step: int, seconds: float = 1.0):
        self._seconds, self._last_step, self._last_time = seconds, step, time.monotonic()
        self._stride = 1  # steps until the next poll

    def __call__(self, step: int, value: Any) -> list[Any]:
        """The values of all processes if this step is a poll, else []. A single process polls at every step."""
        if jax.process_count() > 1 and step < self._last_step + self._stride:
            return []
        now = time.monotonic()
        steps_per_second = (step - self._last_step) / max(now - self._last_time, 1e-9)
        stride = max(1, min(int(steps_per_second * self._seconds), 2 * self._stride))
        self._last_step, self._last_time = step, now
        answers = gather_from_processes([stride, value])
        self._stride = answers[0][0]  # the stride of process 0, so that all poll at the same step
        return [value for _, value in answers]


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Print the stacks of the threads and exit with status 1 if `reset_watchdog` is not called for
    `seconds` (0: never), because another process of the run hangs. No effect with one process."""
    global _watchdog_seconds
    _watchdog_seconds = seconds if jax.process_count() > 1 else 0
    reset_watchdog()
    try:
        yield
    finally:
        _watchdog_seconds = 0
        faulthandler.cancel_dump_traceback_later()


def reset_watchdog() -> None:
    """Restart the watchdog's timer; called when the run makes progress."""
    if _watchdog_seconds:
        faulthandler.dump_traceback_later(_watchdog_seconds, exit=True)


def exit_process(status: int) -> None:
    """Exit after an error. Threads are not joined: they may compile for minutes, or wait for other processes."""
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk
            file.flush()
    if jax.distributed.is_initialized():
        # The other processes cannot shut down after process 0 has exited: give them time before.
        timer = threading.Timer(SHUTDOWN_SECONDS, os._exit, [status])
        timer.daemon = True
        timer.start()
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
    os._exit(status)


def is_main_process() -> bool:
    """Whether this is process 0, which prints, logs and plots for all."""
    return jax.process_index() == 0


class Signals:
    """A context in which SIGTERM and SIGINT do not end the process: the first is recorded in `caught`.

    A second SIGINT, of a person who does not wait, interrupts. A second SIGTERM is often sent by a scheduler to the
    process and to its group.
    """

    def __enter__(self) -> "Signals":
        self.caught, self._old = 0, {}
        with contextlib.suppress(ValueError):  # raised outside the main thread, as in a notebook's worker
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._record)
        return self

    def _record(self, number, frame):
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = self.caught or number

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
