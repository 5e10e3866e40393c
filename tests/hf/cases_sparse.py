"""Cases of tests/hf/cases.py: mixture of experts."""

from tests.hf.shapes import LLAMA, LLAMA3, YARN

_TINY = LLAMA | dict(intermediate_size=24)
_MIXTRAL = _TINY | dict(num_local_experts=4)
_MOE = _TINY | dict(num_experts=8, num_experts_per_tok=3)
_QWEN3 = _MOE | dict(moe_intermediate_size=16, num_hidden_layers=4)
_QWEN2 = _QWEN3 | dict(shared_expert_intermediate_size=20)
_GRANITE = _MIXTRAL | dict(
    embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.5, logits_scaling=0.25
)
_GLM4 = _TINY | dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, num_hidden_layers=3)
_ERNIE = _TINY | dict(moe_num_experts=8, moe_k=3, moe_intermediate_size=16, num_hidden_layers=4)
_LLAMA4 = _TINY | dict(
    num_local_experts=4, intermediate_size_mlp=40, num_hidden_layers=4, head_dim=8, attention_chunk_size=6
)
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
            clip_qkv=0.1,
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
    "gpt_oss-full": ("GptOssForCausalLM", _GPT_OSS | dict(num_experts_per_tok=1, layer_types=["full_attention"] * 2)),
    "gpt_oss-classify": ("GptOssForSequenceClassification", _GPT_OSS | dict(num_labels=3)),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _QWEN2 | dict(decoder_sparse_step=2)),
    "qwen2_moe-windows": (
        "Qwen2MoeForCausalLM",
        _QWEN2
        | dict(
            qkv_bias=False,
            norm_topk_prob=True,
            mlp_only_layers=[0, 3],
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=3,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            router_aux_loss_coef=0.5,
            rope_parameters=YARN,
        ),
    ),
    "qwen2_moe-dense": ("Qwen2MoeForCausalLM", _QWEN2 | dict(num_experts=0, head_dim=12)),
    "qwen2_moe-classify": ("Qwen2MoeForSequenceClassification", _QWEN2 | dict(num_labels=3)),
    "granitemoe": ("GraniteMoeForCausalLM", _GRANITE),
    "granitemoe-tied": (
        "GraniteMoeForCausalLM",
        _MIXTRAL
        | dict(
            num_experts_per_tok=3,
            attention_bias=True,
            num_key_value_heads=None,
            tie_word_embeddings=True,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            rope_parameters=YARN,
        ),
    ),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", _GRANITE | dict(shared_intermediate_size=20)),
    "granitemoeshared-none": (
        "GraniteMoeSharedForCausalLM",
        _GRANITE | dict(num_experts_per_tok=1, attention_bias=True, tie_word_embeddings=True, hidden_act="relu"),
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", _GLM4),
    "glm4_moe-groups": (
        "Glm4MoeForCausalLM",
        _GLM4
        | dict(
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            first_k_dense_replace=2,
            routed_scaling_factor=1.7,
            norm_topk_prob=False,
            use_qk_norm=True,
            attention_bias=True,
            head_dim=16,
            tie_word_embeddings=True,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            rope_parameters=YARN | dict(partial_rotary_factor=0.75),
        ),
    ),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", _ERNIE | dict(moe_norm_min=0.7)),
    "ernie4_5_moe-bias": (
        "Ernie4_5_MoeForCausalLM",
        _ERNIE
        | dict(
            use_bias=True,
            moe_num_shared_experts=0,
            moe_layer_interval=2,
            moe_layer_start_index=0,
            moe_layer_end_index=2,
            num_key_value_heads=4,
            tie_word_embeddings=False,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            router_aux_loss_coef=0.5,
            rope_parameters=YARN,
        ),
    ),
    "ernie4_5_moe-shared": ("Ernie4_5_MoeForCausalLM", _ERNIE | dict(use_bias=True, moe_num_shared_experts=1)),
    "dots1": ("Dots1ForCausalLM", _GLM4 | dict(n_shared_experts=0)),  # with tensors of the shape [0, D]
    "dots1-windows": (
        "Dots1ForCausalLM",
        _GLM4
        | dict(
            n_group=4,
            topk_group=2,
            n_shared_experts=2,
            first_k_dense_replace=1,
            routed_scaling_factor=1.7,
            norm_topk_prob=True,
            attention_bias=True,
            sliding_window=5,
            max_window_layers=1,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            rope_parameters=YARN,
        ),
    ),
    "flex_olmo": ("FlexOlmoForCausalLM", _MOE),
    "flex_olmo-renormalised": (
        "FlexOlmoForCausalLM",
        _MOE
        | dict(
            num_experts_per_tok=1,
            norm_topk_prob=True,
            attention_bias=True,
            num_key_value_heads=None,
            tie_word_embeddings=True,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            router_aux_loss_coef=0.5,
            rope_parameters=YARN,
        ),
    ),
    "hunyuan_moe": ("HunYuanMoEV1ForCausalLM", _MOE | dict(moe_topk=3, head_dim=8)),
    "hunyuan_moe-top1": (
        "HunYuanMoEV1ForCausalLM",
        _TINY
        | dict(
            num_experts=5,
            moe_topk=[1, 1],
            head_dim=12,
            attention_bias=True,
            tie_word_embeddings=True,
            num_key_value_heads=4,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            rope_parameters={"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 300.0},
        ),
    ),
    "hunyuan_moe-classify": (
        "HunYuanMoEV1ForSequenceClassification",
        _MOE | dict(moe_topk=2, head_dim=8, num_labels=3),
    ),
    "llama4": ("Llama4ForCausalLM", _LLAMA4),
    "llama4-scaled": (  # only with padding on the right: Transformers scales queries by their slots
        "Llama4ForCausalLM",
        _LLAMA4
        | dict(
            num_experts_per_tok=3,
            moe_layers=[0, 3],
            use_qk_norm=False,
            attention_bias=True,
            no_rope_layers=[1, 0, 0, 1],
            layer_types=["chunked_attention", "chunked_attention", "full_attention", "full_attention"],
            floor_scale=3,
            attn_scale=0.7,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            rope_parameters=LLAMA3,
        ),
    ),
    "llama4-dense": (
        "Llama4ForCausalLM",
        _LLAMA4
        | dict(
            interleave_moe_layer_step=2,
            attn_temperature_tuning=False,
            no_rope_layer_interval=2,
            num_experts_per_tok=2,
            layer_types=["full_attention"] * 4,
            head_dim=12,
            rope_parameters=YARN,
        ),
    ),
}
OLDER: list[tuple[str, dict]] = [
    ("hunyuan_moe", {"moe_topk": ..., "num_experts_per_tok": 3}),
    ("mixtral", {"rope_parameters": ..., "rope_theta": 1e6, "head_dim": ..., "sliding_window": ...}),
    ("mixtral-window", {"num_key_value_heads": None, "router_jitter_noise": ...}),
    ("qwen3_moe", {"num_local_experts": ..., "num_experts": 8, "mlp_only_layers": ..., "norm_topk_prob": ...}),
    ("qwen3_moe", {"decoder_sparse_step": 1, "mlp_only_layers": [0, 2], "head_dim": ..., "use_sliding_window": ...}),
    ("olmoe", {"rope_parameters": ..., "rope_theta": 10_000.0, "num_experts": ..., "num_local_experts": 8}),
    ("olmoe", {"num_key_value_heads": 2, "clip_qkv": ..., "norm_topk_prob": ..., "router_aux_loss_coef": ...}),
    ("gpt_oss-default-rope", {"rope_parameters": {}, "rope_theta": 300.0, "hidden_act": ...}),
    ("llama4", {"layer_types": ..., "moe_layers": ..., "no_rope_layers": [], "attn_scale": ..., "head_dim": 8}),
    ("qwen2_moe-windows", {"layer_types": ...}),
    ("qwen2_moe", {"layer_types": ..., "sliding_window": 4096, "qkv_bias": ..., "router_aux_loss_coef": ...}),
    ("granitemoeshared-none", {"shared_intermediate_size": ..., "rope_parameters": ..., "rope_theta": 10_000}),
    ("glm4_moe", {"rope_parameters": ..., "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "use_qk_norm": ...}),
    ("dots1-windows", {"layer_types": ..., "first_k_dense_replace": 1, "moe_intermediate_size": 16}),
    ("dots1", {"layer_types": ..., "sliding_window": ..., "n_group": ..., "routed_scaling_factor": ...}),
    ("flex_olmo", {"router_aux_loss_coef": ..., "norm_topk_prob": ..., "num_key_value_heads": 2}),
    ("glm4_moe", {"n_routed_experts": ..., "num_local_experts": 8, "n_group": ..., "num_nextn_predict_layers": ...}),
    ("ernie4_5_moe-shared", {"moe_layer_end_index": -1, "moe_norm_min": ..., "moe_num_experts": ..., "num_experts": 8}),
]
REFUSED: list[tuple[str, dict, str]] = [
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
    ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers=3"),
    ("qwen2_moe-windows", {"use_sliding_window": False}, "use_sliding_window true"),
    ("olmoe", {"clip_qkv": 0.0}, "qkv_clip=0.0"),
    ("mixtral", {"tie_word_embeddings": None}, "tie_word_embeddings=None"),
    ("llama4", {"attention_chunk_size": None}, "attention_chunk_size=None must be positive"),
    ("llama4", {"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
    ("dots1", {"n_shared_experts": None}, "n_shared_experts=None must be a number, 0 or more"),
    ("glm4_moe", {"n_shared_experts": -1}, "n_shared_experts=-1 must be a number, 0 or more"),
    ("hunyuan_moe", {"moe_topk": [3, 2]}, "moe_topk=[3, 2] must be one number"),
    ("ernie4_5_moe", {"moe_layer_interval": 0}, "moe_layer_interval=0 must be at least 1"),
]
GREEDY: list[str] = [
    "gpt_oss",
    "gpt_oss-default-rope",
    "mixtral",
    "mixtral-window",
    "qwen3_moe",
    "qwen3_moe-renormalised",
    "olmoe",
    "hunyuan_moe",
    "llama4",
    "llama4-dense",
    "dots1",
    "dots1-windows",
    "flex_olmo",
    "flex_olmo-renormalised",
    "qwen2_moe",
    "qwen2_moe-windows",
    "granitemoe",
    "granitemoe-tied",
    "granitemoeshared",
    "granitemoeshared-none",
    "glm4_moe",
    "glm4_moe-groups",
    "ernie4_5_moe",
    "ernie4_5_moe-bias",
]
