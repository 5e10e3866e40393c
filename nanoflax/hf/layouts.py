"""Which tensor of a Hugging Face model holds which of our parameters: names, shapes and layouts."""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from nanoflax import parallel
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError
from nanoflax.hf.family import Family
from nanoflax.hf.gguf import LatentHeads, QuantizedTensor
from nanoflax.hf.mxfp4 import PackedTensor
from nanoflax.hf.safetensors_io import Slices, Tensor
from nanoflax.nn import build

Shape = tuple[int, ...]


@dataclasses.dataclass
class TensorMapping:
    """A tensor in a file, and our parameters that it holds; see `Family` for the layouts."""

    name: str
    layout: str
    parts: dict[int, tuple[str, Shape]]  # number of the part -> (path, shape) of our parameter
    groups: int | None = None  # of fused_by_head; none: heads of the size K
    expert: int | None = None  # the tensor holds only this expert's part of parameters [E, *shape]

    @property
    def paths(self) -> list[str]:
        return [path for _, (path, _) in sorted(self.parts.items())]

    @property
    def shape(self) -> Shape:
        """The shape of the tensor in the file."""
        *rest, _ = self.parts[0][1]
        last = sum(shape[-1] for _, shape in self.parts.values())
        if self.layout == "row":
            return (1, *rest, last)
        if self.layout == "column":
            return (*rest,)
        if self.layout == "each_transposed":
            return (*rest[:-1], last, rest[-1])
        is_same = self.layout in ("same", "fused_columns", "interleaved", "plus_one")
        return (*rest, last) if is_same else (last, *reversed(rest))

    def read(
        self, tensor: Tensor | QuantizedTensor | PackedTensor | LatentHeads, part: int, index: Slices, K: int
    ) -> np.ndarray:
        """Our parameter number `part`, or the part of it that a tuple of slices selects; K: the size of a head."""
        shape = self.parts[part][1]
        *rest, last = (slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
        first = sum(self.parts[i][1][-1] for i in range(part))
        shifted = slice(first + last.start, first + last.stop)
        if self.layout == "row":
            return tensor.read((slice(None), *rest, last))[0]
        if self.layout == "column":
            return tensor.read((*rest,))[..., None][..., last]
        if self.layout in ("same", "fused_columns"):
            return tensor.read((*rest, shifted))
        if self.layout == "each_transposed":
            return tensor.read((*rest[:-1], shifted, rest[-1])).swapaxes(-1, -2)
        if self.layout == "interleaved":
            n = len(self.parts)
            return tensor.read((*rest, slice(n * last.start + part, n * last.stop, n)))
        if self.layout == "plus_one":
            return tensor.read((*rest, last)).astype(np.float32) - 1
        if self.layout in ("transposed", "fused"):
            return tensor.read((shifted, *reversed(rest))).T
        x = tensor.read()
        if self.layout == "fused_by_head":
            n = self.groups or shape[-1] // K
            x = x.reshape(n, -1, *x.shape[1:])[:, first // n : (first + shape[-1]) // n]
        else:  # rotary_pairs
            x = x.reshape(-1, K // 2, 2, *x.shape[1:]).swapaxes(1, 2)
        return x.reshape(shape[::-1]).T[(*rest, last)]

    def join(self, parameters: Mapping[str, Any], K: int) -> np.ndarray:
        """The tensor for the file, from our parameters by path; K: the size of a head."""
        arrays = [np.asarray(parameters[p] if self.expert is None else parameters[p][self.expert]) for p in self.paths]
        if self.layout == "row":
            return arrays[0][None]
        if self.layout == "column":
            return arrays[0][..., 0]
        if self.layout in ("same", "fused_columns"):
            return np.concatenate(arrays, -1) if len(arrays) > 1 else arrays[0]
        if self.layout == "each_transposed":
            return np.concatenate([x.swapaxes(-1, -2) for x in arrays], -2)
        if self.layout == "interleaved":
            return np.stack(arrays, -1).reshape(self.shape)
        if self.layout == "plus_one":
            return arrays[0].astype(np.float32) + 1
        arrays = [x.T for x in arrays]
        if self.layout in ("transposed", "fused"):
            return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        if self.layout == "fused_by_head":
            heads = [x.reshape(self.groups or len(x) // K, -1, *x.shape[1:]) for x in arrays]
            return np.concatenate(heads, 1).reshape(-1, *arrays[0].shape[1:])
        x = arrays[0]  # rotary_pairs
        return x.reshape(-1, 2, K // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


Holders = list[tuple[TensorMapping, int]]  # the tensors that hold a parameter, with the number of its part in each


def holders(mappings: Sequence[TensorMapping]) -> dict[str, Holders]:
    """Path of our parameter -> the tensors that hold it: one, or one for each expert in their order."""
    found: dict[str, Holders] = {}
    for mapping in mappings:
        for part, (path, _) in mapping.parts.items():
            found.setdefault(path, []).append((mapping, part))
    return found


def read_parameter(held: Holders, tensors: Mapping[str, Any], index: Slices, K: int) -> np.ndarray:
    """The part of a parameter that a tuple of slices selects; only the tensors of the selected experts are read."""
    (mapping, part), *_ = held
    if mapping.expert is None:
        return mapping.read(tensors[mapping.name], part, index, K)
    held = held[index[0]]
    pieces = (mapping.read(tensors[mapping.name], part, index[1:], K) for mapping, part in held)
    first = next(pieces)
    stacked = np.empty((len(held), *first.shape), first.dtype)
    stacked[0] = first
    for i, piece in enumerate(pieces, 1):
        stacked[i] = piece
    return stacked


def tensor_mapping(family: Family, config: ModelConfig) -> list[TensorMapping]:
    """The tensors of a model with this configuration, in the files of the family.

    Raises: UserError for a parameter without a tensor in the family.
    """
    keys = family.keys_of(config)
    found: dict[str, TensorMapping] = {}
    for path, shape in parameter_shapes(config).items():
        block = re.search(r"(?<=block_)\d+", path)
        key = re.sub(r"block_\d+", "block_{i}", path)
        module, _, leaf = key.rpartition("/")
        entry = keys.get(key, keys.get(module))
        if entry is None:
            raise UserError(
                f"{family.classes[config.head][0]} has no place for {path}: "
                f"the keys of family {family.model_type} have neither {module} nor {key}"
            )
        name, *rest = list[Any]([entry] if isinstance(entry, str) else entry)
        layout = rest[0] if rest else "transposed" if leaf == "kernel" else "same"
        part = rest[1] if len(rest) > 1 else 0
        if key not in keys:
            name += ".bias" if leaf == "bias" else ".weight"
        experts, one = (range(shape[0]), shape[1:]) if "{e}" in name else ([None], shape)
        for e in experts:
            full = name.format(i=block[0] if block else "", e=e)
            mapping = found.setdefault(full, TensorMapping(full, layout, {}, *rest[2:], expert=e))
            mapping.parts[int(part)] = path, one
    return list(found.values())


def too_many_layers(names: Collection[str]) -> int:
    """A number of layers that is refused before the model is traced, which takes long for many: tensors are numbered
    by their layers."""
    return len(set(re.findall(r"\d+", " ".join(names)))) + 2


@functools.lru_cache(8)
def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shape of every parameter by its path; nothing is allocated."""
    tree: dict[str, Any] = traverse_util.flatten_dict(parallel.param_shapes(build(config)), sep="/")
    return {path: x.shape for path, x in tree.items()}


def shape_problems(parameters: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The differences between the parameters, by path, and the shapes of the model's parameters."""
    return [
        *(f"{path} is missing" for path in sorted(shapes.keys() - parameters.keys())),
        *(f"{path} is not in the model" for path in sorted(parameters.keys() - shapes.keys())),
        *(
            f"{path} has shape {list(parameters[path].shape)}, not {list(shapes[path])}"
            for path in sorted(shapes.keys() & parameters.keys())
            if parameters[path].shape != shapes[path]
        ),
    ]
