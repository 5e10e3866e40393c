"""Where every array lives: the mesh, the one table of rules, and parameters born sharded.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters (ZeRO-3); `tensor` splits
heads and hidden units (Shoeybi et al. 2019); `context` splits the sequence. XLA derives the
collectives; layers name no axis.
"""

import dataclasses
import math
import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflax.errors import UserError
from nanoflax.parallel import constraints, stacking

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
)  # fmt: skip
MAX_REPLICATED_FRACTION = 0.02  # of all numbers may lie whole in matrices on every device of fsdp and tensor ...
MAX_REPLICATED_NUMBERS = 2**20  # ... or this many


def partition_spec(path, shape):
    """The PartitionSpec of an array: the first rule that its path ends with and its rank fits.
    Of stacked blocks [L, ...] no axis splits L, and none a dimension of 1 (Adafactor's places)."""
    layers = (None,) * bool(stacking.STACKED.search(path))
    for pattern, spec in RULES:
        if len(layers) + len(spec) == len(shape) and re.search(rf"(^|/){pattern}$", path):
            return P(*layers, *(None if n == 1 else entry for entry, n in zip(spec, shape[len(layers) :])))
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
        name, spec = f"{path} {leaf.shape}", partition_spec(path, leaf.shape)
        used = [axis for entry in spec for axis in constraints.axis_names(entry)]
        if len(set(used)) < len(used):
            found.append(f"{name}: its rule {spec} names an axis twice")
            return None
        for entry, size in zip(spec, leaf.shape):
            if size % constraints.num_shards(entry, mesh):
                found.append(
                    f"{name}: {size} is not divisible by "
                    + " x ".join(f"{axis}={mesh.shape[axis]}" for axis in constraints.axes_in_mesh(entry, mesh))
                )
        if leaf.ndim > 1 and all(constraints.num_shards(entry, mesh) == 1 for entry in spec):
            whole[name] = leaf.size
        return NamedSharding(mesh, P(*(constraints.axes_in_mesh(entry, mesh) for entry in spec)))

    out = jax.tree_util.tree_map_with_path(of, tree)
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    if constraints.num_shards(("fsdp", "tensor"), mesh) > 1 and sum(whole.values()) > max(
        MAX_REPLICATED_NUMBERS, MAX_REPLICATED_FRACTION * total
    ):
        most = sorted(whole, key=whole.get, reverse=True)
        found.append(
            f"{sum(whole.values()) / total:.0%} of all numbers would be whole on every "
            f"device, more than {MAX_REPLICATED_FRACTION:.0%}: " + ", ".join(most[:4])
        )
    if found:
        raise UserError(
            "the mesh does not divide: "
            + "; ".join(found[:4])
            + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
        )
    return out


def pad_vocabulary(config, mesh):
    """The ModelConfig with as much vocab_padding as the mesh needs, its vocabulary then a multiple
    of 128, so that a run may go on over other meshes."""
    tensor = mesh.shape["tensor"]
    more = -config.vocab_size % math.lcm(128, tensor) if config.vocab_size % tensor else 0
    return dataclasses.replace(config, vocab_size=config.vocab_size + more, vocab_padding=config.vocab_padding + more)


def check_mesh(config, mesh, lengths=None):
    """Refuse a Config whose sizes the mesh cannot divide. lengths: {name: T} of what is trained on,
    default the model's context. Raises: UserError with every problem."""
    t, m, found = config.train, config.model, []
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    micro = t.batch_size // t.accumulate
    if micro % ways:
        found.append(
            f"train.batch_size={t.batch_size} over train.accumulate={t.accumulate} gives "
            f"micro-batches of {micro}, not divisible by data x fsdp = {ways}"
        )
    context = mesh.shape["context"]
    sizes = [("model.vocab_size", m.vocab_size, "tensor"), ("model.dim", m.dim, "fsdp")]
    if m.has_blocks:
        sizes += [
            ("model.heads", m.heads, "tensor"),
            ("model.kv_heads", m.G, "tensor"),
            ("model.mlp_dim", m.F, "tensor"),
        ]
        sizes += [(name, size, "context") for name, size in (lengths or {"model.context": m.context}).items()]
    for name, size, axis in sizes:
        if size % mesh.shape[axis]:
            found.append(f"{name}={size} is not divisible by {axis}={mesh.shape[axis]}")
    if not m.has_blocks and context > 1:
        found.append(
            f"context={context} does not go with model.architecture='lstm', which reads its tokens one after another"
        )
    if found:
        raise UserError("; ".join(found))
