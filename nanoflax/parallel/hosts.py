"""The processes of one run on several hosts: how they join, agree, and end when one of them dies.

They exchange values through JAX's coordination service. Unlike a collective, such an exchange does
not wait behind queued steps, and does not fail after 30 s, as gloo does. In a run of one process
nothing is exchanged.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from nanoflax.config import diff
from nanoflax.errors import UserError, listed

BARRIER_SECONDS = 24 * 3600  # that processes wait for each other: one of them may have to tokenize
SHUTDOWN_SECONDS = 20  # that other processes get to shut down before this one exits

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
    Raises: UserError for arguments that do not fit together, or if processes cannot be joined. If
    one does not answer in time, this process prints that and exits with status 2.
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
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    # At its own timeout JAX would abort with a traceback; this timer is earlier.
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
        f"{timeout} s (--join_seconds); is --coordinator={coordinator or 'that of the cluster'} "
        "the address of process 0, and does each of them run?",
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
    found = sorted(client.key_value_dir_get(f"nanoflax/{number}/"))
    if jax.process_index() == 0:  # every process has read the exchange before this one
        client.key_value_delete(f"nanoflax/{number - 1}/")
    return [json.loads(text) for _, text in found]


def run_on_main_process(function: Callable[[], Any]) -> Any:
    """Call function() on process 0 only; its result (anything that JSON can hold) on every process.

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
    """Raises: UserError, on every process and with the differences, if a dict is not the same on all."""
    found = gather_from_processes(value)
    lines = [
        f"process {i} has {', '.join(diff(found[0], other))}" for i, other in enumerate(found) if other != found[0]
    ]
    if lines:
        raise UserError(f"the processes differ in {what} (that of process 0 -> its own): {listed(lines)}")


class HostPoll:
    """Asks all processes for a value about once a second, at steps that all processes agree on.

    A signal may reach one process only; all of them must stop at the same step.
    """

    def __init__(self, step: int, seconds: float = 1.0):
        self._seconds, self._last_step, self._last_time = seconds, step, time.monotonic()
        self._stride = 1  # steps until the next poll

    def __call__(self, step: int, value: Any) -> list[Any]:
        """The values of all processes if this step is a poll, else []. Alone, every step is a poll."""
        if jax.process_count() > 1 and step < self._last_step + self._stride:
            return []
        now = time.monotonic()
        steps_per_second = (step - self._last_step) / max(now - self._last_time, 1e-9)
        stride = max(1, min(int(steps_per_second * self._seconds), 2 * self._stride))
        self._last_step, self._last_time = step, now
        answers = gather_from_processes([stride, value])
        self._stride = answers[0][0]  # that of process 0
        return [value for _, value in answers]


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """End this process with status 1, and print the stacks of its threads, if `reset_watchdog` is
    not called for so many seconds (0: never): another process of the run hangs. A process that runs
    alone has no watchdog."""
    global _watchdog_seconds
    _watchdog_seconds = seconds if jax.process_count() > 1 else 0
    reset_watchdog()
    try:
        yield
    finally:
        _watchdog_seconds = 0
        faulthandler.cancel_dump_traceback_later()


def reset_watchdog() -> None:
    """Start the watchdog's time again, because the run makes progress."""
    if _watchdog_seconds:
        faulthandler.dump_traceback_later(_watchdog_seconds, exit=True)


def exit_process(status: int) -> None:
    """Exit after an error. In a run of several processes do not wait for threads that wait for them."""
    if not jax.distributed.is_initialized():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    # The others cannot shut down once process 0 is gone: give them time.
    timer = threading.Timer(SHUTDOWN_SECONDS, os._exit, [status])
    timer.daemon = True
    timer.start()
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
    os._exit(status)


def is_main_process() -> bool:
    """Whether this is process 0, which prints, logs and plots for all."""
    return jax.process_index() == 0
