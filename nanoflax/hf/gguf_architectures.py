"""llama.cpp's architectures as our families: which metadata and tensors of GGUF files they have.

Names of metadata and tensors come from the tables of the gguf package. What no metadata says is here: llama.cpp
computes it for every model of an architecture.
"""

import dataclasses
import math
import operator
from collections.abc import Callable

from nanoflax.config import ModelConfig
from nanoflax.hf.families import family_of_type
from nanoflax.hf.family import Family, Json

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
_QWEN_MOE = _EXPERTS | {"moe_intermediate_size": "LLM.EXPERT_FEED_FORWARD_LENGTH"}
_GROUPED = _FIELDS | {  # of models like DeepSeek-V3
    "n_routed_experts": "LLM.EXPERT_COUNT",
    "num_experts_per_tok": "LLM.EXPERT_USED_COUNT",
    "moe_intermediate_size": "LLM.EXPERT_FEED_FORWARD_LENGTH",
    "n_shared_experts": "LLM.EXPERT_SHARED_COUNT",
    "first_k_dense_replace": "LLM.LEADING_DENSE_BLOCK_COUNT",
    "routed_scaling_factor": "LLM.EXPERT_WEIGHTS_SCALE",
    "norm_topk_prob": "LLM.EXPERT_WEIGHTS_NORM",
}
_LATENT = _GROUPED | {
    "kv_lora_rank": "Attention.KV_LORA_RANK",
    "q_lora_rank": "Attention.Q_LORA_RANK",
    "qk_rope_head_dim": "Rope.DIMENSION_COUNT",
    "v_head_dim": "Attention.VALUE_LENGTH",
    # Of a head, in files whose keys and values are latent vectors.
    "key_length": "Attention.KEY_LENGTH_MLA",
    "value_length": "Attention.VALUE_LENGTH_MLA",
    "yarn_log_multiplier": "Rope.SCALING_YARN_LOG_MUL",
}
_ERNIE = _FIELDS | {
    "moe_num_experts": "LLM.EXPERT_COUNT",
    "moe_k": "LLM.EXPERT_USED_COUNT",
    "moe_intermediate_size": "LLM.EXPERT_FEED_FORWARD_LENGTH",
    "moe_num_shared_experts": "LLM.EXPERT_SHARED_COUNT",
    "moe_layer_start_index": "LLM.LEADING_DENSE_BLOCK_COUNT",
    "moe_layer_interval": "LLM.INTERLEAVE_MOE_LAYER_STEP",
}
_HUNYUAN = _FIELDS | {"num_experts": "LLM.EXPERT_COUNT", "moe_topk": "LLM.EXPERT_USED_COUNT"}
_GRANITE = _MIXTRAL | {
    "shared_intermediate_size": "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH",
    "embedding_multiplier": "LLM.EMBEDDING_SCALE",
    "residual_multiplier": "LLM.RESIDUAL_SCALE",
    "attention_multiplier": "Attention.SCALE",
    "logits_scaling": "LLM.LOGIT_SCALE",
}
# Parameter in a block -> its tensor in gguf.MODEL_TENSOR, the end of its name, its layout: where the family has another
# name or layout. All experts of a layer are in one tensor.
_PARTS = ("gate", "up", "down")
_TENSORS = {
    "attention/sinks": ("ATTN_SINKS", "weight", "same"),
    "mlp/router/correction": ("FFN_EXP_PROBS_B", "bias", "same"),
    "mlp/shared_gate/kernel": ("FFN_GATE_INP_SHEXP", "weight", "column"),
    **{f"mlp/experts/{part}/kernel": (f"FFN_{part.upper()}_EXP", "weight", "each_transposed") for part in _PARTS},
    **{f"mlp/experts/{part}/bias": (f"FFN_{part.upper()}_EXP", "bias", "same") for part in _PARTS},
    **{f"mlp/shared/{part}/kernel": (f"FFN_{part.upper()}_SHEXP", "weight", "transposed") for part in _PARTS},
}


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
    scalings: tuple[str, ...] = ("none", "linear", "yarn")  # values of RopeConfig.scaling
    constants: Json = dataclasses.field(default_factory=dict)  # name in gguf.Keys -> its value in all models
    # Why llama.cpp cannot open the file of a model that the metadata can describe; empty: it can.
    refuses: Callable[[ModelConfig], str] = lambda config: ""

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

    def family_for(self, config: ModelConfig, predicting: int = 0) -> Family:
        """The family with the names of tensors in GGUF files.

        predicting: layers after the others that predict further tokens; Transformers does not read them either.
        """
        import gguf

        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names, keys = gguf.get_tensor_name_map(kind, 1), {}
        for ours, entry in (self.family.keys | self.family.more_keys(config)).items():
            theirs, *layout = [entry] if isinstance(entry, str) else entry
            name = names.get_name(theirs.format(i=0, e=0))
            if name is None:  # this architecture has no such tensor
                continue
            name = name.replace("blk.0.", "blk.{i}.")
            if self.rotary_pairs and ours.endswith(("/query", "/key")):
                layout = ["rotary_pairs"]
            keys[ours] = (name, *layout) if layout else name
            if config.norm_unit_offset and "norm" in ours.rpartition("/")[2]:
                keys[f"{ours}/scale"] = (f"{name}.weight", "plus_one")
        for ours, (tensor, end, layout) in _TENSORS.items():
            if gguf.MODEL_TENSOR[tensor] in gguf.MODEL_TENSORS[kind]:
                name = gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[tensor]].format(bid="{i}")
                keys[f"decoder/block_{{i}}/{ours}"] = (f"{name}.{end}", layout)
        after = "|".join(rf"blk\.{config.layers + i}\..*" for i in range(predicting)) or r"$^"
        return dataclasses.replace(self.family, keys=keys, more_keys=lambda c: {}, stacked={}, ignored=after)


