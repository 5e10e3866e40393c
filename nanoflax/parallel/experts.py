"""The experts of a layer, split over a mesh: each device computes with its own experts (axis `expert`).

Devices along `expert` gather each other's tokens, and the sums of what their experts give go back to the
tokens' devices (a reduce-scatter). No token is dropped. An all-to-all with room for every token, which
dropless routing needs, moves min(k, E / devices) times these bytes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from nanoflax.errors import UserError
from nanoflax.parallel.constraints import BATCH, axes_in_mesh, batch_splits, current_mesh
from nanoflax.parallel.rules import partition_spec

Tokens = Float[Array, "B T D"]


def map_tokens(function: Callable[..., PyTree], x: Float[Array, "B T ..."], *others: PyTree) -> PyTree:
    """function(x, *others), each device with its own tokens of x; the results are [B, T, ...]. XLA would gather all
    tokens on every device for a top_k."""
    mesh = current_mesh()
    if mesh is None:
        return function(x, *others)
    tokens = _spec_of_tokens(x, mesh)
    in_specs = (tokens, *[P()] * len(others))
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=tokens)(x, *others)


def _spec_of_tokens(x, mesh):
    """The split of tokens [B, T, ...]; a dimension that its axes do not divide is not split."""
    splits = zip(batch_splits(*x.shape[:2]), BATCH, strict=True)
    return P(*(axes_in_mesh(axes, mesh) if parts > 1 else None for parts, axes in splits))


def map_experts(
    function: Callable[..., Tokens],
    x: Tokens,
    chosen: Int[Array, "B T k"],
    weights: Float[Array, "B T k"],
    params: PyTree,
) -> Tokens:
    """function(x, chosen, weights, params), each device with its own rows and experts; one call without a mesh.

    chosen: the experts of each token; a number of E or more is no expert of this device. weights: their
    factors. params: {up, down, ...} of arrays [E, ...]. The function sums over experts and is linear in `down`.
    An axis that does not divide one of the parameters splits none of them. A model that is trained has no such axis.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(x, chosen, weights, params)
    b, tokens = batch_splits(x.shape[0], x.shape[1])[0], _spec_of_tokens(x, mesh)
    size = {axis: mesh.shape.get(axis, 1) for axis in ("fsdp", "tensor", "expert")}
    if b == 1:  # rows that are not split: XLA gathers the parameters before
        size["fsdp"] = 1

    def rule_of(path, leaf):
        return partition_spec("mlp/experts/" + jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)

    rules = jax.tree_util.tree_map_with_path(rule_of, params)
    for leaf, rule in zip(jax.tree.leaves(params), jax.tree.leaves(rules), strict=True):
        size |= {axis: 1 for axis, n in zip(rule, leaf.shape, strict=False) if n % size.get(axis, 1)}
    specs = jax.tree.map(lambda rule: P(*(axis if size.get(axis, 1) > 1 else None for axis in rule)), rules)

    if size["tensor"] > 1 and any(leaf.dtype == jnp.uint8 for leaf in jax.tree.leaves(params)):
        raise UserError(f"tensor={size['tensor']} does not work with experts of 4 bits; use quantize='int8'")

    def complete(path, leaf, spec):
        """A parameter with all of D, and a bias of `down` that is added once by all devices along tensor together."""
        if "fsdp" in spec:
            leaf = jax.lax.all_gather(leaf, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)
            leaf = checkpoint_name(leaf, "gathered")  # gathered again backward, not kept
        return leaf / size["tensor"] if jax.tree_util.keystr(path, simple=True, separator="/") == "down/bias" else leaf

    def of_device(x, chosen, weights, params):
        params = jax.tree_util.tree_map_with_path(complete, params, specs)
        if size["tensor"] > 1:  # so that gradients are summed over tensor for each token, not for each expert of it
            x, weights = (jax.lax.pcast(a, "tensor", to="varying") for a in (x, weights))
        if size["expert"] > 1:
            if b > 1:
                x, chosen, weights = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x, chosen, weights))
            own = params["down"]["kernel"].shape[0]
            chosen = chosen - own * jax.lax.axis_index("expert")
            chosen = jnp.where((chosen >= 0) & (chosen < own), chosen, own)
        # A gradient by `jax.custom_vjp` has the axes of x, and each parameter must have them too.
        of_x = jax.typeof(x).manual_axis_type.varying
        params = jax.tree.map(
            lambda p: jax.lax.pcast(p, tuple(of_x - jax.typeof(p).manual_axis_type.varying), to="varying"), params
        )
        y = function(x, chosen, weights, params)
        if size["expert"] > 1:
            y = jax.lax.psum_scatter(y, "expert", tiled=True) if b > 1 else jax.lax.psum(y, "expert")
        return jax.lax.psum(y, "tensor") if size["tensor"] > 1 else y

    of_device = jax.checkpoint(of_device, policy=jax.checkpoint_policies.save_anything_except_these_names("gathered"))
    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens)
    return mapped(x, chosen, weights, params)
