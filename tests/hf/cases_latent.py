"""Cases of tests/hf/cases.py: scalings of rotary positions, and latent attention."""

from tests.hf.shapes import LLAMA

YARN = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 3.0,
    "beta_slow": 0.5,
}
MSCALE = YARN | {"mscale": 0.707, "mscale_all_dim": 1.3, "truncate": False}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 5.0, 9.0],
}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 300.0, "partial_rotary_factor": 0.5, "factor": 2.0}
DEEPSEEK = LLAMA | dict(
    num_hidden_layers=3,
    num_key_value_heads=4,
    kv_lora_rank=12,
    q_lora_rank=10,
    qk_rope_head_dim=4,
    qk_nope_head_dim=6,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=2,
    moe_intermediate_size=20,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
)
CASES: dict[str, tuple[str, dict]] = {
    "llama-yarn": ("LlamaForCausalLM", LLAMA | dict(rope_parameters=YARN)),
    "llama-longrope": (
        "LlamaForCausalLM",
        LLAMA
        | dict(
            rope_parameters=LONGROPE | {"original_max_position_embeddings": 24, "attention_factor": 1.25, "factor": 3.0}
        ),
    ),
    "llama-proportional": ("LlamaForCausalLM", LLAMA | dict(rope_parameters=PROPORTIONAL)),
    "qwen2-yarn": (
        "Qwen2ForCausalLM",
        LLAMA | dict(rope_parameters=YARN | {"attention_factor": 0.8, "truncate": False}),
    ),
    "qwen2-dynamic": ("Qwen2ForCausalLM", LLAMA | dict(rope_parameters=DYNAMIC, max_position_embeddings=16)),
    "qwen3-yarn": ("Qwen3ForCausalLM", LLAMA | dict(head_dim=12, rope_parameters=MSCALE)),
    "qwen3-dynamic": ("Qwen3ForCausalLM", LLAMA | dict(head_dim=12, rope_parameters=DYNAMIC)),
    "phi3-short": (
        "Phi3ForCausalLM",
        LLAMA | dict(rope_parameters=LONGROPE, original_max_position_embeddings=32, num_key_value_heads=1),
    ),
    "phi3-long": (
        "Phi3ForCausalLM",
        LLAMA
        | dict(
            rope_parameters=LONGROPE
            | {"partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0], "factor": 6.0},
            original_max_position_embeddings=16,
            sliding_window=6,
            tie_word_embeddings=True,
            hidden_act="gelu",
        ),
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "deepseek_v3-direct": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK
        | dict(
            q_lora_rank=None,
            attention_bias=True,
            rope_interleave=False,
            rope_parameters=MSCALE,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=0,
            norm_topk_prob=False,
            routed_scaling_factor=1.7,
            n_shared_experts=1,
            v_head_dim=14,
            tie_word_embeddings=True,
            hidden_act="gelu",
            rms_norm_eps=1e-3,
            num_hidden_layers=2,
        ),
    ),
    "deepseek_v3-dense": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK
        | dict(first_k_dense_replace=4, rope_parameters=YARN | {"mscale_all_dim": 1.0, "attention_factor": 1.5}),
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", DEEPSEEK | dict(rope_parameters=MSCALE)),
    "deepseek_v2-groups": (
        "DeepseekV2ForCausalLM",
        DEEPSEEK
        | dict(
            mlp_bias=True,
            topk_method="group_limited_greedy",
            norm_topk_prob=True,
            routed_scaling_factor=1.7,
            first_k_dense_replace=0,
            q_lora_rank=None,
            attention_bias=True,
            num_hidden_layers=2,
        ),
    ),
    "deepseek_v3-classify": ("DeepseekV3ForSequenceClassification", DEEPSEEK | dict(num_labels=3)),
}
OLDER: list[tuple[str, dict]] = [
    ("deepseek_v3", {"num_key_value_heads": None, "head_dim": ..., "moe_layer_freq": 1, "scoring_func": "sigmoid"}),
    ("deepseek_v3-direct", {"rope_parameters": ..., "rope_theta": 300.0, "rope_scaling": MSCALE | {"type": "yarn"}}),
    ("deepseek_v2", {"num_key_value_heads": ..., "topk_method": ..., "n_group": ..., "routed_scaling_factor": ...}),
    ("llama-yarn", {"torch_dtype": "float32", "dtype": ..., "head_dim": None, "mlp_bias": ...}),
]
REFUSED: list[tuple[str, dict, str]] = [
    ("deepseek_v3", {"n_shared_experts": None}, "n_shared_experts=None must be"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("deepseek_v3", {"rope_interleave": None}, "rope_interleave=None"),
    ("deepseek_v2-groups", {"n_group": ...}, "n_group=None must be"),
    ("deepseek_v2-groups", {"topk_group": None}, "topk_group=None must be"),
    ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok=None"),
]
GREEDY: list[str] = ["qwen3-yarn", "deepseek_v3", "phi3-short"]
