"""What the machines can do: peak rates by device, and this one's measured."""

import math
import re
import time
from typing import NamedTuple

from nanoflax.errors import UserError

# Dense bfloat16 FLOP/s of one JAX device (float16 where the chip has no bfloat16), first match
# wins. NVIDIA and AMD: data sheets, half of a figure "with sparsity". TPU: the system architecture
# pages of the Cloud TPU documentation; v2, v3 and TPU7x show each half of a chip as a device.
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
    """A chip's name to JAX, and what `plan` counts with beside its peak FLOP/s."""

    kind: str  # its device_kind
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    network: float  # bytes/s that it receives when all its links are busy
    topologies: tuple = ()  # slices that can be had of a TPU; 8 GPUs at most are joined so

    @property
    def flops(self):
        return next(flops for name, flops in _PEAK_FLOPS if name == self.kind)


_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
CHIPS = {
    # cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; the network is half of the "bidirectional" figure,
    # and v4's, six links of 50 GB/s, from Jouppi et al. 2023, table 4.
    "v4": Chip("TPU v4", 32 * 2**30, 1200e9, 300e9, _CUBES),
    "v5e": Chip("TPU v5 lite", 16 * 2**30, 819e9, 200e9, _FLAT),
    "v5p": Chip("TPU v5", 95 * 2**30, 2765e9, 600e9, _CUBES),
    "v6e": Chip("TPU v6 lite", 32 * 2**30, 1638e9, 400e9, _FLAT),
    # NVIDIA's data sheets, SXM modules, A100 with 80 GB; the network is half of NVLink's total.
    "a100": Chip("A100", 80e9, 2039e9, 300e9),
    "h100": Chip("H100", 80e9, 3350e9, 450e9),
    "h200": Chip("H200", 141e9, 4800e9, 450e9),
}  # fmt: skip


def tpu_slice(topology):
    """(Chip, number of chips) of a TPU slice's name, such as v5e:16x16.

    Raises: UserError with the names that are known.
    """
    name, _, shape = topology.partition(":")
    chip = CHIPS.get(name)
    if chip is None or shape not in chip.topologies:
        known = {n: c.topologies for n, c in CHIPS.items() if c.topologies}
        if name in known:
            known = {name: known[name]}
        raise UserError(
            f"--topology={topology} is not known; known: "
            + ", ".join(f"{n}:{shape}" for n, shapes in known.items() for shape in shapes)
        )
    return chip, math.prod(map(int, shape.split("x")))


def peak_flops(device):
    """The vendor's peak FLOP/s of a jax device by its `device_kind`; None when not known."""
    for name, flops in _PEAK_FLOPS:
        if re.search(rf"\b{name}\b", device.device_kind):
            return flops
    return None


def memory_bandwidth(device):
    """The vendor's bytes/s of a jax device's memory; None when not known."""
    return next(
        (
            chip.bandwidth
            for chip in CHIPS.values()
            if chip.flops == peak_flops(device) and re.search(rf"\b{chip.kind}\b", device.device_kind)
        ),
        None,
    )


def compiler_options(platform):
    """XLA's options for a step or a decode loop on a platform, or None.

    On CPU, YNN fusions make reductions four times as fast but can halve the speed of products.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    return options if platform == "cpu" else None


def measure_bandwidth(bytes_=2**28, tries=5):
    """Bytes a second that all cores together read from memory, the best of a few tries."""
    import concurrent.futures
    import os

    import numpy as np

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = np.array_split(np.ones(bytes_ // 4, np.float32), cores)
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        times = []
        for _ in range(tries):
            begin = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            times.append(time.perf_counter() - begin)
    return bytes_ / min(times)


def measure_peak_flops(size=1024, seconds=0.05):
    """FLOP/s of this machine's float32 matrix product, the best of a few: an MFU for CPUs.

    Fake CPU devices share one machine, so this is the figure of all of them together.
    """
    import jax
    import jax.numpy as jnp

    device = jax.local_devices(backend="cpu")[0]
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times, begin = [], time.perf_counter()
    while len(times) < 2 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
