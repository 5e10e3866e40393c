"""More decoders among the families of Hugging Face Transformers: of 2024 and after, with one MLP in each layer.

In `read` and `write`, hf is a parsed config.json and c a ModelConfig.
"""

import dataclasses

from nanoflax.errors import UserError
from nanoflax.hf.decoders import like_llama, with_classifier
from nanoflax.hf.rope import read_layers, read_rope, write_layers, write_rope

GRANITE = like_llama(
    "granite", "Granite",
    fields={"embedding_multiplier": "embed_scale", "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention_scale"},
    defaults={"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
              "logits_scaling": 1.0},
    read=lambda hf: read_rope(hf) | {"out_bias": hf["attention_bias"], "logit_scale": 1 / hf["logits_scaling"]},
    write=lambda c: write_rope(c) | {"logits_scaling": 1 / c.logit_scale})  # fmt: skip


def _read_window(hf):
    """The kinds of layers, where all but each `period`-th have a window; Transformers needs its size in any case."""
    if not hf["sliding_window"]:
        raise UserError(f"sliding_window={hf['sliding_window']!r} must be positive")
    return read_layers(hf, lambda i: "sliding_attention" if (i + 1) % hf["period"] else "full_attention")


def _write_window(c):
    return write_layers(c) | {"sliding_window": c.window or c.context}


def _read_cohere(hf):
    layers = _read_window(hf | {"period": hf.get("sliding_window_pattern", hf["period"])})
    without = tuple(i for i, kind in enumerate(layers["layer_types"]) if kind == "full")
    return read_rope(hf) | layers | {"out_bias": hf["attention_bias"], "nope_layers": without}


_COHERE2 = like_llama(
    "cohere2", "Cohere2", without=("mlp_bias", "rms_norm_eps"),
    fields={"layer_norm_eps": "norm_eps", "logit_scale": "logit_scale"},
    preset={"norm": "layernorm", "parallel": True, "shared_norm": True, "rope.interleaved": True},
    defaults={"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True, "sliding_window": 4096,
              "max_position_embeddings": 8192, "period": 4},
    read=_read_cohere,
    write=lambda c: write_rope(c) | _write_window(c))  # fmt: skip
_COHERE = dataclasses.replace(
    _COHERE2, model_type="cohere", classes={"lm": ("CohereForCausalLM",)},
    defaults=_COHERE2.defaults | {"use_qk_norm": False, "rope_theta": 500_000.0},
    read=lambda hf: read_rope(hf) | {
        "out_bias": hf["attention_bias"], "qk_norm": "each_head" if hf["use_qk_norm"] else "none"},
    write=lambda c: write_rope(c) | {"use_qk_norm": c.qk_norm == "each_head"})  # fmt: skip
_STARCODER2 = like_llama(
    "starcoder2", "Starcoder2", without=("attention_bias", "mlp_bias", "rms_norm_eps"),
    keys={"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"},
    fields={"norm_epsilon": "norm_eps", "use_bias": "qkv_bias", "residual_dropout": "dropout"},
    preset=dict(norm="layernorm", gated=False, norm_bias=True),
    defaults={"norm_epsilon": 1e-5, "use_bias": True, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 2,
              "max_position_embeddings": 4096, "tie_word_embeddings": True, "sliding_window": None,
              "residual_dropout": 0.0},
    read=lambda hf: read_rope(hf) | {
        "window": hf["sliding_window"] or 0, "out_bias": hf["use_bias"], "mlp_bias": hf["use_bias"]},
    write=lambda c: write_rope(c) | {
        "sliding_window": c.window or None, "embedding_dropout": c.dropout})  # fmt: skip
