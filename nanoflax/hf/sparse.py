"""The decoders with a mixture of experts among the families of Hugging Face Transformers.

In `read` and `write`, hf is a parsed config.json and c a ModelConfig. `router_aux_loss_coef` is
read and written although Transformers adds the loss only with `output_router_logits`.
"""

from typing import Any

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.decoders import like_llama, with_classifier
from nanoflax.hf.family import Family, Json, Keys
from nanoflax.hf.more_decoders import GRANITE, HUNYUAN_NORMS, read_hunyuan
from nanoflax.hf.rope import read_layers, read_rope, write_layers, write_rope

# Our modules of a layer with experts -> their names in most families.
EXPERTS = {
    "mlp/router": "mlp.gate",
    "mlp/experts/up": "mlp.experts.{e}.up_proj",
    "mlp/experts/gate": "mlp.experts.{e}.gate_proj",
    "mlp/experts/down": "mlp.experts.{e}.down_proj",
}


def stacked(module: str = "mlp.experts", more: Keys | None = None) -> dict[str, Any]:
    """`Family.stacked` in a block; more: the keys of what else has another name there."""
    return {"mlp/experts/gate/kernel": (f"{module}.gate_up_proj", "each_transposed", 0),
            "mlp/experts/up/kernel": (f"{module}.gate_up_proj", "each_transposed", 1),
            "mlp/experts/down/kernel": (f"{module}.down_proj", "each_transposed"), **(more or {})}  # fmt: skip


# The MLP beside the experts; with a gate as in Qwen2-MoE.
SHARED = {f"mlp/shared/{part}": f"mlp.shared_experts.{part}_proj" for part in ("up", "gate", "down")}
GATED_SHARED = {"mlp/shared_gate": "mlp.shared_expert_gate"} | {
    name: module.replace("experts", "expert") for name, module in SHARED.items()
}


def read_experts(hf: Json) -> dict[str, Any]:
    """E; the name in older and in newer files."""
    return {"moe.experts": hf["num_local_experts"] if "num_local_experts" in hf else hf["num_experts"]}


def read_dense_layers(hf: Json) -> dict[str, Any]:
    """The layers without experts: those of mlp_only_layers, and all but each decoder_sparse_step-th.

    Raises: UserError for a step that is not a positive number.
    """
    step, own = hf["decoder_sparse_step"], hf["mlp_only_layers"] or ()
    if type(step) is not int or step < 1:
        raise UserError(
            f"decoder_sparse_step={step!r} must be at least 1; mlp_only_layers names layers without experts"
        )
    return {"moe.dense_layers": tuple(i for i in range(hf["num_hidden_layers"]) if i in own or (i + 1) % step)}


def read_shared(hf: Json) -> dict[str, Any]:
    """The MLP beside the experts, as large as n_shared_experts of them. Raises: UserError for what is no number."""
    if type(number := hf["n_shared_experts"]) is not int or number < 0:
        raise UserError(f"n_shared_experts={number!r} must be a number, 0 or more")
    return {"moe.shared_dim": number * hf["moe_intermediate_size"]}


def write_shared(c: ModelConfig) -> Json:
    """`read_shared` and `first_k_dense_replace`, the dense layers before those with experts."""
    return {
        "n_shared_experts": c.moe.shared_dim // (c.moe.expert_dim or c.F) if c.moe.experts else 1,
        "first_k_dense_replace": next((i for i in range(c.layers) if c.is_sparse(i)), c.layers),
    }


