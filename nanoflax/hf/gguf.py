"""Reads GGUF files (llama.cpp's format), versions 2 and 3: metadata, and tensors that are dequantised when read.

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

from nanoflax.errors import UserError
from nanoflax.hf.safetensors_io import Slices, Tensor, is_impossible, raise_problems

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
            10: "<u8", 11: "<i8", 12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4  # of nested arrays; real files have no nested arrays
_CHUNK = 1024  # blocks dequantised at a time: limits the memory of intermediate results
_PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")


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


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """The matrix [H (K + V), R] that makes keys and values of latent vectors, used like `safetensors_io.Tensor`; the
    file has it as keys [H, R, K] and values [H, V, R]."""

    name: str
    keys: Tensor | QuantizedTensor
    values: Tensor | QuantizedTensor

    @property
    def dtype(self) -> np.dtype:
        return self.keys.dtype if self.keys.dtype == self.values.dtype else np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        H, R, K = self.keys.shape
        return H * (K + self.values.shape[1]), R

    def read(self, slices: Slices = ()) -> np.ndarray:
        """The array, or the part that a tuple of slices selects."""
        heads = [self.keys.read().swapaxes(1, 2), self.values.read()]
        return np.concatenate([x.astype(self.dtype) for x in heads], 1).reshape(self.shape)[slices]


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
