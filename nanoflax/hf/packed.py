"""Quantised matrices of GGUF files in packed form, without dequantising them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from nanoflax.hf.gguf import QuantizedTensor
from nanoflax.hf.layouts import Holders, Shape
from nanoflax.kernels import Quantized, pack

_SIZE = 32  # values in a block of these types
_LAYOUTS = ("transposed", "fused", "same", "each_transposed", "rotary_pairs")  # those that keep the rows of a matrix


def read_packed(held: Holders, tensors: Mapping[str, Any], K: int) -> Quantized | None:
    """A matrix of the type Q8_0, Q4_0 or Q4_1 with the numbers of its file; None for other types and layouts.

    A matrix of 4 bits with an odd number of rows gets 8 bits, with the same numbers. K: the size of a head.
    """
    (mapping, part), *_ = held
    tensor = tensors[mapping.name]
    kept = isinstance(tensor, QuantizedTensor) and tensor.kind in _READERS and mapping.layout in _LAYOUTS
    if not kept or mapping.expert is not None:
        return None
    is_kernel = mapping.layout != "same"  # else an embedding
    parts = {i: (path, _in_blocks(shape, is_kernel)) for i, (path, shape) in mapping.parts.items()}
    shape = parts[part][1]
    blocks = dataclasses.replace(mapping, parts=parts).read(tensor.blocks, part, (slice(None),) * len(shape), K)
    rows = np.ascontiguousarray(blocks.swapaxes(-1, -2) if is_kernel else blocks)
    return _READERS[tensor.kind](rows[..., None].view(np.uint8), is_kernel)


def _in_blocks(shape: Shape, is_kernel: bool) -> Shape:
    """The shape of a kernel [*E, I, O] or an embedding [V, D] in blocks of inputs."""
    *first, a, b = shape
    return (*first, a // _SIZE, b) if is_kernel else (*first, a, b // _SIZE)


# The layouts of a block are those of ggml-common.h in llama.cpp. `data`: [*E, O, G, bytes of a block].


def _read_q8_0(data, is_kernel):
    values = np.ascontiguousarray(data[..., 2:]).view(np.int8)
    return Quantized(jnp.asarray(_in_rows(values)), _halves(data, 0), None, is_kernel)


def _read_q4_0(data, is_kernel):
    values = _in_rows(_four_bits(data[..., 2:]))
    packed = jnp.asarray(values.astype(np.int8) - 8) if values.shape[-2] % 2 else pack(jnp.asarray(values))
    return Quantized(packed, _halves(data, 0), None, is_kernel)


def _read_q4_1(data, is_kernel):
    values = _in_rows(_four_bits(data[..., 4:]))
    packed = jnp.asarray(values.astype(np.int8)) if values.shape[-2] % 2 else pack(jnp.asarray(values))
    return Quantized(packed, _halves(data, 0), _halves(data, 2), is_kernel)


def _halves(data, start):
    """The float16 numbers at a byte of each block, [*E, O, G]."""
    return jnp.asarray(np.ascontiguousarray(data[..., start : start + 2]).view(np.float16)[..., 0])


def _four_bits(data):
    """Numbers below 16: those of the low bits of all bytes, then those of the high bits."""
    return np.concatenate([data & 15, data >> 4], -1)


def _in_rows(values):
    return values.reshape(*values.shape[:-2], -1)


_READERS = {"Q8_0": _read_q8_0, "Q4_0": _read_q4_0, "Q4_1": _read_q4_1}
