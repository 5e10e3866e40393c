"""Cheap adaptation, as transforms of the parameter tree: add adapters, choose what is trained, fold
adapters into plain weights. The layers apply what their parameters hold: layers.adapt, blocks.Block
and Stack, attention.Attention. The peft library's files are peft_format's.

    params = peft.add(params, config.peft, rng)
    trained, frozen = peft.split(params, peft.trainable(params, config.peft))
    model.apply({"params": peft.join(trained, frozen)}, tokens)

`trained` alone is differentiated, held by the optimizer and saved.
"""

import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax.config import validate
from nanoflax.errors import UserError
from nanoflax.layers import column_lengths, low_rank

LOW_RANK = ("lora", "dora", "adalora")
_ADAPTER = re.compile(r"(.*/)?(lora_\w+|adapter_\w+/.+|prefix_\w+|prompt)")
_HEAD = r"(unembed|logit_bias|transform|norm_transform|pooler|labels|delay)(/.*)?"
# What an LSTM reads inside a scan, where no adapter is applied.
_MATRIX = r"(query|combine|decoder_\d+|encoder_\d+/(forward|backward))/kernel"


def add(params, peft_config, rng):
    """Parameters with the adapters of a PeftConfig among them, float32. rng: a PRNG key.

    LoRA, AdaLoRA and bottleneck adapters at first change nothing at all, DoRA only by rounding; a
    prompt begins as random rows of the embedding. Can be traced: `jax.eval_shape` gives the shapes.
    Raises: UserError for a bad configuration, one that finds no place in the model, or adapters
    that are there already.
    """
    c, flat = peft_config, flatten_dict(params, sep="/")
    validate(c)
    if any(map(_ADAPTER.fullmatch, flat)):
        raise UserError("the parameters hold adapters already; merge them first")
    if c.kind == "none":
        return params
    places = _places(flat, c)
    for key, (place, make) in zip(jax.random.split(rng, len(places)), sorted(places.items())):
        flat |= {place + name: leaf for name, leaf in make(key).items()}
    return unflatten_dict(flat, sep="/")


def _places(flat, c):
    """Where adapters go, and how they are made: {start of their paths: key -> {end: leaf}}."""
    kernels = {path.removesuffix("/kernel"): x for path, x in flat.items()
               if path.endswith("/kernel") and not re.fullmatch(_MATRIX, path)}
    places = {}
    for path, kernel in kernels.items():
        block, _, part = path.rpartition("/block_")
        part = part.partition("/")[2] if block else ""
        if c.kind in LOW_RANK and re.search(rf"(^|/)({c.targets})$", path):
            places[f"{path}/"] = partial(_low_rank, c, kernel)
        elif c.kind == "prefix" and part == "attention/key":
            start = path.removesuffix("key") + "prefix_"
            places[start] = partial(_prefix, (c.virtual_tokens, kernel.shape[1]))
        elif name := _SUBLAYERS.get(c.kind, {}).get(part):
            start = path.removesuffix(part) + f"adapter_{name}/"
            places[start] = partial(_bottleneck, kernel.shape[1], c.bottleneck)
    if c.kind == "prompt":
        stacks = [name for name in ("encoder", "decoder") if f"{name}/block_0/mlp/up" in kernels]
        if any(f"{name}/relative_bias/embedding" in flat for name in stacks[:1]):
            raise UserError("peft.kind='prompt' does not go with relative positions: padding would "
                            "count as distance from the prompt; use prefix")
        table = flat["embed/embedding"]
        places |= {f"{stack}/": lambda rng: {"prompt": jax.random.choice(
            rng, table, (c.virtual_tokens,)).astype(jnp.float32)} for stack in stacks[:1]}
    if not places and c.kind in LOW_RANK:
        known = sorted({re.sub(r"block_\d+", "block_*", path) for path in kernels})
        raise UserError(f"peft.targets={c.targets!r} is the end of none of {', '.join(known)}")
    if not places:
        raise UserError(f"peft.kind={c.kind!r} needs a Transformer; this model has no blocks")
    if "unembed/" in places:
        raise UserError(f"peft.targets={c.targets!r} includes the output head, which losses read "
                        "as a plain matrix; train it whole with peft.trained='adapters,head'")
    return places


