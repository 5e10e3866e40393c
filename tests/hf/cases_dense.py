"""Cases of tests/hf/cases.py: more dense decoders."""

from tests.hf import shapes
from tests.hf.shapes import LINEAR, LLAMA, LLAMA3, SFS, YARN

OPT = shapes.OPT | dict(word_embed_proj_dim=24)
HUNYUAN_ROPE = {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 300.0}


CASES: dict[str, tuple[str, dict]] = {
    "gpt2-scaled": (
        "GPT2LMHeadModel",
        shapes.GPT2
        | dict(
            n_layer=3,
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
            reorder_and_upcast_attn=True,
            activation_function="gelu_accurate",
        ),
    ),
    "opt-350m": ("OPTForCausalLM", OPT | dict(do_layer_norm_before=False)),
    "opt-projected": (
        "OPTForCausalLM",
        OPT
        | dict(
            word_embed_proj_dim=40, layer_norm_elementwise_affine=False, tie_word_embeddings=False, enable_bias=False
        ),
    ),
    "opt-projected-classify": ("OPTForSequenceClassification", OPT | dict(num_labels=3, pad_token_id=0)),
    "granite": (
        "GraniteForCausalLM",
        LLAMA
        | dict(
            embedding_multiplier=12,
            logits_scaling=0.25,
            residual_multiplier=0.22,
            attention_multiplier=0.5,
            attention_bias=True,
        ),
    ),
    "granite-tied": (
        "GraniteForCausalLM",
        LLAMA
        | dict(
            tie_word_embeddings=True,
            mlp_bias=True,
            hidden_act="gelu",
            rms_norm_eps=1e-3,
            num_key_value_heads=None,
            rope_parameters=LLAMA3,
        ),
    ),
    "cohere": ("CohereForCausalLM", LLAMA | dict(logit_scale=2.0, attention_bias=True, use_qk_norm=True)),
    "cohere-untied": (
        "CohereForCausalLM",
        LLAMA | dict(tie_word_embeddings=False, num_key_value_heads=None, layer_norm_eps=1e-3, logit_scale=1.5),
    ),
    "cohere2": (
        "Cohere2ForCausalLM",
        LLAMA | dict(num_hidden_layers=5, sliding_window=5, logit_scale=2.0, attention_bias=True, head_dim=12),
    ),
    "cohere2-types": (
        "Cohere2ForCausalLM",
        LLAMA
        | dict(
            num_hidden_layers=3,
            layer_types=SFS,
            sliding_window=3,
            logit_scale=1.5,
            tie_word_embeddings=False,
            num_key_value_heads=None,
            layer_norm_eps=1e-3,
            hidden_act="gelu",
            rope_parameters=LINEAR,
        ),
    ),
    "starcoder2": ("Starcoder2ForCausalLM", LLAMA),
    "starcoder2-window": (
        "Starcoder2ForCausalLM",
        LLAMA
        | dict(
            sliding_window=5,
            use_bias=False,
            tie_word_embeddings=False,
            norm_epsilon=1e-3,
            hidden_act="gelu",
            num_key_value_heads=4,
            rope_parameters=LINEAR,
        ),
    ),
    "stablelm": ("StableLmForCausalLM", LLAMA | dict(num_key_value_heads=4)),
    "stablelm-parallel": (
        "StableLmForCausalLM",
        LLAMA
        | dict(
            use_parallel_residual=True,
            use_qkv_bias=True,
            qk_layernorm=True,
            layer_norm_eps=1e-3,
            tie_word_embeddings=True,
            hidden_act="gelu",
            rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        ),
    ),
    "smollm3": ("SmolLM3ForCausalLM", LLAMA | dict(num_hidden_layers=3, no_rope_layer_interval=2)),
    "smollm3-window": (
        "SmolLM3ForCausalLM",
        LLAMA
        | dict(
            num_hidden_layers=3,
            no_rope_layers=[0, 1, 1],
            use_sliding_window=True,
            sliding_window=5,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
    ),
    "smollm3-types": (
        "SmolLM3ForCausalLM",
        LLAMA
        | dict(
            num_hidden_layers=3,
            layer_types=SFS,
            use_sliding_window=True,
            sliding_window=4,
            num_key_value_heads=None,
            hidden_act="gelu",
            rms_norm_eps=1e-3,
            rope_parameters=LLAMA3,
        ),
    ),
    "glm4": ("Glm4ForCausalLM", LLAMA | dict(head_dim=8)),
    "glm4-tied": (
        "Glm4ForCausalLM",
        LLAMA
        | dict(
            head_dim=12,
            attention_bias=False,
            tie_word_embeddings=True,
            rms_norm_eps=1e-3,
            hidden_act="gelu",
            num_key_value_heads=4,
            rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0},
        ),
    ),
    "nanochat": ("NanoChatForCausalLM", LLAMA),
    "nanochat-yarn": ("NanoChatForCausalLM", LLAMA | dict(rope_parameters=YARN)),
    "nanochat-tied": (
        "NanoChatForCausalLM",
        LLAMA
        | dict(
            final_logit_softcapping=None,
            attention_bias=True,
            tie_word_embeddings=True,
            num_key_value_heads=None,
            rms_norm_eps=1e-2,
            hidden_act="silu",
            rope_parameters=LINEAR,
        ),
    ),
    "phi": ("PhiForCausalLM", LLAMA),
    "phi-norms": (
        "PhiForCausalLM",
        LLAMA
        | dict(
            qk_layernorm=True,
            tie_word_embeddings=True,
            num_key_value_heads=4,
            hidden_act="relu",
            layer_norm_eps=1e-3,
            rope_parameters=LINEAR | {"partial_rotary_factor": 0.75},
        ),
    ),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", LLAMA | dict(head_dim=12, rope_parameters=HUNYUAN_ROPE)),
    "hunyuan-tied": (
        "HunYuanDenseV1ForCausalLM",
        LLAMA
        | dict(
            head_dim=8,
            attention_bias=True,
            tie_word_embeddings=True,
            num_key_value_heads=4,
            hidden_act="gelu",
            rms_norm_eps=1e-2,
            rope_parameters=YARN,
        ),
    ),
    "olmo": ("OlmoForCausalLM", LLAMA | dict(clip_qkv=0.1)),
    "olmo-tied": (
        "OlmoForCausalLM",
        LLAMA | dict(attention_bias=True, tie_word_embeddings=True, hidden_act="gelu", rope_parameters=LLAMA3),
    ),
    "olmo3": ("Olmo3ForCausalLM", LLAMA | dict(num_hidden_layers=4, sliding_window=5)),
    "olmo3-yarn": (
        "Olmo3ForCausalLM",
        LLAMA
        | dict(
            num_hidden_layers=3,
            layer_types=SFS,
            sliding_window=4,
            attention_bias=True,
            tie_word_embeddings=True,
            num_key_value_heads=None,
            hidden_act="gelu",
            rms_norm_eps=1e-3,
            rope_parameters={"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
        ),
    ),
    **{
        f"{name.lower()}-classify": (
            f"{name}ForSequenceClassification",
            LLAMA | dict(num_labels=3, num_hidden_layers=2) | more,
        )
        for name, more in [
            ("Starcoder2", {}),
            ("StableLm", {"use_parallel_residual": True}),
            ("SmolLM3", {}),
            ("Glm4", {"head_dim": 8}),
            ("Olmo", {}),
            ("Phi", {}),
            ("HunYuanDenseV1", {"head_dim": 8}),
            ("Olmo3", {"sliding_window": 3}),
        ]
    },
}
GREEDY: list[str] = [
    "gpt2-scaled",
    "opt-350m",
    "granite",
    "cohere",
    "cohere2",
    "starcoder2-window",
    "stablelm-parallel",
    "smollm3-window",
    "glm4",
    "nanochat",
    "phi",
    "hunyuan",
    "olmo",
    "olmo3-yarn",
]
OLDER: list[tuple[str, dict]] = [
    ("opt", {"word_embed_proj_dim": ..., "layer_norm_elementwise_affine": ..., "enable_bias": ...}),
    ("granite-tied", {"rope_parameters": ..., "rope_theta": 300.0, "rope_scaling": LLAMA3, "residual_multiplier": ...}),
    ("cohere-untied", {"rope_parameters": ..., "rope_theta": 500_000, "use_qk_norm": ...}),
    ("cohere2", {"rope_parameters": ..., "layer_types": ..., "sliding_window_pattern": 4, "norm_type": ...}),
    (
        "starcoder2-window",
        {"rope_parameters": ..., "rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    ("stablelm", {"rope_parameters": ..., "qk_layernorm": ..., "use_parallel_residual": ...}),
    ("stablelm-parallel", {"rope_parameters": ..., "rope_theta": 300.0, "partial_rotary_factor": 0.5}),
    ("smollm3", {"rope_parameters": ..., "no_rope_layers": ..., "layer_types": ..., "use_sliding_window": ...}),
    ("smollm3-window", {"layer_types": ..., "rope_parameters": ..., "rope_theta": 2_000_000.0, "rope_scaling": None}),
    ("glm4", {"rope_parameters": ..., "partial_rotary_factor": 0.5, "rope_theta": 10_000.0, "attention_bias": ...}),
    ("glm4-tied", {"rope_parameters": ..., "partial_rotary_factor": 1.0, "rope_theta": 300.0}),
    ("phi", {"rope_parameters": ..., "partial_rotary_factor": 0.5, "rope_theta": 10_000.0, "qk_layernorm": ...}),
    ("hunyuan", {"rope_parameters": ..., "rope_theta": 300.0, "rope_scaling": {"type": "dynamic", "alpha": 50.0}}),
    ("olmo", {"rope_parameters": ..., "rope_theta": 10_000.0, "rope_scaling": None, "attention_bias": ...}),
    ("olmo3", {"rope_parameters": ..., "layer_types": ..., "rope_theta": 500_000, "rope_scaling": None}),
    ("nanochat", {"rope_parameters": ..., "hidden_act": ..., "final_logit_softcapping": ...}),
]
REFUSED: list[tuple[str, dict, str]] = [
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ("cohere2", {"sliding_window": None}, "sliding_window=None"),
    ("cohere2", {"layer_types": ["chunked_attention"] * 5}, "chunked_attention"),
    ("smollm3", {"no_rope_layer_interval": 0, "no_rope_layers": None}, "cannot be read"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers must have 3 values"),
    ("granite", {"logits_scaling": 0}, "cannot be read"),
    ("granite", {"attention_multiplier": -1.0}, "attention_scale"),
    ("nanochat", {"hidden_act": "relu6"}, "relu6"),
    ("hunyuan", {"rope_parameters": HUNYUAN_ROPE | {"alpha": -1.0}}, "model.rope.theta="),
    ("olmo3", {"sliding_window": None}, "sliding_window=None"),
    ("olmo3", {"rope_parameters": LINEAR}, "full_attention"),
    ("olmo3", {"rope_parameters": {"sliding_attention": LINEAR}}, "linear"),
]
