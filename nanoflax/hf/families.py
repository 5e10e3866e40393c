"""The families of Hugging Face Transformers, each an instance of `Family`. CONTRIBUTING.md: how to add a family.

In `read` and `write`, hf is a parsed config.json and c a ModelConfig.
"""

import contextlib
import dataclasses
import re
from typing import Any

from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.family import ACTIVATIONS, FIELD_TYPES, THEIR_ACTIVATIONS, Family, Keys, differences


def family_of_config(config: ModelConfig, model_type: str | None = None) -> Family:
    """The family that a configuration is exported as: model_type, or the first that can express it.

    If no family has models without token types, the first that can express it with one; if none scales an untied
    table, the first that can express it without the scale; see `save`.
    Raises: UserError naming the fields that the nearest family cannot express.
    """
    missing = {}
    for name in FAMILIES if model_type is None else [model_type]:
        family = family_of_type(name)
        try:
            missing[name] = differences(family, config)
        except UserError as error:  # a value that the family refuses
            missing[name] = [str(error)]
        if not missing[name]:
            return family
    if ["token_types"] in missing.values():
        with contextlib.suppress(UserError):
            return family_of_config(dataclasses.replace(config, token_types=1), model_type)
    if ["embed_scale"] in missing.values() and not config.tied:
        return family_of_config(dataclasses.replace(config, embed_scale=1.0), model_type)
    nearest = min(missing, key=lambda name: (missing[name][0] in ("architecture", "head"), len(missing[name])))
    fields = ", ".join(
        f"model.{name}={getattr(config, name)!r}" if name in FIELD_TYPES else name for name in missing[nearest]
    )
    raise UserError(
        f"no family of Transformers ({', '.join(missing)}) has such models; the nearest is {nearest}, except {fields}"
    )


def family_of_type(model_type: Any) -> Family:
    """The family of a model_type. Raises: UserError naming all of them."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type={model_type!r} is not supported; supported are " + ", ".join(FAMILIES))
    return FAMILIES[model_type]


# Functions that several families use.


def _under(ours: str, theirs: str, parts: Keys) -> dict[str, Any]:
    """The keys `parts`, with the prefix `ours` for our names and `theirs` for the names in Transformers."""
    return {
        f"{ours}/{a}": (f"{theirs}.{b}" if isinstance(b, str) else (f"{theirs}.{b[0]}", *b[1:]))
        for a, b in parts.items()
    }


def _read_rope(hf, kinds=("default", "linear", "llama3")):
    """Rotary positions, from rope_parameters (Transformers 5) or from rope_theta and rope_scaling (before).

    kinds: the family's values of rope_type. If hf has rotary_pct, the family can rotate a part of each head.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    local, rope = rope.get("sliding_attention", {}), rope.get("full_attention", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    local_kind = local.get("rope_type", "default")
    if kind not in kinds:
        raise UserError(f"rope_type={kind!r} is not supported; it must be {' or '.join(kinds)}")
    if local_kind != "default":
        raise UserError(f"rope_type={local_kind!r} in layers with a window is not supported; it must be default")
    ours = {
        "rope_theta": rope.get("rope_theta", hf["rope_theta"]),
        "rope_scaling": "none" if kind == "default" else kind,
    }
    if "rope_local_base_freq" in hf:
        ours["rope_local_theta"] = local.get("rope_theta", hf["rope_local_base_freq"])
    if "rotary_pct" in hf:
        ours["rope_fraction"] = rope.get("partial_rotary_factor", hf["rotary_pct"])
    elif (part := rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1))) != 1:
        raise UserError(f"partial_rotary_factor={part!r} must be 1")
    if kind != "default":
        ours["rope_factor"] = rope["factor"]
    if kind == "llama3":
        ours |= {
            "rope_low": rope["low_freq_factor"],
            "rope_high": rope["high_freq_factor"],
            "rope_context": rope["original_max_position_embeddings"],
        }
    return ours


def _write_rope(c):
    """Rotary positions as rope_theta and rope_scaling, which every version of Transformers reads."""
    scaling = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": c.rope_low,
            "high_freq_factor": c.rope_high,
            "original_max_position_embeddings": c.rope_context,
        }
    return {"rope_theta": c.rope_theta, "rope_scaling": None if c.rope_scaling == "none" else scaling}


