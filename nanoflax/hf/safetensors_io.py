"""Weights on disk: a directory of safetensors, whole or in shards, read and written by the tensor.

Transformers' layout: `model.safetensors`, or shards named by `model.safetensors.index.json`. A
file is eight bytes of header length, a JSON header (name -> dtype, shape, byte range), the data.
Read and written here because the safetensors library stops at the first fault, accepts a name that
is there twice, and writes only tensors that are all in memory.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from nanoflax.errors import UserError, listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_JSON = 100_000_000  # bytes; also the limit of the safetensors library
DTYPES = {
    tag: np.dtype(dtype)
    for tag, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "U16": np.uint16,
        "U32": np.uint32,
        "U64": np.uint64,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that lies in a file; nothing is read before `read`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path
    offset: int  # of its first byte in the file

    def read(self, slices=()):
        """The array, or the part that a tuple of slices selects: a copy in either case.

        Serves `jax.make_array_from_callback(tensor.shape, sharding, tensor.read)`.
        """
        try:
            if all(range(n)[s] == range(n) for n, s in zip(self.shape, slices)):
                # Not mapped: the pages of a mapping would count as memory beside the copy.
                size = math.prod(self.shape)
                array = np.fromfile(self.file, self.dtype, size, offset=self.offset)
                return array.reshape(self.shape)
            mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
            return np.array(mapped[slices])
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file}: {self.name} cannot be read any more: {error}") from error


def locate(directory, name):
    """The path of the file `name` in a directory.

    Raises:
      UserError: not a plain file name, no such file, or a link, unless it is one of the Hugging
        Face cache: REPOSITORY/snapshots/REVISION/name, a link into REPOSITORY/blobs, from where
        newer versions link on into the blobs/HA/HASH that all repositories of a cache share.
    """
    path = pathlib.Path(directory, name)
    if name != pathlib.PureWindowsPath(name).name:  # knows both kinds of slash
        raise UserError(f"{name!r} must be a plain file name, inside {directory}")
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):
        raise UserError(f"{name!r} is not a file that can be read in {directory}")
    if path.is_symlink():
        target, snapshots = path.resolve(), path.parent.resolve().parent
        shared = snapshots.parent.parent / "blobs" / target.name[:2]
        blobs = (snapshots.parent / "blobs", shared)
        if snapshots.name != "snapshots" or target.parent not in blobs:
            raise UserError(f"{path} is a link out of its directory; put the file itself there")
    return path


def open_safetensors(directory, single=SINGLE):
    """Opens the weights in a directory, reading only headers: a dict, name -> Tensor.

    single: the name of a file that holds all.
    Raises:
      UserError: with every problem found, before anything is allocated: nothing but pickles,
        damaged or lying headers, an index that does not agree with its files or leaves the
        directory.
    """
    directory, problems, tensors = pathlib.Path(directory), [], {}
    if os.path.lexists(directory / single):
        shards = {single: None}
    elif single == SINGLE and os.path.lexists(directory / INDEX):
        shards = _read_index(directory)
    else:
        raise UserError(_nothing_to_open(directory, single))
    for shard, listed in shards.items():
        try:
            found = _read_header(locate(directory, shard), problems)
        except UserError as error:
            problems.append(str(error))
            continue
        tensors |= found
        if listed is not None:
            problems += [
                f"{shard}: {name!r} is in the index but not in the file" for name in sorted(listed - found.keys())
            ]
            problems += [
                f"{shard}: {name!r} is in the file but not in the index" for name in sorted(found.keys() - listed)
            ]
    raise_problems(directory, problems)
    return tensors


def raise_problems(path: object, problems: Sequence[str]) -> None:
    """Raises: UserError of all the problems, if there are any."""
    if problems:
        raise UserError(f"{path}: {listed(problems, 20)}")


def _nothing_to_open(directory, single):
    if not directory.is_dir():
        return f"{directory} is not a directory with {single} in it"
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
    if not pickles and single != SINGLE:
        return f"{directory} has no {single}"
    if not pickles:
        return f"{directory} has neither {SINGLE} nor {INDEX}"
    return (
        f"{directory}: {', '.join(pickles)}: a pickle can run code when it is opened; if you "
        "trust it, convert it with Transformers: AutoModel.from_pretrained(directory)"
        ".save_pretrained(new_directory, safe_serialization=True)"
    )


def read_json(path):
    """The JSON object of a file. Raises: UserError if it holds none, or a name twice."""
    with path.open("rb") as file:
        return _read_json(path, file, path.stat().st_size)


def _read_json(path, file, size):
    """The JSON object in the next `size` bytes; each name once in each object."""

    def once(pairs):
        table = dict(pairs)
        if len(table) < len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            repeated.extend(name for name, count in counts.items() if count > 1)
        return table

    repeated = []
    if size > _MAX_JSON:
        raise UserError(f"{path}: {size} bytes of JSON are more than {_MAX_JSON}")
    try:
        value = json.loads(file.read(size).decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} holds no JSON where it should: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: its JSON must be an object, not {type(value).__name__}")
    raise_problems(path, [f"{name!r} is there twice" for name in repeated])
    return value


def _read_index(directory):
    """File name -> set of the names of its tensors."""
    path, shards = locate(directory, INDEX), {}
    weight_map = read_json(path).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())):
        raise UserError(f"{path}: weight_map must be an object, name of tensor: name of file")
    for name, shard in weight_map.items():
        shards.setdefault(shard, set()).add(name)
    return shards


def _read_header(path, problems):
    """Name -> Tensor; what is wrong with tensors is added to `problems`, one str each."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise UserError(f"{path}: a header of {length} bytes cannot be in a file of {size}")
        header = _read_json(path, file, length)
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