_PFEIFFER = {"mlp/down": "mlp"}  # what a sublayer ends with, and its name in blocks.Block
_HOULSBY = _PFEIFFER | {"attention/out": "attention", "cross_attention/out": "cross"}
_SUBLAYERS = {"houlsby": _HOULSBY, "pfeiffer": _PFEIFFER}


def _low_rank(c, kernel, rng):
    D_in, D_out = kernel.shape
    leaves = {"lora_scale": jnp.float32(c.alpha / c.rank**(0.5 if c.rank_stabilized else 1))}
    if c.kind == "adalora":
        a, b = jax.random.split(rng)
        return leaves | {"lora_a": 0.02 * jax.random.normal(a, (D_in, c.rank)),
                         "lora_b": 0.02 * jax.random.normal(b, (c.rank, D_out)),
                         "lora_e": jnp.zeros(c.rank), "lora_mask": jnp.ones(c.rank)}
    bound = D_in**-0.5
    leaves |= {"lora_a": jax.random.uniform(rng, (D_in, c.rank), minval=-bound, maxval=bound),
               "lora_b": jnp.zeros((c.rank, D_out))}
    if c.kind == "dora":
        leaves["lora_magnitude"] = column_lengths(kernel.astype(jnp.float32))
    return leaves


def _prefix(shape, rng):
    key, value = jax.random.split(rng)
    return {"key": 0.02 * jax.random.normal(key, shape),
            "value": 0.02 * jax.random.normal(value, shape)}


def _bottleneck(dim, hidden, rng):
    return {"down/kernel": 0.02 * jax.random.normal(rng, (dim, hidden)),
            "down/bias": jnp.zeros(hidden),
            "up/kernel": jnp.zeros((hidden, dim)), "up/bias": jnp.zeros(dim)}


def trainable(params, peft_config):
    """Which parameters are trained, by peft_config.trained: a tree of bool.

    The scale and mask of low-rank adapters belong to the adapters; no gradient reaches them.
    Raises: UserError for a part of it that no parameter fits, or adapters that are not trained.
    """
    flat = flatten_dict(params, sep="/")
    default = "all" if peft_config.kind == "none" else "adapters"
    chosen = set()
    for part in (peft_config.trained or default).split(","):
        pattern = {"all": r".*", "adapters": _ADAPTER, "head": _HEAD, "biases": r"(.*/)?\w*bias"
                   }.get(part) or _last_blocks(flat, part) or rf"(.*/)?({part})(/.*)?"
        found = {path for path in flat if re.fullmatch(pattern, path)}
        if not found:
            raise UserError(f"peft.trained={part!r} fits no parameter of this model")
        chosen |= found
    if peft_config.kind != "none" and not any(re.fullmatch(_ADAPTER, path) for path in chosen):
        raise UserError(f"peft.trained={peft_config.trained!r} leaves the adapters of "
                        f"peft.kind={peft_config.kind!r} out: add adapters, or set peft.kind=none")
    return unflatten_dict({path: path in chosen for path in flat}, sep="/")


def _last_blocks(flat, part):
    """The pattern of `last:N`, or None."""
    if not (m := re.fullmatch(r"last:(\d+)", part)):
        return None
    matches = [re.match(r"(encoder|decoder)/block_(\d+)/", path) for path in flat]
    stack = min((m[1] for m in matches if m), default="")  # a decoder, if there is one
    count = 1 + max((int(m[2]) for m in matches if m and m[1] == stack), default=0)
    blocks = "|".join(str(i) for i in range(max(count - int(m[1]), 0), count))
    return rf"{stack}/(block_({blocks})|norm)/.*|{_HEAD}"


def split(params, mask):
    """(the parameters where a tree of bool is true, the others): nested dicts without holes."""
    flat, mask = flatten_dict(params), flatten_dict(mask)
    return tuple(unflatten_dict({path: x for path, x in flat.items() if mask[path] == wanted})
                 for wanted in (True, False))


