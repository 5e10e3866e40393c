"""Peak rates and slices of known chips."""

import os
import random
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest

from nanoflax import parallel


@pytest.mark.parametrize(
    "kind, flops",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla T4", 65e12),
        ("NVIDIA T400", None),
        ("cpu", None),
    ],
)
def test_peak_flops(kind, flops):
    assert parallel.peak_flops(types.SimpleNamespace(device_kind=kind)) == flops


def test_measured_peak_is_a_machine_and_quick():
    parallel.measure_peak_flops(size=64)  # starts the backend
    begin = time.perf_counter()
    assert 1e9 < parallel.measure_peak_flops() < 1e14
    assert time.perf_counter() - begin < 2


def test_the_peak_of_a_busy_machine_is_not_known(monkeypatch):
    from nanoflax.parallel import hardware

    def measured(*values):
        found = iter(values)
        monkeypatch.setattr(hardware, "measure_peak_flops", lambda: next(found))
        return hardware.quiet_peak_flops(tries=4)

    assert measured(100, 98) == 100 and measured(50, 100, 99) == 100
    assert measured(10, 100, 50, 70) is None


def test_seconds_of_compilation_are_those_of_a_clock():
    before = parallel.compile_seconds()
    begin = time.perf_counter()
    new = random.random()  # no compiled program in the cache has it
    inner = jax.jit(lambda x: sum(jnp.sin(x * i + new) for i in range(40)))
    step = jax.jit(lambda x: jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=3)[0])
    step(jnp.ones(7)).block_until_ready()
    wall, counted = time.perf_counter() - begin, parallel.compile_seconds() - before
    assert 0.3 * wall < counted <= wall
    step(jnp.ones(7)).block_until_ready()
    assert parallel.compile_seconds() - before == counted
    threading.Thread(target=lambda: jax.jit(lambda x: x * 3)(1.0)).start()  # another thread does not count
    assert parallel.compile_seconds() - before == counted


BLOCKS = """
import ctypes, resource, sys
from nanoflax import parallel
if sys.argv[1] == "keep":
    parallel.keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
for i in range(4):
    block = ctypes.c_void_p(c.malloc(2**26))
    c.memset(block, 1, ctypes.c_size_t(2**26))
    c.free(block)
    if i == 0:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="glibc"
)
def test_memory_that_is_kept_costs_no_page_faults():
    new, kept = (int(subprocess.check_output([sys.executable, "-c", BLOCKS, how])) for how in ("", "keep"))
    if new < 5000:
        pytest.skip("this kernel gives memory in large pages")
    assert kept < new / 100
