"""Where activations lie, said inside a function that is traced for a mesh: layers ask for the place
of an array by what it holds, and name no axis. Without a mesh nothing here does anything.

The mesh and the parameters are `sharding`'s.
"""

import functools
import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = P(("data", "fsdp"), "context")  # of what a batch holds and activations: [B, T, ...]
EMBEDDED = P("data", "context", "fsdp")  # rows of the embedding [B, T, D], before `split_batch`
CACHE = P(("data", "fsdp"), "tensor")  # of keys and values in a cache: [B, G, S, K]


def axis_names(entry):
    """The names in an entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def num_shards(entry, mesh):
    """Into how many parts a mesh splits a dimension of this entry."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axis_names(entry))


def axes_in_mesh(entry, mesh):
    """The entry with the axes that a mesh has, or None."""
    return tuple(axis for axis in axis_names(entry) if axis in mesh.shape) or None


def with_mesh(mesh, function):
    """`function`, which finds the mesh (None: none) with `current_mesh` whenever it is traced."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def on_mesh(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return on_mesh


def current_mesh(mesh=None):
    """The mesh, or if None the (abstract) one of `jax.set_mesh`; None for a single device."""
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()  # may be asked for while tracing too
        return mesh if mesh.size > 1 else None
    return mesh


def mesh_of(tree):
    """The mesh that arrays lie on, or None for a single device."""
    for x in jax.tree.leaves(tree):
        if isinstance(place := getattr(x, "sharding", None), NamedSharding) and place.mesh.size > 1:
            return place.mesh
    return None


def axis_size(*axes):
    """Into how many parts the mesh that is traced for splits along these axes; 1 without one."""
    mesh = current_mesh()
    return 1 if mesh is None else num_shards(axes, mesh)


def batch_splits(B, T, rows=BATCH[0]):
    """How many parts that mesh splits B and T of a batch into, B along the axes `rows`; 1 where it
    does not divide them."""
    sizes = axis_size(*rows), axis_size(*axis_names(BATCH[1]))
    return tuple(1 if length % n else n for length, n in zip((B, T), sizes))


def current_platform():
    """The platform of the mesh that is traced for, or JAX's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def map_shards(function, heads, rows):
    """function(*heads, rows) where each device has its part: of arrays [B, H, ...] the rows and
    heads, of a tree of [B, ...] the rows. For kernels that XLA cannot split. Returns [B, H, ...]."""
    mesh = current_mesh()
    if mesh is None:
        return function(*heads, rows)
    spec = [P(*(axes_in_mesh(entry, mesh) for entry in CACHE))]
    return jax.shard_map(
        function, mesh=mesh, in_specs=(*spec * len(heads), P(spec[0][0])), out_specs=spec[0], check_vma=False
    )(*heads, rows)


def constrain(x, spec):
    """x split as spec says over the mesh that is traced for. Left to XLA: dimensions beyond spec,
    those that their axes do not divide, and those whose axes the mesh does not have."""
    mesh, free = current_mesh(), P.UNCONSTRAINED
    if mesh is None:
        return x

    def place(entry, size):
        if entry is None:
            return None
        return free if size % num_shards(entry, mesh) else axes_in_mesh(entry, mesh) or free

    places = [place(*pair) for pair in zip(spec, x.shape)]
    if all(p is free for p in places):
        return x
    return jax.lax.with_sharding_constraint(x, P(*places, *[free] * (x.ndim - len(places))))


def split_batch(x):
    """Activations x [B, T, ...], split along B and T as the batch is."""
    return constrain(x, BATCH)


def split_embedded(x):
    """Rows x [B, T, D] of the embedding, split as the batch is.

    First as fsdp splits the embedding: then one exchange along fsdp is left to do. XLA by itself
    may put all of x together on every device.
    """
    return split_batch(constrain(x, EMBEDDED))


def split_cache(x):
    """Keys or values [B, G, S, K] of a cache, split along B and the heads."""
    return constrain(x, CACHE)


def replicate(x):
    """A weight, put together on every device."""
    return x if axis_size("fsdp", "tensor") == 1 else constrain(x, P(*[None] * x.ndim))


def gather_sequence(x):
    """Keys or values [B, G, S, K] whole along S, where context splits the queries. Their gradient
    is split again."""
    return x if axis_size("context") == 1 else _gather_sequence(x)


@jax.custom_vjp
def _gather_sequence(x):
    return constrain(x, P(*CACHE, None))


_gather_sequence.defvjp(lambda x: (_gather_sequence(x), None), lambda _, dx: (constrain(dx, P(*CACHE, "context")),))
