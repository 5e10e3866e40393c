"""Deep models: the parameters of equal blocks, stacked along a leading dimension L.

Parameters are normally a tree per block: {"decoder": {"block_0": .., "block_1": .., ..}}. With
train.scan_layers a training state (parameters, optimizer state, moving average) holds them as
{"decoder": {"blocks": ..}}, each leaf [L, ...], and the compiled step scans one block over L.
Blocks of several kinds that repeat are groups, {"blocks": {"from_1_step_3": ..}} with blocks 1, 4, 7, ..; the scan
runs one block of each group. Blocks before the first group stay as they are (dense layers before sparse ones).
Code that reads parameters needs no flag: a model runs either form (nn.blocks.Stack), the optimizer
is vmapped over L (`vmap_over_layers`), the sharding rules cover both forms, a checkpoint of one form
is restored into the other, and `runs.restore_params` always returns a tree per block.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from nanoflax.errors import UserError

STACKED = re.compile(r"(^|/)blocks/")  # matches the path of a stacked leaf
Group: TypeAlias = tuple[int, int]  # (the first block, the distance to the next one)


def stack(tree: PyTree, groups: Sequence[Group] = ((0, 1),)) -> PyTree:
    """A tree whose stacks hold {"blocks": leaves [L, ...]} instead of {"block_0": .., ..}.

    tree: parameters, optimizer state or a training state, of arrays or of ShapeDtypeStructs (which
    keep their shardings). groups: ModelConfig.layer_groups, or `groups_of` a tree.
    Raises: UserError if the blocks of a group differ, as when only some of them are trained.
    """

    def convert(node):
        if not _has_separate_blocks(node):
            return node
        rest, numbers = dict(node), sorted(int(name.removeprefix("block_")) for name in node if _is_block_name(name))
        stacked, counts = {}, set()
        for first, step in groups:
            own = [i for i in numbers if i >= first and (i - first) % step == 0]
            blocks = [rest.pop(f"block_{i}") for i in own]
            counts |= {len(own)} - {0}  # one scan runs all groups
            in_turn = own == [*range(first, first + len(own) * step, step)]
            if not in_turn or len(counts) > 1 or len(set(map(jax.tree.structure, blocks))) > 1:
                raise UserError(
                    "train.scan_layers needs blocks with equal parameters, equally trained or frozen; "
                    "here the blocks differ: set train.scan_layers=false"
                )
            if own:
                stacked[f"from_{first}_step_{step}"] = jax.tree.map(_join, *blocks)
        stacked = stacked.get("from_0_step_1", stacked)
        return rest | ({"blocks": stacked} if stacked else {})

    return jax.tree.map(convert, tree, is_leaf=_has_separate_blocks)


def unstack(tree: PyTree) -> PyTree:
    """The inverse of `stack`, bit for bit; a tree that is not stacked is returned unchanged."""
    # A part of an optimizer's state may hold no array of the blocks; take their number from another part.
    num_blocks = {
        (str(path[-1:]), group): leaf.shape[0]
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_has_stacked_blocks)
        if _has_stacked_blocks(node)
        for group, blocks in stacked_groups(node["blocks"]).items()
        for leaf in jax.tree.leaves(blocks)[:1]
    }

    def convert(path, node):
        if not _has_stacked_blocks(node):
            return node
        blocks = {}
        for group, stacked in stacked_groups(node["blocks"]).items():
            own = [leaf.shape[0] for leaf in jax.tree.leaves(stacked)[:1]]  # a teacher may have more blocks
            for i in range(own[0] if own else num_blocks.get((str(path[-1:]), group), 0)):
                blocks[group[0] + i * group[1]] = jax.tree.map(lambda x, i=i: _layer(x, i), stacked)
        rest = {name: x for name, x in node.items() if name != "blocks"}
        return rest | {f"block_{i}": blocks[i] for i in sorted(blocks)}

    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=_has_stacked_blocks)


def stacked_groups(blocks: dict[str, Any]) -> dict[Group, Any]:
    """{group: leaves [R, ...]} of the value of "blocks", in the order of the groups."""
    named = {name: re.fullmatch(r"from_(\d+)_step_(\d+)", name) for name in blocks}
    groups = {(int(m[1]), int(m[2])): blocks[name] for name, m in named.items() if m}
    return {group: groups[group] for group in sorted(groups)} or {(0, 1): blocks}


def groups_of(tree: PyTree) -> tuple[Group, ...]:
    """The groups by which `stack` stacked a tree."""
    nodes = [x for x in jax.tree.leaves(tree, is_leaf=_has_stacked_blocks) if _has_stacked_blocks(x)]
    return tuple(sorted({group for node in nodes for group in stacked_groups(node["blocks"])}))


def is_stacked(tree: PyTree) -> bool:
    """Whether a tree holds stacked blocks."""
    return any(map(_has_stacked_blocks, jax.tree.leaves(tree, is_leaf=_has_stacked_blocks)))


def vmap_over_layers(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer, vmapped over L of stacked blocks; unchanged for other leaves.

    It sees a stacked kernel [L, D, F] as L matrices, and a stacked scale [L, D] as L vectors.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def axes(tree):  # of jax.vmap: 0 for stacked leaves, None for others
        return jax.tree_util.tree_map_with_path(
            lambda path, _: 0 if STACKED.search(jax.tree_util.keystr(path, simple=True, separator="/")) else None, tree
        )

    def init(params):
        if not is_stacked(params):
            return optimizer.init(params)
        one_layer = jax.tree.map(
            lambda x, axis: jax.ShapeDtypeStruct(x.shape if axis is None else x.shape[1:], x.dtype),
            params,
            axes(params),
        )
        state_axes = axes(jax.eval_shape(optimizer.init, one_layer))
        return jax.vmap(optimizer.init, (axes(params),), state_axes)(params)

    def update(updates, state, params=None, **extra):
        if not is_stacked(updates):
            return optimizer.update(updates, state, params, **extra)
        results = axes(updates), axes(state)
        update_layer = jax.vmap(lambda *trees: optimizer.update(*trees, **extra), (*results, axes(params)), results)
        return update_layer(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_block_name(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"block_\d+", name))


def _has_separate_blocks(node: Any) -> bool:
    return isinstance(node, dict) and any(map(_is_block_name, node))


def _has_stacked_blocks(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("blocks"), dict)


def _join(*layers):
    x = layers[0]
    if not isinstance(x, jax.ShapeDtypeStruct):
        return jnp.stack(layers)
    sharding = _with_spec(x.sharding, lambda spec: (None, *spec))
    return jax.ShapeDtypeStruct((len(layers), *x.shape), x.dtype, sharding=sharding)


def _layer(x, i):
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x[i]
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=_with_spec(x.sharding, lambda spec: spec[1:]))


def _with_spec(sharding, change: Callable[[Any], Any]):
    """A sharding with a changed PartitionSpec; any other kind of sharding unchanged."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, P(*change(sharding.spec)))
