"""llama.cpp's architectures as our families: the metadata and tensor names of GGUF files, in both directions.

Names of metadata and tensors come from the tables of the gguf package. What no metadata says is here: llama.cpp
computes it for every model of an architecture.
"""

import dataclasses
import operator
import os
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from nanoflax import nn
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.families import family_of_type
from nanoflax.hf.family import Family, Json, canonical, differences, different_fields, from_config, to_config
from nanoflax.hf.gguf import QuantizedTensor, open_gguf
from nanoflax.hf.layouts import tensor_mapping
from nanoflax.hf.safetensors_io import Tensor, raise_problems

Tensors = dict[str, Tensor | QuantizedTensor]
_FIELDS = {  # name in config.json -> name in gguf.Keys
    "vocab_size": "LLM.VOCAB_SIZE",
    "max_position_embeddings": "LLM.CONTEXT_LENGTH",
    "hidden_size": "LLM.EMBEDDING_LENGTH",
    "num_hidden_layers": "LLM.BLOCK_COUNT",
    "intermediate_size": "LLM.FEED_FORWARD_LENGTH",
    "num_attention_heads": "Attention.HEAD_COUNT",
    "num_key_value_heads": "Attention.HEAD_COUNT_KV",
    "head_dim": "Attention.KEY_LENGTH",
    "rms_norm_eps": "Attention.LAYERNORM_RMS_EPS",
    "rope_theta": "Rope.FREQ_BASE",
}
_GEMMA = _FIELDS | {
    "sliding_window": "Attention.SLIDING_WINDOW",
    "attn_logit_softcapping": "LLM.ATTN_LOGIT_SOFTCAPPING",
    "final_logit_softcapping": "LLM.FINAL_LOGIT_SOFTCAPPING",
}
_EXPERTS = _FIELDS | {"num_experts": "LLM.EXPERT_COUNT", "num_experts_per_tok": "LLM.EXPERT_USED_COUNT"}
_MIXTRAL = _FIELDS | {"num_local_experts": "LLM.EXPERT_COUNT", "num_experts_per_tok": "LLM.EXPERT_USED_COUNT"}
_DEFAULTS = {"num_key_value_heads": None, "head_dim": None, "rope_theta": 10_000.0}  # of llama.cpp
ROPE_FREQS = "rope_freqs.weight"  # divisors of the rotary rates, as Llama 3.1 scales them


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One general.architecture of llama.cpp."""

    name: str
    model_type: str  # its family
    fields: dict[str, str] = dataclasses.field(default_factory=lambda: _FIELDS)
    # Values of config.json that no metadata has, from those that it has.
    implied: Callable[[Json], Json] = lambda hf: {}
    # Field of config.json -> the tensor whose presence decides it.
    present: dict[str, str] = dataclasses.field(default_factory=dict)
    rotary_pairs: bool = False  # the halves of a rotary pair are neighbours in the weights of queries and keys
    scalings: tuple[str, ...] = ("none", "linear")  # values of RopeConfig.scaling

    @property
    def is_sparse(self) -> bool:
        """Whether its models have experts."""
        return "LLM.EXPERT_COUNT" in self.fields.values()

    @property
    def family(self) -> Family:
        return family_of_type(self.model_type)

    def key(self, name: str) -> str:
        """The key of the metadata with this name in gguf.Keys."""
        from gguf import Keys

        return operator.attrgetter(name)(Keys).format(arch=self.name)

    def family_for(self, config: ModelConfig) -> Family:
        """The family with the names of tensors in GGUF files."""
        import gguf

        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names, keys = gguf.get_tensor_name_map(kind, 1), {}
        for ours, entry in (self.family.keys | self.family.more_keys(config)).items():
            theirs, *layout = [entry] if isinstance(entry, str) else entry
            name = names.get_name(theirs.replace(".{e}", "").format(i=0))
            if name is None:  # this architecture has no such tensor
                continue
            name = name.replace("blk.0.", "blk.{i}.")
            if self.rotary_pairs and ours.endswith(("/query", "/key")):
                layout = ["rotary_pairs"]
            if "{e}" in theirs:  # one tensor for all experts
                layout = ["each_transposed"]
            keys[ours] = (name, *layout) if layout else name
            if config.norm_unit_offset and "norm" in ours.rpartition("/")[2]:
                keys[f"{ours}/scale"] = (f"{name}.weight", "plus_one")
        return dataclasses.replace(self.family, keys=keys, more_keys=lambda c: {}, stacked={})


def _gemma(layers_of_27b: int) -> Callable[[Json], Json]:
    def implied(hf):
        K = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
        if hf["num_hidden_layers"] == layers_of_27b:
            K = hf["hidden_size"] // hf["num_attention_heads"]
        return {"query_pre_attn_scalar": K, "sliding_window": hf.get("sliding_window", 4096)}

    return implied


_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
ARCHITECTURES = (
    Architecture(
        "llama", "llama", present=_BIASES, rotary_pairs=True, scalings=("none", "linear", "llama3")),
    Architecture("llama", "mixtral", _MIXTRAL, rotary_pairs=True, scalings=("none", "linear", "llama3")),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3"),
    Architecture("gemma2", "gemma2", _GEMMA, _gemma(46), scalings=("none",)),
    Architecture("gemma3", "gemma3_text", _GEMMA | {"rope_local_base_freq": "Rope.FREQ_BASE_SWA"}, _gemma(62)),
    Architecture(
        "qwen3moe", "qwen3_moe", _EXPERTS | {"moe_intermediate_size": "LLM.EXPERT_FEED_FORWARD_LENGTH"},
        lambda hf: {"norm_topk_prob": True}),
    Architecture("olmoe", "olmoe", _EXPERTS, lambda hf: {"norm_topk_prob": False}),
)  # fmt: skip

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
    "rope.scaling.type": ("none", "linear"),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (0, 1),
    "leading_dense_block_count": (0,),
}


def open_gguf_model(path: str | os.PathLike) -> tuple[Family, ModelConfig, Tensors]:
    """The family (with GGUF's names), configuration and tensors of a GGUF file. Raises: UserError."""
    metadata, tensors = open_gguf(path)
    architecture = _architecture_of(metadata, path)
    divisors = tensors.pop(ROPE_FREQS, None) if "llama3" in architecture.scalings else None
    table = tensors.get("token_embd.weight")
    config = read_config(
        architecture, metadata, tensors, table.shape[0] if table else None, divisors and divisors.read(), path
    )
    return architecture.family_for(config), config, tensors


def _architecture_of(metadata: dict[str, Any], path: str | os.PathLike) -> Architecture:
    name = metadata.get("general.architecture")
    rows = [architecture for architecture in ARCHITECTURES if architecture.name == name]
    if rows:
        has_experts = bool(metadata.get(rows[0].key("LLM.EXPERT_COUNT")))
        return next((row for row in rows if row.is_sparse == has_experts), rows[0])
    known = ", ".join(dict.fromkeys(architecture.name for architecture in ARCHITECTURES))
    raise UserError(
        f"{path}: general.architecture={name!r} is not supported; supported are {known} "
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
    try:
        hf |= a.implied(hf)
    except (TypeError, KeyError, ArithmeticError) as error:
        raise UserError(f"{path}: the sizes of the model are missing or wrong: {error}") from error
    config = to_config(family, hf, "lm", len(names) + 1)
    config = dataclasses.replace(config, **_read_own_fields(a, metadata, path))
    if divisors is not None:
        expected = rope_divisors(config)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise UserError(
                f"{path}: {ROPE_FREQS} must have the values of Llama 3.1 to 3.3, with a context of "
                f"{config.rope.context} in training"
            )
    key = a.key("Rope.DIMENSION_COUNT")
    if (rotated := metadata.get(key, config.K)) != config.K:
        raise UserError(f"{path}: {key}={rotated} must be the head's size, {config.K}")
    return config


def _plain(value: Any) -> Any:
    """The shortest number that is the same in float32, in which files have it: 1e-6, not 9.99999997475e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value


def rope_divisors(config: ModelConfig) -> np.ndarray:
    """The tensor ROPE_FREQS: float32 [K / 2], each rotary rate divided by the scaled one."""
    rates = nn.base_rates(config.rope.theta, config.K) / nn.rotary_rates(config.rope, config.K)
    return np.asarray(rates, np.float32)


def _refuse_unsupported(a: Architecture, metadata: dict[str, Any], path: str | os.PathLike) -> None:
    """Raises: UserError naming all metadata that changes the model and is not supported."""
    unsupported = _UNSUPPORTED if a.is_sparse else _UNSUPPORTED | {"expert_count": (0,)}
    found = {f"{a.name}.{name}": values for name, values in unsupported.items() if f"{a.name}.{name}" in metadata}
    raise_problems(
        path,
        [
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


def _read_scaling(a: Architecture, metadata, divisors: np.ndarray | None, path) -> Json | None:
    """rope_scaling as in a config.json.

    A factor without a type is linear, as in llama.cpp; the first files name it rope.scale_linear.
    """
    key = a.key("Rope.SCALING_FACTOR")
    factor = metadata.get(key) or metadata.get(f"{a.name}.rope.scale_linear") or 1.0
    is_scaled = factor != 1 and metadata.get(a.key("Rope.SCALING_TYPE")) != "none"
    if divisors is None:
        return {"rope_type": "linear", "factor": _plain(factor)} if is_scaled else None
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
    for architecture in ARCHITECTURES:
        for candidate in dict.fromkeys(same):
            try:
                metadata = _metadata_of(architecture, candidate)
                # Read as llama.cpp reads it, it must be the same model.
                names = [mapping.name for mapping in tensor_mapping(architecture.family_for(candidate), candidate)]
                divisors = rope_divisors(candidate) if candidate.rope.scaling == "llama3" else None
                back = read_config(architecture, metadata, names, candidate.vocab_size, divisors, "GGUF")
                wrong = different_fields(_untrained(candidate), _untrained(back))
                distance, wrong = len(wrong), [f"model.{name}={getattr(config, name)!r}" for name in wrong]
            except UserError as error:
                distance, wrong = 2 + len(_differences(architecture.family, candidate)), [str(error)]
            if not wrong:
                return architecture, metadata, candidate
            problems.setdefault(architecture.name, (distance, wrong))
    nearest = min(problems, key=lambda name: problems[name][0])
    raise UserError(
        f"no architecture of GGUF files here ({', '.join(problems)}) has such models; the nearest is {nearest}, "
        f"except {', '.join(problems[nearest][1])}"
    )


def _untrained(config: ModelConfig) -> ModelConfig:
    """The canonical configuration without what only training reads."""
    c = canonical(config)
    return dataclasses.replace(c, moe=dataclasses.replace(c.moe, balance_loss=0.0, z_loss=0.0))


def _differences(family: Family, config: ModelConfig) -> list[str]:
    try:
        return differences(family, config)
    except UserError as error:  # a value that the family refuses
        return [str(error)]


def _metadata_of(a: Architecture, config: ModelConfig) -> dict[str, Any]:
    if config.rope.scaling not in a.scalings:
        raise UserError(f"model.rope.scaling={config.rope.scaling!r}, not {' or '.join(a.scalings)}")
    hf = from_config(a.family, config)
    metadata = {a.key(name): hf[field] for field, name in a.fields.items() if hf.get(field) is not None}
    metadata |= {a.key("Attention.KEY_LENGTH"): config.K, a.key("Attention.VALUE_LENGTH"): config.K}
    metadata |= {a.key("Rope.DIMENSION_COUNT"): config.K}
    if config.rope.scaling == "linear":
        metadata |= {a.key("Rope.SCALING_TYPE"): "linear", a.key("Rope.SCALING_FACTOR"): config.rope.factor}
    if config.rope.scaling == "llama3":
        metadata[a.key("Rope.SCALING_ORIG_CTX_LEN")] = config.rope.context
    return metadata
