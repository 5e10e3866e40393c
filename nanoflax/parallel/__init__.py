"""Many devices and hosts as one: the mesh, the table of parameter shardings, arrays on a mesh."""

from nanoflax.parallel.arrays import (
    batch_sharding,
    check_memory,
    chip_bytes,
    divisible_batch_size,
    draw,
    fetch,
    init,
    own_rows,
    put,
    put_batch,
    shapes,
)
from nanoflax.parallel.constraints import (
    axis_size,
    constrain,
    current,
    gather_time,
    mesh_of,
    on_each,
    platform,
    replicate,
    split_batch,
    split_cache,
    split_rows,
    traced_on,
    ways,
)
from nanoflax.parallel.hardware import (
    CHIPS,
    bandwidth,
    compiler_options,
    measure_bandwidth,
    measure_peak_flops,
    peak_flops,
    slice_of,
)
from nanoflax.parallel.hosts import (
    HostPoll,
    alive,
    check_same,
    first,
    gather,
    initialize,
    is_main_process,
    leave,
    watchdog,
)
from nanoflax.parallel.mesh import AXES, abstract_mesh, make_mesh, mesh_name, mesh_sizes
from nanoflax.parallel.rules import check_mesh, padded, shardings, spec_of
from nanoflax.parallel.stacking import STACKED, is_stacked, over_layers, stack, unstack

__all__ = [
    "AXES", "CHIPS", "HostPoll", "STACKED", "abstract_mesh", "alive", "axis_size", "bandwidth", "batch_sharding",
    "check_memory", "check_mesh", "check_same", "chip_bytes", "compiler_options", "constrain", "current",
    "divisible_batch_size", "draw", "fetch", "first", "gather", "gather_time", "init", "initialize",
    "is_main_process", "is_stacked", "leave", "make_mesh", "measure_bandwidth", "measure_peak_flops", "mesh_name",
    "mesh_of", "mesh_sizes", "on_each", "over_layers", "own_rows", "padded", "peak_flops", "platform", "put",
    "put_batch", "replicate", "shapes", "shardings", "slice_of", "spec_of", "split_batch", "split_cache",
    "split_rows", "stack", "traced_on", "unstack", "watchdog", "ways"]  # fmt: skip
