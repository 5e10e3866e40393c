"""Where every array lives: the mesh, the one table of rules, and parameters born sharded.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters (ZeRO-3); `tensor` splits
heads and hidden units (Shoeybi et al. 2019); `context` splits the sequence. XLA derives the
collectives; layers name no axis.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec as P

from nanoflax import placement, stacking
from nanoflax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")

# The end of a parameter's path, and the axis of each of its dimensions. Optimizer state and moving
# averages repeat the parameters' paths, so the table covers them too. What no row names is whole.
_SPLITS = r"((cross_)?attention/(query|key|value)|mlp/(up|gate))"  # D to HK, GK or F
_JOINS = r"((cross_)?attention/out|mlp/down)"  # and back
RULES = (
    (r"embed/embedding", P("tensor", "fsdp")),  # [V, D]
    (r"position_embed/embedding", P(None, "fsdp")),  # [T, D]
    (r"relative_bias/embedding", P(None, "tensor")),  # [buckets, H]
    (r"unembed/kernel", P("fsdp", "tensor")),  # [D, V]
    (rf"{_SPLITS}/kernel", P("fsdp", "tensor")),
    (rf"{_SPLITS}/(bias|lora_magnitude)", P("tensor")),
    (rf"{_SPLITS}/lora_a", P("fsdp", None)),  # [D, r]
    (rf"{_SPLITS}/lora_b", P(None, "tensor")),  # [r, HK]
    (rf"{_JOINS}/kernel", P("tensor", "fsdp")),
    (rf"{_JOINS}/lora_a", P("tensor", None)),
    (rf"{_JOINS}/lora_b", P(None, "fsdp")),
    (r"attention/prefix_(key|value)", P(None, "tensor")),  # [P, GK]
    (r"adapter_\w+/down/kernel", P("fsdp", None)),  # [D, r]
    (r"adapter_\w+/up/kernel", P(None, "fsdp")),
    (r"(transform|pooler|delay)/kernel", P("fsdp", "tensor")),  # [D, D]
    (r"labels/kernel", P("fsdp", None)),  # [D, labels]
    # An LSTM's, put together before its scan: split units would wait for each other at every token.
    (r"(forward|backward|\w*input|start_\d+|decoder_\d+|key|query|combine)/kernel",
     P("fsdp", None)),
)
MAX_WHOLE = 0.02  # of all numbers may lie whole in matrices on every device of fsdp and tensor ...
SMALL = 2**20  # ... or this many


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
        raise UserError(f"train.mesh={shape!r} must be three sizes for data, fsdp, tensor, such as "
                        "1,8,1, or a fourth for context, at most one of them -1")
    sizes += [1] * (len(AXES) - len(sizes))
    rest = math.prod(n for n in sizes if n > 0)
    sizes = [count // rest if n == -1 else n for n in sizes]
    if rest > count:
        raise UserError(f"train.mesh={shape!r} needs {rest} devices, and {count} are present")
    if math.prod(sizes) != count:
        raise UserError(f"train.mesh={shape!r} does not use the {count} devices present; "
                        f"the sizes must multiply to {count}")
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
    if granules(devices)[0] > 1:
        placed = hybrid(sizes, devices)
    else:  # on a torus an axis need not be whole axes of it
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(placed, AXES, axis_types=types)


def granules(devices):
    """(how many groups of devices a fast network joins, whether a group is a process)."""
    slices = {getattr(d, "slice_index", None) for d in devices}
    if None not in slices:
        return len(slices), False
    # GPUs that do not tell their node: a process with several has those of one node.
    processes = {d.process_index for d in devices}
    several = devices[0].platform == "gpu" and len(processes) < len(devices)
    return (len(processes) if several else 1), True


def hybrid(sizes, devices):
    """Devices of several slices or nodes as an array of `sizes`, along AXES: the slow network lies
    along data, and where that has not enough parts along fsdp."""
    count, by_process = granules(devices)
    data = math.gcd(sizes[0], count)
    fsdp = count // data
    if sizes[1] % fsdp:
        raise UserError(f"train.mesh={mesh_name(sizes)!r} must split {count} slices or nodes along "
                        "data, then fsdp: tensor and context need the fast network of one")
    outer = (data, fsdp, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(
        tuple(n // m for n, m in zip(sizes, outer)), outer, devices, process_is_granule=by_process,
        allow_split_physical_axes=True)


def abstract_mesh(sizes, platform=None):
    """A mesh of no devices, to plan with. sizes: along AXES, the last ones 1 where left out;
    platform: of the devices there will be, such as tpu."""
    device = platform and jax.sharding.AbstractDevice("any", None, platform)
    return jax.sharding.AbstractMesh((*sizes, *[1] * (len(AXES) - len(sizes))), AXES,
                                     abstract_device=device)


def spec_of(path, shape):
    """The PartitionSpec of an array: the first rule that its path ends with and its rank fits.
    Of stacked blocks [L, ...] no axis splits L, and none a dimension of 1 (Adafactor's places)."""
    layers = (None,) * bool(stacking.STACKED.search(path))
    for pattern, spec in RULES:
        if len(layers) + len(spec) == len(shape) and re.search(rf"(^|/){pattern}$", path):
            return P(*layers, *(None if n == 1 else entry
                                for entry, n in zip(spec, shape[len(layers):])))
    return P()


def shardings(tree, mesh):
    """The NamedSharding of every leaf of a tree of parameters or training state.

    An axis that the mesh does not have splits nothing: on a mesh of `data` alone all is whole.
    Raises: UserError naming every leaf whose dimension an axis does not divide or whose rule names
    an axis twice, and the largest of too many that would be whole on every device.
    """
    found, whole = [], {}

    def of(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        name, spec = f"{path} {leaf.shape}", spec_of(path, leaf.shape)
        used = [axis for entry in spec for axis in placement.axes_of(entry)]
        if len(set(used)) < len(used):
            found.append(f"{name}: its rule {spec} names an axis twice")
            return None
        for entry, size in zip(spec, leaf.shape):
            if size % placement.parts_of(entry, mesh):
                found.append(f"{name}: {size} is not divisible by " + " x ".join(
                    f"{axis}={mesh.shape[axis]}" for axis in placement.axes_on(entry, mesh)))
        if leaf.ndim > 1 and all(placement.parts_of(entry, mesh) == 1 for entry in spec):
            whole[name] = leaf.size
        return NamedSharding(mesh, P(*(placement.axes_on(entry, mesh) for entry in spec)))

    out = jax.tree_util.tree_map_with_path(of, tree)
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    if (placement.parts_of(("fsdp", "tensor"), mesh) > 1
            and sum(whole.values()) > max(SMALL, MAX_WHOLE * total)):
        most = sorted(whole, key=whole.get, reverse=True)
        found.append(f"{sum(whole.values()) / total:.0%} of all numbers would be whole on every "
                     f"device, more than {MAX_WHOLE:.0%}: " + ", ".join(most[:4]))
    if found:
        raise UserError("the mesh does not divide: " + "; ".join(found[:4])
                        + (f"; and {len(found) - 4} more" if len(found) > 4 else ""))
    return out


def padded(config, mesh):
    """The ModelConfig with as much vocab_padding as the mesh needs, its vocabulary then a multiple
    of 128, so that a run may go on over other meshes."""
    tensor = mesh.shape["tensor"]
    more = -config.vocab_size % math.lcm(128, tensor) if config.vocab_size % tensor else 0
    return dataclasses.replace(config, vocab_size=config.vocab_size + more,
                               vocab_padding=config.vocab_padding + more)


def check(config, mesh, lengths=None):
    """Refuse a Config whose sizes the mesh cannot divide. lengths: {name: T} of what is trained on,
    default the model's context. Raises: UserError with every problem."""
    t, m, found = config.train, config.model, []
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    micro = t.batch_size // t.accumulate
    if micro % ways:
        found.append(f"train.batch_size={t.batch_size} over train.accumulate={t.accumulate} gives "
                     f"micro-batches of {micro}, not divisible by data x fsdp = {ways}")
    lstm, context = m.architecture == "lstm", mesh.shape["context"]
    sizes = [("model.vocab_size", m.vocab_size, "tensor"), ("model.dim", m.dim, "fsdp")]
    if not lstm:
        sizes += [("model.heads", m.heads, "tensor"), ("model.kv_heads", m.G, "tensor"),
                  ("model.mlp_dim", m.F, "tensor")]
        sizes += [(name, size, "context")
                  for name, size in (lengths or {"model.context": m.context}).items()]
    for name, size, axis in sizes:
        if size % mesh.shape[axis]:
            found.append(f"{name}={size} is not divisible by {axis}={mesh.shape[axis]}")
    if lstm and context > 1:
        found.append(f"context={context} does not go with model.architecture='lstm', which reads "
                     "its tokens one after another")
    if found:
        raise UserError("; ".join(found))


def chip_bytes(tree):
    """Bytes of one device's part of a tree of arrays or shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(tree))


def check_memory(tree, mesh):
    """Refuse a tree of arrays or shapes with shardings that the devices cannot hold.

    Raises: UserError with both sizes; a device that does not tell its own (a CPU) holds all.
    """
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    need = chip_bytes(tree)
    if need > limit:
        raise UserError(f"parameters and optimizer take {need / 2**30:.1f} GiB of each device on "
                        f"the mesh {dict(mesh.shape)}, and a device has {limit / 2**30:.1f} GiB; "
                        "give train.mesh more fsdp or tensor, or take more devices")


def batch(mesh, rank):
    """The NamedSharding of an array [B, ...] of a batch, whose second dimension is T."""
    return NamedSharding(mesh, P(*placement.BATCH[:rank]))


def rows(mesh, batch_size):
    """The rows of a batch that this process's devices hold, ascending: those that it must read.

    Processes may share rows (where `tensor` goes across them), and their rows need not be next to
    each other (where the mesh does not follow the order of processes).
    """
    found = batch(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part, in found for row in range(*part.indices(batch_size))})


def whole_batch(batch_size, mesh):
    """The least batch size of at least this that the mesh divides."""
    return batch_size + -batch_size % placement.parts_of(placement.BATCH[0], mesh)


def put_batch(arrays, mesh):
    """This process's `rows` of a batch (a dict of numpy arrays), as global arrays split over the
    mesh. Raises: UserError for a length that context does not divide."""
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    rank = {name: 1 if name == "label" else x.ndim for name, x in arrays.items()}  # [B, labels] too
    for name, x in arrays.items():
        if rank[name] > 1 and x.shape[1] % mesh.shape.get("context", 1):
            raise UserError(f"{name} of length {x.shape[1]} is not divisible by "
                            f"context={mesh.shape['context']}")
    count = placement.parts_of(placement.BATCH[0], mesh)
    parts = rows(mesh, count)  # of as many equal ones

    def put(name, x):
        size = len(x) // len(parts)  # rows of a part

        def read(index):
            start, stop, _ = index[0].indices(count * size)
            here = parts.index(start // size) * size
            return x[here:here + stop - start][:, *index[1:]]

        return jax.make_array_from_callback(
            (count * size, *x.shape[1:]), batch(mesh, rank[name]), read)

    return {name: put(name, x) for name, x in arrays.items()}


def put(tree, mesh):
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


def shapes(model):
    """The parameters of a model as a tree of jax.ShapeDtypeStruct; nothing is allocated."""
    return jax.eval_shape(lambda: draw(model, jax.random.PRNGKey(0)))


def draw(model, rng):
    """What `init` compiles: the parameters of a model from a PRNG key."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    reads_source = model.config.architecture in ("encoder_decoder", "lstm")
    return model.init(rng, tokens, **{"source": tokens} if reads_source else {})["params"]


def init(model, rng, mesh=None):
    """Parameters of a model: a plain nested dict of float32 arrays. rng: a PRNG key.

    With a mesh, or under `jax.set_mesh`, each is born in its shards, never whole.
    Raises: UserError if the mesh does not divide them.
    """
    mesh, make = placement.current(mesh), lambda rng: draw(model, rng)
    if mesh is None:
        return jax.jit(make)(rng)
    return jax.jit(make, out_shardings=shardings(shapes(model), mesh))(rng)
