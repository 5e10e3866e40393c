"""The Hugging Face world: `load` a directory, a hub name or a .gguf file; `save` what Transformers
opens. The families' tables are in nanoflax.families; files are safetensors_io's and gguf's."""

import dataclasses
import functools
import json
import logging
import pathlib
import re
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from nanoflax import parallel, tokenizers
from nanoflax.errors import UserError
from nanoflax.hf import families, safetensors_io
from nanoflax.hf.family import from_config, head_of, to_config
from nanoflax.hf.gguf import open_gguf_model
from nanoflax.nn import build, without_padding

_MAX_CONFIG = 10_000_000  # bytes
_FLOATS = ("float32", "float16", "bfloat16")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """A tensor of theirs and the one or three of ours that it holds."""

    name: str
    layout: str
    ours: list  # of (path, shape)

    @property
    def shape(self):
        *rest, last = self.ours[0][1]
        if self.layout == "row":
            return (1, *rest, last)
        if self.layout == "beside":
            return (*rest, 3 * last)
        if self.layout == "heads":
            return (3 * last, *rest)
        return (*rest, last) if self.layout == "same" else (last, *rest)


def load(source, dtype=None, mesh=None):
    """A published model: (ModelConfig, parameters for `nanoflax.build(config)`).

    source: a directory with config.json and safetensors, a hub name ("owner/name", through the
    huggingface_hub package and its cache), or a .gguf file of llama type, dequantised. dtype: of
    the parameters; None keeps each tensor's. With a mesh, or under `jax.set_mesh`, each shard is
    read only where it lives. One tensor at a time is in memory beside the result.
    Raises: UserError before anything is allocated, with every problem of config.json or, if that
    is good, of the tensors: missing, unexpected, misshapen.
    """
    path = find_source(source)
    if path.is_dir():
        family, config, tensors = _open_directory(path)
    else:
        family, config, tensors = open_gguf_model(path)
    rows = tensor_mapping(family, config)
    _check(family, config, rows, tensors, path, dtype)
    return config, _read_all(config, rows, tensors, dtype, mesh)


def load_config(source):
    """The ModelConfig of a published model, by its config.json and the names of its tensors; see `load`."""
    path = find_source(source)
    return (_open_directory if path.is_dir() else open_gguf_model)(path)[1]


