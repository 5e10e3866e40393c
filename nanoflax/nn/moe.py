"""Mixture of experts (Shazeer et al. 2017)."""

import flax.linen as nn

from nanoflax.config import ModelConfig
from nanoflax.nn.arrays import States


class MoE(nn.Module):
    """E experts, each an MLP, of which a router chooses k for a token. Settings: config.moe."""

    config: ModelConfig
    out_stddev: float

    @nn.compact
    def __call__(self, x: States) -> States:
        raise NotImplementedError
