"""Cheap adaptation, as transforms of the parameter tree: add adapters, choose what is trained, fold
adapters into plain weights, exchange them with the `peft` library. The layers apply what their
parameters hold: layers.adapt, blocks.Block and Stack, attention.Attention.

    params = peft.add(params, config.peft, rng)
    trained, frozen = peft.split(params, peft.trainable(params, config.peft))
    model.apply({"params": peft.join(trained, frozen)}, tokens)

`trained` alone is differentiated, held by the optimizer and saved.
"""

import json
import pathlib
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax import families, hf, safetensors_io
from nanoflax.config import PeftConfig, validate
from nanoflax.errors import UserError
from nanoflax.layers import column_lengths, low_rank

LOW_RANK = ("lora", "dora", "adalora")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of the peft library
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
    Raises: UserError for a part of it that no parameter fits.
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


# The format of the `peft` library.

_KNOWN = """peft_type task_type auto_mapping peft_version base_model_name_or_path revision
    inference_mode r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias
    use_rslora use_dora init_lora_weights layers_to_transform layers_pattern rank_pattern
    megatron_core qalora_group_size ensure_weight_tying target_r init_r tinit tfinal deltaT beta1
    beta2 orth_reg_weight total_step""".split()
_SCHEDULE = {"target_rank": "target_r", "warmup_steps": "tinit", "final_steps": "tfinal",
             "beta1": "beta1", "beta2": "beta2", "orthogonality": "orth_reg_weight"}
_TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}


