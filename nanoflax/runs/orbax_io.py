"""How we use orbax: without its log, with a clock that nobody sets, and with its errors as one line."""

import contextlib
import importlib
import logging
import pathlib
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree

from nanoflax.errors import UserError
from nanoflax.runs.lock import Path

_quiet_contexts = 0
_make_loud: Callable[[], None] = lambda: None
_until_exit = contextlib.ExitStack()


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """A context in which orbax logs nothing. Contexts may overlap.

    orbax logs every save, and the traceback of a failed save. Failures are raised as exceptions anyway.
    """
    global _quiet_contexts, _make_loud
    _quiet_contexts += 1
    if _quiet_contexts == 1:
        _make_loud = _make_quiet()
    try:
        yield
    finally:
        _quiet_contexts -= 1
        if _quiet_contexts == 0:
            _make_loud()


def stay_quiet() -> None:
    """Enters `quiet_orbax` until the process ends: after a failed save, threads may report the error again later."""
    _until_exit.enter_context(quiet_orbax())
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)


def is_retrieved(record: logging.LogRecord) -> bool:
    """False for asyncio's report of the arrays after the first one that failed; that one is raised."""
    return "never retrieved" not in record.getMessage()


def _make_quiet() -> Callable[[], None]:
    """Installs a log filter, an unraisablehook and an excepthook of threads; returns the function that removes them."""
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    thread_hook = threading.excepthook

    def not_from_orbax(record):
        return "orbax" not in record.pathname and is_retrieved(record)

    def show_others(event):
        # When the disk is full, the first failed array closes orbax's event loop. For the other arrays,
        # threads of tensorstore then print that the loop is closed.
        if not (event.exc_type is RuntimeError and str(event.exc_value) == "Event loop is closed"):
            hook(event)

    def show_other_threads(event):
        # orbax keeps the exception of its thread, raises it later, and lets the thread fail with it too.
        if not type(event.thread).__module__.startswith("orbax."):
            thread_hook(event)

    def undo():
        for logger in loggers:
            logger.removeFilter(not_from_orbax)
        sys.unraisablehook, threading.excepthook = hook, thread_hook

    for logger in loggers:
        logger.addFilter(not_from_orbax)
    sys.unraisablehook, threading.excepthook = show_others, show_other_threads
    return undo


def use_steady_clock() -> None:
    """orbax measures time limits with time.time(). If that clock is set, as when a laptop wakes up, a save fails."""
    for name in ("signaling_client", "future"):
        with contextlib.suppress(ImportError):
            module: Any = importlib.import_module(f"orbax.checkpoint._src.futures.{name}")
            module.time = types.SimpleNamespace(time=time.monotonic)


def copy_on_cpu(x: Any) -> Any:
    """A copy of an array that is on a CPU. orbax keeps a view of the array, and XLA cannot donate a buffer
    that has a view."""
    if not isinstance(x, jax.Array) or next(iter(x.devices())).platform != "cpu":
        return x
    return jax.device_put(x, x.sharding, may_alias=False)


def with_sharding(x: Any, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    """The shape and dtype of x with a sharding; None: the first device of this process."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _step_path(directory: Path, step: int) -> epath.Path:
    return epath.Path(pathlib.Path(directory).resolve()) / str(step)


@contextlib.contextmanager
def _refused(directory, step):
    """A context in which orbax reads. Raises: UserError for what it cannot read, though the checksums are right."""
    try:
        with quiet_orbax():
            yield
    except Exception as error:  # orbax and tensorstore raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{directory}: step {step} cannot be restored: {reason}") from error


def read_shapes(directory: Path, step: int) -> PyTree:
    """The tree of a saved state, with the shape and dtype of every array. Raises: UserError if it cannot be read."""
    with _refused(directory, step):
        tree = ocp.PyTreeCheckpointHandler().metadata(_step_path(directory, step) / "state").tree
        if not isinstance(tree, dict) or not all(hasattr(x, "shape") for x in jax.tree.leaves(tree)):
            raise ValueError("it does not hold a tree of arrays")
        return tree


def read_arrays(directory: Path, step: int, target: PyTree, partial_restore: bool = False) -> PyTree:
    """The saved arrays of `target`, a tree of jax.ShapeDtypeStruct with shardings. Raises: UserError if they cannot be
    read.

    partial_restore: `target` may leave out parts of the saved tree.
    """
    args = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial_restore
    )
    with _refused(directory, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(_step_path(directory, step) / "state", args=args)
