"""A Transformer block: attention and MLP, each behind a norm and a residual."""

import flax.linen as nn

from nanoflax.attention import Attention
from nanoflax.config import ModelConfig
from nanoflax.layers import MLP, Norm


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, Radford et al. 2019)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, mask, angles=None, cache=None, index=None, deterministic=True):
        """x: [B, T, D]; the other arguments as for `Attention`. Returns ([B, T, D], cache)."""
        c = self.config
        out_stddev = 0.02 / (2 * c.layers) ** 0.5  # GPT-2: keeps the residual's variance near 1
        drop = nn.Dropout(c.dropout, deterministic=deterministic)
        h, cache = Attention(c, out_stddev, name="attention")(
            Norm(c.norm, c.norm_eps, c.bias, name="norm_attention")(x), mask, angles, cache, index)
        x = x + drop(h)
        h = MLP(c.F, c.activation, c.gated, c.bias, out_stddev, name="mlp")(
            Norm(c.norm, c.norm_eps, c.bias, name="norm_mlp")(x))
        return x + drop(h), cache