def save(directory, config, params, peft_config, base="", model_type=None):
    """Write the low-rank adapters among params as `peft` opens them over the model of `hf.save`.

    config: the ModelConfig; base: the name or directory of that model, for peft's Auto classes;
    model_type: its family, as in `hf.save`. What else peft_config.trained names, such as a head,
    goes along as their modules_to_save.
    Raises: UserError for other adapters, those of Linears that are one in Transformers (GPT-2's
    c_attn), a part of a module that is trained without the rest, and what `hf.save` refuses.
    """
    c, flat = peft_config, flatten_dict(params, sep="/")
    modules = _modules(config, model_type)
    linears = [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]
    if c.kind not in LOW_RANK or not linears:
        raise UserError(f"peft.kind={c.kind!r} cannot be written for the peft library; "
                        f"{', '.join(LOW_RANK)} can")
    safetensors_io.fail(directory, [
        f"{path} is a part of {modules[path][0]}, which peft adapts as one; leave it out of "
        "peft.targets" for path in linears if modules[path][1] not in ("kernel", "same")])
    tensors, pattern = {}, {}
    for path in linears:
        name = modules[path][0]
        leaf = lambda end: np.asarray(flat[f"{path}/lora_{end}"], np.float32)
        a, b = leaf("a").T, leaf("b").T
        if c.kind == "adalora":
            kept = leaf("mask") > 0
            pattern[f"{name}.lora_E"] = kept.tolist()
            parts = {"lora_A": a[kept], "lora_B": b[:, kept], "lora_E": leaf("e")[kept, None]}
        else:
            parts = {"lora_A.weight": a, "lora_B.weight": b}
        if c.kind == "dora":
            parts["lora_magnitude_vector"] = leaf("magnitude")
        tensors |= {f"base_model.model.{name}.{part}": x for part, x in parts.items()}
    whole = _whole_modules(config, model_type, flat, flatten_dict(trainable(params, c), sep="/"))
    tensors |= {f"base_model.model.{name}": x for name, x in whole.items()}
    theirs = {
        "peft_type": "ADALORA" if c.kind == "adalora" else "LORA",
        "task_type": _TASKS.get(config.architecture) if config.head == "lm" else None,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
        "base_model_name_or_path": str(base), "inference_mode": True,
        "target_modules": [modules[path][0] for path in linears],
        "lora_alpha": int(c.alpha) if c.alpha == int(c.alpha) else c.alpha, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": any(modules[path][1] == "same" for path in linears),
        "use_rslora": c.rank_stabilized, "use_dora": c.kind == "dora"}
    if c.kind != "adalora":
        theirs["r"] = c.rank
    else:
        # peft wants a whole schedule, even of what has been trained.
        theirs |= {name: getattr(c, ours) for ours, name in _SCHEDULE.items()} | {
            "init_r": c.rank, "total_step": c.warmup_steps + c.final_steps + 1,
            "rank_pattern": pattern}
    safetensors_io.save(directory, [(name, x.shape, x.dtype, x) for name, x in tensors.items()],
                        single=WEIGHTS)
    try:
        pathlib.Path(directory, CONFIG).write_text(json.dumps(theirs, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from error


def _whole_modules(config, model_type, flat, trained):
    """What is trained beside adapters, {their name: array}, of modules trained as a whole."""
    found, tensors, parts = [], {}, {}
    family = families.of_config(config, model_type)
    for row in hf.plan(family, config):
        name = row.name.removeprefix(family.base) if config.head == "none" else row.name
        parts.setdefault(name.rpartition(".")[0], []).append(row._replace(name=name))
    for name, rows in parts.items():
        paths = [path for row in rows for path, _ in row.ours]
        kept = [path for path in paths if not trained[path]]
        if len(kept) == len(paths):
            continue
        if kept or any(row.layout not in ("kernel", "same") for row in rows):
            found.append(f"peft saves {name} as a whole, and peft.trained has a part of it")
        if any(f"{path.removesuffix('kernel')}lora_a" in flat for path in paths):
            found.append(f"peft cannot both adapt {name} and save it as a whole")
        tensors |= {row.name: np.asarray(flat[path].T if row.layout == "kernel" else flat[path])
                    for row in rows for path, _ in row.ours}
    if found:
        raise UserError("; ".join(found[:4]))
    return tensors


def load(directory, config, params, model_type=None):
    """LoRA, DoRA or AdaLoRA of the `peft` library, put among the parameters of their model.

    config, model_type: as in `save`; params: without adapters.
    Returns (params, PeftConfig). Raises: UserError with every setting or every tensor that is not
    supported, missing or misshapen.
    """
    path = safetensors_io.locate(directory, CONFIG)
    c, patterns = _from_theirs(safetensors_io.read_json(path), path)
    flat, found, parts = flatten_dict(params, sep="/"), [], {}
    ours = {name: place for place, (name, layout) in _modules(config, model_type).items()
            if layout in ("kernel", "same")}
    for name, tensor in safetensors_io.open(directory, single=WEIGHTS).items():
        m = _TENSOR.fullmatch(name)
        if m and m[1] in ours:
            parts.setdefault(m[1], {})[m[2]] = tensor
        else:
            found.append(f"{name} has no place in this model")
    if not parts:
        found.append("no adapter is in it")
    new = {}
    for name, tensors in parts.items():
        place = ours[name]
        problems = _problems(c, name, tensors, flat[f"{place}/kernel"].shape, patterns)
        found += problems
        if not problems:
            arrays = {part: tensor.read() for part, tensor in tensors.items()}
            leaves = _leaves(c, arrays, patterns.get(f"{name}.lora_E"))
            new |= {f"{place}/{leaf}": jnp.asarray(x, jnp.float32) for leaf, x in leaves.items()}
    safetensors_io.fail(pathlib.Path(directory, WEIGHTS), found)
    return unflatten_dict(flat | new, sep="/"), c


_TENSOR = re.compile(r"base_model\.model\.(.+)\.(lora_[ABE]|lora_magnitude_vector)(\.weight)?")


def _modules(config, model_type):
    """Path of a Linear of ours -> (the name of theirs, how its kernel lies there)."""
    family, modules = families.of_config(config, model_type), {}
    for row in hf.plan(family, config):
        name = row.name.removeprefix(family.base) if config.head == "none" else row.name
        modules |= {path.removesuffix("/kernel"): (name.removesuffix(".weight"), row.layout)
                    for path, _ in row.ours if path.endswith("/kernel")}
    return modules


def _from_theirs(theirs, path):
    """(PeftConfig, rank_pattern) of an adapter_config.json."""
    patterns = theirs.get("rank_pattern") or {}
    adalora, init = theirs.get("peft_type") == "ADALORA", theirs.get("init_lora_weights")
    wrong = {name for name, value in theirs.items() if value and name not in _KNOWN}
    wrong |= {name for name, fine in [
        ("peft_type", adalora or theirs.get("peft_type") == "LORA"),
        ("bias", theirs.get("bias", "none") == "none"),
        ("init_lora_weights", init in (None, True, False, "gaussian")),  # others change the kernels
        ("rank_pattern", isinstance(patterns, dict) and all(
            isinstance(x, list) and all(type(keep) is bool for keep in x) if adalora else
            type(x) is int for x in patterns.values()))] if not fine}
    safetensors_io.fail(path, [f"{name}={str(theirs.get(name))[:200]} is not supported"
                               for name in sorted(wrong)])
    kind = "adalora" if adalora else "dora" if theirs.get("use_dora") else "lora"
    rank = theirs.get("init_r", 12) if adalora else theirs.get("r", 8)
    c = PeftConfig(kind, rank=rank, alpha=theirs.get("lora_alpha", 8),
                   rank_stabilized=theirs.get("use_rslora", False),
                   **{ours: theirs[name] for ours, name in _SCHEDULE.items()
                      if adalora and name in theirs})
    validate(c)
    return c, patterns


def _problems(c, name, tensors, kernel, patterns):
    """What is wrong with the tensors {part: Tensor} of a module whose kernel has this shape."""
    wanted = {"lora_A", "lora_B", *{"dora": ["lora_magnitude_vector"], "adalora": ["lora_E"]}.get(
        c.kind, [])}
    if tensors.keys() != wanted:
        return [f"{name} has {', '.join(sorted(tensors))} and needs {', '.join(sorted(wanted))}"]
    r, (D_in, D_out) = next(iter(tensors["lora_A"].shape), 0), kernel
    shapes = {"lora_A": (r, D_in), "lora_B": (D_out, r), "lora_E": (r, 1),
              "lora_magnitude_vector": (D_out,)}
    found = [f"{x.name} has shape {list(x.shape)}, not {list(shapes[part])}"
             for part, x in tensors.items() if x.shape != shapes[part]]
    kept = patterns.get(f"{name}.lora_E", [True] * c.rank)
    if c.kind == "adalora" and (len(kept), sum(kept)) != (c.rank, r):
        found.append(f"{name}: rank_pattern keeps {sum(kept)} ranks of {len(kept)}, the tensors "
                     f"{r} of init_r={c.rank}")
    return found


def _leaves(c, arrays, kept):
    """A Linear's leaves from arrays of theirs; kept: which ranks of AdaLoRA those are, or None."""
    a, b = arrays["lora_A"].T, arrays["lora_B"].T
    if c.kind == "adalora":
        mask = np.ones(c.rank, bool) if kept is None else np.array(kept)
        place = np.eye(c.rank)[mask]  # [kept, rank]
        return {"lora_scale": c.alpha / c.rank, "lora_a": a @ place, "lora_b": place.T @ b,
                "lora_e": arrays["lora_E"][:, 0] @ place, "lora_mask": mask}
    scale = c.alpha / len(b)**(0.5 if c.rank_stabilized else 1)
    magnitude = {"lora_magnitude": arrays["lora_magnitude_vector"]} if c.kind == "dora" else {}
    return {"lora_scale": scale, "lora_a": a, "lora_b": b} | magnitude
