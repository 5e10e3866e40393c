"""AdaLoRA (Zhang et al. 2023): low-rank adapters whose ranks are pruned to a budget."""

import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax.errors import UserError

# AdaLoRA (Zhang et al. 2023).


class AdaLoraState(NamedTuple):
    """What `adalora_update` hands on: two averages for every entry of lora_a, lora_b and lora_e,
    {path: array}."""

    sensitivity: dict
    uncertainty: dict


def adalora_optimizer(optimizer, peft_config, steps):
    """An optax transformation: `optimizer` with the penalty's gradient added, then adalora_update.

    Its update takes `step`, () int32 from 1, beside the mean gradients of the loss.
    """
    c, optimizer = peft_config, optax.with_extra_args_support(optimizer)

    def init(params):
        return {"optimizer": optimizer.init(params), "ranks": adalora_init(params)}

    def update(grads, state, params, *, step, **_):
        slopes = jax.grad(orthogonality)(params)
        grads = jax.tree.map(lambda g, slope: g + c.orthogonality * slope, grads, slopes)
        updates, inner = optimizer.update(grads, state["optimizer"], params)
        moved = optax.apply_updates(params, updates)
        ranks, masked = adalora_update(state["ranks"], moved, grads, step, steps, c)
        # What was not masked keeps its update to the bit, what was becomes exactly 0.
        updates = jax.tree.map(lambda u, p, m, new: jnp.where(new == m, u, new - p), updates, params, moved, masked)
        return updates, {"optimizer": inner, "ranks": ranks}

    return optax.GradientTransformationExtraArgs(init, update)


def adalora_init(params):
    """The state before the first step, zeros; params need hold no more than the adapters.

    Raises: UserError if a part of an adapter, or all of them, is absent.
    """
    flat = flatten_dict(params, sep="/")
    entries = {path: x for path, x in flat.items() if re.search(r"/lora_[abe]$", path)}
    whole = {path.rpartition("/")[0] + "/lora_" + end for path in entries for end in "abe"}
    if not entries or entries.keys() != whole:
        raise UserError("peft.trained must include the whole of AdaLoRA's adapters, so that ranks can be weighed")
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return AdaLoraState(zeros(entries), zeros(entries))


def adalora_update(state, params, grads, step, steps, peft_config):
    """After an optimizer's step: weigh every rank, and mask all but the step's budget of them.

    params, grads: trees with the adapters, after and of the step; step: () int32 from 1, of
    `steps`. Nothing changes shape. From step steps - final_steps on exactly target_rank ranks a
    matrix are left, on average; until then those masked may come back. Ties go to the first.
    Returns (state, params).
    """
    c, flat, slopes = peft_config, flatten_dict(params, sep="/"), flatten_dict(grads, sep="/")
    now = {path: jnp.abs(flat[path] * slopes[path]) for path in state.sensitivity}  # equation 8
    mean = {path: c.beta1 * state.sensitivity[path] + (1 - c.beta1) * x for path, x in now.items()}
    spread = {
        path: c.beta2 * state.uncertainty[path] + (1 - c.beta2) * jnp.abs(x - mean[path]) for path, x in now.items()
    }
    score = {path: mean[path] * spread[path] for path in now}  # equations 9 to 11
    linears = sorted(path.removesuffix("lora_e") for path in now if path.endswith("/lora_e"))
    scores = [score[f"{p}lora_e"] + score[f"{p}lora_a"].mean(0) + score[f"{p}lora_b"].mean(1) for p in linears]
    order = jnp.argsort(jnp.argsort(-jnp.concatenate(scores)))
    keep = (order < adalora_budget(step, steps, order.size, len(linears), c)).astype(jnp.float32)
    sizes = np.cumsum([len(s) for s in scores])
    left = sum(flat[f"{p}lora_mask"].sum() for p in linears)
    final = (step > steps - c.final_steps) & (left == len(linears) * c.target_rank)
    for p, mask in zip(linears, jnp.split(keep, sizes[:-1]), strict=True):
        mask = jnp.where(final, flat[f"{p}lora_mask"], mask)
        flat |= {f"{p}lora_mask": mask, f"{p}lora_e": flat[f"{p}lora_e"] * mask}
    return AdaLoraState(mean, spread), unflatten_dict(flat, sep="/")


def adalora_budget(step, steps, ranks, linears, peft_config):
    """How many of `ranks` in all stay at a step, () int32: all, a cubic fall, the target."""
    c, target = peft_config, linears * peft_config.target_rank
    left = (steps - c.final_steps - step) / (steps - c.final_steps - c.warmup_steps)
    return jnp.floor((ranks - target) * jnp.clip(left, 0, 1) ** 3 + target).astype(jnp.int32)


def orthogonality(params):
    """AdaLoRA's penalty, a float32 scalar to add to the mean loss times peft_config.orthogonality.

    The mean of the Frobenius norms of a^T a - I and b b^T - I; the paper's sum of squares would
    weigh more in a larger model.
    """
    flat = flatten_dict(params, sep="/")
    norms = [
        jnp.sqrt(((w @ w.T - jnp.eye(len(w))) ** 2).sum() + 1e-12)
        for path, x in flat.items()
        if re.search(r"/lora_[ab]$", path)
        for w in [x.T if path.endswith("a") else x]
    ]
    return sum(norms) / len(norms)
