"""Many devices and hosts as one: the mesh, the sharding of parameters and activations, arrays on a
mesh, and the processes of a run."""

from nanoflax.parallel.arrays import (
    batch_sharding,
    bytes_per_device,
    cache_sharding,
    check_memory,
    divisible_batch_size,
    fetch,
    init,
    initial_params,
    own_rows,
    param_shapes,
    put_batch,
    put_params,
)
from nanoflax.parallel.compilation import compile_seconds
from nanoflax.parallel.constraints import (
    BATCH,
    AnyMesh,
    axis_size,
    batch_splits,
    constrain,
    current_mesh,
    current_platform,
    gather_sequence,
    map_shards,
    mesh_of,
    replicate,
    split_batch,
    split_cache,
    split_embedded,
    with_mesh,
)
from nanoflax.parallel.experts import map_experts, map_tokens
from nanoflax.parallel.hardware import (
    CHIPS,
    Chip,
    compiled,
    compiler_options,
    keep_freed_memory,
    measure_bandwidth,
    measure_peak_flops,
    memory_bandwidth,
    peak_flops,
    quiet_peak_flops,
    tpu_slice,
)
from nanoflax.parallel.hosts import (
    HostPoll,
    Signals,
    check_processes_agree,
    exit_process,
    gather_from_processes,
    is_main_process,
    join_processes,
    reset_watchdog,
    run_on_main_process,
    watchdog,
)
from nanoflax.parallel.mesh import AXES, abstract_mesh, make_mesh, mesh_name, mesh_sizes
from nanoflax.parallel.rules import check_mesh, pad_vocabulary, partition_spec, shardings
from nanoflax.parallel.stacking import STACKED, groups_of, is_stacked, stack, stacked_groups, unstack, vmap_over_layers

__all__ = [
    "AXES", "AnyMesh", "BATCH", "CHIPS", "Chip", "HostPoll", "STACKED", "Signals", "abstract_mesh", "axis_size",
    "batch_sharding", "batch_splits", "bytes_per_device", "cache_sharding", "check_memory", "check_mesh",
    "check_processes_agree", "compile_seconds", "compiled", "compiler_options", "constrain", "current_mesh",
    "current_platform", "divisible_batch_size", "exit_process", "fetch", "gather_from_processes", "gather_sequence",
    "groups_of", "init", "initial_params", "is_main_process", "is_stacked", "join_processes", "keep_freed_memory",
    "make_mesh", "map_experts", "map_shards", "map_tokens", "measure_bandwidth", "measure_peak_flops",
    "memory_bandwidth", "mesh_name", "mesh_of", "mesh_sizes", "own_rows", "pad_vocabulary", "param_shapes",
    "partition_spec", "peak_flops", "put_batch", "put_params", "quiet_peak_flops", "replicate", "reset_watchdog",
    "run_on_main_process", "shardings", "split_batch", "split_cache", "split_embedded", "stack", "stacked_groups",
    "tpu_slice", "unstack", "vmap_over_layers", "watchdog", "with_mesh"]  # fmt: skip
