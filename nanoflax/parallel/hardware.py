"""The speed and memory of devices: published figures, measurements of this machine, and its allocator."""

import concurrent.futures
import ctypes
import functools
import inspect
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanoflax.errors import UserError
from nanoflax.parallel.constraints import with_mesh

# Dense bfloat16 FLOP/s of one JAX device (float16 where the chip has no bfloat16); the first match
# wins. NVIDIA and AMD: data sheets, half of a figure "with sparsity". TPU: the system architecture
# pages of the Cloud TPU documentation. On v2, v3 and TPU7x half a chip is a device.
_PEAK_FLOPS = (
    ("TPU v2", 22.5e12), ("TPU v3", 61.5e12), ("TPU v4 lite", 138e12), ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12), ("TPU v6e", 918e12), ("TPU7x", 1153.5e12),
    ("GB200", 2500e12), ("B200", 2250e12), ("GH200", 989e12), ("H200 NVL", 835e12),
    ("H200", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12),
    ("A100", 312e12), ("A10G", 70e12), ("A10", 125e12), ("L40S", 362e12), ("L40", 181e12),
    ("L4", 121e12), ("V100", 125e12), ("T4", 65e12), ("A6000", 154.8e12), ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12), ("MI300X", 1307e12), ("MI250X", 191.5e12),
)  # fmt: skip


class Chip(NamedTuple):
    """The figures of a chip that planning needs."""

    kind: str  # the device_kind that JAX reports
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    network: float  # bytes/s that the chip receives with all its links in use
    topologies: tuple[str, ...] = ()  # the slices of a TPU that exist; () for a GPU

    @property
    def flops(self) -> float:
        """Peak dense bfloat16 FLOP/s."""
        return next(flops for name, flops in _PEAK_FLOPS if name == self.kind)


_SIZES_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SIZES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
CHIPS = {
    # cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; the network is half of the "bidirectional" figure.
    # The network of v4, six links of 50 GB/s: Jouppi et al. 2023, table 4.
    "v4": Chip("TPU v4", 32 * 2**30, 1200e9, 300e9, _SIZES_3D),
    "v5e": Chip("TPU v5 lite", 16 * 2**30, 819e9, 200e9, _SIZES_2D),
    "v5p": Chip("TPU v5", 95 * 2**30, 2765e9, 600e9, _SIZES_3D),
    "v6e": Chip("TPU v6 lite", 32 * 2**30, 1638e9, 400e9, _SIZES_2D),
    # NVIDIA's data sheets: SXM modules, the A100 with 80 GB; the network is half of NVLink's total.
    "a100": Chip("A100", 80e9, 2039e9, 300e9),
    "h100": Chip("H100", 80e9, 3350e9, 450e9),
    "h200": Chip("H200", 141e9, 4800e9, 450e9),
}  # fmt: skip


def tpu_slice(topology: str) -> tuple[Chip, int]:
    """(the Chip, the number of chips) of a TPU slice such as "v5e:16x16".

    Raises: UserError with the names of the slices that exist.
    """
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None or shape not in chip.topologies:
        names = [name] if chip is not None and chip.topologies else CHIPS
        known = ", ".join(f"{n}:{shape}" for n in names for shape in CHIPS[n].topologies)
        raise UserError(f"--topology={topology} is not known; known: {known}")
    return chip, math.prod(map(int, shape.split("x")))


def peak_flops(device: Any) -> float | None:
    """The vendor's peak FLOP/s of a jax.Device, found by its device_kind; None if not known."""
    return next((flops for name, flops in _PEAK_FLOPS if re.search(rf"\b{name}\b", device.device_kind)), None)


def memory_bandwidth(device: Any) -> float | None:
    """The vendor's memory bandwidth of a jax.Device in bytes/s; None if not known."""
    for chip in CHIPS.values():
        if chip.flops == peak_flops(device) and re.search(rf"\b{chip.kind}\b", device.device_kind):
            return chip.bandwidth
    return None


def compiler_options(platform: str) -> dict[str, str] | None:
    """XLA's options for a training step or a decode loop.

    On CPU, YNN fusions make reductions four times as fast, but can halve the speed of matrix
    products: they are limited to reductions. XLA prefers vectors of 256 bits; with those of 512 bits an AMD EPYC
    that has them decodes a text with GPT-2 124M 1.08 times as fast, and 8 texts with int8 weights 1.2 times.
    """
    options = {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
        "xla_cpu_prefer_vector_width": "512",
    }
    return options if platform == "cpu" else None


@functools.cache
def compiled(function: Callable, donate: str | tuple = (), mesh: Any = None, static: tuple = ()) -> Any:
    """jax.jit of a function of parameters on a mesh, with the platform's options.

    donate: names of arguments whose memory the result may take; static: of those that are compiled for their value,
    where the function has them.
    """
    return jax.jit(
        with_mesh(mesh, function),
        donate_argnames=donate,
        static_argnames=[name for name in static if name in inspect.signature(function).parameters],
        compiler_options=compiler_options(jax.default_backend()),
    )


def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees; without glibc nothing changes. Call it before JAX has threads.

    XLA frees the temporary memory of every training step on a CPU. Each gigabyte that the next step gets anew from
    the kernel costs 260,000 page faults: 10 to 17% of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:  # malloc.h: M_ARENA_MAX (only the main arena can hold large blocks), M_MMAP_MAX, M_TRIM_THRESHOLD
        for name, value in ((-8, 1), (-4, 0), (-1, -1)):
            mallopt(name, value)


def measure_bandwidth(num_bytes: int = 2**28, tries: int = 5) -> float:
    """Bytes/s that all cores together read from memory, the best of several tries."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(np.ones(num_bytes // 4, np.float32), cores)
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        times = []
        for _ in range(tries):
            begin = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            times.append(time.perf_counter() - begin)
    return num_bytes / min(times)


def measure_peak_flops(size: int = 1024, seconds: float = 0.05) -> float:
    """FLOP/s of this machine's float32 matrix product, the best of several tries; for the MFU on CPUs.

    Virtual CPU devices share the machine, so this is the speed of all of them together.
    """
    x = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices(backend="cpu")[0])
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times, begin = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def quiet_peak_flops(tries: int = 5, spread: float = 0.1) -> float | None:
    """`measure_peak_flops`, once the best two of several tries agree; None if other work disturbs them all."""
    found: list[float] = []
    for _ in range(tries):
        found = sorted([*found, measure_peak_flops()])
        if len(found) > 1 and found[-2] >= (1 - spread) * found[-1]:
            return found[-1]
    return None
