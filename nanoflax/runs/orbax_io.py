"""How we use orbax: without its log, with a clock that nobody sets, and with its errors as one line."""

import contextlib
import importlib
import logging
import os
import pathlib
import re
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

from nanoflax import storage
from nanoflax.errors import UserError
from nanoflax.runs.step_files import AnyPath
from nanoflax.storage import RemotePath

_quiet_contexts = 0
_make_loud: Callable[[], None] = lambda: None
_until_exit = contextlib.ExitStack()


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """A context in which orbax logs nothing. Contexts may overlap.

    orbax logs every save, and the traceback of a failed save. Failures are raised as exceptions anyway.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _quiet_contexts, _make_loud
    _quiet_contexts += 1
    if _quiet_contexts == 1:
        _make_loud = _make_quiet()


def _leave() -> None:
    global _quiet_contexts
    _quiet_contexts -= 1
    if _quiet_contexts == 0:
        _make_loud()


def stay_quiet() -> None:
    """Enters `quiet_orbax` until the process ends: after a failed save, threads may report the error again later."""
    _enter()
    _until_exit.callback(_leave)  # the generator of quiet_orbax would fail when the interpreter ends
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


def use_our_storage() -> None:
    """Lets orbax read and write gs:// and s3:// through our file systems, with their retries and endpoints.

    orbax 0.12 knows the rules of gs:// (a commit marker instead of a renaming) and has no driver for s3://, though
    tensorstore has; here s3:// gets the same rules. Buckets with folders (hierarchical namespaces) are used as others.
    """
    backend: Any = importlib.import_module("etils.epath.backend")
    paths: Any = importlib.import_module("orbax.checkpoint._src.path.gcs_utils")
    arrays: Any = importlib.import_module("orbax.checkpoint._src.serialization.tensorstore_utils")
    scheme = {"gcs": "gs", "gs": "gs", "s3": "s3"}
    find = type(backend.fsspec_backend)._get_filesystem
    backend.fsspec_backend._get_filesystem = lambda name: (
        storage.filesystem(f"{scheme[name]}://any") if name in scheme else find(backend.fsspec_backend, name)
    )
    paths._GCS_PATH_PREFIX = ("gs://", "s3://")
    paths.get_kvstore_for_gcs = key_value_store
    paths.is_hierarchical_namespace_enabled = lambda path: False
    arrays._use_gcs_driver = storage.is_remote
    arrays._normalize_path = lambda path: re.sub("^(gs|s3):/", r"\1://", os.path.normpath(path))


def key_value_store(name: str) -> dict[str, Any]:
    """tensorstore's specification of a remote name."""
    scheme, _, rest = name.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme == "gs":  # its endpoint is in TENSORSTORE_GCS_HTTP_URL
        return {"driver": os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs"), "bucket": bucket, "path": path}
    own: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": path}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):  # tensorstore would ask AWS for the region of the bucket
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        own |= {"endpoint": endpoint, "aws_region": region}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else its library logs each missing file of AWS
        own["aws_credentials"] = {"type": "environment"}
    return own


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


def directory_for_orbax(directory: AnyPath) -> epath.Path:
    """orbax's path of a directory of checkpoints."""
    if isinstance(directory, RemotePath):
        use_our_storage()
        return epath.Path(str(directory))
    return epath.Path(pathlib.Path(directory).resolve())


@contextlib.contextmanager
def _refused(directory, step):
    """A context in which orbax reads. Raises: UserError for what it cannot read, though the checksums are right."""
    try:
        with quiet_orbax():
            yield
    except Exception as error:  # orbax and tensorstore raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{directory}: step {step} cannot be restored: {reason}") from error


def read_shapes(directory: AnyPath, step: int) -> PyTree:
    """The tree of a saved state, with the shape and dtype of every array. Raises: UserError if it cannot be read."""
    with _refused(directory, step):
        path = directory_for_orbax(directory) / str(step) / "state"
        tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
        if not isinstance(tree, dict) or not all(hasattr(x, "shape") for x in jax.tree.leaves(tree)):
            raise ValueError("it does not hold a tree of arrays")
        return tree


def read_arrays(directory: AnyPath, step: int, target: PyTree, partial_restore: bool = False) -> PyTree:
    """The saved arrays of `target`, a tree of jax.ShapeDtypeStruct with shardings. Raises: UserError if they cannot be
    read.

    partial_restore: `target` may leave out parts of the saved tree.
    """
    args = ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial_restore
    )
    with _refused(directory, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory_for_orbax(directory) / str(step) / "state", args=args)
