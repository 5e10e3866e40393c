"""Cases of tests/hf/cases.py: more encoders and encoder-decoders."""

from tests.hf import shapes
from tests.hf.shapes import BERT

MODERN = dict(
    max_position_embeddings=64,
    num_hidden_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    local_attention=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
    num_labels=3,
)
MODERN_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
}
BIASES = dict(norm_bias=True, mlp_bias=True, attention_bias=True, classifier_bias=True)

CASES: dict[str, tuple[str, dict]] = {
    "modernbert": ("ModernBertModel", MODERN | dict(local_attention=7, norm_eps=1e-3)),
    "modernbert-mlm": (
        "ModernBertForMaskedLM",
        MODERN | dict(hidden_activation="silu", classifier_activation="relu", rope_parameters=MODERN_ROPE),
    ),
    "modernbert-mlm-untied": (
        "ModernBertForMaskedLM",
        MODERN
        | BIASES
        | dict(decoder_bias=False, tie_word_embeddings=False, layer_types=["sliding_attention", "full_attention"] * 2),
    ),
    "modernbert-classify": ("ModernBertForSequenceClassification", MODERN | dict(classifier_activation="tanh")),
    "modernbert-classify-mean": (
        "ModernBertForSequenceClassification",
        MODERN | dict(classifier_pooling="mean", classifier_bias=True, global_attn_every_n_layers=2),
    ),
    "modernbert-tag": (
        "ModernBertForTokenClassification",
        MODERN | dict(norm_bias=True, layer_types=["full_attention"] * 4, classifier_activation="gelu_new"),
    ),
}
CASES["eurobert-classify-mean"] = (
    "EuroBertForSequenceClassification",
    dict(
        vocab_size=67, num_hidden_layers=2, hidden_size=48, num_attention_heads=4, intermediate_size=64, pad_token_id=0
    )
    | dict(num_key_value_heads=2, classifier_pooling="mean", num_labels=5, bos_token_id=1, eos_token_id=2),
)
CASES["eurobert-classify-late"] = (
    "EuroBertForSequenceClassification",
    CASES["eurobert-classify-mean"][1] | dict(classifier_pooling="late"),
)
CASES["roberta-mlm-relu"] = ("RobertaForMaskedLM", BERT | dict(hidden_act="relu"))
ELECTRA = BERT | dict(embedding_size=16)
CASES |= {
    "electra": ("ElectraModel", ELECTRA),
    "electra-wide": ("ElectraModel", ELECTRA | dict(embedding_size=32, type_vocab_size=1, hidden_act="relu")),
    "electra-detect": ("ElectraForPreTraining", ELECTRA | dict(hidden_act="silu", layer_norm_eps=1e-3)),
    "electra-detect-narrow": (
        "ElectraForPreTraining",
        ELECTRA | dict(embedding_size=72, hidden_size=64, num_attention_heads=2),
    ),
    "electra-mlm": ("ElectraForMaskedLM", ELECTRA | dict(hidden_act="relu")),
    "electra-mlm-untied": ("ElectraForMaskedLM", ELECTRA | dict(tie_word_embeddings=False, type_vocab_size=3)),
    "electra-classify": (
        "ElectraForSequenceClassification",
        ELECTRA | dict(hidden_act="gelu_new", hidden_size=96, num_labels=6),
    ),
    "electra-tag": ("ElectraForTokenClassification", ELECTRA | dict(embedding_size=32)),
}
BART = shapes.BART | dict(decoder_start_token_id=2)
MBART = BART | dict(decoder_start_token_id=61)
CASES |= {
    "bart-unequal": (
        "BartForConditionalGeneration",
        BART | dict(decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=56, decoder_layers=1),
    ),
    "marian-unequal": (
        "MarianMTModel",
        BART | dict(encoder_attention_heads=2, decoder_ffn_dim=24, pad_token_id=66, decoder_start_token_id=66),
    ),
    "mbart": ("MBartForConditionalGeneration", MBART),
    "mbart-unequal": (
        "MBartForConditionalGeneration",
        MBART
        | dict(decoder_attention_heads=8, decoder_ffn_dim=20, encoder_layers=1, scale_embedding=True)
        | dict(activation_function="relu", decoder_start_token_id=None),
    ),
    "mbart-untied": (
        "MBartForConditionalGeneration",
        MBART | dict(tie_word_embeddings=False, activation_function="gelu_new", encoder_ffn_dim=24),
    ),
}
M2M = shapes.BART | dict(decoder_start_token_id=2)
CASES |= {
    "m2m": ("M2M100ForConditionalGeneration", M2M),
    "m2m-untied": (
        "M2M100ForConditionalGeneration",
        M2M
        | dict(decoder_attention_heads=8, decoder_ffn_dim=20, encoder_layers=1, scale_embedding=False, pad_token_id=3)
        | dict(activation_function="gelu", tie_word_embeddings=False),
    ),
}
GEMMA = shapes.HEAD8 | dict(use_bidirectional_attention=True, num_hidden_layers=3, layer_types=shapes.SFS)
CASES |= {
    "gemma3-encoder": ("Gemma3TextModel", GEMMA | dict(sliding_window=8, rope_parameters=shapes.LOCAL)),
    "gemma3-encoder-wide": (
        "Gemma3TextModel",
        GEMMA | dict(sliding_window=100, query_pre_attn_scalar=20, attention_bias=True, num_key_value_heads=1),
    ),
}
OLDER: list[tuple[str, dict]] = [
    ("modernbert-mlm", {"rope_scaling": {"rope_type": "default"}, "norm_bias": ..., "classifier_pooling": ...}),
    ("electra", {"position_embedding_type": "absolute", "hidden_act": ..., "layer_norm_eps": ...}),
    ("mbart-unequal", {"normalize_before": True, "add_final_layer_norm": True, "decoder_start_token_id": ...}),
]
REFUSED: list[tuple[str, dict, str]] = [
    ("modernbert", {"global_attn_every_n_layers": 0}, "global_attn_every_n_layers=0 must be at least 1"),
    ("modernbert", {"rope_scaling": {"rope_theta": 70.0}}, "rope_scaling null"),
    ("marian-unequal", {"decoder_start_token_id": ...}, "model.start_id=58100"),
    ("mbart", {"add_final_layer_norm": False}, "add_final_layer_norm"),
    ("gemma3-encoder", {"architectures": ["Gemma3ForCausalLM"]}, "supported are Gemma3TextModel"),
]
GREEDY = ["bart-unequal", "marian-unequal", "mbart", "mbart-unequal"]