_STABLELM = like_llama(
    "stablelm", "StableLm", without=("attention_bias", "mlp_bias", "rms_norm_eps", "head_dim"),
    keys={"attention/query_norm": "self_attn.q_layernorm.norms.{e}",
          "attention/key_norm": "self_attn.k_layernorm.norms.{e}"},
    fields={"layer_norm_eps": "norm_eps", "use_qkv_bias": "qkv_bias", "use_parallel_residual": "parallel",
            "hidden_dropout": "dropout"},
    preset=dict(norm="layernorm", norm_bias=True),
    defaults={"layer_norm_eps": 1e-5, "use_qkv_bias": False, "use_parallel_residual": False, "hidden_dropout": 0.0,
              "num_key_value_heads": 32, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25,
              "qk_layernorm": False},
    read=lambda hf: read_rope(hf | {"rotary_pct": hf["partial_rotary_factor"]}) | {
        "shared_norm": hf["use_parallel_residual"], "qk_norm": "each_head" if hf["qk_layernorm"] else "none"},
    write=lambda c: write_rope(c) | {
        "partial_rotary_factor": c.rope.fraction, "qk_layernorm": c.qk_norm == "each_head"})  # fmt: skip


def _read_smollm3(hf):
    every, window = hf["no_rope_layer_interval"], hf["use_sliding_window"] and hf["sliding_window"]
    has_rope = hf["no_rope_layers"] or [(i + 1) % every for i in range(hf["num_hidden_layers"])]
    if len(has_rope) != hf["num_hidden_layers"]:
        raise UserError(f"no_rope_layers must have {hf['num_hidden_layers']} values, not {has_rope!r}")
    layers = read_layers(hf, lambda i: "sliding_attention" if window and not has_rope[i] else "full_attention")
    without = tuple(i for i in range(hf["num_hidden_layers"]) if not has_rope[i])
    return read_rope(hf) | layers | {"out_bias": hf["attention_bias"], "nope_layers": without}


_SMOLLM3 = like_llama(
    "smollm3", "SmolLM3",
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
              "rope_theta": 2_000_000.0, "use_sliding_window": False, "sliding_window": None, "no_rope_layers": None,
              "no_rope_layer_interval": 4},
    read=_read_smollm3,
    write=lambda c: write_rope(c) | write_layers(c) | {
        "use_sliding_window": c.window > 0,
        "no_rope_layers": [int(c.has_rope(i)) for i in range(c.layers)]})  # fmt: skip
_GLM4 = like_llama(
    "glm4", "Glm4", without=("mlp_bias",),
    keys={"norm_attention_out": "post_self_attn_layernorm", "norm_mlp_out": "post_mlp_layernorm",
          "mlp/gate": ("mlp.gate_up_proj", "fused", 0), "mlp/up": ("mlp.gate_up_proj", "fused", 1)},
    preset={"norm_place": "sandwich", "rope.interleaved": True},
    defaults={"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072,
              "rms_norm_eps": 1.5625e-7, "attention_bias": True, "partial_rotary_factor": 0.5},
    read=lambda hf: read_rope(hf | {"rotary_pct": hf["partial_rotary_factor"]}),
    write=lambda c: write_rope(c) | {"partial_rotary_factor": c.rope.fraction})  # fmt: skip
_NANOCHAT = like_llama(
    "nanochat", "NanoChat", without=("mlp_bias",),
    keys={"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"},
    preset={"gated": False, "norm_scale": False, "embed_norm": True, "qk_norm": "rotated", "rope.reversed": True},
    defaults={"hidden_act": "relu2", "final_logit_softcapping": 15.0},
    read=lambda hf: read_rope(hf) | {
        "out_bias": hf["attention_bias"], "logit_softcap": hf["final_logit_softcapping"] or 0.0},
    write=lambda c: write_rope(c) | {"final_logit_softcapping": c.logit_softcap or None})  # fmt: skip

_OLMO = like_llama(
    "olmo", "Olmo", without=("mlp_bias", "head_dim", "rms_norm_eps"), fields={"clip_qkv": "qkv_clip"},
    preset=dict(norm="layernorm", norm_scale=False, norm_bias=False, norm_eps=1e-5),
    defaults={"clip_qkv": None})  # fmt: skip


