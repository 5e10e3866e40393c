"""GGUF files (llama.cpp's format), versions 2 and 3: metadata, and tensors dequantised when read.

A file is a header (magic, version, counts), the metadata as typed key-value pairs, the table of
tensors, then the data, every tensor aligned. A quantised row is a run of blocks of 32 or 256
values, each a packed record of scales and small integers; `_BLOCKS` gives the records as NumPy
dtypes, so a file is mapped as an array of them.
"""

import dataclasses
import math
import os
import pathlib
import struct

import ml_dtypes
import numpy as np

from nanoflax import nn
from nanoflax.errors import UserError
from nanoflax.hf import families
from nanoflax.hf.family import to_config
from nanoflax.hf.safetensors_io import Tensor, fail, impossible

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4  # of arrays in arrays; files in use have none
_CHUNK = 4096  # blocks at a time: bounds the memory of the intermediate steps
_PLAIN = {0: ("F32", np.float32), 1: ("F16", np.float16), 30: ("BF16", ml_dtypes.bfloat16)}
_UNSUPPORTED = {9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
                18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
                24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
                35: "TQ2_0", 39: "MXFP4"}  # fmt: skip


def _nibbles(q):  # the low halves of all bytes, then the high halves
    return np.concatenate([q & 15, q >> 4], axis=-1)


def _bits(q):  # [N, 4] bytes -> [N, 32]
    return np.unpackbits(q, axis=-1, bitorder="little")


def _f32(x):  # [N] -> [N, 1]
    return x.astype(np.float32)[:, None]


def _q4_0(b):
    return _f32(b["d"]) * (_nibbles(b["q"]).astype(np.int8) - 8)


def _q4_1(b):
    return _f32(b["d"]) * _nibbles(b["q"]) + _f32(b["m"])


def _q5_0(b):
    return _f32(b["d"]) * ((_nibbles(b["q"]) | _bits(b["high"]) << 4).astype(np.int8) - 16)


def _q5_1(b):
    return _f32(b["d"]) * (_nibbles(b["q"]) | _bits(b["high"]) << 4) + _f32(b["m"])


def _q8_0(b):
    return _f32(b["d"]) * b["q"]


def _scaled_groups(b, q):
    """[N, 8, 32] numbers of Q4_K or Q5_K, each group with a scale and a minimum of 6 bits."""
    low, middle, high = np.split(b["scales"], 3, axis=-1)
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    minima = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=-1)
    scales, minima = _f32(b["d"]) * scales, _f32(b["m"]) * minima
    return (scales[..., None] * q - minima[..., None]).reshape(-1, 256)


