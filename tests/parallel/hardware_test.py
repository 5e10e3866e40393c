"""Peak rates and slices of known chips."""

import time
import types

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
