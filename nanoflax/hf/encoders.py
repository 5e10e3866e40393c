"""The encoders among the families of Hugging Face Transformers.

In `read` and `write`, hf is a parsed config.json and c a ModelConfig.
"""

import dataclasses

from nanoflax.errors import UserError
from nanoflax.hf.decoders import GEMMA3, LLAMA
from nanoflax.hf.family import Family, under
from nanoflax.hf.rope import read_layers, read_rope, write_layers, write_rope

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
          **under("encoder/block_{i}", "bert.encoder.layer.{i}", {
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
    return {"position_offset": offset, "context": hf["max_position_embeddings"] - offset}


_ROBERTA = dataclasses.replace(
    _BERT, model_type="roberta",
    classes={head: tuple(name.replace("Bert", "Roberta") for name in classes[:1])
             for head, classes in _BERT.classes.items()},
    keys={ours: theirs.replace("bert.", "roberta.") for ours, theirs in _BERT.keys.items()} | {
        "transform": "lm_head.dense", "norm_transform": "lm_head.layer_norm",
        "unembed": "lm_head.decoder"},
    preset=_BERT.preset | dict(transform_activation="gelu"),
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

_XLM_ROBERTA = dataclasses.replace(
    _ROBERTA, model_type="xlm-roberta",
    classes={head: (f"XLM{name}",) for head, (name,) in _ROBERTA.classes.items()})  # fmt: skip

_ELECTRA_HEADS = {
    "mlm": {"transform": "generator_predictions.dense", "norm_transform": "generator_predictions.LayerNorm",
            "unembed": "generator_lm_head", "logit_bias": ("generator_lm_head.bias", "same")},
    "classify": {"pooler": "classifier.dense", "labels": "classifier.out_proj"},
    "detect": {"transform": "discriminator_predictions.dense",
               "labels": "discriminator_predictions.dense_prediction"},
}  # fmt: skip
_ELECTRA = dataclasses.replace(
    _BERT, model_type="electra",
    classes={head: (f"Electra{name}",) for head, name in [
        ("none", "Model"), ("mlm", "ForMaskedLM"), ("classify", "ForSequenceClassification"),
        ("tag", "ForTokenClassification"), ("detect", "ForPreTraining")]},
    keys={ours: theirs.replace("bert.", "electra.") for ours, theirs in _BERT.keys.items()} | {
        "encoder/project_in": "electra.embeddings_project"},
    more_keys=lambda c: _ELECTRA_HEADS.get(c.head, {}),
    fields=_BERT.fields | {"embedding_size": "embed_dim"},
    preset=_BERT.preset | dict(transform_activation="gelu", pooler_activation="gelu"),
    defaults=_BERT.defaults | {"embedding_size": 128, "max_position_embeddings": 512},
    present={}, same=lambda c: {}, ignored=r"electra\.embeddings\.position_ids", base="electra.")  # fmt: skip

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
          **under("encoder/block_{i}", "distilbert.transformer.layer.{i}", {
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
    aliases={"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
    write=lambda c: {"attention_dropout": 0.0, "seq_classif_dropout": c.dropout},
    base="distilbert.")  # fmt: skip


_POOLINGS = {"bos": "first", "cls": "first", "mean": "mean", "late": "late"}  # Transformers' name: ours


def _read_eurobert(hf):
    pooling = hf.get("classifier_pooling", "late")
    classifies = "EuroBertForSequenceClassification" in (hf.get("architectures") or [])
    if classifies and pooling not in ("bos", "mean", "late"):
        raise UserError(
            f"classifier_pooling={pooling!r} is not supported; it must be 'bos', the first state, 'mean' or 'late'"
        )
    return LLAMA.read(hf) | {"head_bias": hf["mlp_bias"], "pooling": _POOLINGS.get(pooling, "first")}


_EUROBERT = dataclasses.replace(
    LLAMA, model_type="eurobert",
    classes={"none": ("EuroBertModel",), "mlm": ("EuroBertForMaskedLM",),
             "classify": ("EuroBertForSequenceClassification",), "tag": ("EuroBertForTokenClassification",)},
    keys={ours.replace("decoder/", "encoder/"): theirs for ours, theirs in LLAMA.keys.items()} | {
        "logit_bias": ("lm_head.bias", "same"), "pooler": "dense", "labels": "classifier"},
    preset=LLAMA.preset | dict(architecture="encoder", mlm_transform=False, pooler_activation="gelu"),
    defaults=LLAMA.defaults | {"rms_norm_eps": 1e-5, "max_position_embeddings": 8192},
    read=_read_eurobert,
    write=lambda c: write_rope(c) | {"classifier_pooling": "bos" if c.pooling == "first" else c.pooling})  # fmt: skip


def _read_modernbert(hf):
    rope, local = hf.get("rope_parameters") or {}, hf["local_rope_theta"] or hf["global_rope_theta"]
    scaling = {k: v for k, v in (hf.get("rope_scaling") or {}).items() if v != "default"}
    if set(rope) - {"full_attention", "sliding_attention"} or scaling:
        raise UserError("rope_parameters must be of full_attention and sliding_attention, and rope_scaling null")
    # A query sees this many tokens on each side, and itself.
    side = hf.get("sliding_window", hf["local_attention"] // 2)
    every = hf["global_attn_every_n_layers"]
    if type(every) is not int or every < 1:
        raise UserError(f"global_attn_every_n_layers={every!r} must be at least 1")
    hf = hf | {"rope_scaling": None}
    return (
        read_rope(hf | {"rope_theta": hf["global_rope_theta"], "rope_local_base_freq": local})
        | read_layers(hf | {"sliding_window": side + 1}, lambda i: f"{'sliding' if i % every else 'full'}_attention")
        | {"out_bias": hf["attention_bias"], "pooling": _POOLINGS[hf["classifier_pooling"]]}
    )


def _write_modernbert(c):
    scaling = write_rope(c)["rope_scaling"] or {"rope_type": "default"}
    local = c.rope.theta if c.rope.local_theta is None else c.rope.local_theta
    return {
        "layer_types": write_layers(c)["layer_types"],
        "local_attention": 2 * (c.window - 1) if c.window else 128,
        "rope_parameters": {"full_attention": scaling | {"rope_theta": c.rope.theta},
                            "sliding_attention": {"rope_type": "default", "rope_theta": local}},
        "global_rope_theta": c.rope.theta, "local_rope_theta": local,  # Transformers 4 reads these
        "classifier_pooling": "cls" if c.pooling == "first" else "mean",
        "embedding_dropout": c.dropout, "classifier_dropout": c.dropout, "attention_dropout": 0.0,
    }  # fmt: skip


_MODERNBERT = Family(
    model_type="modernbert",
    classes={"none": ("ModernBertModel",), "mlm": ("ModernBertForMaskedLM",),
             "classify": ("ModernBertForSequenceClassification",), "tag": ("ModernBertForTokenClassification",)},
    keys={"embed": "model.embeddings.tok_embeddings", "encoder/embed_norm": "model.embeddings.norm",
          "encoder/norm": "model.final_norm", "transform": "head.dense", "norm_transform": "head.norm",
          "unembed": "decoder", "logit_bias": ("decoder.bias", "same"), "labels": "classifier",
          **under("encoder/block_{i}", "model.layers.{i}", {
              "norm_attention": "attn_norm", "norm_mlp": "mlp_norm", "attention/query": ("attn.Wqkv", "fused", 0),
              "attention/key": ("attn.Wqkv", "fused", 1), "attention/value": ("attn.Wqkv", "fused", 2),
              "attention/out": "attn.Wo", "mlp/gate": ("mlp.Wi", "fused", 0), "mlp/up": ("mlp.Wi", "fused", 1),
              "mlp/down": "mlp.Wo"})},
    fields={"vocab_size": "vocab_size", "max_position_embeddings": "context", "num_hidden_layers": "layers",
            "hidden_size": "dim", "num_attention_heads": "heads", "intermediate_size": "mlp_dim",
            "hidden_activation": "activation", "norm_eps": "norm_eps", "norm_bias": "norm_bias",
            "attention_bias": "qkv_bias", "mlp_bias": "mlp_bias", "decoder_bias": "head_bias",
            "classifier_bias": "transform_bias", "classifier_activation": "transform_activation",
            "tie_word_embeddings": "tied", "mlp_dropout": "dropout"},
    preset=dict(architecture="encoder", positions="rotary", gated=True, embed_norm=True, first_norm=False,
                label_transform=True),
    defaults={"max_position_embeddings": 8192, "hidden_activation": "gelu", "norm_eps": 1e-5, "norm_bias": False,
              "attention_bias": False, "mlp_bias": False, "decoder_bias": True, "classifier_bias": False,
              "classifier_activation": "gelu", "classifier_pooling": "cls", "tie_word_embeddings": True,
              "mlp_dropout": 0.0, "local_attention": 128, "global_attn_every_n_layers": 3,
              "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0},
    only={"classifier_pooling": ("cls", "mean")},
    read=_read_modernbert, write=_write_modernbert, base="model.")  # fmt: skip

# EmbeddingGemma: a query of a layer with a window sees half of sliding_window on each side.
_GEMMA3_ENCODER = dataclasses.replace(
    GEMMA3, classes={"none": ("Gemma3TextModel",)},
    keys={ours.replace("decoder/", "encoder/"): theirs for ours, theirs in GEMMA3.keys.items()},
    preset=GEMMA3.preset | dict(architecture="encoder"), variant="use_bidirectional_attention",
    only=GEMMA3.only | {"use_bidirectional_attention": (True,)},
    read=lambda hf: GEMMA3.read(hf | {"sliding_window": hf["sliding_window"] // 2 + 1}),
    write=lambda c: GEMMA3.write(c) | {"sliding_window": 2 * ((c.window or c.context) - 1)})  # fmt: skip

ENCODERS = [_BERT, _ROBERTA, _XLM_ROBERTA, _ELECTRA, _DISTILBERT, _EUROBERT, _MODERNBERT, _GEMMA3_ENCODER]
