"""Functions of the parameter tree: add adapters, select what is trained, merge adapters into kernels.

The layers apply the adapters that they find in their parameters: nn.layers.adapt, nn.blocks, nn.attention.
hf.adapters reads and writes the files of the `peft` library.

    params = peft.add(params, config.peft, rng)
    trained, frozen = peft.split(params, peft.trainable(params, config.peft))
    model.apply({"params": peft.join(trained, frozen)}, tokens)

Gradients, optimizer state and checkpoints contain only `trained`.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from nanoflax.config import FullFineTuning, Houlsby, LowRank, PeftConfig, Pfeiffer, PrefixTuning, PromptTuning, validate
from nanoflax.errors import UserError
from nanoflax.nn import column_lengths, low_rank

_ADAPTER = re.compile(r"(.*/)?(lora_\w+|adapter_\w+/.+|prefix_\w+|prompt)")
_HEAD = r"(unembed|logit_bias|transform|norm_transform|pooler|labels|delay)(/.*)?"
# The matrices that an LSTM reads inside a scan, where no adapter is applied.
_MATRIX = r"(query|combine|decoder_\d+|encoder_\d+/(forward|backward))/kernel"


def add(params: dict, peft_config: PeftConfig, rng: jax.Array) -> dict:
    """Parameters with the float32 adapters of a configuration such as LoRA(rank=4) among them.

    New LoRA, AdaLoRA and bottleneck adapters do not change the output; DoRA changes it only by rounding.
    A prompt begins as random rows of the embedding. `jax.eval_shape` works.
    Raises: UserError for a bad configuration, one that fits no part of the model, or a model that has
    adapters already.
    """
    c: Any = peft_config
    flat: Any = flatten_dict(params, sep="/")
    validate(c)
    if any(map(_ADAPTER.fullmatch, flat)):
        raise UserError("the parameters have adapters already; merge the adapters first")
    if isinstance(c, FullFineTuning):
        return params
    places = _places(flat, c)
    for key, (place, make) in zip(jax.random.split(rng, len(places)), sorted(places.items()), strict=True):
        flat |= {place + name: leaf for name, leaf in make(key).items()}
    return unflatten_dict(flat, sep="/")


def _places(flat, c: Any):
    """{the beginning of an adapter's paths: a function of a PRNG key -> {the rest of a path: leaf}}."""
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
            if kernel.ndim == 3 and c.kind != "lora":
                raise UserError(f"peft.kind={c.kind!r} adapts no experts: leave {path} out of peft.targets")
            places[f"{path}/"] = partial(_low_rank, c, kernel)
        elif isinstance(c, PrefixTuning) and part == "attention/key":
            start = path.removesuffix("key") + "prefix_"
            places[start] = partial(_prefix, (c.virtual_tokens, kernel.shape[1]))
        elif isinstance(c, (Houlsby, Pfeiffer)) and (name := _SUBLAYERS[c.kind].get(part)):
            start = path.removesuffix(part) + f"adapter_{name}/"
            places[start] = partial(_bottleneck, kernel.shape[-1], c.bottleneck)
    if isinstance(c, (PromptTuning, PrefixTuning)) and any("/recurrent/" in path for path in flat):
        raise UserError(f"peft.kind={c.kind!r} does not work with layers of the kinds delta and mamba2; use lora")
    if isinstance(c, PromptTuning):
        stacks = [name for name in ("encoder", "decoder") if any(path.startswith(f"{name}/block_0/") for path in flat)]
        if stacks and f"{stacks[0]}/relative_bias/embedding" in flat:
            raise UserError(
                "peft.kind='prompt' does not work with relative positions: padding would "
                "count as distance from the prompt; use prefix"
            )
        if "project_in/kernel" in flat:
            raise UserError(
                "peft.kind='prompt' does not work in a decoder with model.embed_dim, whose blocks do not read "
                "vectors of the embedding's size; use prefix"
            )
        if stacks:
            places[f"{stacks[0]}/"] = partial(_prompt, c.virtual_tokens, flat["embed/embedding"])
    if not places and isinstance(c, LowRank):
        known = sorted({re.sub(r"block_\d+", "block_*", path) for path in kernels})
        raise UserError(f"peft.targets={c.targets!r} matches the end of none of {', '.join(known)}")
    if isinstance(c, PrefixTuning) and any(path.endswith("attention/latent_up") for path in kernels):
        raise UserError("peft.kind='prefix' does not work with latent attention, whose heads have no keys; use prompt")
    if not places:
        raise UserError(f"peft.kind={c.kind!r} needs a Transformer; this model has no blocks")
    if isinstance(c, LowRank) and "unembed/" in places:
        raise UserError(
            f"peft.targets={c.targets!r} includes the output head, but losses use its kernel "
            "without adapters; train all of the head with peft.trained='adapters,head'"
        )
    return places


# The last Linear of a sublayer, and the sublayer's name in nn.Block.
_PFEIFFER = {"mlp/down": "mlp", "mlp/experts/down": "mlp"}
_HOULSBY = _PFEIFFER | {"attention/out": "attention", "recurrent/out": "attention", "cross_attention/out": "cross"}
_SUBLAYERS = {"houlsby": _HOULSBY, "pfeiffer": _PFEIFFER}


def _low_rank(c, kernel, rng):
    return {"lora_scale": jnp.float32(c.scale)} | _LOW_RANK[c.kind](c.rank, kernel, rng)


def _lora(rank, kernel, rng):
    *E, D_in, D_out = kernel.shape  # experts have an adapter each
    bound = D_in**-0.5
    a = jax.random.uniform(rng, (*E, D_in, rank), minval=-bound, maxval=bound)
    return {"lora_a": a, "lora_b": jnp.zeros((*E, rank, D_out))}


def _dora(rank, kernel, rng):
    return _lora(rank, kernel, rng) | {"lora_magnitude": column_lengths(kernel.astype(jnp.float32))}


def _adalora(rank, kernel, rng):
    (D_in, D_out), (a, b) = kernel.shape, jax.random.split(rng)
    return {
        "lora_a": 0.02 * jax.random.normal(a, (D_in, rank)),
        "lora_b": 0.02 * jax.random.normal(b, (rank, D_out)),
        "lora_e": jnp.zeros(rank),
        "lora_mask": jnp.ones(rank),
    }


_LOW_RANK = {"lora": _lora, "dora": _dora, "adalora": _adalora}


def _prompt(tokens, table, rng):
    return {"prompt": jax.random.choice(rng, table, (tokens,)).astype(jnp.float32)}


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


def trainable(params: dict, peft_config: PeftConfig) -> dict:
    """A tree of bool: True at the parameters that peft_config.trained names.

    The scale and mask of low-rank adapters count as adapters, but get no gradient.
    Raises: UserError for a pattern that matches no parameter, or if no adapter is trained.
    """
    flat: Any = flatten_dict(params, sep="/")
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
            raise UserError(f"peft.trained={part!r} matches no parameter of this model")
        chosen |= found
    if not isinstance(peft_config, FullFineTuning) and not any(re.fullmatch(_ADAPTER, path) for path in chosen):
        raise UserError(
            f"peft.trained={peft_config.trained!r} does not include the adapters of "
            f"peft.kind={peft_config.kind!r}: write adapters into it, or set peft.kind=none"
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


def split(params: dict, mask: dict) -> tuple[dict, dict]:
    """(the parameters where the tree of bool is True, the others), as nested dicts."""
    flat, mask = flatten_dict(params), flatten_dict(mask)
    chosen, others = ({path: x for path, x in flat.items() if mask[path] == wanted} for wanted in (True, False))
    return unflatten_dict(chosen), unflatten_dict(others)


def join(trained: dict, frozen: dict) -> dict:
    """The inverse of `split`."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained))


def without_adapters(params: dict) -> dict:
    """The parameters without adapters: those of the model under them, the same arrays. Tuned parameters that are no
    adapters (peft.trained) stay as they are."""
    flat: Any = flatten_dict(params, sep="/")
    return unflatten_dict({path: x for path, x in flat.items() if not _ADAPTER.fullmatch(path)}, sep="/")


def merge(params: dict) -> dict:
    """Parameters with the low-rank adapters merged into their kernels; the outputs stay the same.

    Raises: UserError for adapters of another kind, which cannot be merged.
    """
    flat: Any = flatten_dict(params, sep="/")
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
