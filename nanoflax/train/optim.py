"""Optimizers and schedules: optax chains chosen by an OptimConfig."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanoflax import parallel
from nanoflax.config import RECIPES, OptimConfig, fill


def make_schedule(config: OptimConfig, steps: int, peak: float) -> optax.Schedule:
    """Learning rate by step: linear warmup to `peak`, then the schedule to end_factor * peak.

    cosine, linear, constant, or wsd: constant, then linear over the last decay_fraction of the
    steps (warmup-stable-decay, Hu et al. 2024). Fields that are none: those of a model from scratch.
    """
    config = fill(config, RECIPES["scratch"], steps)
    warmup, end_factor = config.warmup_steps, config.end_factor
    assert warmup is not None and end_factor is not None  # filled
    end = end_factor * peak
    rest = max(steps - warmup, 1)
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, end_factor)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, end, rest)
    elif config.schedule == "wsd":
        decay = max(1, min(rest, round(steps * config.decay_fraction)))
        after = optax.linear_schedule(peak, end, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([ramp, after], [warmup])


def is_kernel(path: tuple, leaf: Any) -> bool:
    """Whether a parameter is a matrix between hidden states, or one for each expert: not an embedding, the head, a
    router or a vector."""
    names = [getattr(p, "key", None) for p in path]
    return names[-1] == "kernel" and leaf.ndim == 2 + ("experts" in names) and not {"unembed", "router"} & {*names}


def matrix_axes(params: Any) -> Any:
    """A tree that says to Muon which two axes of a parameter are its matrices: the last two."""
    return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)


def decay_mask(params: Any) -> Any:
    """A tree of bool: True for the parameters with weight decay: all matrices except embeddings. The biases of
    experts [E, F] and the scales of heads [H, K] are vectors."""
    excluded = ("embedding", "bias", "scale")
    decays = lambda path, leaf: leaf.ndim >= 2 and getattr(path[-1], "key", None) not in excluded
    return jax.tree_util.tree_map_with_path(decays, params)


def layers_above(params: Any) -> Any:
    """The depth of each parameter below the output, a tree of int: 0 for the head and the last norm, 1
    for the last block, the maximum for embeddings. A decoder's blocks are above an encoder's blocks.
    For stacked blocks, an array of L ints that broadcasts to the leaf.
    """

    def index(block, leaf):
        if block["i"] is not None:
            return int(block["i"])
        first, step = int(block["first"] or 0), int(block["step"] or 1)
        return (first + step * np.arange(leaf.shape[0])).reshape(-1, *[1] * (leaf.ndim - 1))

    paths = [(path_of(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    blocks = [(m["stack"], np.max(index(m, x))) for path, x in paths if (m := _BLOCK.match(path))]
    blocks_in = lambda stack: max((int(i) + 1 for name, i in blocks if name == stack), default=0)
    count = {stack: blocks_in(stack) for stack in ("encoder", "decoder")}

    def above(path, leaf):
        path = path_of(path)
        if m := _BLOCK.match(path):
            under = count["decoder"] if m["stack"] == "encoder" else 0
            return count[m["stack"]] - index(m, leaf) + under
        if re.search(r"(?<!un)embed|relative_bias|prompt", path):
            return 1 + sum(count.values())
        return count["decoder"] if path.startswith("encoder/") else 0

    return jax.tree_util.tree_map_with_path(above, params)


_BLOCK = re.compile(r"(?P<stack>encoder|decoder)/(blocks(/from_(?P<first>\d+)_step_(?P<step>\d+))?|block_(?P<i>\d+))/")


def path_of(path: tuple) -> str:
    """A key path of JAX as text, such as `decoder/norm/scale`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def layerwise_decay(decay: float) -> optax.GradientTransformation:
    """The last transformation of a chain: multiply the updates of a parameter below n layers by decay^n
    (Howard and Ruder 2018). A tied embedding counts as an embedding, not as the head."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, n: u * decay**n, updates, layers_above(updates)))


def at_step(opt_state: Any, step: Any) -> Any:
    """The state of an optimizer with its schedules at `step`. Skipped steps count for the schedule, so that the logged
    rate is the one in use and the schedule ends with the run, but not for the moments (as with torch's GradScaler)."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    put = lambda x: x._replace(count=jnp.full_like(x.count, step)) if is_schedule(x) else x
    return jax.tree.map(put, opt_state, is_leaf=is_schedule)


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer of a run of `steps`.

    Muon (Jordan 2024) orthogonalises the hidden matrices and leaves the rest to AdamW, here with
    Nesterov momentum (NAdam). Fields that are none: those of a model from scratch.
    Returns (optax.GradientTransformation, schedule of config.learning_rate; that of muon_learning_rate is
    proportional to it).
    """
    c = fill(config, RECIPES["scratch"], steps)
    assert c.learning_rate is not None  # filled
    schedule = make_schedule(c, steps, c.learning_rate)
    adamw = partial(optax.adamw, schedule, c.b1, c.b2, c.eps, mask=decay_mask, weight_decay=c.weight_decay)
    if c.name == "adamw":
        tx = adamw()
    elif c.name == "muon":
        # optax's muon decays all other parameters or none of them, but here only the head has weight decay.
        options: Any = dict(beta=0.95, weight_decay=c.weight_decay, muon_weight_dimension_numbers=matrix_axes)
        muon = optax.contrib.muon(make_schedule(c, steps, c.muon_learning_rate), **options)
        kinds = partial(jax.tree_util.tree_map_with_path, is_kernel)
        tx = optax.partition({True: muon, False: adamw(nesterov=True)}, kinds)
    elif c.name == "lion":
        tx = optax.lion(schedule, c.b1, c.b2, mask=decay_mask, weight_decay=c.weight_decay)
    elif c.name == "adafactor":
        # optax's adafactor does not scale weight decay by the learning rate.
        tx = optax.chain(
            optax.adafactor(multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-c.weight_decay, decay_mask),
            optax.scale_by_schedule(schedule),
        )
    else:
        sgd = optax.sgd(schedule, momentum=c.b1, nesterov=True)
        tx = optax.chain(optax.add_decayed_weights(c.weight_decay, decay_mask), sgd)
    tx = parallel.vmap_over_layers(tx)
    if c.layer_decay != 1:
        tx = optax.chain(tx, layerwise_decay(c.layer_decay))
    if c.clip:
        tx = optax.chain(optax.clip_by_global_norm(c.clip), tx)
    return tx, jax.jit(schedule)  # without jit, each operation of the schedule is compiled separately
