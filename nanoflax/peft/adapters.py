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

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax.config import FullFineTuning, Houlsby, LowRank, Pfeiffer, PrefixTuning, PromptTuning, validate
from nanoflax.errors import UserError
from nanoflax.nn import column_lengths, low_rank

_ADAPTER = re.compile(r"(.*/)?(lora_\w+|adapter_\w+/.+|prefix_\w+|prompt)")
_HEAD = r"(unembed|logit_bias|transform|norm_transform|pooler|labels|delay)(/.*)?"
# What an LSTM reads inside a scan, where no adapter is applied.
_MATRIX = r"(query|combine|decoder_\d+|encoder_\d+/(forward|backward))/kernel"


def add(params, peft_config, rng):
    """Parameters with the adapters of a configuration such as LoRA(rank=4) among them, float32. rng: a PRNG key.

    LoRA, AdaLoRA and bottleneck adapters at first change nothing at all, DoRA only by rounding; a
    prompt begins as random rows of the embedding. Can be traced: `jax.eval_shape` gives the shapes.
    Raises: UserError for a bad configuration, one that finds no place in the model, or adapters
    that are there already.
    """
    c, flat = peft_config, flatten_dict(params, sep="/")
    validate(c)
    if any(map(_ADAPTER.fullmatch, flat)):
        raise UserError("the parameters hold adapters already; merge them first")
    if isinstance(c, FullFineTuning):
        return params
    places = _places(flat, c)
    for key, (place, make) in zip(jax.random.split(rng, len(places)), sorted(places.items()), strict=True):
        flat |= {place + name: leaf for name, leaf in make(key).items()}
    return unflatten_dict(flat, sep="/")


def _places(flat, c):
    """Where adapters go, and how they are made: {start of their paths: key -> {end: leaf}}."""
    kernels = {
        path.removesuffix("/kernel"): x
        for path, x in flat.items()
        if path.endswith("/kernel") and not re.fullmatch(_MATRIX, path)
    }
    places = {}
    for path, kernel in kernels.items():
        block, _, part = path.rpartition("/block_")
        part = part.partition("/")[2] if block else ""
        if isinstance(c, LowRank) and re.search(rf"(^|/)({c.targets})$", path):
            places[f"{path}/"] = partial(_low_rank, c, kernel)
        elif isinstance(c, PrefixTuning) and part == "attention/key":
            start = path.removesuffix("key") + "prefix_"
            places[start] = partial(_prefix, (c.virtual_tokens, kernel.shape[1]))
        elif isinstance(c, (Houlsby, Pfeiffer)) and (name := _SUBLAYERS[c.kind].get(part)):
            start = path.removesuffix(part) + f"adapter_{name}/"
            places[start] = partial(_bottleneck, kernel.shape[1], c.bottleneck)
    if isinstance(c, PromptTuning):
        stacks = [name for name in ("encoder", "decoder") if f"{name}/block_0/mlp/up" in kernels]
        if any(f"{name}/relative_bias/embedding" in flat for name in stacks[:1]):
            raise UserError(
                "peft.kind='prompt' does not work with relative positions: padding would "
                "count as distance from the prompt; use prefix"
            )
        table = flat["embed/embedding"]
        places |= {
            f"{stack}/": lambda rng: {"prompt": jax.random.choice(rng, table, (c.virtual_tokens,)).astype(jnp.float32)}
            for stack in stacks[:1]
        }
    if not places and isinstance(c, LowRank):
        known = sorted({re.sub(r"block_\d+", "block_*", path) for path in kernels})
        raise UserError(f"peft.targets={c.targets!r} is the end of none of {', '.join(known)}")
    if not places:
        raise UserError(f"peft.kind={c.kind!r} needs a Transformer; this model has no blocks")
    if "unembed/" in places:
        raise UserError(
            f"peft.targets={c.targets!r} includes the output head, which losses read "
            "as a plain matrix; train it whole with peft.trained='adapters,head'"
        )
    return places


