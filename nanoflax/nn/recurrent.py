"""Layers whose state has one size for any text: the gated delta rule and Mamba-2."""

import flax.linen as nn
from jax.typing import DTypeLike

from nanoflax.config import ModelConfig
from nanoflax.nn.attention import LayerCache

RECURRENT_LAYERS: dict[str, type[nn.Module]] = {}  # kind in config.layer_types -> layer


def empty_recurrent_cache(config: ModelConfig, layer: int, batch: int, dtype: DTypeLike) -> LayerCache:
    """The state of one layer before the first token."""
    raise NotImplementedError
