"""GGUF files (llama.cpp's format), versions 2 and 3: metadata, and tensors that are dequantised when read.

A file is a header (magic, version, counts), the metadata as typed key-value pairs, the table of tensors,
then the data, every tensor aligned. A quantised row is a sequence of blocks of 32 or 256 values.

The gguf package dequantises the blocks, but this module reads the header: for a damaged array length
`gguf.GGUFReader` never ends; it also flattens nested arrays, reports only the first error, and needs 6 s
and 160 MiB for the vocabulary of SmolLM2 (0.2 s and 9 MiB here).
"""

import dataclasses
import math
import os
import pathlib
import struct
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

from nanoflax import nn
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.families import family_of_type
from nanoflax.hf.family import Family, to_config
from nanoflax.hf.safetensors_io import Slices, Tensor, is_impossible, raise_problems

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4  # of nested arrays; real files have no nested arrays
_CHUNK = 1024  # blocks dequantised at a time: limits the memory of intermediate results
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A quantised tensor in a file, used like `safetensors_io.Tensor`; `read` returns float32."""

    name: str
    shape: tuple[int, ...]
    blocks: Tensor  # [*shape[:-1], blocks in a row] of the bytes of a block
    kind: str  # the class in gguf.quants
    dtype = np.dtype(np.float32)

    def read(self, slices: Slices = ()) -> np.ndarray:
        """The array, or the part that a tuple of slices selects; only its rows are read."""
        from gguf import quants

        dequantize = getattr(quants, self.kind).dequantize_blocks
        leading = len(self.shape) - 1
        blocks = self.blocks.read(slices[:leading])
        data = blocks.reshape(-1, 1).view(np.uint8)  # [N, bytes of a block]
        values = np.empty((len(data), self.shape[-1] // max(self.blocks.shape[-1], 1)), np.float32)
        for i in range(0, len(data), _CHUNK):
            values[i : i + _CHUNK] = dequantize(data[i : i + _CHUNK])
        rows = values.reshape(*blocks.shape[:-1], self.shape[-1])
        return np.ascontiguousarray(rows[..., *slices[leading:]])


class _Reader:
    """Little-endian values from a file; a size beyond the end of the file raises a UserError before any reading."""

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self.path, self.file, self.left = path, file, os.fstat(file.fileno()).st_size

    def refuse(self, problem: str) -> NoReturn:
        raise UserError(f"{self.path}: {problem}")

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            self.refuse(f"{what} needs {size} bytes and the file has {self.left} more")
        self.left -= size
        return self.file.read(size)

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]

    def count(self, min_bytes: int, what: str) -> int:
        """The number of the items that follow, each of at least min_bytes."""
        count = self.number("<Q", what)
        if count * min_bytes > self.left:
            self.refuse(f"{what} cannot be {count}: the file has {self.left} bytes more")
        return count

    def string(self, what: str) -> str:
        data = self.take(self.count(1, f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8: {data[:80]!r}")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            self.refuse(f"{what} has type {kind}; the types are 0 to 12")
        if depth == _MAX_DEPTH:
            self.refuse(f"{what} has more than {_MAX_DEPTH} levels of nested arrays")
        kind = self.number("<I", what)
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            count = self.count(dtype.itemsize, f"the length of {what}")
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        count = self.count(8, f"the length of {what}")
        return [self.value(kind, what, depth + 1) for _ in range(count)]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, number of the type, offset in the data) of the next tensor in the table."""
        name = self.string("the name of a tensor")
        dims = self.number("<I", f"the number of dimensions of {name!r}")
        if dims > 4:
            self.refuse(f"{name!r} has {dims} dimensions; at most 4 are possible")
        shape = [self.number("<Q", f"the shape of {name!r}") for _ in range(dims)]
        kind = self.number("<I", f"the type of {name!r}")
        return name, tuple(reversed(shape)), kind, self.number("<Q", f"the offset of {name!r}")


