"""The decoders among the families of Hugging Face Transformers.

In `read` and `write`, hf is a parsed config.json and c a ModelConfig.
"""

import dataclasses
import re

from nanoflax.hf.family import Family, under
from nanoflax.hf.rope import ROPE_KINDS, read_layers, read_rope, write_layers, write_rope

LLAMA = Family(
    model_type="llama",
    classes={"lm": ("LlamaForCausalLM",)},
    keys={"embed": "model.embed_tokens", "decoder/norm": "model.norm", "unembed": "lm_head",
          **under("decoder/block_{i}", "model.layers.{i}", {
              "norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm",
              "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj",
              "attention/value": "self_attn.v_proj", "attention/out": "self_attn.o_proj",
              "attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm",
              "mlp/up": "mlp.up_proj", "mlp/gate": "mlp.gate_proj", "mlp/down": "mlp.down_proj"})},
    fields={"vocab_size": "vocab_size", "max_position_embeddings": "context", "num_hidden_layers": "layers",
            "hidden_size": "dim", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
            "head_dim": "head_dim", "intermediate_size": "mlp_dim", "hidden_act": "activation",
            "rms_norm_eps": "norm_eps", "tie_word_embeddings": "tied", "attention_bias": "qkv_bias",
            "mlp_bias": "mlp_bias"},
    preset=dict(norm="rmsnorm", gated=True, positions="rotary", bias=False),
    defaults={"num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048,
              "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
              "rope_theta": 10_000.0},
    read=lambda hf: read_rope(hf) | {"out_bias": hf["attention_bias"]},
    write=write_rope,
    ignored=r".*rotary_emb\.inv_freq",
    base="model.")  # fmt: skip


def like_llama(
    model_type, name, without=(), keys=None, preset=None, defaults=None, fields=None, stacked=None, **changes
):
    """The Llama family with changes. without: fields of Llama that this family does not have."""
    in_block = lambda keys: under("decoder/block_{i}", "model.layers.{i}", keys or {})
    kept = {a: b for a, b in LLAMA.fields.items() if a not in without}
    return dataclasses.replace(
        LLAMA,
        model_type=model_type,
        classes={"lm": (f"{name}ForCausalLM",)},
        keys=LLAMA.keys | in_block(keys),
        stacked=in_block(stacked),
        fields=kept | (fields or {}),
        preset=LLAMA.preset | (preset or {}),
        defaults=LLAMA.defaults | (defaults or {}),
        **changes,
    )


_MISTRAL = like_llama(
    "mistral", "Mistral", without=("attention_bias", "mlp_bias"),
    defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    read=lambda hf: read_rope(hf) | {"window": hf["sliding_window"] or 0},
    write=lambda c: write_rope(c) | {"sliding_window": c.window or None})  # fmt: skip


def _read_qwen(hf):
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    first = hf["max_window_layers"]
    return read_rope(hf) | read_layers(
        hf | {"sliding_window": window}, lambda i: "sliding_attention" if i >= first else "full_attention"
    )


def _write_qwen(c):
    first = next((i for i in range(c.layers) if c.is_local(i)), c.layers)
    return write_rope(c) | write_layers(c) | {"use_sliding_window": c.window > 0, "max_window_layers": first}


def _read_phi3(hf):
    rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = rope.pop("type", "default")
    kind = rope.get("rope_type", kind)
    rope["rope_type"] = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)  # names in the first files
    hf = hf | {"rope_scaling": rope, "rotary_pct": hf["partial_rotary_factor"]}
    return read_rope(hf, kinds=("default", "longrope")) | {"window": hf["sliding_window"] or 0}


def _write_phi3(c):
    """The factor of longrope is absent if it is the ratio of the contexts: Transformers 4 refuses it."""
    hf = write_rope(c) | {
        "partial_rotary_factor": c.rope.fraction, "original_max_position_embeddings": c.context,
        "sliding_window": c.window or None, "embd_pdrop": c.dropout}  # fmt: skip
    if c.rope.scaling == "longrope":
        rope = hf["rope_scaling"]
        hf["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
        if rope["factor"] == c.context / c.rope.context:
            del rope["factor"]
    return hf


_PHI3 = like_llama(
    "phi3", "Phi3", without=("attention_bias", "mlp_bias"),
    keys={"attention/query": ("self_attn.qkv_proj", "fused", 0), "attention/key": ("self_attn.qkv_proj", "fused", 1),
          "attention/value": ("self_attn.qkv_proj", "fused", 2),
          "mlp/gate": ("mlp.gate_up_proj", "fused", 0), "mlp/up": ("mlp.gate_up_proj", "fused", 1)},
    fields={"resid_pdrop": "dropout"},
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None, "resid_pdrop": 0.0,
              "partial_rotary_factor": 1.0, "original_max_position_embeddings": 4096},
    read=_read_phi3, write=_write_phi3)  # fmt: skip
