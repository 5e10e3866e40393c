"""The metadata and tensors of GGUF files as models, in both directions."""

import dataclasses
import os
import re
from collections.abc import Collection
from typing import Any

import numpy as np

from nanoflax import nn
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.family import (
    Family,
    Json,
    canonical,
    differences,
    different_fields,
    from_config,
    to_config,
    with_values,
)
from nanoflax.hf.gguf import LatentHeads, QuantizedTensor, open_gguf
from nanoflax.hf.gguf_architectures import ARCHITECTURES, Architecture
from nanoflax.hf.layouts import tensor_mapping, too_many_layers
from nanoflax.hf.safetensors_io import Tensor, raise_problems

Tensors = dict[str, Tensor | QuantizedTensor | LatentHeads]
_NAMES = ", ".join(dict.fromkeys(architecture.name for architecture in ARCHITECTURES))
ROPE_FREQS = "rope_freqs.weight"  # divisors of the rotary rates, as Llama 3.1 scales them
# Values of config.json where metadata is absent, as llama.cpp has them.
_DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "rope_theta": 10_000.0, "norm_topk_prob": False,
             "routed_scaling_factor": 1.0, "n_shared_experts": 0, "first_k_dense_replace": 0,
             "moe_num_shared_experts": 0, "moe_layer_start_index": 0, "q_lora_rank": None,
             "n_group": 1, "topk_group": 1}  # fmt: skip
_YARN = {
    "original_max_position_embeddings": "Rope.SCALING_ORIG_CTX_LEN",
    "beta_fast": "Rope.SCALING_YARN_BETA_FAST",
    "beta_slow": "Rope.SCALING_YARN_BETA_SLOW",
}
_FLOATS = ("_EPS", "_BASE", "_BASE_SWA", "SCALE", "SOFTCAPPING")  # ends of the names of float32 metadata
# Vectors that llama.cpp's converter writes with a dimension of 1, before 2026 without.
_VECTORS = (".ffn_gate_inp_shexp.weight", ".exp_probs_b.bias")
# Fields of ModelConfig that some files have for any architecture; 0 means none.
_OWN_FIELDS = {"attention_scale": "attention.scale", "embed_scale": "embedding_scale",
               "attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping",
               "window": "attention.sliding_window"}  # fmt: skip
# Metadata that changes the model and that is not computed here, with the values that change nothing.
_UNSUPPORTED = {
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (0, 1),
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0, 1),
    "nextn_predict_layers": (0,),
}


def open_gguf_model(path: str | os.PathLike) -> tuple[Family, ModelConfig, Tensors]:
    """The family (with GGUF's names), configuration and tensors of a GGUF file. Raises: UserError."""
    metadata, stored = open_gguf(path)
    tensors: Tensors = {**stored}
    architecture = _architecture_of(metadata, path)
    divisors = tensors.pop(ROPE_FREQS, None) if "llama3" in architecture.scalings else None
    for name, x in tensors.items():
        if isinstance(x, Tensor) and name.endswith(_VECTORS) and x.shape[:-1] == (1,):
            tensors[name] = dataclasses.replace(x, shape=x.shape[1:])
    for name, keys in stored.items():
        layer = re.fullmatch(r"(blk\.\d+\.attn_)k_b\.weight", name)
        values = stored.get(f"{layer[1]}v_b.weight") if layer else None
        if layer and values and len(keys.shape) == len(values.shape) == 3 and keys.shape[:2] == values.shape[::2]:
            tensors[f"{layer[1]}kv_b.weight"] = LatentHeads(name, keys, values)
            del tensors[name], tensors[values.name]
    table = tensors.get("token_embd.weight")
    config = read_config(
        architecture, metadata, tensors, table.shape[0] if table else None, divisors and divisors.read(), path
    )
    predicting = metadata.get(architecture.key("LLM.NEXTN_PREDICT_LAYERS"), 0)
    return architecture.family_for(config, min(predicting, len(tensors))), config, tensors


def _architecture_of(metadata: dict[str, Any], path: str | os.PathLike) -> Architecture:
    name = metadata.get("general.architecture")
    rows = [architecture for architecture in ARCHITECTURES if architecture.name == name]
    if rows:
        values = (metadata.get(rows[0].key(f"LLM.EXPERT_{key}")) for key in ("COUNT", "GATING_FUNC"))
        experts, gating = (x if isinstance(x, int) else 0 for x in values)
        rows = [row for row in rows if row.is_sparse == (experts > 0)] or rows
        return next((row for row in rows if row.constants.get("LLM.EXPERT_GATING_FUNC") == gating), rows[0])
    raise UserError(
        f"{path}: general.architecture={name!r} is not supported; supported are {_NAMES} "
        "(llama: also Mistral, Mixtral, SmolLM2 and similar models)"
    )


