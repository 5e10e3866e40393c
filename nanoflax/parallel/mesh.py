"""Meshes: from "data,fsdp,tensor,context" sizes to devices, fast networks inside."""

import math

import jax
from jax.experimental import mesh_utils

from nanoflax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")


def mesh_sizes(shape, count):
    """The sizes along AXES of a mesh of `count` devices. shape: such as "2,-1,1" or "1,4,1,2"; the
    fourth is 1 where absent, -1 is the rest.

    Raises: UserError if the sizes cannot be read or do not use every device.
    """
    try:
        sizes = [int(n) for n in str(shape).split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (3, 4) or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise UserError(
            f"train.mesh={shape!r} must be three sizes for data, fsdp, tensor, such as "
            "1,8,1, or a fourth for context, at most one of them -1"
        )
    sizes += [1] * (len(AXES) - len(sizes))
    rest = math.prod(n for n in sizes if n > 0)
    sizes = [count // rest if n == -1 else n for n in sizes]
    if rest > count:
        raise UserError(f"train.mesh={shape!r} needs {rest} devices, and {count} are present")
    if math.prod(sizes) != count:
        raise UserError(
            f"train.mesh={shape!r} does not use the {count} devices present; the sizes must multiply to {count}"
        )
    return tuple(sizes)


def mesh_name(sizes):
    """Sizes along AXES as train.mesh writes them; a context of 1 is left out."""
    return ",".join(map(str, sizes[:3] if sizes[3] == 1 else sizes))


def make_mesh(shape="-1,1,1", devices=None):
    """A mesh over all devices. shape: sizes as in `mesh_sizes`.

    Devices of several TPU slices or GPU nodes are ordered by JAX's hybrid mesh.
    Raises: UserError if the sizes cannot be read, do not use every device, or if tensor or context
    would lie across slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(shape, len(devices))
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if fast_network_groups(devices)[0] > 1:
        placed = hybrid_devices(sizes, devices)
    else:  # on a torus an axis need not be whole axes of it
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=types)


def fast_network_groups(devices):
    """(how many groups of devices a fast network joins, whether a group is a process)."""
    slices = {getattr(d, "slice_index", None) for d in devices}
    if None not in slices:
        return len(slices), False
    # GPUs that do not tell their node: a process with several has those of one node.
    processes = {d.process_index for d in devices}
    several = devices[0].platform == "gpu" and len(processes) < len(devices)
    return (len(processes) if several else 1), True


def hybrid_devices(sizes, devices):
    """Devices of several slices or nodes as an array of `sizes`, along AXES: the slow network lies
    along data, and where that has not enough parts along fsdp."""
    count, by_process = fast_network_groups(devices)
    data = math.gcd(sizes[0], count)
    fsdp = count // data
    if sizes[1] % fsdp:
        raise UserError(
            f"train.mesh={mesh_name(sizes)!r} must split {count} slices or nodes along "
            "data, then fsdp: tensor and context need the fast network of one"
        )
    outer = (data, fsdp, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(
        tuple(n // m for n, m in zip(sizes, outer)),
        outer,
        devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def abstract_mesh(sizes, platform=None):
    """A mesh of no devices, to plan with. sizes: along AXES, the last ones 1 where left out;
    platform: of the devices there will be, such as tpu."""
    device = platform and jax.sharding.AbstractDevice("any", None, platform)
    return jax.sharding.AbstractMesh((*sizes, *[1] * (len(AXES) - len(sizes))), AXES, abstract_device=device)