def is_impossible(shape, itemsize):
    """Whether NumPy can have no array of this shape (numbers from 0); it counts 0 as 1."""
    return len(shape) > 32 or math.prod(max(n, 1) for n in shape) * itemsize >= 2**63


def _wrong_ranges(ranges, size):
    """Yields what keeps the ranges (begin, end, name) from filling `size` bytes, each one once."""
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            yield (f"{name!r} begins at byte {begin} of the data, but the tensor before it ends at {position}")
        position = end
    if position != size:
        yield f"the tensors need {position} bytes of data and the file has {size}"


def save_safetensors(directory, tensors, max_shard_bytes=5_000_000_000, single=SINGLE):
    """Writes weights into a directory, in place of the safetensors of a model there.

    One tensor is in memory at a time. The new files take their names when all are written, so a
    failure leaves what was there; a kill between those renamings leaves the old files in the
    subdirectory replaced-*.

    Args:
      directory: made if it does not exist.
      tensors: an iterable of (name, shape, dtype, array or function that returns it).
      max_shard_bytes: a shard is closed before it gets larger; one tensor alone may be larger.
      single: the name of the file if one holds all; the weights of a model are only replaced by
        those of another.
    Raises:
      UserError: a dtype that safetensors does not have, or the directory cannot be written.
      ValueError: a name given twice, or an array that is not of its shape and dtype.
    """
    directory = pathlib.Path(directory)
    tensors = [(name, tuple(shape), np.dtype(dtype), source) for name, shape, dtype, source in tensors]
    if len({name for name, *_ in tensors} - {"__metadata__"}) < len(tensors):
        raise ValueError("two tensors of one name, or one that is called __metadata__")
    raise_problems(
        directory,
        [
            f"{name} has dtype {dtype}; safetensors has {', '.join(DTYPES)}"
            for name, _, dtype, _ in tensors
            if dtype not in _TAGS
        ],
    )
    shards, room = [[]], max_shard_bytes
    for tensor in tensors:
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
            for name, shard in zip(names, shards):
                _write_file(pathlib.Path(new, name), shard)
            if len(shards) > 1:
                index = {
                    "metadata": {"total_size": sum(map(_nbytes, tensors))},
                    "weight_map": {t[0]: n for n, shard in zip(names, shards) for t in shard},
                }
                pathlib.Path(new, INDEX).write_text(json.dumps(index, indent=1) + "\n")
                names.append(INDEX)
            _move_in(pathlib.Path(new), names, directory)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"weights cannot be saved in {directory}: {reason}") from error


def _nbytes(tensor):
    _, shape, dtype, _ = tensor
    return math.prod(shape) * dtype.itemsize


def _write_file(path, tensors):
    # Widest first, as the library does, so that every tensor is aligned to its own items.
    tensors = sorted(tensors, key=lambda tensor: -tensor[2].itemsize)
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        name, shape, dtype, _ = tensor
        end = position + _nbytes(tensor)
        header[name] = {"dtype": _TAGS[dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype, source in tensors:
            array = np.asarray(source() if callable(source) else source)
            if (array.shape, array.dtype) != (shape, dtype):
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, announced as {dtype}{list(shape)}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            array = source = None  # freed before the next one is made
        file.flush()
        os.fsync(file.fileno())  # the files that these replace will be gone


def _move_in(new, names, directory):
    """Moves the named files in, in place of the weights there; undone when one cannot be moved."""
    # One file replaces one in a single step. Shards of two models must never lie side by side.
    old = [
        n
        for n in sorted(os.listdir(directory))
        if _WEIGHTS.fullmatch(n) and [n] != names and _WEIGHTS.fullmatch(names[0])
    ]
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
