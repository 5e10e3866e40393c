"""The arithmetic of a model, counted from the shapes of its parameters."""

import functools
import re
from fractions import Fraction

import jax

from nanoflax import nn, parallel, train
from nanoflax.config import ModelConfig

# Matrices of a text, not of a token: a start of the LSTM's decoder, heads of whole texts; and small ones after MLM.
_NOT_PER_TOKEN = re.compile(r"start_\d+/|(transform|pooler|labels)/")


@functools.cache
def _kernels(config: ModelConfig) -> tuple[int, int, int]:
    """(all parameters, those that one token uses, those in matrix products with one token)."""
    total, active, products = 0, Fraction(0), Fraction(0)
    share = Fraction(min(config.moe.active, config.moe.experts), max(config.moe.experts, 1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(parallel.param_shapes(nn.build(config))):
        name = train.path_of(path)
        used = leaf.size * (share if "/experts/" in name else 1)
        total, active = total + leaf.size, active + used
        if name.endswith("kernel") and not _NOT_PER_TOKEN.match(name):
            products += used
    return total, int(active), int(products)


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all parameters of a model, those that one token uses: with experts, k of E)."""
    return _kernels(config)[:2]


def flops_per_token(config: ModelConfig, length: int | None = None) -> int:
    """Floating-point operations of training on one token (with a source: on one source token and one
    target token), forward and backward.

    6 for each weight of a matrix product that the token uses, and 12 H K T for each attention, not halved for
    the causal mask (Chowdhery et al. 2022, appendix B: the numerator of MFU); in a sliding or chunked layer the window
    in place of T. A recurrent layer takes 12 for each number of its state, with the delta rule 18. length: T, default
    the context.
    """
    c, T = config, length or config.context
    total = 6 * _kernels(c)[2]
    if c.tied and c.head in ("lm", "mlm"):  # the embedding is the head's matrix too
        total += 6 * (c.embed_dim or c.dim) * c.vocab_size
    if not c.has_blocks:
        return total + 18 * c.dim * T
    r, values = c.recurrent, c.latent.value_dim if c.latent.rank else c.K
    for i in range(c.layers):
        if c.is_recurrent(i):
            state = r.heads * r.key_dim * r.value_dim
            total += (18 if c.layer_type(i) == "delta" else 12) * state
        else:
            total += 6 * c.heads * (c.K + values) * (min(T, c.window) if c.is_local(i) else T)
    return total + 24 * c.cross_layers * c.decoder.heads * c.decoder.K * T