def empty_shared(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of an MLP of size 0, which Transformers has where there is no MLP beside the experts."""
    shapes = {} if c.moe.shared_dim else {"up": (0, c.dim), "gate": (0, c.dim), "down": (c.dim, 0)}
    return {
        f"model.layers.{i}.mlp.shared_experts.{part}_proj.weight": shape
        for i in filter(c.is_sparse, range(c.layers))
        for part, shape in shapes.items()
    }


def write_experts(c: ModelConfig) -> Json:
    """E by the name that every version of Transformers reads in families like Qwen2-MoE."""
    return {"num_experts": c.moe.experts}


_MIXTRAL = like_llama(
    "mixtral", "Mixtral", without=("attention_bias", "mlp_bias"),
    keys={"mlp/router": "block_sparse_moe.gate", "mlp/experts/up": "block_sparse_moe.experts.{e}.w3",
          "mlp/experts/gate": "block_sparse_moe.experts.{e}.w1", "mlp/experts/down": "block_sparse_moe.experts.{e}.w2"},
    fields={"num_local_experts": "moe.experts", "num_experts_per_tok": "moe.active",
            "router_aux_loss_coef": "moe.balance_loss"},
    defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1e6,
              "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
    aliases={"num_experts": "num_local_experts"}, only={"router_jitter_noise": (0.0,)},
    stacked=stacked(more={"mlp/router": "mlp.gate"}),
    read=lambda hf: read_rope(hf) | {"window": hf["sliding_window"] or 0},
    write=lambda c: write_rope(c) | {"sliding_window": c.window or None})  # fmt: skip


def _read_qwen3_moe(hf):
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    return (
        read_rope(hf)
        | read_experts(hf)
        | read_dense_layers(hf)
        | {"window": window or 0, "out_bias": hf["attention_bias"]}
    )


def _write_qwen3_moe(c):
    return (
        write_rope(c)
        | write_experts(c)
        | {
            "mlp_only_layers": list(c.moe.dense_layers),
            "moe_intermediate_size": c.moe.expert_dim or c.F,
            "decoder_sparse_step": 1,
            "sliding_window": c.window or None,
            "use_sliding_window": c.window > 0,
        }
    )


_QWEN3_MOE = like_llama(
    "qwen3_moe", "Qwen3Moe", without=("mlp_bias",), keys=EXPERTS,
    fields={"moe_intermediate_size": "moe.expert_dim", "num_experts_per_tok": "moe.active",
            "norm_topk_prob": "moe.renormalise", "router_aux_loss_coef": "moe.balance_loss"},
    preset=dict(qk_norm="head"),
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "num_experts": 128, "num_experts_per_tok": 8,
              "moe_intermediate_size": 768, "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
              "decoder_sparse_step": 1, "mlp_only_layers": None, "use_sliding_window": False, "sliding_window": 4096},
    read=_read_qwen3_moe, write=_write_qwen3_moe, stacked=stacked())  # fmt: skip
_OLMOE_FIELDS = {"num_experts_per_tok": "moe.active", "norm_topk_prob": "moe.renormalise",
                 "router_aux_loss_coef": "moe.balance_loss"}  # fmt: skip
_OLMOE = like_llama(
    "olmoe", "Olmoe", without=("mlp_bias", "head_dim"), keys=EXPERTS, fields=_OLMOE_FIELDS | {"clip_qkv": "qkv_clip"},
    preset=dict(qk_norm="full"),
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8,
              "norm_topk_prob": False, "router_aux_loss_coef": 0.01, "clip_qkv": None},
    stacked=stacked(),
    read=lambda hf: read_rope(hf) | read_experts(hf) | {"out_bias": hf["attention_bias"]},
    write=lambda c: write_rope(c) | write_experts(c))  # fmt: skip

_FLEX_OLMO = like_llama(
    "flex_olmo", "FlexOlmo", without=("mlp_bias",), fields=_OLMOE_FIELDS, stacked=stacked(),
    keys=EXPERTS | {"norm_attention": "post_attention_layernorm", "norm_mlp": "post_feedforward_layernorm"},
    preset=dict(norm_place="after", qk_norm="full"),
    defaults={"max_position_embeddings": 4096, "rope_theta": 500_000.0, "num_experts": 7, "num_experts_per_tok": 5,
              "norm_topk_prob": False, "router_aux_loss_coef": 0.01},
    read=_OLMOE.read, write=_OLMOE.write)  # fmt: skip
_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                 "original_max_position_embeddings": 4096}  # fmt: skip


def _read_gpt_oss(hf):
    if not (hf["swiglu_limit"] or 0) > 0:
        raise UserError(f"swiglu_limit={hf['swiglu_limit']!r} must be above 0")
    scaled = hf.get("rope_parameters") is not None or hf.get("rope_scaling")
    return (
        read_rope(hf if scaled else hf | {"rope_parameters": _GPT_OSS_ROPE})
        | read_layers(hf, lambda i: "full_attention" if i % 2 else "sliding_attention")
        | {"moe.experts": hf["num_local_experts"], "out_bias": hf["attention_bias"]}
    )


_GPT_OSS = like_llama(
    "gpt_oss", "GptOss", without=("mlp_bias", "hidden_act"),
    keys={"attention/sinks": "self_attn.sinks", "mlp/router": "mlp.router",
          "mlp/experts/gate/kernel": ("mlp.experts.gate_up_proj", "interleaved", 0),
          "mlp/experts/up/kernel": ("mlp.experts.gate_up_proj", "interleaved", 1),
          "mlp/experts/gate/bias": ("mlp.experts.gate_up_proj_bias", "interleaved", 0),
          "mlp/experts/up/bias": ("mlp.experts.gate_up_proj_bias", "interleaved", 1),
          "mlp/experts/down/kernel": ("mlp.experts.down_proj", "same"),
          "mlp/experts/down/bias": "mlp.experts.down_proj_bias"},
    fields={"num_local_experts": "moe.experts", "num_experts_per_tok": "moe.active",
            "router_aux_loss_coef": "moe.balance_loss", "swiglu_limit": "swiglu_limit", "swiglu_alpha": "swiglu_alpha"},
    preset={"activation": "silu", "attention_sinks": True, "mlp_bias": True, "moe.router_bias": True},
    defaults={"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
              "attention_bias": True, "rope_theta": 150_000.0, "sliding_window": 128, "num_local_experts": 128,
              "num_experts_per_tok": 4, "router_aux_loss_coef": 0.001, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    aliases={"num_experts": "num_local_experts"}, read=_read_gpt_oss,
    # A model without scaling says so: an absent one is yarn.
    write=lambda c: {k: v or {"rope_type": "default"} for k, v in write_rope(c).items()} | write_layers(c) | {
        "sliding_window": c.window or c.context, "hidden_act": "silu"})  # fmt: skip


def _read_qwen2_moe(hf):
    window, first = hf["sliding_window"] if hf["use_sliding_window"] else None, hf["max_window_layers"]
    layers = read_layers(
        hf | {"sliding_window": window},
        lambda i: "sliding_attention" if window and i % 2 == 0 and i < first else "full_attention",
    )
    return read_rope(hf) | layers | read_experts(hf) | read_dense_layers(hf)


_QWEN2_MOE = like_llama(
    "qwen2_moe", "Qwen2Moe", without=("mlp_bias", "attention_bias"), keys=EXPERTS | GATED_SHARED,
    fields={"qkv_bias": "qkv_bias", "moe_intermediate_size": "moe.expert_dim", "num_experts_per_tok": "moe.active",
            "shared_expert_intermediate_size": "moe.shared_dim", "norm_topk_prob": "moe.renormalise",
            "router_aux_loss_coef": "moe.balance_loss"},
    preset={"moe.shared_gate": True},
    defaults={"num_key_value_heads": 16, "max_position_embeddings": 32768, "num_experts": 60, "num_experts_per_tok": 4,
              "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "norm_topk_prob": False,
              "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1, "mlp_only_layers": None, "qkv_bias": True,
              "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    read=_read_qwen2_moe, write=lambda c: _write_qwen3_moe(c) | write_layers(c), stacked=stacked())  # fmt: skip


def _granite_moe(model_type: str, name: str, keys: Json, fields: dict[str, str], defaults: Json) -> Family:
    """Granite with experts; more keys, fields and defaults."""
    fused = {"mlp/router": "block_sparse_moe.router.layer",
             "mlp/experts/gate/kernel": ("block_sparse_moe.input_linear.weight", "each_transposed", 0),
             "mlp/experts/up/kernel": ("block_sparse_moe.input_linear.weight", "each_transposed", 1),
             "mlp/experts/down/kernel": ("block_sparse_moe.output_linear.weight", "each_transposed")}  # fmt: skip
    kept = {a: b for a, b in GRANITE.fields.items() if a != "mlp_bias"}
    return like_llama(
        model_type, name, without=("mlp_bias",), keys=fused | keys,
        fields=kept | fields | {"num_local_experts": "moe.experts", "num_experts_per_tok": "moe.active",
                                "router_aux_loss_coef": "moe.balance_loss"},
        defaults=GRANITE.defaults | defaults | {
            "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
        stacked=stacked("block_sparse_moe.experts", {"mlp/router": "block_sparse_moe.router"}),
        read=GRANITE.read, write=GRANITE.write)  # fmt: skip


_GRANITE_MOE = _granite_moe("granitemoe", "GraniteMoe", {}, {}, {})
_GRANITE_SHARED = _granite_moe(
    "granitemoeshared", "GraniteMoeShared",
    {"mlp/shared/gate": ("shared_mlp.input_linear", "fused", 0),
     "mlp/shared/up": ("shared_mlp.input_linear", "fused", 1), "mlp/shared/down": "shared_mlp.output_linear"},
    {"shared_intermediate_size": "moe.shared_dim"}, {"shared_intermediate_size": 0})  # fmt: skip


def _read_glm4_moe(hf):
    return (
        read_rope(hf | {"rotary_pct": hf["partial_rotary_factor"]})
        | read_shared(hf)
        | {
            "moe.dense_layers": tuple(range(min(hf["first_k_dense_replace"], hf["num_hidden_layers"]))),
            "qk_norm": "head" if hf["use_qk_norm"] else "none",
        }
    )


_GROUPED_KEYS = EXPERTS | SHARED | {"mlp/router/correction": "mlp.gate.e_score_correction_bias"}
_GROUPED_FIELDS = {
    "n_routed_experts": "moe.experts", "num_experts_per_tok": "moe.active", "n_group": "moe.groups",
    "topk_group": "moe.top_groups", "moe_intermediate_size": "moe.expert_dim",
    "routed_scaling_factor": "moe.scale", "norm_topk_prob": "moe.renormalise"}  # fmt: skip
_GLM4_MOE = like_llama(
    "glm4_moe", "Glm4Moe", without=("mlp_bias",), fields=_GROUPED_FIELDS,
    keys=_GROUPED_KEYS,
    preset={"moe.scores": "sigmoid", "moe.correction": True},
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "n_group": 1,
              "n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 1408,
              "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
              "use_qk_norm": False, "partial_rotary_factor": 0.5},
    aliases={"num_local_experts": "n_routed_experts"}, read=_read_glm4_moe, stacked=stacked(), empty=empty_shared,
    write=lambda c: write_rope(c) | write_shared(c) | {
        "partial_rotary_factor": c.rope.fraction, "use_qk_norm": c.qk_norm == "head"},
    # The layer after the last predicts a second token; Transformers does not read it either.
    ignored=r".*rotary_emb\.inv_freq|model\.layers\.(46|92)\..*")  # fmt: skip


def _read_dots(hf):
    first = hf["max_window_layers"] if hf["sliding_window"] else hf["num_hidden_layers"]
    return (
        read_rope(hf)
        | read_shared(hf)
        | read_layers(hf, lambda i: "sliding_attention" if i >= first else "full_attention")
        | {"moe.dense_layers": tuple(range(min(hf["first_k_dense_replace"], hf["num_hidden_layers"])))}
        | {"out_bias": hf["attention_bias"]}
    )


_DOTS1 = like_llama(
    "dots1", "Dots1", without=("mlp_bias",), fields=_GROUPED_FIELDS, keys=_GROUPED_KEYS,
    preset={"moe.scores": "sigmoid", "moe.correction": True, "qk_norm": "head"},
    defaults={"num_key_value_heads": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
              "norm_topk_prob": False, "routed_scaling_factor": 1.0, "sliding_window": 4096, "max_window_layers": 62,
              "moe_intermediate_size": 1408},
    aliases={"num_local_experts": "n_routed_experts"}, stacked=stacked(), empty=empty_shared, read=_read_dots,
    write=lambda c: write_rope(c) | write_shared(c) | write_layers(c) | {"max_window_layers": c.layers})  # fmt: skip


def _read_ernie(hf):
    first, last, every = (hf[f"moe_layer_{name}"] for name in ("start_index", "end_index", "interval"))
    if type(every) is not int or every < 1:
        raise UserError(f"moe_layer_interval={every!r} must be at least 1")
    layers = range(hf["num_hidden_layers"])
    sparse = [i for i in layers if first <= i and (i <= last or last == -1) and (i + 1) % every == 0]
    return read_rope(hf) | dict.fromkeys(("out_bias", "mlp_bias", "head_bias"), hf["use_bias"]) | {
        "moe.shared_dim": hf["moe_num_shared_experts"] * hf["moe_intermediate_size"],
        "moe.dense_layers": tuple(i for i in layers if i not in sparse)}  # fmt: skip


def _write_ernie(c):
    own = [i for i in range(c.layers) if c.is_sparse(i)] or [c.layers]
    return write_rope(c) | {
        "moe_num_shared_experts": c.moe.shared_dim // (c.moe.expert_dim or c.F), "moe_layer_start_index": own[0],
        "moe_layer_end_index": own[-1], "moe_layer_interval": own[1] - own[0] if own[1:] else 1}  # fmt: skip


# Transformers' balance loss counts the choices that the correction has not changed; here it counts those that are made.
_ERNIE = like_llama(
    "ernie4_5_moe", "Ernie4_5_Moe", without=("mlp_bias", "attention_bias"),
    keys=EXPERTS | SHARED | {"mlp/router/correction": ("mlp.moe_statics.e_score_correction_bias", "row")},
    more_keys=lambda c: {"logit_bias": "lm_head.bias"},
    fields={"use_bias": "qkv_bias", "moe_k": "moe.active", "moe_num_experts": "moe.experts",
            "moe_intermediate_size": "moe.expert_dim", "moe_norm_min": "moe.least_sum",
            "router_aux_loss_coef": "moe.balance_loss"},
    preset={"moe.correction": True, "moe.expert_bias": False, "rope.interleaved": True},
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "use_bias": False,
              "tie_word_embeddings": True, "rope_theta": 500_000.0, "moe_k": 6, "moe_num_experts": 64,
              "moe_num_shared_experts": 2, "moe_intermediate_size": 1536, "moe_layer_start_index": 1,
              "moe_layer_end_index": -1, "moe_layer_interval": 1, "moe_norm_min": 1e-12,
              "router_aux_loss_coef": 0.001},
    aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}, read=_read_ernie, write=_write_ernie,
    stacked=stacked(more={"mlp/router/correction": ("mlp.gate.moe_statics.e_score_correction_bias", "row")}),
    ignored=r".*rotary_emb\.inv_freq|.*mtp.*")  # fmt: skip


def _read_llama4(hf):
    layers, window = range(hf["num_hidden_layers"]), hf["attention_chunk_size"]
    has_rope = hf["no_rope_layers"] or [(i + 1) % hf["no_rope_layer_interval"] for i in layers]
    types = hf.get("layer_types") or ["chunked_attention" if has_rope[i] else "full_attention" for i in layers]
    if not window and "chunked_attention" in types:
        raise UserError(f"attention_chunk_size={window!r} must be positive for layers of chunked_attention")
    sparse, step = hf["moe_layers"], hf["interleave_moe_layer_step"]
    sparse = layers[step - 1 :: step] if sparse is None else sparse
    ours = read_layers(
        hf | {"sliding_window": window, "layer_types": types}, str, ("full_attention", "chunked_attention")
    )
    return read_rope(hf) | ours | {
        "nope_layers": tuple(i for i in layers if not has_rope[i]), "out_bias": hf["attention_bias"],
        "qk_norm": "rotated" if hf["use_qk_norm"] else "none", "moe.shared_dim": hf["intermediate_size"],
        "moe.dense_layers": tuple(i for i in layers if i not in sparse),
        "rope.nope_scale": hf["attn_scale"] if hf["attn_temperature_tuning"] else 0.0}  # fmt: skip


_LLAMA4 = like_llama(
    "llama4_text", "Llama4", without=("intermediate_size", "mlp_bias"),
    keys={"mlp/up": "feed_forward.up_proj", "mlp/gate": "feed_forward.gate_proj", "mlp/down": "feed_forward.down_proj",
          "mlp/router": "feed_forward.router",
          "mlp/experts/gate/kernel": ("feed_forward.experts.gate_up_proj", "fused_columns", 0),
          "mlp/experts/up/kernel": ("feed_forward.experts.gate_up_proj", "fused_columns", 1),
          "mlp/experts/down/kernel": ("feed_forward.experts.down_proj", "same"),
          **{f"mlp/shared/{part}": f"feed_forward.shared_expert.{part}_proj" for part in ("up", "gate", "down")}},
    fields={"intermediate_size_mlp": "mlp_dim", "intermediate_size": "moe.expert_dim", "floor_scale": "rope.nope_floor",
            "num_local_experts": "moe.experts", "num_experts_per_tok": "moe.active",
            "router_aux_loss_coef": "moe.balance_loss"},
    preset={"moe.scores": "sigmoid", "moe.renormalise": False, "moe.weigh_inputs": True, "rope.interleaved": True},
    defaults={"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
              "max_position_embeddings": 131072, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
              "num_experts_per_tok": 1, "num_local_experts": 16, "moe_layers": None, "interleave_moe_layer_step": 1,
              "use_qk_norm": True, "no_rope_layers": None, "no_rope_layer_interval": 4, "attention_chunk_size": 8192,
              "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1, "router_aux_loss_coef": 0.001},
    read=_read_llama4,
    write=lambda c: write_rope(c) | write_layers(c) | {
        "attention_chunk_size": c.window or c.context, "intermediate_size": c.moe.expert_dim or c.F,
        "no_rope_layers": [int(c.has_rope(i)) for i in range(c.layers)],
        "moe_layers": [i for i in range(c.layers) if c.is_sparse(i)], "use_qk_norm": c.qk_norm == "rotated",
        "attn_temperature_tuning": c.rope.nope_scale > 0, "attn_scale": c.rope.nope_scale})  # fmt: skip


def _read_hunyuan_moe(hf):
    active = {*hf["moe_topk"]} if isinstance(hf["moe_topk"], list) else {hf["moe_topk"]}
    if len(active) != 1:
        raise UserError(f"moe_topk={hf['moe_topk']!r} must be one number, or the same in all layers")
    return read_hunyuan(hf) | {"moe.active": active.pop(), "moe.shared_dim": hf["intermediate_size"]}


_HUNYUAN_MOE = like_llama(
    "hunyuan_v1_moe", "HunYuanMoEV1", without=("mlp_bias",),
    keys=EXPERTS | HUNYUAN_NORMS | {"mlp/router": "mlp.gate.wg"} | {
        f"mlp/shared/{part}": f"mlp.shared_mlp.{part}_proj" for part in ("up", "gate", "down")},
    fields={"num_experts": "moe.experts"}, preset=dict(qk_norm="rotated_scale"),
    defaults={"rms_norm_eps": 1e-5, "num_experts": 1, "moe_topk": 1},
    aliases={"num_local_experts": "num_experts", "num_experts_per_tok": "moe_topk"},
    read=_read_hunyuan_moe, write=lambda c: write_rope(c) | {"moe_topk": c.moe.active}, stacked=stacked())  # fmt: skip

SPARSE = [
    *map(with_classifier, (_MIXTRAL, _QWEN3_MOE, _GPT_OSS, _QWEN2_MOE, _HUNYUAN_MOE)),
    *(_DOTS1, _FLEX_OLMO, _LLAMA4, _OLMOE, _GRANITE_MOE, _GRANITE_SHARED, _GLM4_MOE, _ERNIE),
]
