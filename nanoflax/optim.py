"""Optimizers and schedules: optax chains chosen by an OptimConfig."""

import re
from functools import partial

import jax
import optax


def make_schedule(config, steps, peak):
    """Learning rate by step: linear warmup to `peak`, then the schedule to end_factor * peak.

    cosine, linear, constant, or wsd: constant, then linear over the last decay_fraction of the
    steps (warmup-stable-decay, Hu et al. 2024).
    """
    warmup, end = config.warmup_steps, config.end_factor * peak
    rest = max(steps - warmup, 1)
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.end_factor)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, end, rest)
    elif config.schedule == "wsd":
        decay = max(1, min(rest, round(steps * config.decay_fraction)))
        after = optax.linear_schedule(peak, end, decay, transition_begin=rest - decay)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([ramp, after], [warmup])


def is_kernel(path, leaf):
    """Whether a parameter is a matrix between hidden states: neither embedding, head nor vector."""
    names = [getattr(p, "key", None) for p in path]
    return leaf.ndim == 2 and names[-1] == "kernel" and "unembed" not in names


def decay_mask(params):
    """True for the parameters that weight decay pulls on: matrices, but no embedding."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim >= 2 and getattr(path[-1], "key", None) != "embedding", params)


def layers_above(params):
    """How many layers stand above each parameter, a tree of int: 0 for the head and the last norm,
    1 for the last block, the most for the embeddings. An encoder's blocks stand below a decoder's.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    blocks = [m.groups() for m in map(_BLOCK.match, paths) if m]
    count = {stack: max((int(i) + 1 for name, i in blocks if name == stack), default=0)
             for stack in ("encoder", "decoder")}

    def above(path, _):
        path = path_of(path)
        if m := _BLOCK.match(path):
            return count[m[1]] - int(m[2]) + (count["decoder"] if m[1] == "encoder" else 0)
        if re.search(r"(?<!un)embed|relative_bias|prompt", path):
            return 1 + sum(count.values())
        return count["decoder"] if path.startswith("encoder/") else 0

    return jax.tree_util.tree_map_with_path(above, params)


_BLOCK = re.compile(r"(encoder|decoder)/block_(\d+)/")


def path_of(path):
    """A path of JAX's as text, such as `decoder/norm/scale`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def layerwise_decay(decay):
    """An optax transformation, last in a chain: updates times decay^n under n layers (Howard and
    Ruder 2018). A tied embedding is an embedding, not a head."""
    return optax.stateless(lambda updates, _: jax.tree.map(
        lambda u, n: u * decay**n, updates, layers_above(updates)))


def make_optimizer(config, steps):
    """The optax transformation of an OptimConfig over a run of `steps`.

    Muon (Jordan 2024) orthogonalises the hidden matrices and leaves the rest to AdamW, here with
    Nesterov momentum (NAdam).
    Returns (optax.GradientTransformation, schedule of the learning rate).
    """
    c, schedule = config, make_schedule(config, steps, config.learning_rate)
    decay = {"weight_decay": c.weight_decay}
    if c.name == "adamw":
        tx = optax.adamw(schedule, c.b1, c.b2, c.eps, mask=decay_mask, **decay)
    elif c.name == "muon":
        # Its own AdamW would decay all of the rest or none: not the head alone.
        tx = optax.partition({
            True: optax.contrib.muon(make_schedule(c, steps, c.muon_learning_rate), beta=0.95,
                                     **decay),
            False: optax.adamw(schedule, c.b1, c.b2, c.eps, mask=decay_mask, nesterov=True,
                               **decay)}, partial(jax.tree_util.tree_map_with_path, is_kernel))
    elif c.name == "lion":
        tx = optax.lion(schedule, c.b1, c.b2, mask=decay_mask, **decay)
    elif c.name == "adafactor":
        # Its own weight decay is not scaled by the learning rate.
        tx = optax.chain(optax.adafactor(multiply_by_parameter_scale=False),
                         optax.add_decayed_weights(-c.weight_decay, decay_mask),
                         optax.scale_by_schedule(schedule))
    else:
        tx = optax.chain(optax.add_decayed_weights(c.weight_decay, decay_mask),
                         optax.sgd(schedule, momentum=c.b1, nesterov=True))
    if c.layer_decay != 1:
        tx = optax.chain(tx, layerwise_decay(c.layer_decay))
    if c.clip:
        tx = optax.chain(optax.clip_by_global_norm(c.clip), tx)
    return tx, schedule
