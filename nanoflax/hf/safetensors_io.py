"""The weights in a directory, in the safetensors format: read and written one tensor at a time.

Transformers' layout: `model.safetensors`, or shards named by `model.safetensors.index.json`. A file is
eight bytes of header length, a JSON header (name -> dtype, shape, byte range), then the data.

This module replaces the safetensors package, which reports only the first error and accepts a name twice.
With NumPy, the package also has a tensor in memory twice while reading it (mapped and copied), and supports
no slices with negative steps and no float8. It writes only tensors that are all in memory.
"""

import dataclasses
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from nanoflax import report, untrusted
from nanoflax.errors import UserError, listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_JSON = 100_000_000  # bytes; also the limit of the safetensors library
DTYPES = {tag: np.dtype(dtype) for tag, dtype in {
    "BOOL": np.bool_, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64, "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu}.items()}  # fmt: skip
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


Slices = tuple[slice, ...]
TensorToWrite = tuple[str, Sequence[int], DTypeLike, ArrayLike | Callable[[], ArrayLike]]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file; no data is read before `read`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path
    offset: int  # of its first byte in the file

    def read(self, slices: Slices = ()) -> np.ndarray:
        """A copy of the array, or of the part that a tuple of slices selects.

        Can be the callback of `jax.make_array_from_callback(tensor.shape, sharding, tensor.read)`.
        Raises: UserError if the file has changed and no longer holds the tensor.
        """
        try:
            if all(range(n)[s] == range(n) for n, s in zip(self.shape, slices, strict=False)):
                # Not np.memmap: its pages would use memory in addition to the copy.
                size = math.prod(self.shape)
                array = np.fromfile(self.file, self.dtype, size, offset=self.offset)
                return array.reshape(self.shape)
            mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
            return np.array(mapped[slices])
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file}: {self.name} cannot be read any more: {error}") from error


def open_safetensors(directory: str | os.PathLike, single: str = SINGLE) -> dict[str, Tensor]:
    """The tensors in a directory, by name; only headers are read.

    single: the name of the file if one file holds all tensors.
    Raises:
      UserError: naming every problem, before anything is allocated: only pickles, a damaged or
        inconsistent header, an index that does not agree with its files or leaves the directory.
    """
    directory = pathlib.Path(directory)
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    shards: dict[str, set[str] | None] = {single: None}
    if not os.path.lexists(directory / single):
        if single == SINGLE and os.path.lexists(directory / INDEX):
            shards = _read_index(directory)
        else:
            raise UserError(_why_nothing_opens(directory, single))
    for shard, indexed in shards.items():
        try:
            found = _read_header(untrusted.locate(directory, shard), problems)
        except UserError as error:
            problems.append(str(error))
            continue
        tensors |= found
        if indexed is not None:
            problems += [f"{shard}: {x!r} is in the index but not in the file" for x in sorted(indexed - found.keys())]
            problems += [f"{shard}: {x!r} is in the file but not in the index" for x in sorted(found.keys() - indexed)]
    raise_problems(directory, problems)
    return tensors


def raise_problems(path: object, problems: Sequence[str]) -> None:
    """Raises: UserError that lists the problems, if there are any."""
    if problems:
        raise UserError(f"{path}: {listed(problems, 20)}")


def _why_nothing_opens(directory: pathlib.Path, single: str) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory with {single} in it"
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    if not pickles and single != SINGLE:
        return f"{directory} has no {single}"
    if not pickles:
        return f"{directory} has neither {SINGLE} nor {INDEX}"
    return refusal_of_pickles(directory, pickles, "AutoModel" if single == SINGLE else "PeftModel")


def refusal_of_pickles(directory: pathlib.Path, names: Sequence[str], cls: str = "AutoModel") -> str:
    """Why files with pickles are not opened, and what to do. cls: the class of Transformers or peft that opens them."""
    opened = f"{cls}.from_pretrained({'directory' if cls == 'AutoModel' else 'base_model, directory'})"
    return (
        f"{directory}: {', '.join(names)}: a pickle can run code when it is opened; if you trust it, convert it with "
        f"{'Transformers' if cls == 'AutoModel' else 'peft'}: {opened}"
        ".save_pretrained(new_directory, safe_serialization=True)"
    )


def _read_index(directory: pathlib.Path) -> dict[str, set[str] | None]:
    """File name -> the names of its tensors."""
    path, shards = pathlib.Path(directory, INDEX), dict[str, set[str]]()
    content = untrusted.read_bytes(directory, INDEX, _MAX_JSON)
    weight_map = untrusted.json_object(content, path, repeats=False).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())):
        raise UserError(f"{path}: weight_map must be an object, name of tensor: name of file")
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    return {**shards}