_QWEN2 = like_llama(
    "qwen2", "Qwen2", without=("attention_bias", "mlp_bias", "head_dim"),
    preset=dict(qkv_bias=True),
    defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32,
              "max_position_embeddings": 32768},
    read=_read_qwen, write=_write_qwen)  # fmt: skip
_QWEN3 = like_llama(
    "qwen3", "Qwen3", without=("mlp_bias",), preset=dict(qk_norm="head"),
    defaults=_QWEN2.defaults | {"head_dim": 128},
    read=lambda hf: _read_qwen(hf) | {"out_bias": hf["attention_bias"]}, write=_write_qwen)  # fmt: skip
_OLMO2 = like_llama(
    "olmo2", "Olmo2", without=("mlp_bias", "head_dim"),
    keys={"norm_attention": "post_attention_layernorm", "norm_mlp": "post_feedforward_layernorm"},
    preset=dict(norm_place="after", qk_norm="full"), defaults={"rms_norm_eps": 1e-5})  # fmt: skip


def _read_gemma1(hf):
    act = {"activation": "gelu_tanh"} if hf["hidden_act"] == "gelu" else {}  # the name in the first files
    return read_rope(hf) | act | {"out_bias": hf["attention_bias"], "embed_scale": hf["hidden_size"] ** 0.5}


_GEMMA = like_llama(
    "gemma", "Gemma", without=("mlp_bias",), preset=dict(norm_unit_offset=True),
    defaults={"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "num_key_value_heads": 16,
              "tie_word_embeddings": True, "max_position_embeddings": 8192},
    only={"use_bidirectional_attention": (False,)},
    read=_read_gemma1)  # fmt: skip


def _read_gemma(hf):
    period = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", hf["period"]))
    return (
        read_rope(hf)
        | read_layers(hf, lambda i: "sliding_attention" if (i + 1) % period else "full_attention")
        | {
            "out_bias": hf["attention_bias"],
            "embed_scale": hf["hidden_size"] ** 0.5,
            "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": hf["attn_logit_softcapping"] or 0.0,
            "logit_softcap": hf["final_logit_softcapping"] or 0.0,
        }
    )


def _write_gemma(c):
    scalar = c.attention_scale**-2
    return (
        write_rope(c)
        | write_layers(c)
        | {
            "sliding_window": c.window or c.context,  # Transformers needs it in any case
            "query_pre_attn_scalar": round(scalar),
            "attn_logit_softcapping": c.attention_softcap or None,
            "final_logit_softcapping": c.logit_softcap or None,
        }
    )