def _gemma(layers_of_27b: int) -> Callable[[Json], Json]:
    def implied(hf):
        K = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
        if hf["num_hidden_layers"] == layers_of_27b:
            K = hf["hidden_size"] // hf["num_attention_heads"]
        return {"query_pre_attn_scalar": K, "sliding_window": hf.get("sliding_window", 4096)}

    return implied


def _glm4_moe(hf):
    layers = hf["num_hidden_layers"] - hf.get("num_nextn_predict_layers", 0)
    K = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
    rotary = hf["rotary_dim"] or K
    fraction = rotary / K
    if int(K * fraction) < rotary:  # as Transformers computes it
        fraction = math.nextafter(fraction, 1)
    return {"num_hidden_layers": layers, "partial_rotary_factor": fraction}


def _latent(hf):
    rope, K = hf["rope_scaling"], hf.get("key_length", hf["head_dim"])
    if rope["rope_type"] == "yarn":
        strength = 10 * hf["yarn_log_multiplier"]
        if not strength:  # then llama.cpp has another factor of cosines
            raise TypeError("rope.scaling.yarn_log_multiplier must not be 0")
        rope = rope | {"mscale": strength, "mscale_all_dim": strength}
    return {
        "rope_scaling": rope,
        "num_key_value_heads": hf["num_attention_heads"],
        "qk_nope_head_dim": K - hf["qk_rope_head_dim"],
        "v_head_dim": hf["value_length"] if "value_length" in hf else hf["v_head_dim"],
    }


def _latent_refuses(c):
    if not c.latent.query_rank and c.layers not in (26, 27):
        return f"model.layers={c.layers} must be 26 or 27 without model.latent.query_rank: llama.cpp tells so"
    return "" if c.moe.shared_dim else "model.moe.shared_dim=0 must be positive: llama.cpp reads shared experts"


_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
_SIGMOID = {"LLM.EXPERT_GATING_FUNC": 2}  # gguf.ExpertGatingFuncType
ARCHITECTURES = (
    Architecture(
        "llama", "llama", present=_BIASES, rotary_pairs=True, scalings=("none", "linear", "llama3")),
    Architecture("llama", "mixtral", _MIXTRAL, rotary_pairs=True, scalings=("none", "linear", "llama3")),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3"),
    Architecture("gemma2", "gemma2", _GEMMA, _gemma(46), scalings=("none",),
                 constants={"Attention.SLIDING_WINDOW_PATTERN": 2}),
    Architecture("gemma3", "gemma3_text", _GEMMA | {"rope_local_base_freq": "Rope.FREQ_BASE_SWA"}, _gemma(62),
                 scalings=("none", "linear"), constants={"Attention.SLIDING_WINDOW_PATTERN": 6}),
    Architecture("qwen3moe", "qwen3_moe", _QWEN_MOE, lambda hf: {"norm_topk_prob": True}),
    Architecture("olmoe", "olmoe", _EXPERTS, lambda hf: {"norm_topk_prob": False}),
    Architecture(
        "qwen2moe", "qwen2_moe",
        _QWEN_MOE | {"shared_expert_intermediate_size": "LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH"},
        lambda hf: {"norm_topk_prob": False}, present={"qkv_bias": "blk.0.attn_q.bias"}),
    # No metadata says that the ramp of yarn is not rounded; in the published models it is not.
    Architecture("gpt-oss", "gpt_oss", _MIXTRAL | {"sliding_window": "Attention.SLIDING_WINDOW"},
                 lambda hf: {"rope_scaling": hf["rope_scaling"] | {"truncate": False}},
                 present={"attention_bias": "blk.0.attn_q.bias"}, constants={"Attention.SLIDING_WINDOW_PATTERN": 2}),
    Architecture("granitemoe", "granitemoeshared", _GRANITE, rotary_pairs=True,
                 present={"attention_bias": "blk.0.attn_q.bias"}),
    Architecture("dots1", "dots1", _GROUPED, lambda hf: {"sliding_window": None}, constants=_SIGMOID),
    Architecture("glm4moe", "glm4_moe", _GROUPED | {"num_nextn_predict_layers": "LLM.NEXTN_PREDICT_LAYERS"}, _glm4_moe,
                 present={"attention_bias": "blk.0.attn_q.bias", "use_qk_norm": "blk.0.attn_q_norm.weight"},
                 constants=_SIGMOID),
    Architecture("ernie4_5-moe", "ernie4_5_moe", _ERNIE),
    # Written with one tensor for keys and values, which llama.cpp reads too.
    Architecture("deepseek2", "deepseek_v2", {a: b for a, b in _LATENT.items() if a != "norm_topk_prob"}, _latent,
                 constants={"LLM.EXPERT_GATING_FUNC": 1, "LLM.EXPERT_WEIGHTS_NORM": False}, refuses=_latent_refuses),
    Architecture(
        "deepseek2", "deepseek_v3",
        _LATENT | {"n_group": "LLM.EXPERT_GROUP_COUNT", "topk_group": "LLM.EXPERT_GROUP_USED_COUNT"}, _latent,
        constants=_SIGMOID, refuses=_latent_refuses),
    Architecture("hunyuan-dense", "hunyuan_v1_dense"),
    Architecture("hunyuan-moe", "hunyuan_v1_moe", _HUNYUAN, constants={"LLM.EXPERT_SHARED_COUNT": 1}),
)  # fmt: skip