def _q4_k(b):
    return _scaled_groups(b, _nibbles(b["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(b):
    q = _nibbles(b["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = b["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _scaled_groups(b, q | high << 4)


def _q6_k(b):
    low = _nibbles(b["q"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = b["high"].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | high << 4).astype(np.int8) - 32
    scales = _f32(b["d"]) * b["scales"]
    return (scales[..., None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


# Number in the file: (name, values in a block, its record, records [N] -> float32 [N, values]).
_BLOCKS = {
    2: ("Q4_0", 32, [("d", "<f2"), ("q", "u1", 16)], _q4_0),
    3: ("Q4_1", 32, [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], _q4_1),
    6: ("Q5_0", 32, [("d", "<f2"), ("high", "u1", 4), ("q", "u1", 16)], _q5_0),
    7: ("Q5_1", 32, [("d", "<f2"), ("m", "<f2"), ("high", "u1", 4), ("q", "u1", 16)], _q5_1),
    8: ("Q8_0", 32, [("d", "<f2"), ("q", "i1", 32)], _q8_0),
    12: ("Q4_K", 256, [("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("q", "u1", 128)], _q4_k),
    13: ("Q5_K", 256, [("d", "<f2"), ("m", "<f2"), ("scales", "u1", 12), ("high", "u1", 32),
                       ("q", "u1", 128)], _q5_k),
    14: ("Q6_K", 256, [("q", "u1", 128), ("high", "u1", 64), ("scales", "i1", 16), ("d", "<f2")],
         _q6_k),
}  # fmt: skip
SUPPORTED = [name for name, *_ in (*_PLAIN.values(), *_BLOCKS.values())]


@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """As safetensors_io.Tensor; `read` gives float32."""

    name: str
    shape: tuple[int, ...]
    blocks: Tensor  # [*shape[:-1], shape[-1] / values in a block] of records
    dequantize: object  # records [N] -> float32 [N, values in a block]
    dtype = np.dtype(np.float32)

    def read(self, slices=()):
        """The array, or the part that a tuple of slices selects; only its rows are read."""
        leading = len(self.shape) - 1
        records = self.blocks.read(slices[:leading])
        flat = records.reshape(-1)
        values = np.empty((flat.size, self.shape[-1] // max(self.blocks.shape[-1], 1)), np.float32)
        for i in range(0, flat.size, _CHUNK):
            values[i : i + _CHUNK] = self.dequantize(flat[i : i + _CHUNK])
        rows = values.reshape(*records.shape[:-1], self.shape[-1])
        return np.ascontiguousarray(rows[..., *slices[leading:]])


class _Reader:
    """Little-endian values from a file, none of them beyond its end."""

    def __init__(self, path, file):
        self.path, self.file, self.left = path, file, os.fstat(file.fileno()).st_size

    def refuse(self, problem):
        raise UserError(f"{self.path}: {problem}")

    def take(self, size, what):
        if size > self.left:
            self.refuse(f"{what} needs {size} bytes and the file has {self.left} more")
        self.left -= size
        return self.file.read(size)

    def number(self, kind, what):
        return struct.unpack(kind, self.take(struct.calcsize(kind), what))[0]

    def count(self, least, what):
        """The number of things that follow, each at least so many bytes."""
        count = self.number("<Q", what)
        if count * least > self.left:
            self.refuse(f"{what} cannot be {count}: the file has {self.left} bytes more")
        return count

    def string(self, what):
        data = self.take(self.count(1, f"the length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8: {data[:80]!r}")

    def value(self, kind, what, depth=0):
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            self.refuse(f"{what} has type {kind}; the types are 0 to 12")
        if depth == _MAX_DEPTH:
            self.refuse(f"{what} has arrays in arrays more than {_MAX_DEPTH} deep")
        kind = self.number("<I", what)
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            count = self.count(dtype.itemsize, f"the length of {what}")
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        count = self.count(8, f"the length of {what}")
        return [self.value(kind, what, depth + 1) for _ in range(count)]


def open_gguf(path):
    """Opens a GGUF file, reading all but the data.

    Returns:
      (metadata, tensors). metadata: dict of str, int, float, bool, arrays of numbers as NumPy
      arrays, other arrays as lists. tensors: dict, name -> Tensor as of safetensors_io, float32
      when quantised and of the stored dtype otherwise; shapes as NumPy counts, last axis fastest.
    Raises:
      UserError: before anything is allocated. Of faulty tensors all are named.
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
            reader.refuse(f"GGUF version {version} (big-endian files also read so); versions 2 and 3 can be read")
        tensor_count = reader.count(24, "the number of tensors")
        metadata = {}
        for _ in range(reader.count(13, "the number of metadata")):
            key = reader.string("a key")
            if key in metadata:
                reader.refuse(f"metadata {key!r} is there twice")
            metadata[key] = reader.value(reader.number("<I", repr(key)), repr(key))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            reader.refuse(f"general.alignment={alignment!r} must be a power of two")
        infos = [_read_info(reader) for _ in range(tensor_count)]
    tensors = _tensors(path, infos, size - reader.left, size, alignment)
    return metadata, tensors


def _read_info(reader):
    name = reader.string("the name of a tensor")
    dims = reader.number("<I", f"the number of dimensions of {name!r}")
    if dims > 4:
        reader.refuse(f"{name!r} has {dims} dimensions; at most 4 are possible")
    shape = [reader.number("<Q", f"the shape of {name!r}") for _ in range(dims)]
    kind = reader.number("<I", f"the type of {name!r}")
    return name, tuple(reversed(shape)), kind, reader.number("<Q", f"the offset of {name!r}")


def _tensors(path, infos, header_size, size, alignment):
    def aligned(position):
        return -(-position // alignment) * alignment

    problems, tensors, ends = [], {}, []
    data = aligned(header_size)
    for name, shape, kind, offset in infos:
        if name in tensors:
            problems.append(f"{name!r} is there twice")
        if kind in _PLAIN:
            dtype, values = np.dtype(_PLAIN[kind][1]), 1
        elif kind in _BLOCKS:
            _, values, record, dequantize = _BLOCKS[kind]
            dtype = np.dtype(record)
        else:
            problems.append(
                f"{name!r} is of type {_UNSUPPORTED.get(kind, kind)}; supported are " + ", ".join(SUPPORTED)
            )
            continue
        if values > 1 and (not shape or shape[-1] % values):
            problems.append(f"{name!r} of shape {list(shape)} has no rows of whole blocks of {values} values")
            continue
        stored = (*shape[:-1], shape[-1] // values) if shape else ()
        nbytes = math.prod(stored) * dtype.itemsize
        if impossible(shape, 4):  # bytes of a value when dequantised
            problems.append(f"{name!r} has an impossible shape, {list(shape)}")
            continue
        ends.append((offset, offset + nbytes, name))
        tensor = Tensor(name, stored, dtype, path, data + offset)
        tensors[name] = tensor if values == 1 else QuantizedTensor(name, shape, tensor, dequantize)
    position = 0
    for begin, end, name in sorted(ends) if len(ends) == len(infos) else ():
        if begin != aligned(position):
            problems.append(f"{name!r} begins at byte {begin} of the data, but the tensor before it ends at {position}")
        position = end
    if position and size < data + position or size > data + aligned(position):
        problems.append(f"the tensors need {position} bytes of data and the file has {size - data}")
    fail(path, problems)
    return tensors


# GGUF: llama.cpp's names of the tensors and the metadata.

_GGUF_KEYS = {"embed": "token_embd", "decoder/norm": "output_norm", "unembed": "output"} | {
    f"decoder/block_{{i}}/{ours}": theirs
    for ours, theirs in {
        "norm_attention": "blk.{i}.attn_norm", "norm_mlp": "blk.{i}.ffn_norm",
        "attention/query": ("blk.{i}.attn_q", "interleaved"),
        "attention/key": ("blk.{i}.attn_k", "interleaved"),
        "attention/value": "blk.{i}.attn_v", "attention/out": "blk.{i}.attn_output",
        "mlp/up": "blk.{i}.ffn_up", "mlp/gate": "blk.{i}.ffn_gate",
        "mlp/down": "blk.{i}.ffn_down"}.items()}  # fmt: skip
_GGUF_FIELDS = {"max_position_embeddings": "context_length", "hidden_size": "embedding_length",
                "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
                "num_attention_heads": "attention.head_count",
                "num_key_value_heads": "attention.head_count_kv",
                "head_dim": "attention.key_length",
                "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}  # fmt: skip


def _open_gguf(path):
    metadata, tensors = open_gguf(path)
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise UserError(
            f"{path}: general.architecture={kind!r} is not supported; supported is "
            "llama (Llama, Mistral, SmolLM2 and their like)"
        )
    hf = {field: metadata[f"llama.{name}"] for field, name in _GGUF_FIELDS.items() if f"llama.{name}" in metadata}
    if "token_embd.weight" in tensors:
        hf["vocab_size"] = tensors["token_embd.weight"].shape[0]
    hf["tie_word_embeddings"] = "output.weight" not in tensors
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        hf["rope_scaling"] = {
            "rope_type": metadata["llama.rope.scaling.type"],
            "factor": metadata.get("llama.rope.scaling.factor"),
        }
    slowed = tensors.pop("rope_freqs.weight", None)  # what divides each rate, for Llama 3.1's
    if slowed is not None:
        slowed = slowed.read()
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(slowed.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    family = dataclasses.replace(families.family_of_type("llama"), keys=_GGUF_KEYS)
    config = to_config(family, hf, "lm", len(tensors) + 1)
    if slowed is not None:
        rates = nn.base_rates(config.rope_theta, config.K) / nn.rotary_rates(config)
        if slowed.shape != rates.shape or not np.allclose(slowed, rates, rtol=1e-3):
            raise UserError(f"{path}: rope_freqs.weight is not the scaling of Llama 3.1 to 3.3")
    rotated = metadata.get("llama.rope.dimension_count", config.K)
    if rotated != config.K:
        raise UserError(f"{path}: llama.rope.dimension_count={rotated} must be the head's size, {config.K}")
    return family, config, tensors
