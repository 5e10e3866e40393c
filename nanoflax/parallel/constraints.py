"""The sharding of activations. Layers call functions that name the kind of array (`split_batch`,
`split_cache`), and name no mesh axis. The functions use the mesh for which JAX traces the caller
(`current_mesh`); without a mesh they change nothing. The sharding of parameters is in rules.py.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

AnyMesh: TypeAlias = Mesh | AbstractMesh
Entry: TypeAlias = str | Sequence[str] | None  # one dimension's entry in a PartitionSpec

BATCH = P(("data", "expert", "fsdp"), "context")  # batches and activations [B, T, ...]
EMBEDDED = P(("data", "expert"), "context", "fsdp")  # embedded tokens [B, T, D], split along D like the embedding
CACHE = P(BATCH[0], "tensor")  # keys and values of a cache [B, G, S, K]


def axis_names(entry: Entry) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def num_shards(entry: Entry, mesh: AnyMesh) -> int:
    """The number of parts into which a mesh splits a dimension with this entry."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axis_names(entry))


def axes_in_mesh(entry: Entry, mesh: AnyMesh) -> tuple[str, ...] | None:
    """The axes of an entry that the mesh has; None if it has none of them."""
    return tuple(axis for axis in axis_names(entry) if axis in mesh.shape) or None


def dividing(spec: P, shape: Sequence[int], mesh: AnyMesh) -> P:
    """The spec for an array of this shape on a mesh; a dimension that its axes do not divide is not split."""
    fits = lambda entry, size: None if size % num_shards(entry, mesh) else axes_in_mesh(entry, mesh)
    return P(*map(fits, spec, shape))


def with_mesh(mesh: AnyMesh | None, function: Callable) -> Callable:
    """The same function; while JAX traces it, `current_mesh` returns the mesh. None: no mesh."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def on_mesh(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return on_mesh


def current_mesh(mesh: AnyMesh | None = None) -> AnyMesh | None:
    """The given mesh, else the abstract mesh of `with_mesh` or `jax.set_mesh`; None for one device."""
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
        return mesh if mesh.size > 1 else None
    return mesh


def mesh_of(tree: PyTree) -> AnyMesh | None:
    """The mesh over which the arrays of a tree are split; None if they are on one device."""
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def axis_size(*axes: str) -> int:
    """The number of parts into which the current mesh splits along these axes; 1 without a mesh."""
    mesh = current_mesh()
    return 1 if mesh is None else num_shards(axes, mesh)


def batch_splits(B: int, T: int, rows: Sequence[str] = BATCH[0]) -> tuple[int, int]:
    """The numbers of parts into which the current mesh splits the dimensions B and T of a batch.

    rows: the axes that split B. A dimension that its axes do not divide is not split: 1.
    """
    sizes = axis_size(*rows), axis_size(*axis_names(BATCH[1]))
    b, t = (1 if length % n else n for length, n in zip((B, T), sizes, strict=True))
    return b, t


def current_platform() -> str:
    """The platform of the current mesh, such as "tpu"; without a mesh that of JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def map_shards(
    function: Callable[..., Float[Array, "B H T K"]], heads: Sequence[Float[Array, "B H ..."]], rows: PyTree
) -> Float[Array, "B H T K"]:
    """function(*heads, rows), called on every device with its own rows and heads.

    heads: arrays [B, H, ...]; rows: a tree of arrays [B, ...]. For kernels that XLA cannot split.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(*heads, rows)
    by_head = P(*(axes_in_mesh(entry, mesh) for entry in CACHE))
    in_specs = (*[by_head] * len(heads), P(by_head[0]))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=by_head, check_vma=False)
    return mapped(*heads, rows)


def constrain(x: Array, spec: P) -> Array:
    """x, split over the current mesh by a PartitionSpec.

    XLA chooses for dimensions beyond the spec, for dimensions that their axes do not divide, and
    for dimensions whose axes the mesh does not have.
    """
    mesh, free = current_mesh(), P.UNCONSTRAINED
    if mesh is None:
        return x

    def resolve(entry, size):
        if entry is None:
            return None
        return free if size % num_shards(entry, mesh) else axes_in_mesh(entry, mesh) or free

    entries = [resolve(entry, size) for entry, size in zip(spec, x.shape, strict=False)]
    if all(entry is free for entry in entries):
        return x
    return jax.lax.with_sharding_constraint(x, P(*entries, *[free] * (x.ndim - len(entries))))


def split_batch(x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    """Activations, split along B and T like the batch."""
    return constrain(x, BATCH)


def split_embedded(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Embedded tokens, split along B and T like the batch.

    The first constraint splits D like the embedding, so that XLA needs one all-to-all along fsdp.
    Without the first constraint XLA may gather all of x on every device.
    """
    return split_batch(constrain(x, EMBEDDED))


def split_cache(x: Float[Array, "B G S K"]) -> Float[Array, "B G S K"]:
    """Keys or values of a cache, split along B and the heads; a single head is on every device."""
    return constrain(x, CACHE if x.shape[1] > 1 else P(CACHE[0], None, None, None))


def replicate(x: Array) -> Array:
    """A weight, gathered on every device."""
    return x if axis_size("fsdp", "tensor") == 1 else constrain(x, P(*[None] * x.ndim))


def gather_sequence(x: Float[Array, "B G S K"]) -> Float[Array, "B G S K"]:
    """Keys or values, gathered along S; their gradient is split along S again."""
    return x if axis_size("context") == 1 else _gather_sequence(x)


@jax.custom_vjp
def _gather_sequence(x):
    return constrain(x, P(*CACHE, None))


_gather_sequence.defvjp(lambda x: (_gather_sequence(x), None), lambda _, dx: (constrain(dx, P(*CACHE, "context")),))