def _read_header(path: pathlib.Path, problems: list[str]) -> dict[str, Tensor]:
    """Name -> Tensor; the problems of tensors are appended to `problems`."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise UserError(f"{path}: a header of {length} bytes cannot be in a file of {size}")
        if length > _MAX_JSON:
            raise UserError(f"{path}: {length} bytes of JSON are more than {_MAX_JSON}")
        header = untrusted.json_object(file.read(length), f"{path}: its header", repeats=False)
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        problems.append(f"{path.name}: __metadata__ must hold text only")
    tensors, ranges = {}, []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(tag), "shape": list(shape), "data_offsets": [begin, end]} if all(
                type(n) is int and n >= 0 for n in (*shape, begin, end)
            ):
                pass
            case _:
                problems.append(
                    f"{path.name}: {name!r} needs dtype, shape and data_offsets in "
                    f"whole numbers from 0, not {str(entry)[:200]}"
                )
                continue
        ranges.append((begin, end, name))
        if tag not in DTYPES:
            problems.append(f"{path.name}: {name!r} has dtype {tag!r}; known are " + ", ".join(DTYPES))
        elif is_impossible(shape, DTYPES[tag].itemsize):
            problems.append(f"{path.name}: {name!r} has an impossible shape, {str(shape)[:200]}")
        elif (nbytes := math.prod(shape) * DTYPES[tag].itemsize) != end - begin:
            problems.append(f"{path.name}: {name!r} of shape {shape} needs {nbytes} bytes, not {end - begin}")
        else:
            tensors[name] = Tensor(name, tuple(shape), DTYPES[tag], path, 8 + length + begin)
    if len(ranges) == len(header):
        problems += [f"{path.name}: {wrong}" for wrong in _wrong_ranges(ranges, size - 8 - length)]
    return tensors


def is_impossible(shape: Sequence[int], itemsize: int) -> bool:
    """Whether the shape is too large for NumPy, which counts a dimension of 0 as 1."""
    return len(shape) > 32 or math.prod(max(n, 1) for n in shape) * itemsize >= 2**63


def _wrong_ranges(ranges, size):
    """Yield the problems, if the ranges (begin, end, name) do not fill `size` bytes exactly once."""
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            yield f"{name!r} begins at byte {begin} of the data, but the tensor before it ends at {position}"
        position = end
    if position != size:
        yield f"the tensors need {position} bytes of data and the file has {size}"


def save_safetensors(
    directory: str | os.PathLike,
    tensors: Iterable[TensorToWrite],
    max_shard_bytes: int = 5_000_000_000,
    single: str = SINGLE,
) -> None:
    """Write weights into a directory, and replace safetensors that a model has there.

    One tensor is in memory at a time. New files are renamed after all of them are written, so a failure
    keeps the old files. If the process is killed between the renames, the old files are in replaced-*.

    Args:
      directory: created if it does not exist.
      tensors: of (name, shape, dtype, array or function that returns it).
      max_shard_bytes: size of a shard; a single larger tensor gets a shard of its own.
      single: the name of the file if one file holds all tensors; under another name than the default,
        weights of a model in the directory are kept.
    Raises:
      UserError: a dtype that safetensors does not have, or the directory cannot be written.
      ValueError: a repeated name, or an array of another shape or dtype than in `tensors`.
    """
    directory = pathlib.Path(directory)
    announced = [(name, tuple(shape), np.dtype(dtype), source) for name, shape, dtype, source in tensors]
    if len({name for name, *_ in announced} - {"__metadata__"}) < len(announced):
        raise ValueError("two tensors have one name, or one is called __metadata__")
    wrong = [f"{name} has dtype {dtype}" for name, _, dtype, _ in announced if dtype not in _TAGS]
    raise_problems(directory, [f"{problem}; safetensors has {', '.join(DTYPES)}" for problem in wrong])
    shards: list[list] = [[]]
    room = max_shard_bytes
    for tensor in announced:
        if shards[-1] and _nbytes(tensor) > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= _nbytes(tensor)
    names = [single]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="saving-", dir=directory) as new:
            for name, shard in zip(names, shards, strict=True):
                _write_file(pathlib.Path(new, name), shard)
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": sum(map(_nbytes, announced))},
                    "weight_map": {t[0]: n for n, shard in zip(names, shards, strict=True) for t in shard},
                }
                pathlib.Path(new, INDEX).write_text(report.to_json(index, indent=1) + "\n")
                names.append(INDEX)
            _move_in(pathlib.Path(new), names, directory)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"weights cannot be saved in {directory}: {reason}") from error


def _nbytes(tensor):
    _, shape, dtype, _ = tensor
    return math.prod(shape) * dtype.itemsize


def _write_file(path, tensors):
    # Largest itemsize first, as in the safetensors package, so that every tensor is aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor[2].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        name, shape, dtype, _ = tensor
        end = position + _nbytes(tensor)
        header[name] = {"dtype": _TAGS[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = report.to_json(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype, source in tensors:
            array = np.asarray(source() if callable(source) else source)
            if (array.shape, array.dtype) != (shape, dtype):
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, announced as {dtype}{list(shape)}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            del array, source  # free the memory before the next array is made
        file.flush()
        os.fsync(file.fileno())  # must be on disk before the old files are deleted


def _move_in(new, names, directory):
    """Move the named files into the directory, and replace its weights; all moves are undone if one fails."""
    # A single file replaces another in one step. Shards of two models must never be in the directory together.
    replaces = _WEIGHTS.fullmatch(names[0])
    old = [n for n in sorted(os.listdir(directory)) if replaces and _WEIGHTS.fullmatch(n) and [n] != names]
    aside = pathlib.Path(tempfile.mkdtemp(prefix="replaced-", dir=directory))
    moves = [(directory / name, aside / name) for name in old]
    moves += [(new / name, directory / name) for name in names]
    done = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        aside.rmdir()
        raise
    shutil.rmtree(aside)
