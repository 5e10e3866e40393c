"""Operations computed faster than jax.numpy alone does it: each equals a few plain lines, which its tests give. Also
the types of arrays in annotations."""

from nanoflax.kernels.activations import activate
from nanoflax.kernels.arrays import Array, Keys, Logits, Queries, Source, SourceMask, States, Tokens, is_key_of_rows
from nanoflax.kernels.cross_entropy import chunked_cross_entropy, chunks_of, mask_padding, most_probable, token_losses
from nanoflax.kernels.draws import argmax, categorical
from nanoflax.kernels.fused_attention import Call, MaskSpec, attend_by, choose
from nanoflax.kernels.grouped import blocks_of, grouped_matmul, move
from nanoflax.kernels.key_values import KeyValues, empty_key_values, read_key_values, write_key_values
from nanoflax.kernels.quantized import (
    GROUP,
    WEIGHT_KINDS,
    Quantized,
    cast,
    for_rows,
    is_quantized,
    multiply,
    pack,
    quantize,
    quantized_matmul,
)
from nanoflax.kernels.recurrence import chunked, convolve
from nanoflax.kernels.rows import add_bias, matmul, normalise
from nanoflax.kernels.softmax_attention import softmax_attention
from nanoflax.kernels.truncation import truncate_below, truncate_by_entropy, truncate_by_rank, truncate_typical

__all__ = [
    "GROUP", "WEIGHT_KINDS", "Array", "Call", "KeyValues", "Keys", "Logits", "MaskSpec", "Quantized", "Queries",
    "Source", "SourceMask", "States", "Tokens", "activate", "add_bias", "argmax", "attend_by", "blocks_of", "cast",
    "categorical", "choose", "chunked", "chunked_cross_entropy", "chunks_of", "convolve", "empty_key_values",
    "for_rows", "grouped_matmul", "is_key_of_rows", "is_quantized", "mask_padding", "matmul", "most_probable",
    "move", "multiply", "normalise", "pack", "quantize", "quantized_matmul", "read_key_values", "softmax_attention",
    "token_losses", "truncate_below", "truncate_by_entropy", "truncate_by_rank", "truncate_typical",
    "write_key_values",
]  # fmt: skip
