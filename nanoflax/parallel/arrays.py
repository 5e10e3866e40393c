"""Arrays on a mesh: parameters born sharded, batches put on it, results fetched, memory checked."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflax.errors import UserError
from nanoflax.parallel import constraints
from nanoflax.parallel.rules import shardings


def bytes_per_device(tree):
    """Bytes of one device's part of a tree of arrays or shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_memory(tree, mesh):
    """Refuse a tree of arrays or shapes with shardings that the devices cannot hold.

    Raises: UserError with both sizes; a device that does not tell its own (a CPU) holds all.
    """
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    need = bytes_per_device(tree)
    if need > limit:
        raise UserError(
            f"parameters and optimizer take {need / 2**30:.1f} GiB of each device on "
            f"the mesh {dict(mesh.shape)}, and a device has {limit / 2**30:.1f} GiB; "
            "give train.mesh more fsdp or tensor, or take more devices"
        )


def batch_sharding(mesh, rank):
    """The NamedSharding of an array [B, ...] of a batch, whose second dimension is T."""
    return NamedSharding(mesh, P(*constraints.BATCH[:rank]))


def own_rows(mesh, batch_size):
    """The rows of a batch that this process's devices hold, ascending: those that it must read.

    Processes may share rows (where `tensor` goes across them), and their rows need not be next to
    each other (where the mesh does not follow the order of processes).
    """
    found = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in found for row in range(*part.indices(batch_size))})


def divisible_batch_size(batch_size, mesh):
    """The least batch size of at least this that the mesh divides."""
    return batch_size + -batch_size % constraints.num_shards(constraints.BATCH[0], mesh)


def put_batch(arrays, mesh):
    """This process's `rows` of a batch (a dict of numpy arrays), as global arrays split over the
    mesh. Raises: UserError for a length that context does not divide."""
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    rank = {name: 1 if name == "label" else x.ndim for name, x in arrays.items()}  # [B, labels] too
    for name, x in arrays.items():
        if rank[name] > 1 and x.shape[1] % mesh.shape.get("context", 1):
            raise UserError(f"{name} of length {x.shape[1]} is not divisible by context={mesh.shape['context']}")
    count = constraints.num_shards(constraints.BATCH[0], mesh)
    parts = own_rows(mesh, count)  # of as many equal ones

    def put(name, x):
        size = len(x) // len(parts)  # rows of a part

        def read(index):
            start, stop, _ = index[0].indices(count * size)
            here = parts.index(start // size) * size
            return x[here : here + stop - start][:, *index[1:]]

        return jax.make_array_from_callback((count * size, *x.shape[1:]), batch_sharding(mesh, rank[name]), read)

    return {name: put(name, x) for name, x in arrays.items()}


def put_params(tree, mesh):
    """Parameters that every process holds whole (numpy or its own arrays), over the mesh."""

    def one(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings(tree, mesh))


def fetch(x):
    """An array, of whichever processes, whole as numpy on all of them; all must call it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def param_shapes(model):
    """The parameters of a model as a tree of jax.ShapeDtypeStruct; nothing is allocated."""
    return jax.eval_shape(lambda: initial_params(model, jax.random.PRNGKey(0)))


def initial_params(model, rng):
    """What `init` compiles: the parameters of a model from a PRNG key."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(rng, tokens, **{"source": tokens} if model.config.reads_source else {})["params"]


def init(model, rng, mesh=None):
    """Parameters of a model: a plain nested dict of float32 arrays. rng: a PRNG key.

    With a mesh, or under `jax.set_mesh`, each is born in its shards, never whole.
    Raises: UserError if the mesh does not divide them.
    """
    mesh, make = constraints.current_mesh(mesh), lambda rng: initial_params(model, rng)
    if mesh is None:
        return jax.jit(make)(rng)
    return jax.jit(make, out_shardings=shardings(param_shapes(model), mesh))(rng)
