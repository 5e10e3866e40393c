"""Deep models: the parameters of the blocks of a stack, stacked along a leading dimension L.

Everywhere else parameters are a tree per block, {"decoder": {"block_0": .., "block_1": .., ..}}.
With train.scan_layers a training state (parameters, optimizer state, moving average) holds them
as {"decoder": {"blocks": ..}}, each leaf [L, ...], and its step compiles one block scanned over L,
not L blocks. Who reads either needs no flag: a model runs what its parameters hold (blocks.Stack),
the optimizer takes a layer for a layer (`vmap_over_layers`), the table of `sharding` covers both, a
checkpoint of one is restored into the other, and `checkpoint.restore_params` gives a tree per
block.
"""

import re

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflax.errors import UserError

STACKED = re.compile(r"(^|/)blocks/")  # in the path of a stacked leaf


def stack(tree):
    """A tree with the blocks of every stack in it as one: {block_0, ..} becomes {blocks}, [L, ...].

    tree: parameters, optimizer state or a whole training state, of arrays or of ShapeDtypeStructs
    (which keep their shardings).
    Raises: UserError if the blocks of a stack are not alike, as when only some of them are trained.
    """

    def one(holder):
        if not _per_block(holder):
            return holder
        blocks = [holder.get(f"block_{i}") for i in range(sum(map(_is_block, holder)))]
        if None in blocks or len(set(map(jax.tree.structure, blocks))) > 1:
            raise UserError(
                "train.scan_layers needs every block to hold, and to train, the same "
                "parameters; these differ from block to block: set it to false"
            )
        rest = {name: x for name, x in holder.items() if not _is_block(name)}
        return rest | {"blocks": jax.tree.map(_join, *blocks)}

    return jax.tree.map(one, tree, is_leaf=_per_block)


def unstack(tree):
    """The inverse of `stack`, to the bit; what is not stacked stays as it is."""
    # Where an optimizer holds nothing of the blocks, another part of the tree knows how many.
    depth = {
        str(path[-1:]): leaf.shape[0]
        for path, holder in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_stacked)
        if _is_stacked(holder)
        for leaf in jax.tree.leaves(holder["blocks"])[:1]
    }

    def one(path, holder):
        if not _is_stacked(holder):
            return holder
        blocks = {
            f"block_{i}": jax.tree.map(lambda x, i=i: _part(x, i), holder["blocks"])
            for i in range(depth.get(str(path[-1:]), 0))
        }
        return {name: x for name, x in holder.items() if name != "blocks"} | blocks

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_stacked)


def is_stacked(tree):
    """Whether a tree holds stacked blocks."""
    return any(map(_is_stacked, jax.tree.leaves(tree, is_leaf=_is_stacked)))


def vmap_over_layers(optimizer):
    """An optax transformation that takes each layer of stacked blocks for parameters of its own: a
    kernel [L, D, F] for L matrices, a norm's scale [L, D] for L vectors. Other leaves as before."""
    optimizer = optax.with_extra_args_support(optimizer)

    def axes(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: 0 if STACKED.search(jax.tree_util.keystr(path, simple=True, separator="/")) else None, tree
        )

    def init(params):
        if not is_stacked(params):
            return optimizer.init(params)
        layer = jax.tree.map(
            lambda x, axis: jax.ShapeDtypeStruct(x.shape if axis is None else x.shape[1:], x.dtype),
            params,
            axes(params),
        )
        state = axes(jax.eval_shape(optimizer.init, layer))
        return jax.vmap(optimizer.init, (axes(params),), state)(params)

    def update(updates, state, params=None, **extra):
        if not is_stacked(updates):
            return optimizer.update(updates, state, params, **extra)
        places = axes(updates), axes(state)
        return jax.vmap(lambda *trees: optimizer.update(*trees, **extra), (*places, axes(params)), places)(
            updates, state, params
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _is_block(name):
    return isinstance(name, str) and bool(re.fullmatch(r"block_\d+", name))


def _per_block(x):
    return isinstance(x, dict) and any(map(_is_block, x))


def _is_stacked(x):
    return isinstance(x, dict) and isinstance(x.get("blocks"), dict)


def _join(*layers):
    x = layers[0]
    if not isinstance(x, jax.ShapeDtypeStruct):
        return jnp.stack(layers)
    return jax.ShapeDtypeStruct(
        (len(layers), *x.shape), x.dtype, sharding=_resharded(x.sharding, lambda spec: (None, *spec))
    )


def _part(x, i):
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x[i]
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=_resharded(x.sharding, lambda spec: spec[1:]))


def _resharded(sharding, change):
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, P(*change(sharding.spec)))
