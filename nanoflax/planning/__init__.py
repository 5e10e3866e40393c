"""What a training step costs in memory, arithmetic and traffic, before a machine is rented."""

from nanoflax.planning.step_cost import candidate_meshes, compile_for_topology

__all__ = [
    "candidate_meshes", "compile_for_topology"]  # fmt: skip
