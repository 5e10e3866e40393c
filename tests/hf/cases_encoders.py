"""Cases of tests/hf/cases.py: more encoders and encoder-decoders."""

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
GREEDY: list[str] = []
