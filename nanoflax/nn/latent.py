"""Multi-head latent attention (DeepSeek-AI 2024, section 2.1)."""

import flax.linen as nn
from jax.typing import DTypeLike

from nanoflax.config import ModelConfig
from nanoflax.nn.arrays import States
from nanoflax.nn.attention import AttentionInputs, LayerCache


def empty_latent_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> LayerCache:
    """The latent vectors of one layer before the first token."""
    raise NotImplementedError


class LatentAttention(nn.Module):
    """Attention whose keys and values come from one vector per token. Settings: config.latent."""

    config: ModelConfig
    out_stddev: float
    causal: bool = True

    @nn.compact
    def __call__(
        self, x: States, inputs: AttentionInputs, cache: LayerCache | None = None
    ) -> tuple[States, LayerCache | None]:
        """Self-attention; cache: this layer's. Returns (the output, the new cache)."""
        raise NotImplementedError