def _read_olmo3(hf):
    rope, theta = hf.get("rope_parameters") or {}, _OLMO3.defaults["rope_theta"]
    if rope and not {"full_attention", "sliding_attention"} & rope.keys():
        raise UserError("rope_parameters must have values for full_attention and sliding_attention")
    full = {"rope_theta": hf["rope_theta"]} | (rope.get("full_attention") or {}) | (hf.get("rope_scaling") or {})
    local = {"rope_theta": theta} | (rope.get("sliding_attention") or {})  # Transformers 5 ignores rope_theta here
    hf |= {"rope_scaling": None, "rope_parameters": {"full_attention": full, "sliding_attention": local}}
    return read_rope(hf | {"rope_local_base_freq": theta}) | _read_window(hf) | {"out_bias": hf["attention_bias"]}


def _write_olmo3(c):
    rope, local = write_rope(c), c.rope.local_theta or c.rope.theta
    full = (rope["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": c.rope.theta}
    local = {"rope_type": "default", "rope_theta": local}
    return _write_window(c) | {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


_OLMO3 = like_llama(
    "olmo3", "Olmo3", without=("mlp_bias",),
    keys={"norm_attention": "post_attention_layernorm", "norm_mlp": "post_feedforward_layernorm"},
    preset=dict(norm_place="after", qk_norm="full"),
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096, "period": 4},
    read=_read_olmo3, write=_write_olmo3)  # fmt: skip

_PHI = like_llama(
    "phi", "Phi", without=("attention_bias", "mlp_bias", "rms_norm_eps"),
    keys={"attention/out": "self_attn.dense", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
          "attention/query_norm": "self_attn.q_layernorm", "attention/key_norm": "self_attn.k_layernorm"},
    more_keys=lambda c: {"decoder/norm": "model.final_layernorm", "logit_bias": "lm_head.bias"},
    fields={"layer_norm_eps": "norm_eps", "resid_pdrop": "dropout"},
    preset=dict(norm="layernorm", gated=False, bias=True, parallel=True, shared_norm=True, head_bias=True),
    defaults={"layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "resid_pdrop": 0.0, "partial_rotary_factor": 0.5,
              "qk_layernorm": False},
    read=lambda hf: read_rope(hf | {"rotary_pct": hf["partial_rotary_factor"]}) | {
        "qk_norm": "layer" if hf["qk_layernorm"] else "none"},
    write=lambda c: write_rope(c) | {"partial_rotary_factor": c.rope.fraction, "embd_pdrop": c.dropout,
                                     "qk_layernorm": c.qk_norm == "layer"})  # fmt: skip


def read_hunyuan(hf):
    """With `alpha`, the scaling dynamic makes theta larger for every length: theta alpha^(K / (K - 2))."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) == "dynamic" and rope.get("alpha"):
        K = hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"]
        theta = rope.get("rope_theta", hf["rope_theta"]) * rope["alpha"] ** (K / (K - 2))
        hf = hf | {"rope_theta": theta, "rope_parameters": None, "rope_scaling": None}
    return read_rope(hf) | {"out_bias": hf["attention_bias"]}


HUNYUAN_NORMS = {"attention/query_norm": "self_attn.query_layernorm", "attention/key_norm": "self_attn.key_layernorm"}
_HUNYUAN = like_llama(
    "hunyuan_v1_dense", "HunYuanDenseV1", without=("mlp_bias",), keys=HUNYUAN_NORMS,
    preset=dict(qk_norm="rotated_scale"), defaults={"rms_norm_eps": 1e-5}, read=read_hunyuan)  # fmt: skip

MORE_DECODERS = [
    *map(with_classifier, (_STARCODER2, _STABLELM, _SMOLLM3, _GLM4, _OLMO, _OLMO3, _PHI, _HUNYUAN)),
    *(GRANITE, _COHERE, _COHERE2, _NANOCHAT),  # Transformers has no class that classifies with them
]
