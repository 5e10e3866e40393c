"""The encoder-decoders among the families of Hugging Face Transformers.

In `read` and `write`, hf is a parsed config.json and c a ModelConfig.
"""

import dataclasses

from nanoflax.errors import UserError
from nanoflax.hf.family import ACTIVATIONS, THEIR_ACTIVATIONS, Family, under

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
          **under("encoder/block_{i}", "encoder.block.{i}.layer", _T5_BLOCK),
          **under("decoder/block_{i}", "decoder.block.{i}.layer", _T5_BLOCK),
          **under("decoder/block_{i}", "decoder.block.{i}.layer", {
              "norm_cross": "1.layer_norm", "cross_attention/query": "1.EncDecAttention.q",
              "cross_attention/key": "1.EncDecAttention.k",
              "cross_attention/value": "1.EncDecAttention.v",
              "cross_attention/out": "1.EncDecAttention.o"})},
    more_keys=lambda c: {
        key: value for side, n in (("encoder", 1), ("decoder", 2))
        for key, value in under(f"{side}/block_{{i}}", f"{side}.block.{{i}}.layer.{n}", {
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
    aliases={"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers",
             "head_dim": "d_kv"},
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
          **under("encoder/block_{i}", "model.encoder.layers.{i}", _BART_BLOCK),
          **under("decoder/block_{i}", "model.decoder.layers.{i}", _BART_BLOCK)},
    fields={"vocab_size": "vocab_size", "max_position_embeddings": "context",
            "encoder_layers": "layers", "decoder_layers": "decoder_layers", "d_model": "dim",
            "encoder_attention_heads": "heads", "encoder_ffn_dim": "mlp_dim",
            "decoder_attention_heads": "decoder_heads", "decoder_ffn_dim": "decoder_mlp_dim",
            "activation_function": "activation", "tie_word_embeddings": "tied",
            "dropout": "dropout", "decoder_start_token_id": "start_id"},
    preset=dict(architecture="encoder_decoder", norm_place="post", embed_norm=True,
                position_offset=2, head_bias=True),
    defaults={"activation_function": "gelu", "tie_word_embeddings": True, "dropout": 0.1,
              "decoder_start_token_id": 2, "scale_embedding": False, "decoder_attention_heads": 16,
              "decoder_ffn_dim": 4096},
    aliases={"num_attention_heads": "encoder_attention_heads", "hidden_size": "d_model",
             "num_hidden_layers": "encoder_layers"},
    only={"normalize_before": (False,), "normalize_embedding": (True,), "add_final_layer_norm": (False,),
          "static_position_embeddings": (False,)},
    read=lambda hf: {"embed_scale": hf["d_model"]**0.5 if hf["scale_embedding"] else 1.0},
    write=lambda c: {"scale_embedding": c.embed_scale != 1, "is_encoder_decoder": True},
    present={"head_bias": "final_logits_bias"},
    same=lambda c: {f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")},
    ignored=r"model\.(en|de)coder\.version",  # a number in files from fairseq
    base="model.")  # fmt: skip

_MARIAN = dataclasses.replace(
    _BART, model_type="marian", classes={"lm": ("MarianMTModel",)},
    preset=_BART.preset | dict(positions="sinusoidal_halves", embed_norm=False, position_offset=0),
    defaults=_BART.defaults | {"decoder_start_token_id": 58100},
    only=_BART.only | {"decoder_vocab_size": "vocab_size", "normalize_embedding": (False,),
                       "static_position_embeddings": (True,), "share_encoder_decoder_embeddings": (True,)},
    write=lambda c: _BART.write(c) | {"pad_token_id": c.start_id},
    ignored=r"model\.(en|de)coder\.(version|embed_positions\.weight)")  # fmt: skip


def _read_mbart(hf):
    start = hf["bos_token_id"] if hf["decoder_start_token_id"] is None else hf["decoder_start_token_id"]
    return _BART.read(hf) | {"start_id": start}


_MBART = dataclasses.replace(
    _BART, model_type="mbart", classes={"lm": ("MBartForConditionalGeneration",)},
    keys=_BART.keys | {f"{side}/norm": f"model.{side}.layer_norm" for side in ("encoder", "decoder")},
    fields={theirs: ours for theirs, ours in _BART.fields.items() if ours != "start_id"},
    preset=_BART.preset | dict(norm_place="pre"),
    defaults=_BART.defaults | {"decoder_start_token_id": None, "bos_token_id": 0},
    only=_BART.only | {"normalize_before": (True,), "add_final_layer_norm": (True,)},
    read=_read_mbart, write=lambda c: _BART.write(c) | {"decoder_start_token_id": c.start_id})  # fmt: skip

# M2M-100 and NLLB. Transformers counts positions from the row after the padding token.
_M2M_100 = dataclasses.replace(
    _MBART, model_type="m2m_100", classes={"lm": ("M2M100ForConditionalGeneration",)},
    fields=_BART.fields,
    preset=_BART.preset | dict(norm_place="pre", embed_norm=False, head_bias=False, positions="sinusoidal_fairseq"),
    defaults=_BART.defaults | {"activation_function": "relu", "scale_embedding": True, "pad_token_id": 1,
                               "max_position_embeddings": 1024},
    only={}, read=lambda hf: _BART.read(hf) | {"position_offset": hf["pad_token_id"] + 1},
    write=lambda c: _BART.write(c) | {"pad_token_id": c.position_offset - 1}, present={},
    ignored=r"model\.(en|de)coder\.(version|embed_positions\.weights?)")  # fmt: skip

ENCODER_DECODERS = [_T5, _BART, _MARIAN, _MBART, _M2M_100]
