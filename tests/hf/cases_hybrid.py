"""Cases of tests/hf/cases.py: models with recurrent layers."""

MAMBA2 = dict(
    num_hidden_layers=2,
    hidden_size=32,
    num_heads=8,
    head_dim=8,
    n_groups=2,
    state_size=12,
    chunk_size=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
QWEN3_NEXT = dict(
    num_hidden_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    num_experts=0,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=32)
CASES: dict[str, tuple[str, dict]] = {
    "mamba2": ("Mamba2ForCausalLM", MAMBA2),
    "mamba2-limits": (
        "Mamba2ForCausalLM",
        MAMBA2
        | dict(
            num_heads=6,
            head_dim=16,
            expand=3,
            n_groups=1,
            state_size=16,
            conv_kernel=3,
            use_conv_bias=False,
            hidden_act="gelu",
            layer_norm_epsilon=1e-3,
            tie_word_embeddings=True,
            time_step_limit=(0.5, 0.75),
            residual_in_fp32=False,
            chunk_size=64,
        ),
    ),
    # With biases, Transformers' convolution of the first tokens reads the padding on their left.
    "mamba2-bias": ("Mamba2ForCausalLM", MAMBA2 | dict(use_bias=True, n_groups=8)),
    "qwen3-next-dense": ("Qwen3NextForCausalLM", QWEN3_NEXT | dict(attention_bias=True)),
    "qwen3-next": (
        "Qwen3NextForCausalLM",
        QWEN3_NEXT
        | MOE
        | dict(rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}),
    ),
    "qwen3-next-mixed": (
        "Qwen3NextForCausalLM",
        QWEN3_NEXT
        | MOE
        | dict(
            num_hidden_layers=4,
            layer_types=None,
            full_attention_interval=2,
            mlp_only_layers=[1],
            decoder_sparse_step=2,
            norm_topk_prob=False,
            shared_expert_intermediate_size=24,
            tie_word_embeddings=True,
            rms_norm_eps=1e-3,
            hidden_act="gelu",
            linear_conv_kernel_dim=2,
            linear_num_key_heads=4,
            partial_rotary_factor=1.0,
        ),
    ),
    "qwen3-next-classify": (
        "Qwen3NextForSequenceClassification",
        QWEN3_NEXT | dict(num_labels=3, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]),
    ),
}
GREEDY = ["mamba2", "qwen3-next"]
OLDER: list[tuple[str, dict]] = [
    ("mamba2", {"time_step_limit": [0.0, float("inf")], "norm_before_gate": True, "rms_norm": True, "expand": ...}),
    ("mamba2", {"time_step_limit": ..., "use_bias": ..., "use_conv_bias": ..., "tie_word_embeddings": ...}),
    ("qwen3-next-mixed", {"layer_types": ..., "full_attention_interval": 2}),
    (
        "qwen3-next-dense",
        {"rope_parameters": ..., "rope_theta": 10_000.0, "partial_rotary_factor": ..., "mlp_only_layers": ...},
    ),
]
REFUSED: list[tuple[str, dict, str]] = [
    ("mamba2", {"expand": 3}, "expand=3"),
    ("mamba2", {"time_step_limit": [{"__float__": "-Infinity"}, 1.0]}, "min_step"),
    ("mamba2", {"time_step_limit": [0.0, {"x": 1}]}, "cannot be read, among time_step_limit=["),
    ("mamba2", {"rms_norm": False}, "rms_norm=False"),
    ("qwen3-next", {"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
    ("qwen3-next", {"full_attention_interval": 0}, "full_attention_interval=0 must be at least 1"),
]
