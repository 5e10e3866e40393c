"""AdaLoRA (Zhang et al. 2023): low-rank adapters whose ranks are pruned to a budget."""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax.config import AdaLoRA
from nanoflax.errors import UserError


class AdaLoraState(NamedTuple):
    """Moving averages of each entry of lora_a, lora_b and lora_e: {path: array}."""

    sensitivity: dict
    uncertainty: dict


def adalora_optimizer(
    optimizer: optax.GradientTransformation, peft_config: AdaLoRA, steps: int
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with the gradient of the penalty added, followed by `adalora_update`.

    Its update takes `step`, [] int32 from 1, in addition to the mean gradients of the loss.
    """
    c, optimizer = peft_config, optax.with_extra_args_support(optimizer)

    def init(params):
        return {"optimizer": optimizer.init(params), "ranks": adalora_init(params)}

    def update(grads, state, params, *, step, **_):
        penalty_grads = jax.grad(orthogonality)(params)
        grads = jax.tree.map(lambda g, penalty: g + c.orthogonality * penalty, grads, penalty_grads)
        updates, inner = optimizer.update(grads, state["optimizer"], params)
        moved = optax.apply_updates(params, updates)
        ranks, masked = adalora_update(state["ranks"], moved, grads, step, steps, c)
        # An unmasked parameter keeps its update bit by bit; a masked one becomes exactly 0.
        updates = jax.tree.map(lambda u, p, m, new: jnp.where(new == m, u, new - p), updates, params, moved, masked)
        return updates, {"optimizer": inner, "ranks": ranks}

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore  # `step` is one of the extra args


def adalora_init(params: dict) -> AdaLoraState:
    """The state before the first step: zeros.

    Raises: UserError if params lack a part of an adapter, or all adapters.
    """
    flat: Any = flatten_dict(params, sep="/")
    entries = {path: x for path, x in flat.items() if re.search(r"/lora_[abe]$", path)}
    needed = {path.rpartition("/")[0] + "/lora_" + end for path in entries for end in "abe"}
    if not entries or entries.keys() != needed:
        raise UserError("peft.trained must include all parts of AdaLoRA's adapters (write adapters into it)")
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return AdaLoraState(zeros(entries), zeros(entries))


def adalora_update(
    state: AdaLoraState, params: Any, grads: Any, step: jax.Array, steps: int, peft_config: AdaLoRA
) -> tuple[AdaLoraState, dict]:
    """Score every rank after an optimizer's step, and mask all but the budget of the step.

    params: after the step; grads: of the step; step: [] int32 from 1, of `steps`. No shape changes.
    From step steps - final_steps on, exactly target_rank ranks per matrix are left on average; until
    then a masked rank may return. Of equal scores the first is kept.
    Returns (state, params).
    """
    c = peft_config
    flat: Any = flatten_dict(params, sep="/")
    flat_grads: Any = flatten_dict(grads, sep="/")
    now = {path: jnp.abs(flat[path] * flat_grads[path]) for path in state.sensitivity}  # equation 8
    mean = {path: c.beta1 * state.sensitivity[path] + (1 - c.beta1) * x for path, x in now.items()}
    spread = {
        path: c.beta2 * state.uncertainty[path] + (1 - c.beta2) * jnp.abs(x - mean[path]) for path, x in now.items()
    }
    score = {path: mean[path] * spread[path] for path in now}  # equations 9 to 11
    linears = sorted(path.removesuffix("lora_e") for path in now if path.endswith("/lora_e"))
    scores = [score[f"{p}lora_e"] + score[f"{p}lora_a"].mean(0) + score[f"{p}lora_b"].mean(1) for p in linears]
    place = jnp.argsort(jnp.argsort(-jnp.concatenate(scores)))  # of each rank among all, by its score: 0 is the best
    keep = (place < adalora_budget(step, steps, place.size, len(linears), c)).astype(jnp.float32)
    sizes = np.cumsum([len(s) for s in scores])
    left = sum(flat[f"{p}lora_mask"].sum() for p in linears)
    final = (step > steps - c.schedule(steps)[1]) & (left == len(linears) * c.target_rank)
    for p, mask in zip(linears, jnp.split(keep, sizes[:-1]), strict=True):
        mask = jnp.where(final, flat[f"{p}lora_mask"], mask)
        flat |= {f"{p}lora_mask": mask, f"{p}lora_e": flat[f"{p}lora_e"] * mask}
    return AdaLoraState(mean, spread), unflatten_dict(flat, sep="/")


def adalora_budget(step: jax.Array, steps: int, ranks: int, linears: int, peft_config: AdaLoRA) -> jax.Array:
    """The number of all `ranks` to keep at a step, [] int32: all, then a cubic decay to the target
    (Zhang et al. 2023, section 3.3)."""
    c, target = peft_config, linears * peft_config.target_rank
    warmup, final = c.schedule(steps)
    left = (steps - final - step) / (steps - final - warmup)
    return jnp.floor((ranks - target) * jnp.clip(left, 0, 1) ** 3 + target).astype(jnp.int32)


def orthogonality(params: dict) -> jax.Array:
    """The penalty, [] float32; the mean loss plus peft_config.orthogonality times the penalty is minimised.

    The mean of the Frobenius norms of a^T a - I and b b^T - I. The paper's sum of squares grows with
    the size of the model.
    """
    flat: Any = flatten_dict(params, sep="/")
    matrices = [x.T if path.endswith("/lora_a") else x for path, x in flat.items() if re.search(r"/lora_[ab]$", path)]
    norms = [jnp.sqrt(((w @ w.T - jnp.eye(len(w))) ** 2).sum() + 1e-12) for w in matrices]
    return sum(norms) / len(norms)  # type: ignore  # not the number 0: there are adapters
