"""Where every array lives: the mesh, the one table of rules, and parameters born sharded.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters (ZeRO-3); `tensor` splits
heads and hidden units (Shoeybi et al. 2019); `context` splits the sequence. XLA derives the
collectives; layers name no axis.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec as P

from nanoflax import stacking
from nanoflax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH = P(("data", "fsdp"), "context")  # of what a batch holds and activations: [B, T, ...]
LOOKED_UP = P("data", "context", "fsdp")  # rows of the embedding [B, T, D], before `split_batch`
CACHE = P(("data", "fsdp"), "tensor")  # of keys and values in a cache: [B, G, S, K]

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
        return jax.sharding.Mesh(hybrid(sizes, devices), AXES, axis_types=types)
    return jax.make_mesh(sizes, AXES, devices=devices, axis_types=types)


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
        tuple(n // m for n, m in zip(sizes, outer)), outer, devices, process_is_granule=by_process)


def abstract_mesh(sizes, platform=None):
    """A mesh of no devices, to plan with. sizes: along AXES, the last ones 1 where left out;
    platform: of the devices there will be, such as tpu."""
    device = platform and jax.sharding.AbstractDevice("any", None, platform)
    return jax.sharding.AbstractMesh((*sizes, *[1] * (len(AXES) - len(sizes))), AXES,
                                     abstract_device=device)


def spec_of(path, shape):
    """The PartitionSpec of an array: the first rule that its path ends with and its rank fits.
    Of stacked blocks [L, ...] no axis splits L."""
    layers = (None,) * bool(stacking.STACKED.search(path))
    for pattern, spec in RULES:
        if len(layers) + len(spec) == len(shape) and re.search(rf"(^|/){pattern}$", path):
            return P(*layers, *spec)
    return P()


def _axes(entry):
    """The names in an entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _ways(entry, mesh):
    """Into how many parts a mesh splits a dimension of this entry."""
    return math.prod(mesh.shape.get(axis, 1) for axis in _axes(entry))


def _on(entry, mesh):
    """The entry with the axes that a mesh has, or None."""
    return tuple(axis for axis in _axes(entry) if axis in mesh.shape) or None


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
        used = [axis for entry in spec for axis in _axes(entry)]
        if len(set(used)) < len(used):
            found.append(f"{name}: its rule {spec} names an axis twice")
            return None
        for entry, size in zip(spec, leaf.shape):
            if size % _ways(entry, mesh):
                found.append(f"{name}: {size} is not divisible by " + " x ".join(
                    f"{axis}={mesh.shape[axis]}" for axis in _on(entry, mesh)))
        if leaf.ndim > 1 and all(_ways(entry, mesh) == 1 for entry in spec):
            whole[name] = leaf.size
        return NamedSharding(mesh, P(*(_on(entry, mesh) for entry in spec)))

    out = jax.tree_util.tree_map_with_path(of, tree)
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    if (_ways(("fsdp", "tensor"), mesh) > 1
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


def check_memory(tree, mesh):
    """Refuse a tree of arrays or shapes with shardings that the devices cannot hold.

    Raises: UserError with both sizes; a device that does not tell its own (a CPU) holds all.
    """
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    need = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
               for x in jax.tree.leaves(tree))
    if need > limit:
        raise UserError(f"parameters and optimizer take {need / 2**30:.1f} GiB of each device on "
                        f"the mesh {dict(mesh.shape)}, and a device has {limit / 2**30:.1f} GiB; "
                        "give train.mesh more fsdp or tensor, or take more devices")


def batch(mesh, rank):
    """The NamedSharding of an array [B, ...] of a batch, whose second dimension is T."""
    return NamedSharding(mesh, P(*BATCH[:rank]))


def rows(mesh, batch_size):
    """The rows of a batch that this process's devices hold, ascending: those that it must read.

    Processes may share rows (where `tensor` goes across them), and their rows need not be next to
    each other (where the mesh does not follow the order of processes).
    """
    found = batch(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part, in found for row in range(*part.indices(batch_size))})


