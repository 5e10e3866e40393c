"""MXFP4 tensors (OCP Microscaling Formats 1.0, 2023), as the files of gpt-oss hold them, dequantised when read.

A row of a weight is divided into groups of 32 numbers. `NAME_blocks` [E, rows, groups, 16] uint8 has two numbers of
4 bits in a byte, the first in the lower half; `NAME_scales` [E, rows, groups] uint8 has the power of two of a group.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from nanoflax.errors import UserError
from nanoflax.hf.safetensors_io import Slices, Tensor, is_impossible, raise_problems

_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_HALF, -_HALF])  # of the sixteen codes: a sign, two bits of exponent and one of mantissa
_GROUP = 32  # numbers that share a scale
_BIAS = 127  # of a scale


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A tensor [E, groups * 32, rows] of a file, used like `safetensors_io.Tensor`; `read` returns bfloat16, which
    holds every MXFP4 number exactly."""

    name: str
    blocks: Tensor
    scales: Tensor
    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        E, rows, groups = self.scales.shape
        return E, groups * _GROUP, rows

    def read(self, slices: Slices = ()) -> np.ndarray:
        """The array, or the part that a tuple of slices selects; only its experts, rows and groups are read."""
        experts, inputs, rows = (*slices, *[slice(None)] * (3 - len(slices)))
        wanted = range(self.shape[1])[inputs]
        groups = slice(min(wanted) // _GROUP, max(wanted) // _GROUP + 1) if wanted else slice(0, 0)
        blocks, scales = self.blocks.read((experts, rows, groups)), self.scales.read((experts, rows, groups))
        within = np.asarray(wanted, int) - groups.start * _GROUP
        result = np.empty((len(blocks), len(wanted), blocks.shape[1]), self.dtype)
        for y, codes, scale in zip(result, blocks, scales, strict=True):  # expert by expert, to use less memory
            numbers = _VALUES[np.stack([codes & 15, codes >> 4], -1)]
            with np.errstate(over="ignore"):
                numbers = np.ldexp(numbers, (scale.astype(np.int32) - _BIAS)[..., None, None])
                y[:] = numbers.reshape(len(scale), scale.shape[1] * _GROUP).T[within]
        return result


def unpack(hf: Mapping[str, Any], tensors: dict[str, Tensor], path: object) -> dict[str, Tensor | PackedTensor]:
    """The tensors of a directory, with one PackedTensor for the blocks and scales of each quantised tensor.

    hf: config.json. Its `modules_to_not_convert` needs no reading: those modules have no blocks in the file.
    Raises: UserError for another quantisation method, and naming all faulty blocks and scales.
    """
    settings = hf.get("quantization_config")
    if settings is None:
        return {**tensors}
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method != "mxfp4":
        raise UserError(f"{path}: quantization_config has quant_method={method!r}; only 'mxfp4' can be read")
    found, problems = dict[str, Tensor | PackedTensor](tensors), []
    for name in sorted({x.removesuffix(end) for x in tensors for end in ("_blocks", "_scales") if x.endswith(end)}):
        blocks, scales = found.pop(f"{name}_blocks", None), found.pop(f"{name}_scales", None)
        if not (isinstance(blocks, Tensor) and isinstance(scales, Tensor)):
            problems.append(f"{name} has only one of {name}_blocks and {name}_scales")
        elif name in found:
            problems.append(f"{name} and {name}_blocks are both in the file")
        elif (len(scales.shape), blocks.shape) != (3, (*scales.shape, _GROUP // 2)):
            problems.append(
                f"{name}_blocks has shape {list(blocks.shape)} and {name}_scales {list(scales.shape)}, not "
                "[E, rows, groups, 16] and [E, rows, groups]"
            )
        elif wrong := [x for x in (blocks, scales) if x.dtype != np.uint8]:
            problems += [f"{x.name} has dtype {x.dtype}, not uint8" for x in wrong]
        elif is_impossible(blocks.shape, 8):  # bytes of a block's byte in float32
            problems.append(f"{name}_blocks has an impossible shape, {list(blocks.shape)}")
        else:
            found[name] = PackedTensor(name, blocks, scales)
    raise_problems(path, problems)
    return found
