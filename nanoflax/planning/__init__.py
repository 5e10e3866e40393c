"""The memory, arithmetic and network traffic of a training step, computed before a machine is rented."""

from nanoflax.planning.attention_backends import attention_backends
from nanoflax.planning.comparison import (
    candidate_meshes,
    compare_meshes,
    comparison_table,
    compiler_line,
    for_accelerator,
    mesh_of_row,
    with_mesh_vocabulary,
)
from nanoflax.planning.flops import count_parameters, flops_per_token
from nanoflax.planning.step_cost import compile_for_topology, make_plan, projected_mfu, roofline

__all__ = [
    "attention_backends", "candidate_meshes", "compare_meshes", "comparison_table", "compile_for_topology",
    "compiler_line", "count_parameters", "flops_per_token", "for_accelerator", "make_plan", "mesh_of_row",
    "projected_mfu", "roofline", "with_mesh_vocabulary"]  # fmt: skip