def put_batch(arrays, mesh):
    """This process's `rows` of a batch (a dict of numpy arrays), as global arrays split over the
    mesh. Raises: UserError for a length that context does not divide."""
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    rank = {name: 1 if name == "label" else x.ndim for name, x in arrays.items()}  # [B, labels] too
    for name, x in arrays.items():
        if rank[name] > 1 and x.shape[1] % mesh.shape.get("context", 1):
            raise UserError(f"{name} of length {x.shape[1]} is not divisible by "
                            f"context={mesh.shape['context']}")
    count = _ways(BATCH[0], mesh)
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


# What is traced for a mesh.


def traced_on(mesh, function):
    """`function`, which finds the mesh (None: none) with `current` whenever it is traced."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def on_mesh(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return on_mesh


def current(mesh=None):
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
    mesh = current()
    return 1 if mesh is None else _ways(axes, mesh)


def ways(B, T, rows=BATCH[0]):
    """How many parts that mesh splits B and T of a batch into, B along the axes `rows`; 1 where it
    does not divide them."""
    sizes = axis_size(*rows), axis_size(*_axes(BATCH[1]))
    return tuple(1 if length % n else n for length, n in zip((B, T), sizes))


def platform():
    """The platform of the mesh that is traced for, or JAX's own."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_each(function, heads, rows):
    """function(*heads, rows) where each device has its part: of arrays [B, H, ...] the rows and
    heads, of a tree of [B, ...] the rows. For kernels that XLA cannot split. Returns [B, H, ...]."""
    mesh = current()
    if mesh is None:
        return function(*heads, rows)
    spec = [P(*(_on(entry, mesh) for entry in CACHE))]
    return jax.shard_map(function, mesh=mesh, in_specs=(*spec * len(heads), P(spec[0][0])),
                         out_specs=spec[0], check_vma=False)(*heads, rows)


def constrain(x, spec):
    """x split as spec says over the mesh that is traced for. Left to XLA: dimensions beyond spec,
    those that their axes do not divide, and those whose axes the mesh does not have."""
    mesh, free = current(), P.UNCONSTRAINED
    if mesh is None:
        return x

    def place(entry, size):
        if entry is None:
            return None
        return free if size % _ways(entry, mesh) else _on(entry, mesh) or free

    places = [place(*pair) for pair in zip(spec, x.shape)]
    if all(p is free for p in places):
        return x
    return jax.lax.with_sharding_constraint(x, P(*places, *[free] * (x.ndim - len(places))))


def split_batch(x):
    """Activations x [B, T, ...], split along B and T as the batch is."""
    return constrain(x, BATCH)


def split_rows(x):
    """Rows x [B, T, D] of the embedding, split as the batch is.

    First as fsdp splits the embedding: then one exchange along fsdp is left to do. XLA by itself
    may put all of x together on every device.
    """
    return split_batch(constrain(x, LOOKED_UP))


def split_cache(x):
    """Keys or values [B, G, S, K] of a cache, split along B and the heads."""
    return constrain(x, CACHE)


def gather(x):
    """A weight, put together on every device."""
    return x if axis_size("fsdp", "tensor") == 1 else constrain(x, P(*[None] * x.ndim))


def gather_time(x):
    """Keys or values [B, G, S, K] whole along S, where context splits the queries. Their gradient
    is split again."""
    return x if axis_size("context") == 1 else _gather_time(x)


@jax.custom_vjp
def _gather_time(x):
    return constrain(x, P(*CACHE, None))


_gather_time.defvjp(lambda x: (_gather_time(x), None),
                    lambda _, dx: (constrain(dx, P(*CACHE, "context")),))


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
    mesh, make = current(mesh), lambda rng: draw(model, rng)
    if mesh is None:
        return jax.jit(make)(rng)
    return jax.jit(make, out_shardings=shardings(shapes(model), mesh))(rng)
