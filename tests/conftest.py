"""What all tests share: JAX on the CPU, one cache of compiled programs, and checked annotations."""

import contextlib
import gc
import importlib.metadata
import logging
import os
import pathlib
import sys

import jaxtyping
import pytest

import tests.typechecker  # noqa: F401  # found by its name below

# Set before JAX is imported, and inherited by the processes that tests start.
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] != "cpu":  # GPUs and TPUs round the operands of float32 products
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "nanoflax" / "tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# In the tests, calls of the annotated functions of these rooms are checked: types, shapes and dtypes.
# Nothing is checked in users' programs, nor in the processes that tests start.
CHECKED = ["nanoflax.kernels", "nanoflax.nn", "nanoflax.generate", "nanoflax.train"]
jaxtyping.install_import_hook(CHECKED, "tests.typechecker.check")

if int(importlib.metadata.version("protobuf").partition(".")[0]) < 7:  # too old for sentencepiece's schema
    from transformers.utils import sentencepiece_model_pb2_new

    sys.modules["sentencepiece.sentencepiece_model_pb2"] = sentencepiece_model_pb2_new  # for Transformers


@pytest.fixture(autouse=True)
def few_memory_maps(request):
    """Free compiled programs before Linux refuses more memory maps to the process (vm.max_map_count, 65,530), which
    ends it."""
    yield
    request.session.tests_done = done = getattr(request.session, "tests_done", 0) + 1
    maps = pathlib.Path("/proc/self/maps")
    if done % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()
        gc.collect()


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