def read_config(
    architecture: Architecture,
    metadata: dict[str, Any],
    names: Collection[str],
    vocab_size: int | None,
    divisors: np.ndarray | None,
    path: str | os.PathLike,
) -> ModelConfig:
    """The ModelConfig that llama.cpp computes for this metadata. Raises: UserError.

    names: of the tensors. vocab_size: rows of the table of embeddings. divisors: the tensor ROPE_FREQS.
    """
    a, family = architecture, architecture.family
    _refuse_unsupported(a, metadata, path)
    keys = {field: a.key(name) for field, name in a.fields.items()}
    hf = _DEFAULTS | {field: _plain(metadata[key]) for field, key in keys.items() if key in metadata}
    hf |= {} if vocab_size is None else {"vocab_size": vocab_size}
    hf |= {"tie_word_embeddings": "output.weight" not in names}
    hf |= {field: name in names for field, name in a.present.items()}
    hf["rope_scaling"] = _read_scaling(a, metadata, divisors, path)
    hf["rotary_dim"] = metadata.get(a.key("Rope.DIMENSION_COUNT"))
    try:
        hf |= a.implied(hf)
    except KeyError as error:
        raise UserError(f"{path}: {keys.get(error.args[0], error.args[0])} is missing") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path}: the sizes of the model are wrong: {error}") from error
    config = to_config(family, hf, "lm", too_many_layers(names))
    config = dataclasses.replace(config, **_read_own_fields(a, metadata, path))
    if divisors is not None:
        expected = rope_divisors(config)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise UserError(
                f"{path}: {ROPE_FREQS} must have the values of Llama 3.1 to 3.3, with a context of "
                f"{config.rope.context} in training"
            )
    if hf["rotary_dim"] not in (None, config.rotary_dim):
        key = a.key("Rope.DIMENSION_COUNT")
        raise UserError(f"{path}: {key}={hf['rotary_dim']} must be {config.rotary_dim}")
    return config


def _plain(value: Any) -> Any:
    """The shortest number that is the same in float32, in which files have it: 1e-6, not 9.99999997475e-07."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value


def rope_divisors(config: ModelConfig) -> np.ndarray:
    """The tensor ROPE_FREQS: float32 [K / 2], each rotary rate divided by the scaled one."""
    rates = nn.base_rates(config.rope.theta, config.K) / nn.rotary_rates(config.rope, config.K)
    return np.asarray(rates, np.float32)


def _refuse_unsupported(a: Architecture, metadata: dict[str, Any], path: str | os.PathLike) -> None:
    """Raises: UserError naming all metadata that changes the model and is not supported."""
    unsupported = {f"{a.name}.{name}": values for name, values in _UNSUPPORTED.items()}
    unsupported[a.key("Rope.SCALING_TYPE")] = ("none", "linear", *[x for x in a.scalings if x == "yarn"])
    unsupported |= {a.key(name): (value,) for name, value in a.constants.items()}
    if not a.is_sparse:
        unsupported[a.key("LLM.EXPERT_COUNT")] = (0,)
    read = {a.key(name) for name in a.fields.values()}
    found = {name: values for name, values in unsupported.items() if name in metadata and name not in read}
    arrays = [
        name for name, x in metadata.items() if isinstance(x, list | np.ndarray) and name.startswith(f"{a.name}.")
    ]
    raise_problems(
        path,
        [f"{name} has a value for each layer; it must be one value" for name in arrays]
        or [
            f"{name}={metadata[name]!r} is not supported; it must be {' or '.join(map(str, values))}"
            for name, values in found.items()
            if metadata[name] not in values
        ],
    )


def _read_own_fields(a: Architecture, metadata: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """Fields of ModelConfig that the architecture's family does not have; 0 in the metadata means none."""
    read = {a.key(name) for name in a.fields.values()}
    keys = {field: f"{a.name}.{name}" for field, name in _OWN_FIELDS.items() if f"{a.name}.{name}" not in read}
    found = {field: metadata.get(key, 0) for field, key in keys.items()}
    raise_problems(
        path,
        [
            f"{keys[field]}={value!r} must be a number, 0 or above"
            for field, value in found.items()
            if type(value) not in ((int,) if field == "window" else (int, float)) or not value >= 0
        ],
    )
    return {field: value for field, value in found.items() if value}


def _read_scaling(a: Architecture, metadata, divisors: np.ndarray | None, path) -> Json:
    """rope_scaling as in a config.json.

    A factor without a type is linear, as in llama.cpp; the first files name it rope.scale_linear.
    """
    key = a.key("Rope.SCALING_FACTOR")
    factor = metadata.get(key) or metadata.get(f"{a.name}.rope.scale_linear") or 1.0
    kind = metadata.get(a.key("Rope.SCALING_TYPE"))
    is_scaled = factor != 1 and kind != "none"
    if divisors is None:
        found = {"rope_type": kind or "linear", "factor": _plain(factor)} if is_scaled else {"rope_type": "default"}
        if found["rope_type"] == "yarn":
            found |= {name: _plain(metadata[a.key(key)]) for name, key in _YARN.items() if a.key(key) in metadata}
        return found
    if is_scaled:
        raise UserError(f"{path}: {key}={factor} with {ROPE_FREQS} is not supported")
    return {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": metadata.get(a.key("Rope.SCALING_ORIG_CTX_LEN"), 8192),
    }


