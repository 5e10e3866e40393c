"""Where every array lives: the mesh, the one table of rules, and parameters born sharded.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters (ZeRO-3); `tensor` splits
heads and hidden units (Shoeybi et al. 2019). XLA derives the collectives; layers name no axis.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from nanoflax import stacking
from nanoflax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# The end of a parameter's path, and the axis of each of its dimensions. Optimizer state and moving
# averages repeat the parameters' paths, so the table covers them too. What no row names is whole.
RULES = (
    (r"embed/embedding", P("tensor", "fsdp")),  # [V, D]
    (r"unembed/kernel", P("fsdp", "tensor")),  # [D, V]
    (r"(query|key|value|up|gate)/kernel", P("fsdp", "tensor")),  # [D, HK] or [D, F]
    (r"(query|key|value|up|gate)/bias", P("tensor")),
    (r"(out|down)/kernel", P("tensor", "fsdp")),  # [HK, D] or [F, D]
)


def mesh_sizes(shape, count):
    """The sizes along AXES of a mesh of `count` devices. shape: such as "2,-1,1"; -1 is the rest.

    Raises: UserError if the sizes cannot be read or do not use every device.
    """
    try:
        sizes = [int(n) for n in str(shape).split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != len(AXES) or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise UserError(f"train.mesh={shape!r} must be three sizes for {', '.join(AXES)}, "
                        "such as 1,8,1, at most one of them -1")
    rest = math.prod(n for n in sizes if n > 0)
    sizes = [count // rest if n == -1 else n for n in sizes]
    if math.prod(sizes) != count:
        raise UserError(f"train.mesh={shape!r} does not use the {count} devices present; "
                        f"the sizes must multiply to {count}")
    return tuple(sizes)


def make_mesh(shape="-1,1,1", devices=None):
    """A mesh over all devices. shape: sizes along data, fsdp, tensor; one -1 takes the rest.

    Raises: UserError if the sizes cannot be read or do not use every device.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(mesh_sizes(shape, len(devices)), AXES, devices=devices,
                         axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def abstract_mesh(sizes):
    """A mesh of no devices, to plan with. sizes: along AXES."""
    return jax.sharding.AbstractMesh(sizes, AXES)


def spec_of(path, shape):
    """The PartitionSpec of an array: the first rule that its path ends with and its rank fits.
    Of stacked blocks [L, ...] no axis splits L."""
    layers = (None,) * bool(stacking.STACKED.search(path))
    for pattern, spec in RULES:
        if len(layers) + len(spec) == len(shape) and re.search(rf"(^|/){pattern}$", path):
            return P(*layers, *spec)
    return P()


def shardings(tree, mesh):
    """The NamedSharding of every leaf of a tree of parameters or training state.

    An axis that the mesh does not have splits nothing: on a mesh of `data` alone all is whole.
    Raises: UserError naming every leaf whose dimension an axis does not divide.
    """
    found = []

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = P(*(axis if axis in mesh.shape else None for axis in spec_of(name, leaf.shape)))
        for axis, size in zip(spec, leaf.shape):
            if axis and size % mesh.shape[axis]:
                found.append(f"{name} {leaf.shape}: {size} is not divisible by "
                             f"{axis}={mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    out = jax.tree_util.tree_map_with_path(of, tree)
    if found:
        raise UserError("the mesh does not divide: " + "; ".join(found[:4])
                        + (f"; and {len(found) - 4} more" if len(found) > 4 else ""))
    return out


def check(config, mesh):
    """Refuse a Config whose sizes the mesh cannot divide. Raises: UserError with every problem."""
    t, m, found = config.train, config.model, []
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    micro = t.batch_size // t.accumulate
    if micro % ways:
        found.append(f"train.batch_size={t.batch_size} over train.accumulate={t.accumulate} gives "
                     f"micro-batches of {micro}, not divisible by data x fsdp = {ways}")
    for name, size in [("model.heads", m.heads), ("model.kv_heads", m.G), ("model.mlp_dim", m.F),
                       ("model.vocab_size", m.vocab_size)]:
        if size % mesh.shape["tensor"]:
            found.append(f"{name}={size} is not divisible by tensor={mesh.shape['tensor']}")
    if m.dim % mesh.shape["fsdp"]:
        found.append(f"model.dim={m.dim} is not divisible by fsdp={mesh.shape['fsdp']}")
    if found:
        raise UserError("; ".join(found))


def batch(mesh, rank):
    """The NamedSharding of an array [B, ...] of a batch."""
    return NamedSharding(mesh, P(*BATCH, *[None] * (rank - 1)))


def put_batch(arrays, mesh):
    """A host's part of a batch (numpy arrays [B_host, ...]) as global arrays, split over the mesh."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(
        batch(mesh, np.ndim(x)), np.asarray(x)), arrays)


def ways(B, T):
    """How many parts the mesh that the step is traced for splits B and T of a batch into; 1 where
    it splits nothing, or not evenly."""
    mesh = current()
    sizes = [1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in axes)
             for axes in (BATCH[0], ("context",))]
    return tuple(1 if length % n else n for length, n in zip((B, T), sizes))


def constrain(x, spec):
    """x split as spec says over the mesh that the step is traced for: by the axes that it has, where
    they divide x. Dimensions that spec leaves out are for XLA to choose."""
    mesh = current()
    if mesh is None:
        return x

    def present(axes, size):
        axes = tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if a in mesh.shape)
        return () if size % math.prod(mesh.shape[a] for a in axes) else axes

    split = map(present, spec, x.shape)
    return jax.lax.with_sharding_constraint(
        x, P(*split, *[P.UNCONSTRAINED] * (x.ndim - len(spec))))


def split_batch(x):
    """Activations x [B, ...], on the mesh that the step is traced for split along B as the batch is.

    Left to itself XLA may follow the embedding's split of D instead, and give every device all B.
    """
    return constrain(x, BATCH)


def current(mesh=None):
    """The mesh, or if None the (abstract) one of `jax.set_mesh`; None for a single device."""
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()  # may be asked for while tracing too
        return mesh if mesh.size > 1 else None
    return mesh


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