_PFEIFFER = {"mlp/down": "mlp"}  # what a sublayer ends with, and its name in blocks.Block
_HOULSBY = _PFEIFFER | {"attention/out": "attention", "cross_attention/out": "cross"}
_SUBLAYERS = {"houlsby": _HOULSBY, "pfeiffer": _PFEIFFER}


def _low_rank(c, kernel, rng):
    D_in, D_out = kernel.shape
    leaves = {"lora_scale": jnp.float32(c.scale)}
    if c.kind == "adalora":
        a, b = jax.random.split(rng)
        return leaves | {
            "lora_a": 0.02 * jax.random.normal(a, (D_in, c.rank)),
            "lora_b": 0.02 * jax.random.normal(b, (c.rank, D_out)),
            "lora_e": jnp.zeros(c.rank),
            "lora_mask": jnp.ones(c.rank),
        }
    bound = D_in**-0.5
    leaves |= {
        "lora_a": jax.random.uniform(rng, (D_in, c.rank), minval=-bound, maxval=bound),
        "lora_b": jnp.zeros((c.rank, D_out)),
    }
    if c.kind == "dora":
        leaves["lora_magnitude"] = column_lengths(kernel.astype(jnp.float32))
    return leaves


def _prefix(shape, rng):
    key, value = jax.random.split(rng)
    return {"key": 0.02 * jax.random.normal(key, shape), "value": 0.02 * jax.random.normal(value, shape)}


def _bottleneck(dim, hidden, rng):
    return {
        "down/kernel": 0.02 * jax.random.normal(rng, (dim, hidden)),
        "down/bias": jnp.zeros(hidden),
        "up/kernel": jnp.zeros((hidden, dim)),
        "up/bias": jnp.zeros(dim),
    }


def trainable(params, peft_config):
    """Which parameters are trained, by peft_config.trained: a tree of bool.

    The scale and mask of low-rank adapters belong to the adapters; no gradient reaches them.
    Raises: UserError for a part of it that no parameter fits, or adapters that are not trained.
    """
    flat = flatten_dict(params, sep="/")
    default = "all" if isinstance(peft_config, FullFineTuning) else "adapters"
    chosen = set()
    for part in (peft_config.trained or default).split(","):
        pattern = (
            {"all": r".*", "adapters": _ADAPTER, "head": _HEAD, "biases": r"(.*/)?\w*bias"}.get(part)
            or _last_blocks(flat, part)
            or rf"(.*/)?({part})(/.*)?"
        )
        found = {path for path in flat if re.fullmatch(pattern, path)}
        if not found:
            raise UserError(f"peft.trained={part!r} fits no parameter of this model")
        chosen |= found
    if not isinstance(peft_config, FullFineTuning) and not any(re.fullmatch(_ADAPTER, path) for path in chosen):
        raise UserError(
            f"peft.trained={peft_config.trained!r} leaves the adapters of "
            f"peft.kind={peft_config.kind!r} out: add adapters, or set peft.kind=none"
        )
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
    return tuple(
        unflatten_dict({path: x for path, x in flat.items() if mask[path] == wanted}) for wanted in (True, False)
    )


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
        p = {
            path.removeprefix(start): flat[path]
            for path in list(flat)
            if path.startswith(f"{start}lora_") or path == f"{start}kernel"
        }
        w = p["kernel"].astype(jnp.float32) + low_rank(p)
        if "lora_magnitude" in p:
            w = w * (p["lora_magnitude"] / column_lengths(w))
        flat = {path: x for path, x in flat.items() if not path.startswith(f"{start}lora_")}
        flat[f"{start}kernel"] = w.astype(p["kernel"].dtype)
    if left := sorted(filter(_ADAPTER.fullmatch, flat)):
        raise UserError(f"{left[0]} cannot be merged; only LoRA, DoRA and AdaLoRA can")
    return unflatten_dict(flat, sep="/")
