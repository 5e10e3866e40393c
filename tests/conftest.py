"""What all tests share: JAX on the CPU, one cache of compiled programs, and checked annotations."""

import contextlib
import ctypes
import gc
import importlib.metadata
import logging
import os
import pathlib
import sys

import jaxtyping
import pytest

import tests.typechecker  # noqa: F401  # found by its name below
from tests import processes

# Set before JAX is imported, and inherited by the processes that tests start.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] != "cpu":  # GPUs and TPUs round the operands of float32 products
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "nanoflax" / "tests"))
# Also the smallest programs, which are the most: an eager operation compiles in 17 ms, and is read in 8.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Two cores have work for two pytest workers; torch's threads would wait for each other in loops that take a core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The tests compile thousands of small functions and call each a few times, so the compiler of this process makes little
# effort: a fifth of the time.
if os.environ["JAX_PLATFORMS"] == "cpu" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = processes.QUICK_XLA
    import jax

    jax.jit(lambda: 0)()  # XLA reads the flags now, and never again
    del os.environ["XLA_FLAGS"]

gc.set_threshold(20_000, 20, 100)  # JAX and Transformers keep many objects, which each collection visits

# In the tests, calls of the annotated functions of these rooms are checked: types, shapes and dtypes.
# Nothing is checked in users' programs, nor in the processes that tests start.
CHECKED = ["nanoflax.kernels", "nanoflax.nn", "nanoflax.generate", "nanoflax.train"]
jaxtyping.install_import_hook(CHECKED, "tests.typechecker.check")

if int(importlib.metadata.version("protobuf").partition(".")[0]) < 7:  # too old for sentencepiece's schema
    from transformers.utils import sentencepiece_model_pb2_new

    sys.modules["sentencepiece.sentencepiece_model_pb2"] = sentencepiece_model_pb2_new  # for Transformers


@pytest.fixture(autouse=True)
def little_memory(request):
    """Free compiled programs whenever the process has grown by 1.5 GB: an old process is slow, and Linux ends one that
    has too many memory maps (vm.max_map_count, 65,530)."""
    yield
    statm = pathlib.Path("/proc/self/statm")
    if "jax" not in sys.modules or not statm.exists():
        return
    resident = lambda: int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident() > getattr(request.session, "resident", 0) + 1.5e9:
        sys.modules["jax"].clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps two thirds of it otherwise
        request.session.resident = resident()


@pytest.fixture
def compilations():
    """A context manager that gives a list: the name of each function that JAX compiled inside."""
    import jax

    @contextlib.contextmanager
    def recorded():
        names, logger = [], logging.getLogger("jax._src.interpreters.pxla")

        class Recorder(logging.Handler):
            def emit(self, record):
                words = record.getMessage().split()
                if words[0] == "Compiling":
                    names.append(words[1])

        handler = Recorder()
        logger.addHandler(handler)
        try:
            with jax.log_compiles():
                yield names
        finally:
            logger.removeHandler(handler)

    return recorded