def _read_window(hf, is_local):
    """Which layers have a window. is_local(i): whether layer i has a window, if config.json has no layer_types."""
    layers, window = hf["num_hidden_layers"], hf["sliding_window"] or 0
    types = hf.get("layer_types") or ["sliding_attention" if is_local(i) else "full_attention" for i in range(layers)]
    if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise UserError(f"layer_types must be {layers} times sliding_attention or full_attention, not {types!r}")
    full = tuple(i for i, kind in enumerate(types) if kind == "full_attention")
    window = window if len(full) < layers else 0
    return {"window": window, "global_layers": full if window else ()}


def _write_window(c):
    return {
        "sliding_window": c.window or None,
        "layer_types": ["sliding_attention" if c.is_local(i) else "full_attention" for i in range(c.layers)],
    }


# Decoders.

_LLAMA = Family(
    model_type="llama",
    classes={"lm": ("LlamaForCausalLM",)},
    keys={"embed": "model.embed_tokens", "decoder/norm": "model.norm", "unembed": "lm_head",
          **_under("decoder/block_{i}", "model.layers.{i}", {
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
    read=lambda hf: _read_rope(hf) | {"out_bias": hf["attention_bias"]},
    write=_write_rope,
    ignored=r".*rotary_emb\.inv_freq",
    base="model.")  # fmt: skip


def _like_llama(model_type, name, without=(), keys=None, preset=None, defaults=None, fields=None, **changes):
    """The Llama family with changes. without: fields of Llama that this family does not have."""
    kept = {a: b for a, b in _LLAMA.fields.items() if a not in without}
    return dataclasses.replace(
        _LLAMA,
        model_type=model_type,
        classes={"lm": (f"{name}ForCausalLM",)},
        keys=_LLAMA.keys | _under("decoder/block_{i}", "model.layers.{i}", keys or {}),
        fields=kept | (fields or {}),
        preset=_LLAMA.preset | (preset or {}),
        defaults=_LLAMA.defaults | (defaults or {}),
        **changes,
    )


_MISTRAL = _like_llama(
    "mistral", "Mistral", without=("attention_bias", "mlp_bias"),
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    read=lambda hf: _read_rope(hf) | {"window": hf["sliding_window"] or 0},
    write=lambda c: _write_rope(c) | {"sliding_window": c.window or None})  # fmt: skip


def _read_qwen(hf):
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    return _read_rope(hf) | _read_window(hf | {"sliding_window": window}, lambda i: i >= hf["max_window_layers"])


def _write_qwen(c):
    first = next((i for i in range(c.layers) if c.is_local(i)), c.layers)
    return _write_rope(c) | _write_window(c) | {"use_sliding_window": c.window > 0, "max_window_layers": first}


_PHI3 = _like_llama(
    "phi3", "Phi3", without=("attention_bias", "mlp_bias"),
    keys={"attention/query": ("self_attn.qkv_proj", "fused", 0), "attention/key": ("self_attn.qkv_proj", "fused", 1),
          "attention/value": ("self_attn.qkv_proj", "fused", 2),
          "mlp/gate": ("mlp.gate_up_proj", "fused", 0), "mlp/up": ("mlp.gate_up_proj", "fused", 1)},
    fields={"resid_pdrop": "dropout"},
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None, "resid_pdrop": 0.0,
              "partial_rotary_factor": 1.0},
    # Its other rope_type, longrope, has a list of factors.
    read=lambda hf: _read_rope(hf | {"rotary_pct": hf["partial_rotary_factor"]}, kinds=("default",)) | {
        "window": hf["sliding_window"] or 0},
    write=lambda c: _write_rope(c) | {
        "partial_rotary_factor": c.rope_fraction, "original_max_position_embeddings": c.context,
        "sliding_window": c.window or None, "embd_pdrop": c.dropout})  # fmt: skip
_QWEN2 = _like_llama(
    "qwen2", "Qwen2", without=("attention_bias", "mlp_bias", "head_dim"),
    preset=dict(qkv_bias=True),
    defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    read=_read_qwen, write=_write_qwen)  # fmt: skip
_QWEN3 = _like_llama(
    "qwen3", "Qwen3", without=("mlp_bias",), preset=dict(qk_norm="head"),
    defaults=_QWEN2.defaults | {"head_dim": 128},
    read=lambda hf: _read_qwen(hf) | {"out_bias": hf["attention_bias"]}, write=_write_qwen)  # fmt: skip
_OLMO2 = _like_llama(
    "olmo2", "Olmo2", without=("mlp_bias", "head_dim"),
    keys={"norm_attention": "post_attention_layernorm", "norm_mlp": "post_feedforward_layernorm"},
    preset=dict(norm_place="after", qk_norm="full"), defaults={"rms_norm_eps": 1e-5})  # fmt: skip


def _read_gemma(hf):
    period = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", hf["period"]))
    return (
        _read_rope(hf)
        | _read_window(hf, lambda i: (i + 1) % period)
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
        _write_rope(c)
        | _write_window(c)
        | {
            "query_pre_attn_scalar": round(scalar),
            "attn_logit_softcapping": c.attention_softcap or None,
            "final_logit_softcapping": c.logit_softcap or None,
        }
    )


_GEMMA2 = _like_llama(
    "gemma2", "Gemma2", without=("mlp_bias", "hidden_act"),
    keys={"norm_attention_out": "post_attention_layernorm", "norm_mlp": "pre_feedforward_layernorm",
          "norm_mlp_out": "post_feedforward_layernorm"},
    fields={"hidden_activation": "activation"},
    preset=dict(norm_place="sandwich", norm_unit_offset=True),
    defaults={"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "num_key_value_heads": 4,
              "tie_word_embeddings": True, "sliding_window": 4096, "period": 2, "query_pre_attn_scalar": 256,
              "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    only={"use_bidirectional_attention": (False,)},
    read=_read_gemma, write=_write_gemma)  # fmt: skip
_GEMMA3 = dataclasses.replace(
    _GEMMA2, model_type="gemma3_text", classes={"lm": ("Gemma3ForCausalLM",)},
    preset=_GEMMA2.preset | dict(qk_norm="head"),
    defaults=_GEMMA2.defaults | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "period": 6,
                                 "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    only=_GEMMA2.only | {"attn_logit_softcapping": (None,)},  # Transformers would not apply it
    write=lambda c: _write_gemma(c) | {"rope_local_base_freq": c.rope_local_theta or c.rope_theta})  # fmt: skip

_GPT2 = Family(
    model_type="gpt2",
    classes={"lm": ("GPT2LMHeadModel",)},
    keys={"embed": "transformer.wte", "decoder/position_embed": "transformer.wpe",
          "decoder/norm": "transformer.ln_f", "unembed": "lm_head",
          **_under("decoder/block_{i}", "transformer.h.{i}", {
              "norm_attention": "ln_1", "norm_mlp": "ln_2",
              "attention/query": ("attn.c_attn", "fused_columns", 0),
              "attention/key": ("attn.c_attn", "fused_columns", 1),
              "attention/value": ("attn.c_attn", "fused_columns", 2),
              "attention/out": ("attn.c_proj", "same"),
              "mlp/up": ("mlp.c_fc", "same"), "mlp/down": ("mlp.c_proj", "same")})},
    fields={"vocab_size": "vocab_size", "n_positions": "context", "n_layer": "layers",
            "n_embd": "dim", "n_head": "heads", "n_inner": "mlp_dim",
            "activation_function": "activation", "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tied", "resid_pdrop": "dropout"},
    preset={},
    defaults={"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True, "resid_pdrop": 0.1, "n_positions": 1024},
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    write=lambda c: {"embd_pdrop": c.dropout, "attn_pdrop": 0.0},
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    base="transformer.")  # fmt: skip

_OPT = Family(
    model_type="opt",
    classes={"lm": ("OPTForCausalLM",)},
    keys={"embed": "model.decoder.embed_tokens", "unembed": "lm_head",
          "decoder/position_embed": "model.decoder.embed_positions",
          "decoder/norm": "model.decoder.final_layer_norm",
          **_under("decoder/block_{i}", "model.decoder.layers.{i}", {
              "norm_attention": "self_attn_layer_norm", "norm_mlp": "final_layer_norm",
              "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj",
              "attention/value": "self_attn.v_proj", "attention/out": "self_attn.out_proj",
              "mlp/up": "fc1", "mlp/down": "fc2"})},
    fields={"vocab_size": "vocab_size", "max_position_embeddings": "context", "num_hidden_layers": "layers",
            "hidden_size": "dim", "num_attention_heads": "heads", "ffn_dim": "mlp_dim",
            "activation_function": "activation", "enable_bias": "qkv_bias", "tie_word_embeddings": "tied",
            "dropout": "dropout"},
    preset=dict(position_offset=2, norm_bias=True),
    defaults={"activation_function": "relu", "enable_bias": True, "tie_word_embeddings": True, "dropout": 0.1,
              "do_layer_norm_before": True},
    only={"word_embed_proj_dim": "hidden_size", "layer_norm_elementwise_affine": (True,),
          "_remove_final_layer_norm": (False,)},
    read=lambda hf: {"norm_place": "pre" if hf["do_layer_norm_before"] else "post",
                     "out_bias": hf["enable_bias"], "mlp_bias": hf["enable_bias"]},
    write=lambda c: {"do_layer_norm_before": c.norm_place == "pre"},
    base="model.")  # fmt: skip

_NEOX = Family(
    model_type="gpt_neox",
    classes={"lm": ("GPTNeoXForCausalLM",)},
    keys={"embed": "gpt_neox.embed_in", "decoder/norm": "gpt_neox.final_layer_norm",
          "unembed": "embed_out",
          **_under("decoder/block_{i}", "gpt_neox.layers.{i}", {
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
    read=lambda hf: _read_rope(hf | {"rope_theta": hf["rotary_emb_base"]}) | {
        "out_bias": hf["attention_bias"]},
    write=lambda c: _write_rope(c) | {
        "rotary_pct": c.rope_fraction, "rotary_emb_base": c.rope_theta},
    ignored=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    base="gpt_neox.")  # fmt: skip

# Encoders.

_BERT = Family(
    model_type="bert",
    classes={"none": ("BertModel",), "mlm": ("BertForMaskedLM", "BertForPreTraining"),
             "classify": ("BertForSequenceClassification",),
             "tag": ("BertForTokenClassification",)},
    keys={"embed": "bert.embeddings.word_embeddings",
          "type_embed": "bert.embeddings.token_type_embeddings",
          "encoder/position_embed": "bert.embeddings.position_embeddings",
          "encoder/embed_norm": "bert.embeddings.LayerNorm", "pooler": "bert.pooler.dense",
          "transform": "cls.predictions.transform.dense",
          "norm_transform": "cls.predictions.transform.LayerNorm",
          "unembed": "cls.predictions.decoder", "labels": "classifier",
          **_under("encoder/block_{i}", "bert.encoder.layer.{i}", {
              "norm_attention": "attention.output.LayerNorm", "norm_mlp": "output.LayerNorm",
              "attention/query": "attention.self.query", "attention/key": "attention.self.key",
              "attention/value": "attention.self.value", "attention/out": "attention.output.dense",
              "mlp/up": "intermediate.dense", "mlp/down": "output.dense"})},
    fields={"vocab_size": "vocab_size", "max_position_embeddings": "context",
            "num_hidden_layers": "layers", "hidden_size": "dim", "num_attention_heads": "heads",
            "intermediate_size": "mlp_dim", "hidden_act": "activation",
            "type_vocab_size": "token_types", "layer_norm_eps": "norm_eps",
            "tie_word_embeddings": "tied", "hidden_dropout_prob": "dropout"},
    preset=dict(architecture="encoder", norm_place="post", embed_norm=True, head_bias=True),
    defaults={"hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": 1e-12,
              "tie_word_embeddings": True, "hidden_dropout_prob": 0.1},
    only={"position_embedding_type": ("absolute",), "is_decoder": (False,), "add_cross_attention": (False,)},
    write=lambda c: {"attention_probs_dropout_prob": 0.0},
    # A file has this bias under two names; the model uses the one of the decoder.
    more_keys=lambda c: {"logit_bias": (f"cls.predictions.{'' if c.tied else 'decoder.'}bias",
                                        "same")},
    present={"pooler": "bert.pooler.dense.weight"},
    same=lambda c: {"cls.predictions.decoder.bias": "cls.predictions.bias"} if c.tied else {
        "cls.predictions.bias": "cls.predictions.decoder.bias"},
    ignored=r"bert\.embeddings\.position_ids|bert\.pooler\..*|cls\.seq_relationship\..*",
    base="bert.")  # fmt: skip


def _read_roberta(hf):
    # max_position_embeddings also counts the first rows, up to the row of the padding token, which are not positions.
    offset = hf["pad_token_id"] + 1
    if "RobertaForMaskedLM" in (hf.get("architectures") or []) and hf["hidden_act"] != "gelu":
        raise UserError(
            f"hidden_act={hf['hidden_act']!r} with RobertaForMaskedLM is not supported: its head always has gelu"
        )
    return {"position_offset": offset, "context": hf["max_position_embeddings"] - offset}


_ROBERTA = dataclasses.replace(
    _BERT, model_type="roberta",
    classes={head: tuple(name.replace("Bert", "Roberta") for name in classes[:1])
             for head, classes in _BERT.classes.items()},
    keys={ours: theirs.replace("bert.", "roberta.") for ours, theirs in _BERT.keys.items()} | {
        "transform": "lm_head.dense", "norm_transform": "lm_head.layer_norm",
        "unembed": "lm_head.decoder"},
    defaults=_BERT.defaults | {"pad_token_id": 1},
    read=_read_roberta,
    write=lambda c: {"attention_probs_dropout_prob": 0.0, "pad_token_id": c.position_offset - 1,
                     "max_position_embeddings": c.context + c.position_offset},
    present={"pooler": "roberta.pooler.dense.weight"},
    more_keys=lambda c: {
        "logit_bias": (f"lm_head.{'' if c.tied else 'decoder.'}bias", "same"),
        **({"pooler": "classifier.dense", "labels": "classifier.out_proj"}
           if c.head == "classify" else {})},
    same=lambda c: {"lm_head.decoder.bias": "lm_head.bias"} if c.tied else {"lm_head.bias": "lm_head.decoder.bias"},
    ignored=r"roberta\.embeddings\.position_ids|roberta\.pooler\..*",
    base="roberta.")  # fmt: skip

_DISTILBERT = Family(
    model_type="distilbert",
    classes={"none": ("DistilBertModel",), "mlm": ("DistilBertForMaskedLM",),
             "classify": ("DistilBertForSequenceClassification",), "tag": ("DistilBertForTokenClassification",)},
    keys={"embed": "distilbert.embeddings.word_embeddings",
          "encoder/position_embed": "distilbert.embeddings.position_embeddings",
          "encoder/embed_norm": "distilbert.embeddings.LayerNorm", "pooler": "pre_classifier",
          "transform": "vocab_transform", "norm_transform": "vocab_layer_norm",
          "unembed": "vocab_projector", "logit_bias": ("vocab_projector.bias", "same"),
          "labels": "classifier",
          **_under("encoder/block_{i}", "distilbert.transformer.layer.{i}", {
              "norm_attention": "sa_layer_norm", "norm_mlp": "output_layer_norm",
              "attention/query": "attention.q_lin", "attention/key": "attention.k_lin",
              "attention/value": "attention.v_lin", "attention/out": "attention.out_lin",
              "mlp/up": "ffn.lin1", "mlp/down": "ffn.lin2"})},
    fields={"vocab_size": "vocab_size", "max_position_embeddings": "context", "n_layers": "layers", "dim": "dim",
            "n_heads": "heads", "hidden_dim": "mlp_dim", "activation": "activation", "tie_word_embeddings": "tied",
            "dropout": "dropout"},
    preset=dict(architecture="encoder", norm_place="post", embed_norm=True, head_bias=True,
                norm_eps=1e-12, pooler_activation="relu"),
    defaults={"activation": "gelu", "tie_word_embeddings": True, "dropout": 0.1},
    write=lambda c: {"attention_dropout": 0.0, "seq_classif_dropout": c.dropout},
    base="distilbert.")  # fmt: skip


def _read_eurobert(hf):
    pooling = hf.get("classifier_pooling", "late")
    if "EuroBertForSequenceClassification" in (hf.get("architectures") or []) and pooling != "bos":
        raise UserError(f"classifier_pooling={pooling!r} is not supported; it must be 'bos', the first state")
    return _LLAMA.read(hf) | {"head_bias": hf["mlp_bias"]}


_EUROBERT = dataclasses.replace(
    _LLAMA, model_type="eurobert",
    classes={"none": ("EuroBertModel",), "mlm": ("EuroBertForMaskedLM",),
             "classify": ("EuroBertForSequenceClassification",), "tag": ("EuroBertForTokenClassification",)},
    keys={ours.replace("decoder/", "encoder/"): theirs for ours, theirs in _LLAMA.keys.items()} | {
        "logit_bias": ("lm_head.bias", "same"), "pooler": "dense", "labels": "classifier"},
    preset=_LLAMA.preset | dict(architecture="encoder", mlm_transform=False, pooler_activation="gelu"),
    defaults=_LLAMA.defaults | {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192},
    read=_read_eurobert,
    write=lambda c: _write_rope(c) | {"classifier_pooling": "bos"})  # fmt: skip

# Encoder-decoders.

_T5_BLOCK = {"norm_attention": "0.layer_norm", "attention/query": "0.SelfAttention.q",
             "attention/key": "0.SelfAttention.k", "attention/value": "0.SelfAttention.v",
             "attention/out": "0.SelfAttention.o"}  # fmt: skip


def _read_t5(hf):
    *gated, name = hf["feed_forward_proj"].split("-")
    if gated not in ([], ["gated"]) or name not in ACTIVATIONS:
        raise UserError(
            f"feed_forward_proj={hf['feed_forward_proj']!r} is not supported; it must "
            "be an activation, such as relu, or gated- and an activation, such as gated-gelu"
        )
    scaled = hf.get("scale_decoder_outputs", hf["tie_word_embeddings"])
    start = hf.get("decoder_start_token_id")
    return {
        "gated": bool(gated),
        "logit_scale": hf["d_model"] ** -0.5 if scaled else 1.0,
        # In T5, "gated-gelu" has the tanh approximation, and "gelu" has not.
        "activation": "gelu_tanh" if gated and name == "gelu" else ACTIVATIONS[name],
        "start_id": (hf.get("pad_token_id") or 0) if start is None else start,
    }


def _write_t5(c):
    name = THEIR_ACTIVATIONS[c.activation]
    if c.gated:
        name = "gated-" + {"gelu_pytorch_tanh": "gelu", "gelu": "gelu_python"}.get(name, name)
    return {
        "feed_forward_proj": name,
        "scale_decoder_outputs": c.logit_scale != 1,
        "decoder_start_token_id": c.start_id,
        "is_encoder_decoder": True,
    }


_T5 = Family(
    model_type="t5",
    classes={"lm": ("T5ForConditionalGeneration",)},
    keys={"embed": "shared", "unembed": "lm_head",
          **{f"{side}/norm": f"{side}.final_layer_norm" for side in ("encoder", "decoder")},
          **{f"{side}/relative_bias":
             f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
             for side in ("encoder", "decoder")},
          **_under("encoder/block_{i}", "encoder.block.{i}.layer", _T5_BLOCK),
          **_under("decoder/block_{i}", "decoder.block.{i}.layer", _T5_BLOCK),
          **_under("decoder/block_{i}", "decoder.block.{i}.layer", {
              "norm_cross": "1.layer_norm", "cross_attention/query": "1.EncDecAttention.q",
              "cross_attention/key": "1.EncDecAttention.k",
              "cross_attention/value": "1.EncDecAttention.v",
              "cross_attention/out": "1.EncDecAttention.o"})},
    more_keys=lambda c: {
        key: value for side, n in (("encoder", 1), ("decoder", 2))
        for key, value in _under(f"{side}/block_{{i}}", f"{side}.block.{{i}}.layer.{n}", {
            "norm_mlp": "layer_norm", "mlp/down": "DenseReluDense.wo",
            "mlp/gate": "DenseReluDense.wi_0",
            "mlp/up": f"DenseReluDense.wi{'_1' if c.gated else ''}"}).items()},
    fields={"vocab_size": "vocab_size", "n_positions": "context", "num_layers": "layers",
            "num_decoder_layers": "decoder_layers", "d_model": "dim", "num_heads": "heads", "d_kv": "head_dim",
            "d_ff": "mlp_dim", "layer_norm_epsilon": "norm_eps", "relative_attention_num_buckets": "relative_buckets",
            "relative_attention_max_distance": "relative_distance", "tie_word_embeddings": "tied",
            "dropout_rate": "dropout"},
    preset=dict(architecture="encoder_decoder", norm="rmsnorm", bias=False, positions="relative",
                attention_scale=1.0),
    defaults={"n_positions": 512, "num_decoder_layers": None, "layer_norm_epsilon": 1e-6,
              "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
              "feed_forward_proj": "relu", "tie_word_embeddings": True, "dropout_rate": 0.1},
    read=_read_t5, write=_write_t5,
    same=lambda c: {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
    # Files of the first T5 have this tensor, but no version of the model uses it.
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")  # fmt: skip

_BART_BLOCK = {"norm_attention": "self_attn_layer_norm", "norm_mlp": "final_layer_norm",
               "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj",
               "attention/value": "self_attn.v_proj", "attention/out": "self_attn.out_proj",
               "norm_cross": "encoder_attn_layer_norm", "cross_attention/query": "encoder_attn.q_proj",
               "cross_attention/key": "encoder_attn.k_proj", "cross_attention/value": "encoder_attn.v_proj",
               "cross_attention/out": "encoder_attn.out_proj", "mlp/up": "fc1", "mlp/down": "fc2"}  # fmt: skip

_BART = Family(
    model_type="bart",
    classes={"lm": ("BartForConditionalGeneration",)},
    keys={"embed": "model.shared", "unembed": "lm_head", "logit_bias": ("final_logits_bias", "row"),
          **{f"{side}/{ours}": f"model.{side}.{theirs}" for side in ("encoder", "decoder")
             for ours, theirs in [("position_embed", "embed_positions"),
                                  ("embed_norm", "layernorm_embedding")]},
          **_under("encoder/block_{i}", "model.encoder.layers.{i}", _BART_BLOCK),
          **_under("decoder/block_{i}", "model.decoder.layers.{i}", _BART_BLOCK)},
    fields={"vocab_size": "vocab_size", "max_position_embeddings": "context",
            "encoder_layers": "layers", "decoder_layers": "decoder_layers", "d_model": "dim",
            "encoder_attention_heads": "heads", "encoder_ffn_dim": "mlp_dim",
            "activation_function": "activation", "tie_word_embeddings": "tied",
            "dropout": "dropout", "decoder_start_token_id": "start_id"},
    preset=dict(architecture="encoder_decoder", norm_place="post", embed_norm=True,
                position_offset=2, head_bias=True),
    defaults={"activation_function": "gelu", "tie_word_embeddings": True, "dropout": 0.1,
              "decoder_start_token_id": 2, "scale_embedding": False},
    only={"decoder_attention_heads": "encoder_attention_heads", "decoder_ffn_dim": "encoder_ffn_dim",
          "normalize_before": (False,), "normalize_embedding": (True,), "add_final_layer_norm": (False,),
          "static_position_embeddings": (False,)},
    read=lambda hf: {"embed_scale": hf["d_model"]**0.5 if hf["scale_embedding"] else 1.0},
    write=lambda c: {"scale_embedding": c.embed_scale != 1, "is_encoder_decoder": True},
    present={"head_bias": "final_logits_bias"},
    same=lambda c: {f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")},
    base="model.")  # fmt: skip

_MARIAN = dataclasses.replace(
    _BART, model_type="marian", classes={"lm": ("MarianMTModel",)},
    preset=_BART.preset | dict(positions="sinusoidal_halves", embed_norm=False, position_offset=0),
    only=_BART.only | {"decoder_vocab_size": "vocab_size", "normalize_embedding": (False,),
                       "static_position_embeddings": (True,), "share_encoder_decoder_embeddings": (True,)},
    write=lambda c: _BART.write(c) | {"pad_token_id": c.start_id},
    ignored=r"model\.(en|de)coder\.embed_positions\.weight")  # fmt: skip


def _with_classifier(family):
    """A decoder's family with its class for classification: a Linear over labels on the state of the last token."""
    (causal,) = family.classes["lm"]
    name = re.sub("ForCausalLM|LMHeadModel", "ForSequenceClassification", causal)
    name = name.replace("Gemma3For", "Gemma3TextFor")
    return dataclasses.replace(
        family, classes=family.classes | {"classify": (name,)}, keys=family.keys | {"labels": "score"}
    )


FAMILIES = {family.model_type: family for family in (
    *map(_with_classifier, (_GPT2, _OPT, _LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA2, _GEMMA3, _OLMO2,
                            _NEOX, _PHI3)),
    _BERT, _ROBERTA, _DISTILBERT, _EUROBERT, _T5, _BART, _MARIAN)}  # fmt: skip
