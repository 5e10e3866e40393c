"""The sharding of parameters: one table of rules, from a parameter's path to mesh axes.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters (ZeRO-3, Rajbhandari et al.
2020); `tensor` splits heads and hidden units (Shoeybi et al. 2019); `context` splits the sequence;
`expert` splits the batch and the experts of a layer (Lepikhin et al. 2021; collectives in experts.py).
XLA derives the other collectives; layers name no axis.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from nanoflax.config import Config, ModelConfig
from nanoflax.errors import UserError, listed
from nanoflax.parallel.constraints import BATCH, AnyMesh, axes_in_mesh, axis_names, dividing, num_shards
from nanoflax.parallel.stacking import STACKED

# The end of a parameter's path, and the mesh axis of each dimension. Optimizer state and moving
# averages repeat the parameters' paths, so the table covers them too. A parameter that matches no
# row is replicated on every device.
_COLUMN_PARALLEL = (  # D to HK, GK or F
    r"((cross_)?attention/((query|latent)_up|query|key|value|gate)"
    r"|recurrent/(query|key|value|gate|step|write)|mlp/(shared/)?(up|gate))"
)
_ROW_PARALLEL = r"((cross_)?attention/out|recurrent/out|mlp/(shared/)?down)"  # HK or F to D
RULES = (
    (r"embed/embedding", P("tensor", "fsdp")),  # [V, D]
    (r"position_embed/embedding", P(None, "fsdp")),  # [T, D]
    (r"relative_bias/embedding", P(None, "tensor")),  # [buckets, H]
    (r"unembed/kernel", P("fsdp", "tensor")),  # [D, V]
    (rf"{_COLUMN_PARALLEL}/kernel", P("fsdp", "tensor")),
    (rf"{_COLUMN_PARALLEL}/(bias|lora_magnitude)", P("tensor")),
    (rf"{_COLUMN_PARALLEL}/lora_a", P("fsdp", None)),  # [D, r]
    (rf"{_COLUMN_PARALLEL}/lora_b", P(None, "tensor")),  # [r, HK]
    (r"attention/(query|latent)_down/(kernel|lora_a)", P("fsdp", None)),  # [D, rank]
    (rf"{_ROW_PARALLEL}/kernel", P("tensor", "fsdp")),
    (rf"{_ROW_PARALLEL}/lora_a", P("tensor", None)),
    (rf"{_ROW_PARALLEL}/lora_b", P(None, "fsdp")),
    (r"(cross_)?attention/sinks", P("tensor")),  # [H]
    (r"mlp/router/kernel", P("fsdp", None)),  # [D, E]
    (r"mlp/experts/(up|gate)/kernel", P("expert", "fsdp", "tensor")),  # [E, D, F]
    (r"mlp/experts/(up|gate)/bias", P("expert", "tensor")),
    (r"mlp/experts/(up|gate)/lora_a", P("expert", "fsdp", None)),  # [E, D, r]
    (r"mlp/experts/(up|gate)/lora_b", P("expert", None, "tensor")),  # [E, r, F]
    (r"mlp/experts/down/kernel", P("expert", "tensor", "fsdp")),  # [E, F, D]
    (r"mlp/experts/down/bias", P("expert", None)),
    (r"mlp/experts/down/lora_a", P("expert", "tensor", None)),
    (r"mlp/experts/down/lora_b", P("expert", None, "fsdp")),
    (r"attention/prefix_(key|value)", P(None, "tensor")),  # [P, GK]
    (r"adapter_\w+/down/kernel", P("fsdp", None)),  # [D, r]
    (r"adapter_\w+/up/kernel", P(None, "fsdp")),
    (r"(transform|pooler|delay|project_(in|out))/kernel", P("fsdp", "tensor")),  # [D, D] or embed_dim
    (r"labels/kernel", P("fsdp", None)),  # [D, labels]
    # Weights of an LSTM are gathered before its scan: split units would have to exchange data at every token.
    (r"(forward|backward|\w*input|start_\d+|decoder_\d+|key|query|combine)/kernel",
     P("fsdp", None)),
)  # fmt: skip
# Limits of the numbers in replicated matrices, if fsdp or tensor is larger than 1. The larger limit counts.
MAX_REPLICATED_FRACTION = 0.02  # of all numbers in the tree
MAX_REPLICATED_NUMBERS = 2**20


_QUANTIZED = re.compile(r"(.*/(kernel|embedding))/(values|scales|offsets)")  # the leaves of a kernels.Quantized


def partition_spec(path: str, shape: Sequence[int]) -> P:
    """The PartitionSpec of an array: the first rule that matches the end of its path and its rank.

    Stacked blocks [L, ...] are never split along L. A dimension of 1 (a placeholder of Adafactor)
    is not split. A quantised matrix [O, I] is split as the kernel [I, O]; its groups of inputs only for experts.
    """
    layers = (None,) * bool(STACKED.search(path))
    if m := _QUANTIZED.fullmatch(path):
        rule = partition_spec(m[1], [0] * len(shape))  # any sizes: these are not those of the kernel
        *first, a, b = (*rule, *[None] * len(shape))[: len(shape)]
        outputs, inputs = (a, b) if m[2] == "embedding" else (b, a)
        spec = *first, outputs, inputs if m[3] == "values" or "/experts/" in path else None
        return P(*(None if n == 1 else entry for entry, n in zip(spec, shape, strict=True)))
    for pattern, spec in RULES:
        if len(layers) + len(spec) == len(shape) and re.search(rf"(^|/){pattern}$", path):
            sizes = shape[len(layers) :]
            return P(*layers, *(None if n == 1 else entry for entry, n in zip(spec, sizes, strict=True)))
    return P()


def shardings(tree: PyTree, mesh: AnyMesh, uneven: bool = False) -> PyTree[NamedSharding]:
    """The sharding of every leaf of a tree of parameters or of a training state.

    An axis that the mesh does not have splits nothing. uneven: nor does one that does not divide its dimension, as a
    published vocabulary of 50,257 tokens.
    Raises: UserError that names every leaf whose rule names an axis twice, and unless `uneven` those with a dimension
    that is not divisible by its axis, and the largest matrices if too many numbers would be replicated.
    """
    problems, replicated = [], {}

    def sharding(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        name, spec = f"{path} {leaf.shape}", partition_spec(path, leaf.shape)
        axes = [axis for entry in spec for axis in axis_names(entry)]
        if len(set(axes)) < len(axes):
            problems.append(f"{name}: its rule {spec} names an axis twice")
            return None
        spec = dividing(spec, leaf.shape, mesh) if uneven else spec
        for entry, size in zip(spec, leaf.shape, strict=False):  # P() of a replicated leaf is shorter
            if size % num_shards(entry, mesh):
                factors = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes_in_mesh(entry, mesh) or ())
                problems.append(f"{name}: {size} is not divisible by {factors}")
        if leaf.ndim > 1 and all(num_shards(entry, mesh) == 1 for entry in spec):
            replicated[name] = leaf.size
        return NamedSharding(mesh, P(*(axes_in_mesh(entry, mesh) for entry in spec)))

    result = jax.tree_util.tree_map_with_path(sharding, tree)
    if num_shards(("fsdp", "tensor"), mesh) > 1 and not uneven:
        problems += _too_much_replicated(replicated, sum(leaf.size for leaf in jax.tree.leaves(tree)))
    if problems:
        raise UserError("the parameters do not fit the mesh: " + listed(problems, 4))
    return result


def _too_much_replicated(replicated: Mapping[str, int], total: int) -> list[str]:
    """The problem in a list, if the matrices {name: size} are too large a part of `total` numbers; else []."""
    count = sum(replicated.values())
    if count <= max(MAX_REPLICATED_NUMBERS, MAX_REPLICATED_FRACTION * total):
        return []
    largest = sorted(replicated, key=lambda name: -replicated[name])[:4]
    return [
        f"{count / total:.0%} of all numbers would be replicated on every "
        f"device, more than {MAX_REPLICATED_FRACTION:.0%}: " + ", ".join(largest)
    ]


def pad_vocabulary(config: ModelConfig, mesh: AnyMesh) -> ModelConfig:
    """The ModelConfig with the vocab_padding that the mesh needs. The padded vocabulary is a
    multiple of 128, so that other meshes can resume the run."""
    tensor = mesh.shape["tensor"]
    rows = -config.vocab_size % math.lcm(128, tensor) if config.vocab_size % tensor else 0
    return dataclasses.replace(config, vocab_size=config.vocab_size + rows, vocab_padding=config.vocab_padding + rows)


def check_mesh(config: Config, mesh: AnyMesh, lengths: Mapping[str, int] | None = None) -> None:
    """Raises: UserError with every size of the Config that the mesh does not divide.

    lengths: {name: T} of the training examples; default the model's context.
    """
    t, m, problems = config.train, config.model, []
    row_shards, context = num_shards(BATCH[0], mesh), mesh.shape["context"]
    micro = t.batch_size // t.accumulate
    if micro % row_shards:
        problems.append(
            f"train.batch_size={t.batch_size} over train.accumulate={t.accumulate} gives "
            f"micro-batches of {micro}, not divisible by data x fsdp x expert = {row_shards}"
        )
    sizes = [("model.vocab_size", m.vocab_size, "tensor"), ("model.dim", m.dim, "fsdp")]
    recurrent = [m.is_recurrent(i) for i in range(m.layers)]
    if m.has_blocks:
        sizes += [("model.mlp_dim", m.F, "tensor")]
        if not all(recurrent):
            sizes += [("model.heads", m.heads, "tensor"), ("model.kv_heads", m.G, "tensor")]
        if any(recurrent):
            sizes += [(f"model.recurrent.{name}", getattr(m.recurrent, name), "tensor") for name in ("heads", "groups")]
        sizes += [
            (f"model.decoder_{name}", n, "tensor")
            for name, n in (("heads", m.decoder_heads), ("mlp_dim", m.decoder_mlp_dim))
            if n is not None
        ]
        if m.moe.experts:
            experts = {"experts": (m.moe.experts, "expert"), "expert_dim": (m.moe.expert_dim or m.F, "tensor")}
            sizes += [(f"model.moe.{name}", *row) for name, row in experts.items()]
        sizes += [(name, T, "context") for name, T in (lengths or {"model.context": m.context}).items()]
    for name, size, axis in sizes:
        if size % mesh.shape[axis]:
            problems.append(f"{name}={size} is not divisible by {axis}={mesh.shape[axis]}")
    if not m.moe.experts and mesh.shape["expert"] > 1:
        problems.append(
            f"expert={mesh.shape['expert']} needs a mixture of experts: model.moe.experts=0; use data or fsdp"
        )
    if any(recurrent) and context > 1:
        problems.append(f"context={context} does not work with layers of the kinds delta and mamba2: use data or fsdp")
    if not m.has_blocks and context > 1:
        problems.append(
            f"context={context} does not work with model.architecture='lstm', which reads its tokens one after another"
        )
    if problems:
        raise UserError("; ".join(problems))
