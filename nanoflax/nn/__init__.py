"""The models: masks, positions, attention, layers, blocks, the four architectures, and losses."""

from nanoflax.kernels import Array, chunked_cross_entropy, chunks_of, token_losses
from nanoflax.nn.attention import Attention, attention_weights, dot_product_attention
from nanoflax.nn.blocks import Block, Stack
from nanoflax.nn.language_model import LanguageModel, SourceModel, mean_pool
from nanoflax.nn.layers import MLP, Embedding, Linear, Norm, column_lengths, low_rank
from nanoflax.nn.lstm import AttentionLSTM
from nanoflax.nn.models import (
    VOCABULARY,
    Decoder,
    DecoderClassifier,
    Encoder,
    EncoderDecoder,
    alignment,
    build,
    head_kernel,
    without_padding,
)
from nanoflax.nn.moe import router_terms
from nanoflax.nn.positions import angles_of, base_rates, rotary_rates, rotate
from nanoflax.nn.targets import shift_right

__all__ = [
    "Array", "Attention", "AttentionLSTM", "Block", "Decoder", "DecoderClassifier", "Embedding", "Encoder",
    "EncoderDecoder", "LanguageModel", "Linear", "MLP", "Norm", "SourceModel", "Stack", "VOCABULARY", "alignment",
    "angles_of", "attention_weights", "base_rates", "build", "chunked_cross_entropy", "chunks_of", "column_lengths",
    "dot_product_attention", "head_kernel", "low_rank", "mean_pool", "rotary_rates", "rotate",
    "router_terms", "shift_right", "token_losses", "without_padding"]  # fmt: skip
