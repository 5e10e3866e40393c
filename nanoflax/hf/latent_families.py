"""The decoders with multi-head latent attention among the families of Hugging Face Transformers.

In `read` and `write`, hf is a parsed config.json and c a ModelConfig.
"""

import math

from nanoflax.errors import UserError
from nanoflax.hf.decoders import like_llama, with_classifier
from nanoflax.hf.rope import read_rope, write_rope, yarn_scale
from nanoflax.hf.sparse import EXPERTS, SHARED, empty_shared, read_shared, stacked, write_shared

_ATTENTION = {
    "attention/query": "self_attn.q_proj", "attention/query_down": "self_attn.q_a_proj",
    "attention/query_norm": "self_attn.q_a_layernorm", "attention/query_up": "self_attn.q_b_proj",
    "attention/latent_down": "self_attn.kv_a_proj_with_mqa", "attention/latent_norm": "self_attn.kv_a_layernorm",
    "attention/latent_up": "self_attn.kv_b_proj"}  # fmt: skip


def _read_latent(hf):
    rope, ours = hf.get("rope_scaling") or hf.get("rope_parameters") or {}, read_rope(hf)
    strength, K = rope.get("mscale_all_dim"), hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
    scale = yarn_scale(rope["factor"], strength) if strength and ours["rope.scaling"] != "none" else 1.0
    return ours | read_shared(hf) | {
        "head_dim": K, "attention_scale": K**-0.5 * scale**2, "out_bias": hf["attention_bias"],
        "latent.query_rank": hf["q_lora_rank"] or 0,
        "moe.dense_layers": tuple(range(min(hf["first_k_dense_replace"] or 0, hf["num_hidden_layers"]))),
    }  # fmt: skip


def _write_latent(c):
    """mscale_all_dim changes the scale of the scores; mscale then gives rope.attention_factor in other programs."""
    hf, a, m, K = write_rope(c), c.latent, c.moe, c.K
    strength = (math.sqrt(c.attention_scale * K**0.5) - 1) / (0.1 * math.log(c.rope.factor)) if c.rope.factor > 1 else 0
    if hf["rope_scaling"] and round(strength, 9):
        hf["rope_scaling"]["mscale_all_dim"] = round(strength, 9)
        if factor := c.rope.attention_factor:
            over = factor * yarn_scale(c.rope.factor, strength)
            hf["rope_scaling"]["mscale"] = round((over - 1) / (0.1 * math.log(c.rope.factor)), 9)
    return hf | write_shared(c) | {
        "qk_nope_head_dim": K - a.rope_dim, "q_lora_rank": a.query_rank or None,
        "moe_intermediate_size": m.expert_dim or c.F,
    }  # fmt: skip


_FIELDS = {
    "kv_lora_rank": "latent.rank", "qk_rope_head_dim": "latent.rope_dim", "v_head_dim": "latent.value_dim",
    "n_routed_experts": "moe.experts", "num_experts_per_tok": "moe.active", "moe_intermediate_size": "moe.expert_dim",
    "routed_scaling_factor": "moe.scale"}  # fmt: skip
_WITHOUT = ("num_key_value_heads", "head_dim", "mlp_bias")
_DEFAULTS = {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
             "kv_lora_rank": 512, "q_lora_rank": 1536}  # fmt: skip
_V3 = like_llama(
    "deepseek_v3", "DeepseekV3", without=_WITHOUT,
    keys=_ATTENTION | EXPERTS | SHARED | {"mlp/router/correction": "mlp.gate.e_score_correction_bias"},
    fields=_FIELDS | {"n_group": "moe.groups", "topk_group": "moe.top_groups", "norm_topk_prob": "moe.renormalise",
                      "rope_interleave": "rope.interleaved"},
    preset={"moe.scores": "sigmoid", "moe.correction": True},
    defaults=_DEFAULTS | {
        "n_group": 8, "topk_group": 4, "max_position_embeddings": 4096, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_interleave": True},
    only={"num_key_value_heads": "num_attention_heads", "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",),
          "moe_layer_freq": (1,)},
    aliases={"num_local_experts": "n_routed_experts"}, read=_read_latent, write=_write_latent, stacked=stacked(),
    empty=empty_shared,
    # Layer 61 of the published model predicts a second token; Transformers does not read it either.
    ignored=r".*rotary_emb\.inv_freq|model\.layers\.61\..*")  # fmt: skip


def _read_v2(hf):
    """Transformers computes neither norm_topk_prob nor, without groups, n_group."""
    if hf["topk_method"] == "greedy":
        return _read_latent(hf)
    if hf["topk_method"] != "group_limited_greedy":
        raise UserError(f"topk_method={hf['topk_method']!r} must be 'greedy' or 'group_limited_greedy'")
    for name in ("n_group", "topk_group"):
        if type(hf.get(name)) is not int:
            raise UserError(f"{name}={hf.get(name)!r} must be a number for topk_method='group_limited_greedy'")
    groups = {"moe.groups": hf["n_group"], "moe.top_groups": hf["topk_group"], "moe.group_best": 1}
    return _read_latent(hf) | groups


def _write_v2(c):
    method = "greedy" if c.moe.groups == 1 else "group_limited_greedy"
    return _write_latent(c) | {"topk_method": method, "n_group": c.moe.groups, "topk_group": c.moe.top_groups}


_V2 = like_llama(
    "deepseek_v2", "DeepseekV2", without=_WITHOUT, keys=_ATTENTION | EXPERTS | SHARED,
    fields=_FIELDS | {"mlp_bias": "mlp_bias"},
    preset={"moe.renormalise": False, "moe.expert_bias": False, "rope.interleaved": True},
    defaults=_DEFAULTS | {
        "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0, "topk_method": "greedy"},
    only={"num_key_value_heads": "num_attention_heads", "scoring_func": ("softmax",), "moe_layer_freq": (1,)},
    aliases={"num_experts": "n_routed_experts"}, read=_read_v2, write=_write_v2, stacked=stacked(),
    empty=empty_shared)  # fmt: skip
LATENT = [with_classifier(_V3), with_classifier(_V2)]
