"""Meshes: from the text of train.mesh to an array of devices. Only data and fsdp use a slow network."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from nanoflax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context", "expert")
_AUTO = (jax.sharding.AxisType.Auto,) * len(AXES)  # XLA chooses the shardings that no constraint states


def mesh_sizes(shape: str, num_devices: int, name: str = "train.mesh") -> tuple[int, ...]:
    """The sizes along AXES. shape: such as "2,-1,1", "1,4,1,2" or "1,2,1,1,4"; -1 takes the remaining
    devices, and absent fourth and fifth sizes are 1.

    Raises: UserError if the shape cannot be read or does not use every device.
    """
    try:
        sizes = [int(n) for n in str(shape).split(",")]
    except ValueError:
        sizes = []
    if not 3 <= len(sizes) <= len(AXES) or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise UserError(
            f"{name}={shape!r} must be three sizes for data, fsdp, tensor, such as "
            "1,8,1, a fourth for context and a fifth for expert, at most one of them -1"
        )
    sizes += [1] * (len(AXES) - len(sizes))
    known = math.prod(n for n in sizes if n > 0)
    sizes = [num_devices // known if n == -1 else n for n in sizes]
    if known > num_devices:
        raise UserError(f"{name}={shape!r} needs {known} devices, and {num_devices} are present")
    if math.prod(sizes) != num_devices:
        raise UserError(
            f"{name}={shape!r} does not use the {num_devices} devices present; the sizes must multiply to {num_devices}"
        )
    return tuple(sizes)


def mesh_name(sizes: Sequence[int]) -> str:
    """The sizes along AXES in the form of train.mesh; context and expert are left out where they end it with 1."""
    length = max([3, *(i + 1 for i, n in enumerate(sizes) if n > 1)])
    return ",".join(map(str, sizes[:length]))


def make_mesh(
    shape: str = "-1,1,1", devices: Sequence[Any] | None = None, name: str = "train.mesh"
) -> jax.sharding.Mesh:
    """A mesh over all devices (default: jax.devices()). shape: as in `mesh_sizes`; name: of its setting, for errors.

    Raises: UserError if the shape cannot be read or does not use every device, or if tensor, context
    or expert would extend over several TPU slices or GPU nodes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(shape, len(devices), name)
    if fast_network_groups(devices)[0] > 1:
        array = hybrid_devices(sizes, devices)
    else:  # an axis of the mesh may be a part of an axis of the TPU's torus
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(array, AXES, axis_types=_AUTO)


def fast_network_groups(devices: Sequence[Any]) -> tuple[int, bool]:
    """(the number of groups of devices that a fast network joins, whether each group is a process)."""
    slices = {getattr(d, "slice_index", None) for d in devices}
    if None not in slices:
        return len(slices), False
    # GPUs do not report their node: a process with several GPUs is assumed to be a node.
    processes = {d.process_index for d in devices}
    one_process_per_node = devices[0].platform == "gpu" and len(processes) < len(devices)
    return (len(processes) if one_process_per_node else 1), True


def hybrid_devices(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices of several slices or nodes as an array with `sizes` along AXES.

    The slow network between the groups is used along data, then along fsdp.
    Raises: UserError if tensor, context or expert would need the slow network.
    """
    groups, by_process = fast_network_groups(devices)
    data = math.gcd(sizes[0], groups)
    fsdp = groups // data
    if sizes[1] % fsdp:
        raise UserError(
            f"train.mesh={mesh_name(sizes)!r} must split {groups} slices or nodes along "
            "data, then fsdp: tensor, context and expert need the fast network of one slice or node"
        )
    between_groups = (data, fsdp, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(
        tuple(n // m for n, m in zip(sizes, between_groups, strict=True)),
        between_groups,
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def abstract_mesh(sizes: Sequence[int], platform: str | None = None) -> jax.sharding.AbstractMesh:
    """A mesh without devices, for planning. sizes: along AXES, absent ones are 1; platform: such as
    "tpu"."""
    device = jax.sharding.AbstractDevice("any", None, platform) if platform else None
    sizes = (*sizes, *[1] * (len(AXES) - len(sizes)))
    return jax.sharding.AbstractMesh(sizes, AXES, axis_types=_AUTO, abstract_device=device)