def save(directory, config, params, tokenizer=None, model_type=None, max_shard_bytes=5_000_000_000, labels=()):
    """Write a directory that Transformers' AutoModel...from_pretrained opens.

    params: of `nanoflax.build(config)`, written in their dtypes one at a time; tokenizer: its files
    and the ids of its special tokens go along; model_type: the family, default the first whose
    configuration can say what this one does; labels: the names of the classes. Rows of
    config.vocab_padding are left out. Returns the family.
    Raises: UserError if none can, if params are not the configuration's, or nothing can be written.
    """
    config, params = without_padding(config, params)
    family = families.family_of_config(config, model_type)
    params = traverse_util.flatten_dict(params, sep="/")
    shapes = _shapes(config)
    safetensors_io.raise_problems(
        "params",
        [
            *(f"{p} is missing" for p in sorted(shapes.keys() - params.keys())),
            *(f"{p} is not in the model" for p in sorted(params.keys() - shapes.keys())),
            *(
                f"{p} has shape {list(params[p].shape)}, not {list(shapes[p])}"
                for p in sorted(shapes.keys() & params.keys())
                if params[p].shape != shapes[p]
            ),
        ],
    )

    def tensor(row):
        parts = [params[path] for path, _ in row.ours]
        name = row.name.removeprefix(family.base) if config.head == "none" else row.name
        return (
            name,
            row.shape,
            np.dtype(parts[0].dtype),
            lambda: _join([np.asarray(x) for x in parts], row.layout, config.K),
        )

    rows = {row.name: row for row in tensor_mapping(family, config)}
    if not config.tied:  # then Transformers ties nothing: what is one tensor here is two there
        rows |= {name: rows[other]._replace(name=name) for name, other in family.same(config).items() if other in rows}
    safetensors_io.save_safetensors(directory, map(tensor, rows.values()), max_shard_bytes)
    hf = from_config(family, config)
    if labels:
        hf |= {
            "id2label": {str(i): name for i, name in enumerate(labels)},
            "label2id": {name: i for i, name in enumerate(labels)},
        }
    hf["torch_dtype"] = str(params["embed/embedding"].dtype)
    ids = {"bos_token_id": None, "eos_token_id": None}
    if tokenizer is not None:
        tokenizer = tokenizers.exported(tokenizer)
        stops = list(getattr(tokenizer, "stop_ids", ())) or [tokenizer.eos_id]
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "pad_token_id": tokenizer.pad_id,
            "eos_token_id": stops if len(stops) > 1 else stops[0],
        }
    if config.reads_source:
        ids |= {"decoder_start_token_id": config.start_id, "forced_eos_token_id": None}
    directory = pathlib.Path(directory)
    try:
        (directory / "config.json").write_text(json.dumps(ids | hf, indent=2) + "\n")
        if config.head == "lm":
            ids = {name: hf.get(name, i) for name, i in ids.items()}
            (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        if tokenizer is not None:  # which may have a generation_config.json of its own
            tokenizer.save(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from error
    return family


def tensor_mapping(family, config):
    """Every tensor of theirs that the model of a configuration has: a list of Rows.

    Raises: UserError for what the family's class has no place for.
    """
    keys, rows = family.keys | family.more_keys(config), {}
    for path, shape in _shapes(config).items():
        block = re.search(r"(?<=block_)\d+", path)
        key = path if block is None else re.sub(r"block_\d+", "block_{i}", path)
        module, _, leaf = key.rpartition("/")
        entry = keys.get(key, keys.get(module))
        if entry is None:
            raise UserError(f"{family.classes[config.head][0]} has no place for {path}")
        name, layout, part = (*((entry,) if isinstance(entry, str) else entry), None, None)[:3]
        name = name.format(i=block and block[0])
        if key not in keys:
            name += ".bias" if leaf == "bias" else ".weight"
        if layout is None:
            layout = "kernel" if leaf == "kernel" else "same"
        row = rows.setdefault(name, Row(name, layout, [None] * (1 if part is None else 3)))
        row.ours[part or 0] = path, shape
    return list(rows.values())


@functools.lru_cache(8)
def _shapes(config):
    """The shape of every parameter by its path, nothing allocated."""
    tree = traverse_util.flatten_dict(parallel.param_shapes(build(config)), sep="/")
    return {path: x.shape for path, x in tree.items()}


def _read(tensor, row, part, index, K):
    """The part of one of our arrays that a tuple of slices selects, of a tensor in a file.

    Layouts: same; kernel: transposed; row: [1, V] for [V]; beside: query, key and value along the
    last axis (GPT-2); heads: query, key and value in turn for each head, transposed (GPT-NeoX);
    interleaved: transposed, and rotary pairs as neighbours (GGUF).
    """
    shape = row.ours[part][1]
    index = tuple(slice(*s.indices(n)) for s, n in zip(index, shape))
    if row.layout == "same":
        return tensor.read(index)
    if row.layout == "kernel":
        return tensor.read(index[::-1]).T
    if row.layout == "row":
        return tensor.read((slice(None), *index))[0]
    if row.layout == "beside":
        first = part * shape[-1]
        *rest, last = index
        return tensor.read((*rest, slice(first + last.start, first + last.stop)))
    x = tensor.read()
    if row.layout == "heads":
        x = x.reshape(-1, 3, K, *x.shape[1:])[:, part]
    else:
        x = x.reshape(-1, K // 2, 2, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(shape[::-1]).T[index]


def _join(parts, layout, K):
    """A tensor of theirs of whole arrays of ours: what `_read` takes apart."""
    if layout == "heads":
        parts = [x.T.reshape(-1, K, *x.T.shape[1:]) for x in parts]
        return np.stack(parts, 1).reshape(-1, *parts[0].shape[2:])
    if layout == "beside":
        return np.concatenate(parts, -1)
    return {"same": parts[0], "kernel": parts[0].T, "row": parts[0][None]}[layout]


def _read_all(config, rows, tensors, dtype, mesh):
    params = {}
    if mesh is None and parallel.current_mesh() is not None:
        mesh = jax.sharding.get_mesh()
    if mesh is not None:
        places = parallel.shardings(parallel.param_shapes(build(config)), mesh)
        places = traverse_util.flatten_dict(places, sep="/")
    for row in rows:
        for part, (path, shape) in enumerate(row.ours):

            def read(index, row=row, part=part):
                x = _read(tensors[row.name], row, part, index, config.K)
                return x if dtype is None else x.astype(dtype)

            if mesh is None:
                whole = (slice(None),) * len(shape)
                params[path] = jax.device_put(read(whole)).block_until_ready()
            else:
                params[path] = jax.make_array_from_callback(shape, places[path], read)
    return traverse_util.unflatten_dict(params, sep="/")


def _check(family, config, rows, tensors, path, dtype):
    """Raises: UserError with every tensor that is missing, unexpected, misshapen or no float."""
    found, expected = [], {row.name for row in rows}
    for row in rows:
        tensor = tensors.get(row.name)
        if tensor is None:
            found.append(f"{row.name} {list(row.shape)} is missing")
        elif tensor.shape != row.shape:
            found.append(f"{row.name} has shape {list(tensor.shape)}, not {list(row.shape)}")
        elif dtype is None and tensor.dtype.name not in _FLOATS:
            found.append(f"{row.name} has dtype {tensor.dtype}, not {', '.join(_FLOATS)}; pass dtype")
    for name in sorted(tensors.keys() - expected):
        if re.fullmatch(family.ignored, name):
            _log.info("%s: %s is not part of %s", path, name, family.classes[config.head][0])
        else:
            tensor = tensors[name]
            found.append(f"{tensor.name} {list(tensor.shape)} is unexpected")
    safetensors_io.raise_problems(path, found)


def find_source(source):
    """The directory or .gguf file of a source, from the hub if need be."""
    path = pathlib.Path(source).expanduser()
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if not _HUB_NAME.fullmatch(str(source)):
        raise UserError(f"{source}: neither a directory, nor a .gguf file, nor a hub name such as owner/name")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{source} is not a directory here; to fetch it from the hub, pip install huggingface_hub"
        ) from error
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                str(source), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.jinja"]
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{source} is neither a directory here nor in the hub's local cache, and the hub does not give it: {reason}"
        ) from error


def _open_directory(directory):
    """(family, ModelConfig, tensors by the names that the family's table has)."""
    path = safetensors_io.locate(directory, "config.json")
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"larger than {_MAX_CONFIG} bytes")
        hf = json.loads(path.read_bytes())
        if not isinstance(hf, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    family = families.family_of_type(hf.get("model_type"))
    head = head_of(family, hf.get("architectures"))
    tensors = safetensors_io.open_safetensors(directory)
    config = to_config(family, hf, head, len(tensors) + 1)
    return _reconciled(family, config, tensors, directory)


def _reconciled(family, config, tensors, path):
    """What a file may say in more than one way, made one: names without the bare model's prefix,
    BERT's first names of LayerNorm's weights, tensors that are there twice, and what they tell of
    the model. Returns (family, ModelConfig, tensors)."""
    keys = (family.keys | family.more_keys(config)).values()
    known = {(key if isinstance(key, str) else key[0]).split(".")[0] for key in keys}
    named = {}
    for name, tensor in tensors.items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        named[name if name.split(".")[0] in known else family.base + name] = tensor
    if len(named) < len(tensors):
        raise UserError(f"{path}: tensors are there with and without {family.base!r}")
    for field, name in family.present.items():
        if config.head in ("none", "lm"):
            config = dataclasses.replace(config, **{field: name in named})
    for name, other in family.same(config).items():
        if name not in named:
            continue
        if other in named and not _equal(named[name], named[other]):
            # As in Transformers: a head of its own in the file is one, whatever config.json says.
            if name != f"{family.keys['unembed']}.weight":
                raise UserError(f"{path}: {name} and {other} must be equal in this model")
            config = dataclasses.replace(config, tied=False)
            continue
        named.setdefault(other, named[name])
        del named[name]
    return family, config, named


def _equal(a, b):
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().tobytes() == b.read().tobytes()
