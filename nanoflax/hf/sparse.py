"""The decoders with a mixture of experts among the families of Hugging Face Transformers.

In `read` and `write`, hf is a parsed config.json and c a ModelConfig. `router_aux_loss_coef` is
read and written although Transformers adds the loss only with `output_router_logits`.
"""

from typing import Any

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.decoders import like_llama, with_classifier
from nanoflax.hf.family import Json
from nanoflax.hf.rope import read_layers, read_rope, write_layers, write_rope

# Our modules of a layer with experts -> their names in most families.
EXPERTS = {
    "mlp/router": "mlp.gate",
    "mlp/experts/up": "mlp.experts.{e}.up_proj",
    "mlp/experts/gate": "mlp.experts.{e}.gate_proj",
    "mlp/experts/down": "mlp.experts.{e}.down_proj",
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
    read=_read_qwen3_moe, write=_write_qwen3_moe)  # fmt: skip
_OLMOE = like_llama(
    "olmoe", "Olmoe", without=("mlp_bias", "head_dim"), keys=EXPERTS,
    fields={"num_experts_per_tok": "moe.active", "norm_topk_prob": "moe.renormalise",
            "router_aux_loss_coef": "moe.balance_loss"},
    preset=dict(qk_norm="full"),
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8,
              "norm_topk_prob": False, "router_aux_loss_coef": 0.01},
    only={"clip_qkv": (None,)},
    read=lambda hf: read_rope(hf) | read_experts(hf) | {"out_bias": hf["attention_bias"]},
    write=lambda c: write_rope(c) | write_experts(c))  # fmt: skip

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
        "hidden_act": "silu"})  # fmt: skip

SPARSE = [with_classifier(_MIXTRAL), with_classifier(_QWEN3_MOE), _OLMOE, with_classifier(_GPT_OSS)]