_GEMMA2 = like_llama(
    "gemma2", "Gemma2", without=("mlp_bias", "hidden_act"),
    keys={"norm_attention_out": "post_attention_layernorm", "norm_mlp": "pre_feedforward_layernorm",
          "norm_mlp_out": "post_feedforward_layernorm"},
    fields={"hidden_activation": "activation"},
    preset=dict(norm_place="sandwich", norm_unit_offset=True),
    defaults={"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "num_key_value_heads": 4,
              "tie_word_embeddings": True, "max_position_embeddings": 8192, "sliding_window": 4096, "period": 2,
              "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    only={"use_bidirectional_attention": (False,)},
    read=_read_gemma, write=_write_gemma)  # fmt: skip
GEMMA3 = dataclasses.replace(
    _GEMMA2, model_type="gemma3_text", classes={"lm": ("Gemma3ForCausalLM",)},
    preset=_GEMMA2.preset | dict(qk_norm="head"),
    defaults=_GEMMA2.defaults | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "period": 6,
                                 "max_position_embeddings": 131_072,
                                 "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    only=_GEMMA2.only | {"attn_logit_softcapping": (None,)},  # Transformers would not apply it
    write=lambda c: _write_gemma(c) | {"rope_local_base_freq": c.rope.local_theta or c.rope.theta})  # fmt: skip

_GPT2 = Family(
    model_type="gpt2",
    classes={"lm": ("GPT2LMHeadModel",)},
    keys={"embed": "transformer.wte", "decoder/position_embed": "transformer.wpe",
          "decoder/norm": "transformer.ln_f", "unembed": "lm_head",
          **under("decoder/block_{i}", "transformer.h.{i}", {
              "norm_attention": "ln_1", "norm_mlp": "ln_2",
              "attention/query": ("attn.c_attn", "fused_columns", 0),
              "attention/key": ("attn.c_attn", "fused_columns", 1),
              "attention/value": ("attn.c_attn", "fused_columns", 2),
              "attention/out": ("attn.c_proj", "same"),
              "mlp/up": ("mlp.c_fc", "same"), "mlp/down": ("mlp.c_proj", "same")})},
    fields={"vocab_size": "vocab_size", "n_positions": "context", "n_layer": "layers",
            "n_embd": "dim", "n_head": "heads", "n_inner": "mlp_dim",
            "activation_function": "activation", "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tied", "resid_pdrop": "dropout",
            "scale_attn_by_inverse_layer_idx": "scale_by_layer"},
    preset={},
    defaults={"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True, "resid_pdrop": 0.1, "n_positions": 1024, "scale_attn_weights": True,
              "scale_attn_by_inverse_layer_idx": False},
    aliases={"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
             "num_hidden_layers": "n_layer"},
    only={"add_cross_attention": (False,)},
    read=lambda hf: {"attention_scale": None if hf["scale_attn_weights"] else 1.0},
    write=lambda c: {"scale_attn_weights": c.attention_scale != 1, "embd_pdrop": c.dropout, "attn_pdrop": 0.0},
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    base="transformer.")  # fmt: skip

_OPT = Family(
    model_type="opt",
    classes={"lm": ("OPTForCausalLM",)},
    keys={"embed": "model.decoder.embed_tokens", "unembed": "lm_head",
          "decoder/position_embed": "model.decoder.embed_positions",
          "decoder/norm": "model.decoder.final_layer_norm",
          "project_in": "model.decoder.project_in", "project_out": "model.decoder.project_out",
          **under("decoder/block_{i}", "model.decoder.layers.{i}", {
              "norm_attention": "self_attn_layer_norm", "norm_mlp": "final_layer_norm",
              "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj",
              "attention/value": "self_attn.v_proj", "attention/out": "self_attn.out_proj",
              "mlp/up": "fc1", "mlp/down": "fc2"})},
    fields={"vocab_size": "vocab_size", "max_position_embeddings": "context", "num_hidden_layers": "layers",
            "hidden_size": "dim", "num_attention_heads": "heads", "ffn_dim": "mlp_dim",
            "activation_function": "activation", "enable_bias": "qkv_bias", "tie_word_embeddings": "tied",
            "word_embed_proj_dim": "embed_dim", "layer_norm_elementwise_affine": "norm_scale", "dropout": "dropout"},
    preset=dict(position_offset=2),
    defaults={"activation_function": "relu", "enable_bias": True, "tie_word_embeddings": True, "dropout": 0.1,
              "do_layer_norm_before": True, "word_embed_proj_dim": None, "layer_norm_elementwise_affine": True},
    only={"_remove_final_layer_norm": (False,)},
    read=lambda hf: {"norm_place": "pre" if hf["do_layer_norm_before"] else "post",
                     "out_bias": hf["enable_bias"], "mlp_bias": hf["enable_bias"],
                     "norm_bias": hf["layer_norm_elementwise_affine"],
                     "embed_dim": hf["word_embed_proj_dim"] or hf["hidden_size"]},
    write=lambda c: {"do_layer_norm_before": c.norm_place == "pre"},
    base="model.")  # fmt: skip

_NEOX = Family(
    model_type="gpt_neox",
    classes={"lm": ("GPTNeoXForCausalLM",)},
    keys={"embed": "gpt_neox.embed_in", "decoder/norm": "gpt_neox.final_layer_norm",
          "unembed": "embed_out",
          **under("decoder/block_{i}", "gpt_neox.layers.{i}", {
              "norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm",
              "attention/query": ("attention.query_key_value", "fused_by_head", 0),
              "attention/key": ("attention.query_key_value", "fused_by_head", 1),
              "attention/value": ("attention.query_key_value", "fused_by_head", 2),
              "attention/out": "attention.dense",
              "mlp/up": "mlp.dense_h_to_4h", "mlp/down": "mlp.dense_4h_to_h"})},
    fields={"vocab_size": "vocab_size", "max_position_embeddings": "context",
            "num_hidden_layers": "layers", "hidden_size": "dim", "num_attention_heads": "heads",
            "intermediate_size": "mlp_dim", "hidden_act": "activation",
            "layer_norm_eps": "norm_eps", "tie_word_embeddings": "tied",
            "attention_bias": "qkv_bias", "use_parallel_residual": "parallel",
            "hidden_dropout": "dropout"},
    preset=dict(positions="rotary"),
    defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "attention_bias": True,
              "use_parallel_residual": True, "hidden_dropout": 0.0, "rotary_pct": 0.25, "rotary_emb_base": 10_000},
    read=lambda hf: read_rope(hf | {"rope_theta": hf["rotary_emb_base"]}, kinds=ROPE_KINDS[:-1]) | {
        "out_bias": hf["attention_bias"]},
    write=lambda c: write_rope(c) | {
        "rotary_pct": c.rope.fraction, "rotary_emb_base": c.rope.theta},
    renamed={"lm_head.weight": "embed_out.weight"},  # Transformers 5
    ignored=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    base="gpt_neox.")  # fmt: skip


def with_classifier(family):
    """A decoder's family with its class for classification: a Linear over labels on the state of the last token."""
    (causal,) = family.classes["lm"]
    name = re.sub("ForCausalLM|LMHeadModel", "ForSequenceClassification", causal)
    name = name.replace("Gemma3For", "Gemma3TextFor")
    return dataclasses.replace(
        family, classes=family.classes | {"classify": (name,)}, keys=family.keys | {"labels": "score"}
    )


DECODERS = [
    *map(with_classifier, (_GPT2, _OPT, LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA, _GEMMA2, GEMMA3, _OLMO2, _NEOX, _PHI3))
]
