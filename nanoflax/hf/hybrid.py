"""The decoders with recurrent layers among the families of Hugging Face Transformers."""

import math

from nanoflax.errors import UserError
from nanoflax.hf.decoders import like_llama, with_classifier
from nanoflax.hf.family import Family, under
from nanoflax.hf.rope import read_layers, read_rope, write_layers, write_rope
from nanoflax.hf.sparse import EXPERTS, GATED_SHARED, read_dense_layers, stacked

_NO_LIMIT = 3.4e38  # the largest float32: not every version of Transformers reads Infinity in JSON


def _read_mamba2(hf):
    inner, width = hf["num_heads"] * hf["head_dim"], hf["expand"] * hf["hidden_size"]
    if inner != width:
        raise UserError(
            f"expand={hf['expand']!r} times hidden_size is {width}, but num_heads times head_dim is {inner}"
        )
    low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in hf["time_step_limit"])
    return {"recurrent.min_step": low, "recurrent.max_step": None if high >= _NO_LIMIT else high}


def _write_mamba2(c):
    r = c.recurrent
    return {
        "expand": r.heads * r.value_dim // c.dim,
        "time_step_limit": [r.min_step, _NO_LIMIT if r.max_step is None else r.max_step],
    }


# residual_in_fp32 changes nothing in float32; time_step_rank, _min, _max and _floor are for new weights only.
_MAMBA2 = Family(
    model_type="mamba2",
    classes={"lm": ("Mamba2ForCausalLM",)},
    keys={"embed": "backbone.embeddings", "decoder/norm": "backbone.norm_f", "unembed": "lm_head",
          **under("decoder/block_{i}", "backbone.layers.{i}", {
              "norm_attention": "norm",
              **{f"recurrent/{name}": ("mixer.in_proj", "fused", part)
                 for part, name in enumerate(("gate", "value", "key", "query", "step"))},
              "recurrent/conv": ("mixer.conv1d.weight", "transposed"),
              "recurrent/conv_bias": "mixer.conv1d.bias", "recurrent/decay": "mixer.A_log",
              "recurrent/step_bias": "mixer.dt_bias", "recurrent/skip": "mixer.D",
              "recurrent/norm": "mixer.norm.weight", "recurrent/out": "mixer.out_proj"})},
    # Mamba2Config has no max_position_embeddings, and its models no largest length; training here has a context.
    fields={"vocab_size": "vocab_size", "num_hidden_layers": "layers", "hidden_size": "dim",
            "max_position_embeddings": "context", "hidden_act": "activation",
            "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied",
            "num_heads": "recurrent.heads", "n_groups": "recurrent.groups", "state_size": "recurrent.key_dim",
            "head_dim": "recurrent.value_dim", "conv_kernel": "recurrent.conv",
            "use_conv_bias": "recurrent.conv_bias", "use_bias": "recurrent.bias", "chunk_size": "recurrent.chunk"},
    preset=dict(norm="rmsnorm", positions="none", layer_types=("mamba2",), mlp_dim=0, bias=False, heads=1),
    # What Mamba2Config has, where config.json says nothing.
    defaults={"vocab_size": 32768, "num_hidden_layers": 64, "hidden_size": 4096, "hidden_act": "silu",
              "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "num_heads": 128, "n_groups": 8,
              "state_size": 128, "head_dim": 64, "conv_kernel": 4, "use_conv_bias": True, "use_bias": False,
              "chunk_size": 256, "max_position_embeddings": 2048, "expand": 2, "time_step_limit": [0.0, math.inf]},
    only={"rms_norm": (True,)},
    read=_read_mamba2, write=_write_mamba2,
    base="backbone.")  # fmt: skip


def _read_qwen3_next(hf):
    every = hf["full_attention_interval"]
    if type(every) is not int or every < 1:
        raise UserError(f"full_attention_interval={every!r} must be at least 1")
    return (
        read_rope(hf | {"rotary_pct": hf["partial_rotary_factor"]})
        | read_layers(
            hf,
            lambda i: "linear_attention" if (i + 1) % every else "full_attention",
            kinds=("full_attention", "linear_attention"),
        )
        | read_dense_layers(hf)
        | {"out_bias": hf["attention_bias"]}
    )


def _write_qwen3_next(c):
    return (
        write_rope(c)
        | write_layers(c)
        | {
            "partial_rotary_factor": c.rope.fraction,
            "moe_intermediate_size": c.moe.expert_dim or c.F,
            "mlp_only_layers": [*c.moe.dense_layers],
            "decoder_sparse_step": 1,
        }
    )


_QWEN3_NEXT = like_llama(
    "qwen3_next", "Qwen3Next", without=("mlp_bias",),
    keys=EXPERTS | GATED_SHARED | {
          "attention/query": ("self_attn.q_proj", "fused_by_head", 0),
          "attention/gate": ("self_attn.q_proj", "fused_by_head", 1),
          "recurrent/conv": ("linear_attn.conv1d.weight", "transposed"), "recurrent/decay": "linear_attn.A_log",
          "recurrent/step_bias": "linear_attn.dt_bias", "recurrent/norm": "linear_attn.norm.weight",
          "recurrent/out": "linear_attn.out_proj"},
    more_keys=lambda c: under("decoder/block_{i}/recurrent", "model.layers.{i}.linear_attn", {
        **{name: ("in_proj_qkvz", "fused_by_head", part, c.recurrent.groups)
           for part, name in enumerate(("query", "key", "value", "gate"))},
        **{name: ("in_proj_ba", "fused_by_head", part, c.recurrent.groups)
           for part, name in enumerate(("write", "step"))}}),
    fields={"linear_num_value_heads": "recurrent.heads", "linear_num_key_heads": "recurrent.groups",
            "linear_key_head_dim": "recurrent.key_dim", "linear_value_head_dim": "recurrent.value_dim",
            "linear_conv_kernel_dim": "recurrent.conv", "num_experts": "moe.experts",
            "num_experts_per_tok": "moe.active", "moe_intermediate_size": "moe.expert_dim",
            "shared_expert_intermediate_size": "moe.shared_dim", "norm_topk_prob": "moe.renormalise",
            "router_aux_loss_coef": "moe.balance_loss"},
    preset={"norm_unit_offset": True, "qk_norm": "head", "attention_gate": True, "moe.shared_gate": True},
    defaults={"num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768,
              "partial_rotary_factor": 0.25, "full_attention_interval": 4, "linear_num_value_heads": 32,
              "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
              "linear_conv_kernel_dim": 4, "num_experts": 512, "num_experts_per_tok": 10,
              "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
              "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1, "mlp_only_layers": ()},
    read=_read_qwen3_next, write=_write_qwen3_next, stacked=stacked(),
    # The layers that predict a second token; Transformers does not read them either.
    ignored=r".*rotary_emb\.inv_freq|(model\.)?mtp\..*")  # fmt: skip

HYBRID = [_MAMBA2, with_classifier(_QWEN3_NEXT)]