def describe(config: ModelConfig) -> tuple[Architecture, dict[str, Any], ModelConfig]:
    """The architecture that computes the same as this model, the metadata of its file, and the configuration there.

    It may have no window, if that is not shorter than the context, and the factor of an untied table of embeddings may
    be 1: the table in the file then has the factor.

    Raises: UserError naming the fields that the nearest architecture cannot express.
    """
    if config.architecture != "decoder" or config.head != "lm":
        raise UserError(
            f"GGUF files are written for decoders with the head lm, not for model.architecture="
            f"{config.architecture!r} with model.head={config.head!r}"
        )
    same = [config]
    if config.window >= config.context:
        full = tuple("full" if config.is_local(i) else config.layer_type(i) for i in range(config.layers))
        same.append(dataclasses.replace(config, window=0, layer_types=full))
    if not config.tied:
        same += [dataclasses.replace(c, embed_scale=1.0) for c in same]
    problems: dict[str, tuple[int, list[str]]] = {}  # (distance from the model, ...)
    for architecture in (a for a in ARCHITECTURES if config.moe.experts or not a.is_sparse):
        for candidate in dict.fromkeys(same):
            try:
                metadata = _metadata_of(architecture, candidate)
                # Read as llama.cpp reads it, it must be the same model.
                names = [mapping.name for mapping in tensor_mapping(architecture.family_for(candidate), candidate)]
                divisors = rope_divisors(candidate) if candidate.rope.scaling == "llama3" else None
                back = read_config(architecture, metadata, names, candidate.vocab_size, divisors, "GGUF")
                wrong = different_fields(_untrained(candidate), _untrained(back))
                distance, wrong = len(wrong), with_values(config, wrong)
            except UserError as error:
                distance, wrong = 2 + len(_differences(architecture.family, candidate)), [str(error)]
            if not wrong:
                return architecture, metadata, candidate
            problems[architecture.name] = min(problems.get(architecture.name, (distance, wrong)), (distance, wrong))
    nearest = min(problems, key=lambda name: problems[name][0])
    raise UserError(
        f"no architecture of GGUF files here ({_NAMES}) has such models; the nearest is {nearest}, "
        f"except {', '.join(problems[nearest][1])}"
    )


def _untrained(config: ModelConfig) -> ModelConfig:
    """The canonical configuration without what only training or files of Transformers read."""
    c = canonical(config)
    return dataclasses.replace(
        c, transform_activation=None, moe=dataclasses.replace(c.moe, balance_loss=0.0, z_loss=0.0, stacked=False)
    )


def _differences(family: Family, config: ModelConfig) -> list[str]:
    try:
        return differences(family, config)
    except UserError as error:  # a value that the family refuses
        return [str(error)]


def _metadata_of(a: Architecture, config: ModelConfig) -> dict[str, Any]:
    if config.rope.scaling not in a.scalings:
        raise UserError(f"model.rope.scaling={config.rope.scaling!r}, not {' or '.join(a.scalings)}")
    if problem := a.refuses(config):
        raise UserError(problem)
    hf = from_config(a.family, config)
    metadata = {
        a.key(name): float(hf[field]) if name.endswith(_FLOATS) else hf[field]
        for field, name in a.fields.items()
        if hf.get(field) is not None
    }
    V = config.latent.value_dim if config.latent.rank else config.K
    metadata |= {a.key("Attention.KEY_LENGTH"): config.K, a.key("Attention.VALUE_LENGTH"): V}
    metadata |= {a.key("Rope.DIMENSION_COUNT"): config.rotary_dim}
    metadata |= {a.key(name): value for name, value in a.constants.items()}
    if a.is_sparse:  # llama.cpp reads these lengths of some architectures, although other fields imply them
        metadata |= {a.key("LLM.EXPERT_FEED_FORWARD_LENGTH"): config.moe.expert_dim or config.F}
        metadata |= {a.key("LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH"): config.moe.shared_dim}
    if (rope := config.rope).scaling in ("linear", "yarn"):
        metadata |= {a.key("Rope.SCALING_TYPE"): rope.scaling, a.key("Rope.SCALING_FACTOR"): float(rope.factor)}
    if rope.scaling == "yarn":
        metadata[a.key("Rope.SCALING_ORIG_CTX_LEN")] = rope.context
        metadata[a.key("Rope.SCALING_YARN_BETA_FAST")] = float(rope.beta_fast)
        metadata[a.key("Rope.SCALING_YARN_BETA_SLOW")] = float(rope.beta_slow)
        if strength := (hf["rope_scaling"] or {}).get("mscale_all_dim"):
            metadata[a.key("Rope.SCALING_YARN_LOG_MUL")] = 0.1 * strength
    if config.rope.scaling == "llama3":
        metadata[a.key("Rope.SCALING_ORIG_CTX_LEN")] = config.rope.context
    return metadata