def open_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor | QuantizedTensor]]:
    """Open a GGUF file; everything except the tensors' data is read.

    Returns:
      (metadata, tensors). metadata: str, int, float, bool, arrays of numbers as NumPy arrays, other
      arrays as lists. tensors: name -> tensor, float32 if quantised and of the stored dtype otherwise;
      the last axis of a shape is the fastest, as in NumPy.
    Raises:
      UserError: before anything is allocated; it names all faulty tensors.
    """
    path = pathlib.Path(path)
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        raise UserError(f"{path} is not a file that can be read")
    with path.open("rb") as file:
        reader = _Reader(path, file)
        size = reader.left
        if reader.take(4, "the magic number") != b"GGUF":
            reader.refuse("it does not begin with GGUF")
        version = reader.number("<I", "the version")
        if version not in (2, 3):
            reader.refuse(f"GGUF version {version} (or a big-endian file); only versions 2 and 3 can be read")
        tensor_count = reader.count(24, "the number of tensors")
        metadata: dict[str, Any] = {}
        for _ in range(reader.count(13, "the number of metadata")):
            key = reader.string("a key")
            if key in metadata:
                reader.refuse(f"metadata {key!r} is there twice")
            metadata[key] = reader.value(reader.number("<I", repr(key)), repr(key))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            reader.refuse(f"general.alignment={alignment!r} must be a power of two")
        infos = [reader.tensor_info() for _ in range(tensor_count)]
    return metadata, _checked_tensors(path, infos, size - reader.left, size, alignment)


