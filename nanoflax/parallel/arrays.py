"""Arrays on a mesh: initial parameters, batches, results of all processes, and the memory check."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PyTree

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.parallel.constraints import BATCH, CACHE, AnyMesh, current_mesh, dividing, num_shards
from nanoflax.parallel.rules import shardings


class Model(Protocol):
    """The part of a Linen module that this file uses."""

    @property
    def config(self) -> ModelConfig: ...

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any: ...


def bytes_per_device(tree: PyTree) -> int:
    """Bytes that one device holds of a tree of arrays, or of ShapeDtypeStructs with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def check_memory(tree: PyTree, mesh: Mesh) -> None:
    """Raises: UserError if a tree (as in `bytes_per_device`) needs more memory than a device has.

    Devices that do not report their memory, such as CPUs, are not checked.
    """
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    need = bytes_per_device(tree)
    if need > limit:
        raise UserError(
            f"parameters and optimizer need {need / 2**30:.1f} GiB on each device of "
            f"the mesh {dict(mesh.shape)}, but a device has {limit / 2**30:.1f} GiB; "
            "increase fsdp or tensor in train.mesh, or use more devices"
        )


def batch_sharding(mesh: AnyMesh, rank: int) -> NamedSharding:
    """The sharding of an array of a batch: [B] for rank 1, [B, T, ...] for a higher rank."""
    return NamedSharding(mesh, P(*BATCH[:rank]))


def cache_sharding(mesh: AnyMesh, shape: Sequence[int], slots: bool) -> NamedSharding:
    """The sharding of an array of a cache: heads along tensor, as `split_cache`. Without slots it is [1, ...] of one
    text, whose heads all groups of devices along tensor have; with slots [slots, 1, ...], split like a batch's rows.
    A dimension that its axes do not divide is not split."""
    of_text = shape[1:] if slots else shape
    heads = CACHE[1] if len(of_text) == 4 and of_text[1] > 1 else None  # keys, values and states [1, H, ...]
    spec = P(BATCH[0], None, heads) if slots else P(None, heads)
    return NamedSharding(mesh, dividing(spec, shape, mesh))


def own_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process must read, because its devices hold them; ascending.

    Two processes share rows where `tensor` or `context` extends over both. The rows of a process
    need not be neighbours.
    """
    slices = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in slices if index for row in range(*index[0].indices(batch_size))})


def divisible_batch_size(batch_size: int, mesh: AnyMesh) -> int:
    """The smallest batch size, at least the given one, that the mesh divides."""
    return batch_size + -batch_size % num_shards(BATCH[0], mesh)


def put_batch(arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, Array]:
    """A batch as global arrays, split over the mesh.

    arrays: this process's rows (`own_rows`), numpy arrays [rows, T, ...] or [rows].
    Raises: UserError if a T is not divisible by the mesh's context.
    """
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    # A label may be [B, labels]; its second dimension is not T.
    rank = {name: 1 if name == "label" else x.ndim for name, x in arrays.items()}
    for name, x in arrays.items():
        if rank[name] > 1 and x.shape[1] % mesh.shape.get("context", 1):
            raise UserError(f"{name} of length {x.shape[1]} is not divisible by context={mesh.shape['context']}")
    num_parts = num_shards(BATCH[0], mesh)
    own_parts = own_rows(mesh, num_parts)  # all parts have the same number of rows

    def put(name, x):
        part_size = len(x) // len(own_parts)
        shape = (num_parts * part_size, *x.shape[1:])

        def read(index):  # index: slices of the global array, within one part
            start, stop, _ = index[0].indices(shape[0])
            local = own_parts.index(start // part_size) * part_size
            return x[local : local + stop - start][:, *index[1:]]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, rank[name]), read)

    return {name: put(name, x) for name, x in arrays.items()}


def put_params(tree: PyTree, mesh: Mesh) -> PyTree[Array]:
    """Parameters that every process holds completely (numpy or local arrays), split over the mesh."""

    def put(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings(tree, mesh))


def fetch(x: Any) -> np.ndarray:
    """A global array as numpy on every process. All processes must call it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def param_shapes(model: Model) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a model's parameters. Nothing is allocated."""
    return _init.eval_shape(model, jax.eval_shape(jax.random.PRNGKey, 0))


def initial_params(model: Model, rng: Array) -> dict[str, Any]:
    """`init` without a mesh and without jit; for calls inside a compiled function."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(rng, tokens, **{"source": tokens} if model.config.reads_source else {})["params"]


def init(model: Model, rng: Array, mesh: AnyMesh | None = None) -> dict[str, Any]:
    """Initial parameters of a model: a plain nested dict of float32 arrays.

    rng: a PRNG key. mesh: default the mesh of `jax.set_mesh`, if there is one; every device then
    creates its own shards only.
    Raises: UserError if the mesh does not divide a parameter.
    """
    mesh = current_mesh(mesh)
    if mesh is None:
        return _init(model, rng)
    places = shardings(param_shapes(model), mesh)
    return jax.jit(initial_params, static_argnums=0, out_shardings=places)(model, rng)


_init = jax.jit(initial_params, static_argnums=0)  # one for all calls, so that a model is traced once
