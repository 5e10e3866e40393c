"""Cases of tests/hf/cases.py: mixture of experts."""

from tests.hf.shapes import LLAMA, YARN

_TINY = LLAMA | dict(intermediate_size=24)
_MIXTRAL = _TINY | dict(num_local_experts=4)
_MOE = _TINY | dict(num_experts=8, num_experts_per_tok=3)
_QWEN3 = _MOE | dict(moe_intermediate_size=16, num_hidden_layers=4)
_GPT_OSS = _TINY | dict(num_local_experts=5, num_experts_per_tok=2, head_dim=16, sliding_window=5)

CASES: dict[str, tuple[str, dict]] = {
    "mixtral": ("MixtralForCausalLM", _MIXTRAL),
    "mixtral-window": (
        "MixtralForCausalLM",
        _MIXTRAL
        | dict(
            num_experts_per_tok=3,
            sliding_window=6,
            head_dim=12,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            tie_word_embeddings=True,
            num_key_value_heads=4,
            router_aux_loss_coef=0.5,
            rope_parameters=dict(rope_type="default", rope_theta=300.0),
        ),
    ),
    "mixtral-top1": ("MixtralForCausalLM", _MIXTRAL | dict(num_experts_per_tok=1)),  # weights of 1
    "mixtral-classify": ("MixtralForSequenceClassification", _MIXTRAL | dict(num_labels=3)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _QWEN3 | dict(decoder_sparse_step=2, attention_bias=True)),
    "qwen3_moe-renormalised": (
        "Qwen3MoeForCausalLM",
        _QWEN3
        | dict(
            norm_topk_prob=True,
            mlp_only_layers=[0, 3],
            head_dim=12,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=6,
            hidden_act="gelu_pytorch_tanh",
            rms_norm_eps=1e-2,
            rope_parameters=YARN,
        ),
    ),
    "qwen3_moe-top1": ("Qwen3MoeForCausalLM", _QWEN3 | dict(norm_topk_prob=True, num_experts_per_tok=1)),
    "qwen3_moe-classify": ("Qwen3MoeForSequenceClassification", _QWEN3 | dict(num_labels=3)),
    "olmoe": ("OlmoeForCausalLM", _MOE),
    "olmoe-renormalised": (
        "OlmoeForCausalLM",
        _MOE
        | dict(
            norm_topk_prob=True,
            attention_bias=True,
            num_key_value_heads=None,
            tie_word_embeddings=True,
            hidden_act="relu",
            rms_norm_eps=1e-2,
            router_aux_loss_coef=0.5,
            rope_parameters=dict(rope_type="linear", rope_theta=300.0, factor=4.0),
        ),
    ),
    "gpt_oss": ("GptOssForCausalLM", _GPT_OSS),
    "gpt_oss-default-rope": (
        "GptOssForCausalLM",
        _GPT_OSS
        | dict(
            num_hidden_layers=3,
            num_experts_per_tok=4,
            num_key_value_heads=4,
            head_dim=12,
            attention_bias=False,
            tie_word_embeddings=True,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            sliding_window=3,
            swiglu_limit=0.3,
            swiglu_alpha=0.9,
            hidden_act="relu",  # no effect in Transformers either
            rms_norm_eps=1e-3,
            router_aux_loss_coef=0.5,
            rope_parameters=dict(rope_type="default", rope_theta=300.0),
        ),
    ),
    "gpt_oss-yarn": ("GptOssForCausalLM", _GPT_OSS | dict(swiglu_limit=0.02, rope_parameters=YARN, hidden_size=48)),
    "gpt_oss-classify": ("GptOssForSequenceClassification", _GPT_OSS | dict(num_labels=3)),
}
OLDER: list[tuple[str, dict]] = [
    ("mixtral", {"rope_parameters": ..., "rope_theta": 1e6, "head_dim": ..., "sliding_window": ...}),
    ("mixtral-window", {"num_key_value_heads": None, "router_jitter_noise": ...}),
    ("qwen3_moe", {"num_local_experts": ..., "num_experts": 8, "mlp_only_layers": ..., "norm_topk_prob": ...}),
    ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0, 2], "head_dim": ..., "use_sliding_window": ...}),
    ("olmoe", {"rope_parameters": ..., "rope_theta": 10_000.0, "num_experts": ..., "num_local_experts": 8}),
    ("olmoe", {"num_key_value_heads": 2, "clip_qkv": ..., "norm_topk_prob": ..., "router_aux_loss_coef": ...}),
    ("gpt_oss-default-rope", {"rope_parameters": {}, "rope_theta": 300.0, "hidden_act": ...}),
]
REFUSED: list[tuple[str, dict, str]] = [
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
    ("qwen3_moe", {"mlp_only_layers": 3}, "cannot be read"),
    ("mixtral", {"tie_word_embeddings": None}, "tie_word_embeddings=None"),
]
GREEDY: list[str] = [
    "gpt_oss",
    "gpt_oss-default-rope",
    "mixtral",
    "mixtral-window",
    "qwen3_moe",
    "qwen3_moe-renormalised",
    "olmoe",
]
