"""Several processes that are one run: how they join, agree, and end when one of them is gone.

They speak through JAX's coordination service: unlike a collective, what is said there neither waits
behind queued steps nor gives up after 30 s, as gloo does. Alone, a process says nothing to anyone.
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

from nanoflax.config import diff
from nanoflax.errors import UserError

PATIENCE = 24 * 3600  # seconds that processes wait for each other: one may have to tokenize


def join_processes(coordinator="", processes=None, process_id=None, timeout=300, heartbeat=50):
    """Join the processes of this run, before JAX is first used; nothing, if it is one process.

    coordinator: HOST:PORT of process 0. What is not given JAX finds in the environment that Cloud
    TPU, Slurm's srun or Open MPI made. timeout: seconds until all must have joined; heartbeat:
    seconds of silence after which JAX takes a process for dead, and ends the others.
    Raises: UserError for arguments that do not fit together, or when the others do not answer.
    """
    import jax

    if not coordinator:
        if (processes, process_id) != (None, None):
            raise UserError("--processes and --process_id need --coordinator=HOST:PORT")
        if "1" in (os.environ.get("SLURM_NTASKS"), os.environ.get("OMPI_COMM_WORLD_SIZE")):
            return
    elif not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, of process 0")
    elif None not in (processes, process_id) and not 0 <= process_id < processes:
        raise UserError(f"--process_id={process_id} must be from 0 to --processes={processes} - 1")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    deadline = threading.Timer(timeout, _unanswered, [coordinator, timeout])
    deadline.daemon = True
    deadline.start()  # at its own deadline JAX would abort
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


def _unanswered(coordinator, timeout):
    print(
        f"{os.path.basename(sys.argv[0])}: not all processes of the run have answered within "
        f"{timeout} s (--join_seconds); is --coordinator={coordinator or 'that of the cluster'} "
        "the address of process 0, and does each of them run?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def gather_from_processes(value):
    """The value of every process (what JSON can hold), by process, on all of them.

    All must call it, in the same order; a float comes as it was.
    """
    import jax

    if jax.process_count() == 1:
        return [value]
    from jax._src.distributed import global_state  # JAX has no public way to this service

    client, call = global_state.client, next(_calls)
    client.key_value_set(f"nanoflax/{call}/{jax.process_index():06}", json.dumps(value))
    client.wait_at_barrier(f"nanoflax/{call}", PATIENCE * 1000)
    found = sorted(client.key_value_dir_get(f"nanoflax/{call}/"))
    if jax.process_index() == 0:  # all have read what was said before
        client.key_value_delete(f"nanoflax/{call - 1}/")
    return [json.loads(text) for _, text in found]


_calls = itertools.count(1)


def run_on_main_process(function):
    """function() of process 0 alone: its result (what JSON can hold) or UserError, on all."""
    import jax

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


def check_processes_agree(what, value):
    """Raises: UserError on all processes, with the differences, if a dict differs between them."""
    found = gather_from_processes(value)
    lines = [
        f"process {i} has {', '.join(diff(found[0], other))}" for i, other in enumerate(found) if other != found[0]
    ]
    if lines:
        raise UserError(f"the processes differ in {what} (that of process 0 -> its own): " + "; ".join(lines[:8]))


class HostPoll:
    """What every process wants, told to all about once a second, at a step that all agree on."""

    def __init__(self, step, seconds=1.0):
        self._seconds, self._step, self._time = seconds, step, time.monotonic()
        self._stride = 1

    def __call__(self, step, value):
        """gather_from_processes(value) if this is such a step (to a process alone every one is), else []."""
        import jax

        if jax.process_count() > 1 and step < self._step + self._stride:
            return []
        now = time.monotonic()
        pace = (step - self._step) / max(now - self._time, 1e-9)
        stride = max(1, min(int(pace * self._seconds), 2 * self._stride))
        self._step, self._time = step, now
        votes = gather_from_processes([stride, value])
        self._stride = votes[0][0]
        return [value for _, value in votes]


@contextlib.contextmanager
def watchdog(seconds):
    """While entered, `reset_watchdog` must be called every so many seconds (0: never), or else the process
    ends with status 1 and the stacks of all threads: a run of several whose peer hangs."""
    import jax

    global _watching
    _watching = seconds if jax.process_count() > 1 else 0
    reset_watchdog()
    try:
        yield
    finally:
        _watching = 0
        faulthandler.cancel_dump_traceback_later()


_watching = 0


def reset_watchdog():
    """Tell the watchdog, if there is one, that the run has got on."""
    if _watching:
        faulthandler.dump_traceback_later(_watching, exit=True)


def exit_process(status):
    """Exit after an error; of several processes, without waiting for threads that wait for others.

    Those that leave as well may do so in peace, as they could not if process 0 were gone at once.
    """
    if "jax" not in sys.modules or not sys.modules["jax"].distributed.is_initialized():
        sys.exit(status)
    import jax

    sys.stdout.flush(), sys.stderr.flush()
    end = threading.Timer(20, os._exit, [status])
    end.daemon = True
    end.start()
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
    os._exit(status)


def is_main_process():
    """Whether this process prints, logs and plots: the first one of a run on several hosts."""
    import jax

    return jax.process_index() == 0