def join(trained, frozen):
    """The parameters that `split` took apart."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained))


def merge(params):
    """Plain parameters that compute the same: low-rank adapters folded into their kernels.

    Raises: UserError for adapters of another kind, which no plain weights can stand for.
    """
    flat = flatten_dict(params, sep="/")
    linears = [path.removesuffix("lora_a") for path in flat if path.endswith("/lora_a")]
    for start in linears:
        p = {path.removeprefix(start): flat[path] for path in list(flat)
             if path.startswith(f"{start}lora_") or path == f"{start}kernel"}
        w = p["kernel"].astype(jnp.float32) + low_rank(p)
        if "lora_magnitude" in p:
            w = w * (p["lora_magnitude"] / column_lengths(w))
        flat = {path: x for path, x in flat.items() if not path.startswith(f"{start}lora_")}
        flat[f"{start}kernel"] = w.astype(p["kernel"].dtype)
    if left := sorted(filter(_ADAPTER.fullmatch, flat)):
        raise UserError(f"{left[0]} cannot be merged; only LoRA, DoRA and AdaLoRA can")
    return unflatten_dict(flat, sep="/")


# AdaLoRA (Zhang et al. 2023).


class AdaLoraState(NamedTuple):
    """What `adalora_update` hands on: two averages for every entry of lora_a, lora_b and lora_e,
    {path: array}."""

    sensitivity: dict
    uncertainty: dict


def adalora(optimizer, peft_config, steps):
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
        updates = jax.tree.map(lambda u, p, m, new: jnp.where(new == m, u, new - p),
                               updates, params, moved, masked)
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
        raise UserError("peft.trained must include the whole of AdaLoRA's adapters, so that ranks "
                        "can be weighed")
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
    spread = {path: c.beta2 * state.uncertainty[path] + (1 - c.beta2) * jnp.abs(x - mean[path])
              for path, x in now.items()}
    score = {path: mean[path] * spread[path] for path in now}  # equations 9 to 11
    linears = sorted(path.removesuffix("lora_e") for path in now if path.endswith("/lora_e"))
    scores = [score[f"{p}lora_e"] + score[f"{p}lora_a"].mean(0) + score[f"{p}lora_b"].mean(1)
              for p in linears]
    order = jnp.argsort(jnp.argsort(-jnp.concatenate(scores)))
    keep = (order < adalora_budget(step, steps, order.size, len(linears), c)).astype(jnp.float32)
    sizes = np.cumsum([len(s) for s in scores])
    left = sum(flat[f"{p}lora_mask"].sum() for p in linears)
    final = (step > steps - c.final_steps) & (left == len(linears) * c.target_rank)
    for p, mask in zip(linears, jnp.split(keep, sizes[:-1])):
        mask = jnp.where(final, flat[f"{p}lora_mask"], mask)
        flat |= {f"{p}lora_mask": mask, f"{p}lora_e": flat[f"{p}lora_e"] * mask}
    return AdaLoraState(mean, spread), unflatten_dict(flat, sep="/")


def adalora_budget(step, steps, ranks, linears, peft_config):
    """How many of `ranks` in all stay at a step, () int32: all, a cubic fall, the target."""
    c, target = peft_config, linears * peft_config.target_rank
    left = (steps - c.final_steps - step) / (steps - c.final_steps - c.warmup_steps)
    return jnp.floor((ranks - target) * jnp.clip(left, 0, 1)**3 + target).astype(jnp.int32)


def orthogonality(params):
    """AdaLoRA's penalty, a float32 scalar to add to the mean loss times peft_config.orthogonality.

    The mean of the Frobenius norms of a^T a - I and b b^T - I; the paper's sum of squares would
    weigh more in a larger model.
    """
    flat = flatten_dict(params, sep="/")
    norms = [jnp.sqrt(((w @ w.T - jnp.eye(len(w)))**2).sum() + 1e-12)
             for path, x in flat.items() if re.search(r"/lora_[ab]$", path)
             for w in [x.T if path.endswith("a") else x]]
    return sum(norms) / len(norms)
