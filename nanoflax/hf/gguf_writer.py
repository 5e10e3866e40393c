"""Writes models as GGUF files, which llama.cpp and programs like it open."""

import collections
import functools
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from nanoflax import peft, tokenizers
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.gguf_models import ROPE_FREQS, describe, rope_divisors
from nanoflax.hf.layouts import TensorMapping, parameter_shapes, shape_problems, tensor_mapping
from nanoflax.hf.safetensors_io import raise_problems
from nanoflax.nn import without_padding

# type -> general.file_type
GGUF_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}
_PLAIN = {"F32": np.float32, "F16": np.float16}
_F16_MAX = 65504.0
_LARGEST = {  # numbers of a type
    "F16": _F16_MAX,
    "BF16": (2 - 2**-7) * 2.0**127,
    "Q8_0": 127 * _F16_MAX,
    "Q4_0": 8 * _F16_MAX,
    "Q4_1": _F16_MAX,
}


class GGUFSummary(NamedTuple):
    """What `save_gguf` has written. tensors: their number by type."""

    architecture: str
    tensors: dict[str, int]
    nbytes: int


def save_gguf(
    path: str | os.PathLike,
    config: ModelConfig,
    params: dict[str, Any],
    tokenizer: Any = None,
    kind: str = "F16",
    name: str | None = None,
) -> GGUFSummary:
    """Write a model as one .gguf file; one tensor at a time is in memory in addition to the parameters.

    Rows of config.vocab_padding are left out, and an untied table takes the factor config.embed_scale. The file has
    its name when it is complete.

    Args:
      params: of `nanoflax.build(config)`, without adapters.
      tokenizer: its vocabulary, special tokens and chat template are written too.
      kind: F32, F16, BF16, Q8_0, Q4_0 (blocks of 32 numbers of 8 or 4 bits with one scale), Q4_1 (with an offset too)
        or MXFP4 (experts in 4 bits, as gpt-oss is published, other matrices in Q8_0). Vectors, biases and routers are
        F32 always; the table of tokens and the output head are Q8_0 for Q4_0 and Q4_1; a matrix whose rows 32 does not
        divide is F16, unless kind has no blocks.
      name: general.name; by default the name of the file.
    Raises: UserError if GGUF cannot express the model or its tokenizer, params are not of this configuration, a number
      is not finite or too large for its type, or the file cannot be written.
    """
    path = pathlib.Path(path)
    if kind not in GGUF_TYPES:
        raise UserError(f"GGUF type {kind!r} must be {', '.join(GGUF_TYPES)}")
    if path.suffix != ".gguf" or path.is_dir():
        raise UserError(f"{path} must be the name of a .gguf file")
    config, params = without_padding(config, params)
    factor = config.embed_scale
    architecture, metadata, config = describe(config)
    factor /= config.embed_scale  # is 1 unless the table takes it
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    own: dict[str, Any] = traverse_util.flatten_dict(peft.without_adapters(params), sep="/")
    if adapters := sorted(flat.keys() - own.keys()):
        raise UserError(
            f"the parameters have adapters ({adapters[0]}, ...), which GGUF files of models do not hold; merge them "
            "first: nanoflax.peft.merge(params)"
        )
    raise_problems("params", shape_problems(flat, parameter_shapes(config)))
    if tokenizer is not None:
        metadata |= tokenizers.to_gguf(tokenizer, config.vocab_size)
    metadata = {"general.type": "model", "general.name": name or path.stem} | metadata

    mappings = tensor_mapping(architecture.family_for(config), config)

    def read(mapping: TensorMapping) -> np.ndarray:
        x = mapping.join(flat, config.K)
        return np.asarray(x, np.float32) * factor if mapping.paths == ["embed/embedding"] and factor != 1 else x

    tensors: list[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]] = [
        (mapping.name, mapping.shape, functools.partial(read, mapping)) for mapping in mappings
    ]
    if config.rope.scaling == "llama3":
        tensors.append((ROPE_FREQS, (config.K // 2,), lambda: rope_divisors(config)))
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            counts = _write(part, architecture.name, metadata, tensors, kind)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return GGUFSummary(architecture.name, counts, path.stat().st_size)


def _write(path: pathlib.Path, architecture: str, metadata, tensors, kind: str) -> dict[str, int]:
    """Write the file. Returns the number of tensors of each type."""
    import gguf

    class Writer(gguf.GGUFWriter):
        """One that can write an empty list of texts too: the merges of a tokenizer of bytes."""

        def _pack_val(self, val, vtype, *args, **kwargs):
            empty = vtype == gguf.GGUFValueType.ARRAY and not val
            types = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING
            return struct.pack("<IIQ", *types, 0) if empty else super()._pack_val(val, vtype, *args, **kwargs)

    writer = Writer(path, architecture)
    writer.add_file_type(gguf.LlamaFileType[GGUF_TYPES[kind]])
    if kind not in _PLAIN:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        writer.add_key_value(key, value, _type_of(value))
    kinds = [_kind(name, shape, kind) for name, shape, _ in tensors]
    for (name, shape, _), own in zip(tensors, kinds, strict=True):
        writer.add_tensor_info(name, *_announced(shape, own))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, _, read), own in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(_encode(name, read(), own))
        for file in writer.fout or ():
            file.flush()
            os.fsync(file.fileno())
    finally:
        writer.close()
    return dict(collections.Counter(kinds))


def _type_of(value: Any) -> Any:
    from gguf import GGUFValueType

    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return GGUFValueType[kinds[type(value)]]


def _kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1 or ".ffn_gate_inp" in name or not name.endswith(".weight"):
        return "F32"
    if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        return "F16"
    if kind == "MXFP4" and len(shape) < 3:
        return "Q8_0"
    return "Q8_0" if kind.startswith("Q4") and name in ("token_embd.weight", "output.weight") else kind


def _announced(shape: tuple[int, ...], kind: str) -> tuple[Any, ...]:
    """The arguments of GGUFWriter.add_tensor_info after the name."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    number = GGMLQuantizationType[kind]
    if kind not in _PLAIN:
        stored = quant_shape_to_byte_shape(shape, number)
        return stored, np.dtype(np.uint8), int(np.prod(stored)), number
    dtype = np.dtype(_PLAIN[kind])
    return shape, dtype, int(np.prod(shape)) * dtype.itemsize, number


def _encode(name: str, x: np.ndarray, kind: str) -> np.ndarray:
    """The tensor as the file has it. Raises: UserError for a number that the type does not have."""
    from gguf import GGMLQuantizationType, quants

    x = np.ascontiguousarray(x, np.float32)
    largest = np.abs(x).max(initial=0)
    if not np.isfinite(largest) or largest > _LARGEST.get(kind, np.inf):
        raise UserError(f"{name} has a number of size {largest}, which {kind} does not have")
    if kind not in _PLAIN:
        return quants.quantize(x, GGMLQuantizationType[kind])
    return x.astype(np.float16) if kind == "F16" else x