def _checked_tensors(path, infos, header_size, size, alignment):
    """Name -> tensor. Raises: UserError with every impossible type, shape and offset."""

    def aligned(position):
        return -(-position // alignment) * alignment

    problems, tensors, ends = [], {}, []
    data = aligned(header_size)
    for name, shape, number, offset in infos:
        if name in tensors:
            problems.append(f"{name!r} is there twice")
        kind, values, nbytes = _type(number)
        if kind not in (*_PLAIN, *_QUANTIZED):
            problems.append(f"{name!r} is of type {kind}; supported are {', '.join((*_PLAIN, *_QUANTIZED))}")
        elif values > 1 and (not shape or shape[-1] % values):
            problems.append(f"{name!r} of shape {list(shape)}: a row is not divisible into blocks of {values} values")
        elif is_impossible(shape, 4):  # bytes of a value when dequantised
            problems.append(f"{name!r} has an impossible shape, {list(shape)}")
        else:
            stored = (*shape[:-1], shape[-1] // values) if shape else ()
            ends.append((offset, offset + math.prod(stored) * nbytes, name))
            tensor = Tensor(name, stored, _PLAIN.get(kind, np.dtype(f"V{nbytes}")), path, data + offset)
            tensors[name] = tensor if kind in _PLAIN else QuantizedTensor(name, shape, tensor, kind)
    position = 0
    for begin, end, name in sorted(ends) if len(ends) == len(infos) else ():
        if begin != aligned(position):
            problems.append(f"{name!r} begins at byte {begin} of the data, but the tensor before it ends at {position}")
        position = end
    if position and size < data + position or size > data + aligned(position):
        problems.append(f"the tensors need {position} bytes of data and the file has {size - data}")
    raise_problems(path, problems)
    return tensors


def _type(number: int) -> tuple[str, int, int]:
    """(name, values in a block, bytes of a block) of a type of tensor."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:  # unknown to the package
        return str(number), 1, 1
    return kind.name, *GGML_QUANT_SIZES[kind]


# llama.cpp's names of the tensors and of the metadata.

_KEYS = {"embed": "token_embd", "decoder/norm": "output_norm", "unembed": "output"} | {
    f"decoder/block_{{i}}/{ours}": theirs
    for ours, theirs in {
        "norm_attention": "blk.{i}.attn_norm", "norm_mlp": "blk.{i}.ffn_norm",
        "attention/query": ("blk.{i}.attn_q", "rotary_pairs"), "attention/key": ("blk.{i}.attn_k", "rotary_pairs"),
        "attention/value": "blk.{i}.attn_v", "attention/out": "blk.{i}.attn_output",
        "mlp/up": "blk.{i}.ffn_up", "mlp/gate": "blk.{i}.ffn_gate",
        "mlp/down": "blk.{i}.ffn_down"}.items()}  # fmt: skip
_FIELDS = {"max_position_embeddings": "context_length", "hidden_size": "embedding_length",
           "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
           "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
           "head_dim": "attention.key_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
           "rope_theta": "rope.freq_base"}  # fmt: skip


_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
_OWN_FIELDS = {"attention_scale": "attention.scale", "embed_scale": "embedding_scale",
               "attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping",
               "window": "attention.sliding_window"}  # fmt: skip
# Metadata that changes the model and that is not computed here, with the values that change nothing.
_UNSUPPORTED = {"logit_scale": (0, 1), "residual_scale": (0, 1), "expert_count": (0,), "attention.clamp_kqv": (0,),
                "attention.max_alibi_bias": (0,), "attention.causal": (True,), "use_parallel_residual": (False,),
                "rope.scaling.attn_factor": (0, 1), "rope.scaling.type": ("none", "linear")}  # fmt: skip


def _refuse_unsupported(metadata: dict[str, Any], path: str | os.PathLike) -> None:
    """Raises: UserError naming all metadata that changes a llama model and is not supported."""
    found = {f"llama.{name}": values for name, values in _UNSUPPORTED.items() if f"llama.{name}" in metadata}
    raise_problems(
        path,
        [
            f"{name}={metadata[name]!r} is not supported; it must be {' or '.join(map(str, values))}"
            for name, values in found.items()
            if metadata[name] not in values
        ],
    )


def _own_fields(metadata, path):
    """Fields of ModelConfig that a llama model of Transformers does not have; 0 in the metadata means none."""
    found = {field: metadata.get(f"llama.{name}", 0) for field, name in _OWN_FIELDS.items()}
    raise_problems(
        path,
        [
            f"llama.{_OWN_FIELDS[field]}={value!r} must be a number, 0 or above"
            for field, value in found.items()
            if type(value) not in ((int,) if field == "window" else (int, float)) or not value >= 0
        ],
    )
    return {field: value for field, value in found.items() if value}


def _rope_scaling(metadata: dict[str, Any], divisors: np.ndarray | None, path: str | os.PathLike) -> dict | None:
    """rope_scaling as in a config.json. divisors: of the rotary rates, as in Llama 3.1.

    A factor without a type is linear, as in llama.cpp; the first files name it rope.scale_linear.
    """
    factor = metadata.get("llama.rope.scaling.factor") or metadata.get("llama.rope.scale_linear") or 1.0
    is_scaled = factor != 1 and metadata.get("llama.rope.scaling.type") != "none"
    if divisors is None:
        return {"rope_type": "linear", "factor": factor} if is_scaled else None
    if is_scaled:
        raise UserError(f"{path}: llama.rope.scaling.factor={factor} with rope_freqs.weight is not supported")
    return {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": metadata.get("llama.rope.scaling.original_context_length", 8192),
    }


def open_gguf_model(path: str | os.PathLike) -> tuple[Family, ModelConfig, dict[str, Tensor | QuantizedTensor]]:
    """The family, configuration and tensors of a GGUF file of llama type. Raises: UserError."""
    metadata, tensors = open_gguf(path)
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise UserError(
            f"{path}: general.architecture={kind!r} is not supported; supported is "
            "llama (Llama, Mistral, SmolLM2 and similar models)"
        )
    _refuse_unsupported(metadata, path)
    hf = {field: metadata[f"llama.{name}"] for field, name in _FIELDS.items() if f"llama.{name}" in metadata}
    if "token_embd.weight" in tensors:
        hf["vocab_size"] = tensors["token_embd.weight"].shape[0]
    hf["tie_word_embeddings"] = "output.weight" not in tensors
    hf |= {field: name in tensors for field, name in _BIASES.items()}
    divisors = tensors.pop("rope_freqs.weight", None)  # divide the rotary rates, as Llama 3.1 scales them
    divisors = None if divisors is None else divisors.read()
    hf["rope_scaling"] = _rope_scaling(metadata, divisors, path)
    family = dataclasses.replace(family_of_type("llama"), keys=_KEYS)
    config = to_config(family, hf, "lm", len(tensors) + 1)
    config = dataclasses.replace(config, **_own_fields(metadata, path))
    if divisors is not None:
        expected = nn.base_rates(config.rope.theta, config.K) / nn.rotary_rates(config.rope, config.K)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise UserError(
                f"{path}: rope_freqs.weight must have the values of Llama 3.1 to 3.3, with a context of "
                f"{config.rope.context} in training"
            )
    rotated = metadata.get("llama.rope.dimension_count", config.K)
    if rotated != config.K:
        raise UserError(f"{path}: llama.rope.dimension_count={rotated} must be the head's size, {config.K}")
    return family, config, tensors
