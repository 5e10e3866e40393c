"""Models of published sizes, and small ones."""

import dataclasses
from typing import Any

from nanoflax.config.fields import from_dict
from nanoflax.config.layers import MoEConfig, RopeConfig
from nanoflax.config.model import ModelConfig
from nanoflax.errors import UserError

_GPT2 = ModelConfig(vocab_size=50257, context=1024, dropout=0.0)
_LLAMA = ModelConfig(norm="rmsnorm", activation="silu", gated=True, positions="rotary", bias=False, tied=False)


def _with(base, **changes):
    return dataclasses.replace(base, **changes)


PRESETS = {
    "nano-1m": _with(_LLAMA, layers=4, dim=128, heads=4, context=128, tied=True),
    "nano-5m": _with(_LLAMA, layers=4, dim=256, heads=4, context=256, tied=True),
    "nano-15m": _with(_LLAMA, layers=8, dim=384, heads=6, context=512, tied=True),
    # BART (Lewis et al. 2019), small; Transformers has this shape for an encoder-decoder.
    "nano-bart": ModelConfig(
        architecture="encoder_decoder", context=128, layers=2, dim=128, heads=4, activation="gelu", positions="learned",
        position_offset=2, norm_place="post", embed_norm=True, head_bias=True),
    "gpt2": _with(_GPT2, layers=12, dim=768, heads=12),
    "gpt2-medium": _with(_GPT2, layers=24, dim=1024, heads=16),
    "gpt2-large": _with(_GPT2, layers=36, dim=1280, heads=20),
    "gpt2-xl": _with(_GPT2, layers=48, dim=1600, heads=25),
    # The base model of Vaswani et al. 2017, table 3, to be trained from scratch.
    "transformer-base": ModelConfig(
        architecture="encoder_decoder", context=512, layers=6, dim=512, heads=8, mlp_dim=2048,
        activation="relu", norm_place="post", positions="sinusoidal", embed_scale=512**0.5,
        qkv_bias=False, out_bias=False, dropout=0.1),
    # Llama 3.2 1B (Meta, 2024), without its rotary scaling.
    "llama-1b": _with(_LLAMA, vocab_size=128256, context=8192, layers=16, dim=2048, heads=32,
                      kv_heads=8, head_dim=64, mlp_dim=8192, rope=RopeConfig(theta=500_000.0), tied=True),
    # Llama 3 8B and 70B (Grattafiori et al. 2024, table 3).
    "llama-8b": _with(_LLAMA, vocab_size=128256, context=8192, layers=32, dim=4096, heads=32,
                      kv_heads=8, mlp_dim=14336, rope=RopeConfig(theta=500_000.0)),
    "llama-70b": _with(_LLAMA, vocab_size=128256, context=8192, layers=80, dim=8192, heads=64,
                       kv_heads=8, mlp_dim=28672, rope=RopeConfig(theta=500_000.0)),
    # Mixtral 8x7B (Jiang et al. 2024, table 1).
    "mixtral-8x7b": _with(_LLAMA, vocab_size=32000, context=32768, layers=32, dim=4096, heads=32, kv_heads=8,
                          mlp_dim=14336, rope=RopeConfig(theta=1e6), moe=MoEConfig(experts=8, active=2)),
    # T5 11B (Raffel et al. 2020, section 3.7), its vocabulary padded to 32128 as published.
    "t5-11b": ModelConfig(
        architecture="encoder_decoder", vocab_size=32128, context=512, layers=24, dim=1024,
        heads=128, head_dim=128, mlp_dim=65536, activation="relu", norm="rmsnorm", norm_eps=1e-6,
        positions="relative", bias=False, attention_scale=1.0, logit_scale=1024**-0.5),
}  # fmt: skip


def preset(name: str, **changes: Any) -> ModelConfig:
    """The ModelConfig of a preset, with some fields changed.

    Raises: UserError for an unknown name or field.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    return from_dict(ModelConfig, dataclasses.asdict(PRESETS[name]) | changes, where="preset")
