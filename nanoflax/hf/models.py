"""Published models: `load` a directory, a hub name or a .gguf file; `save` a directory for Transformers."""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from numpy.typing import DTypeLike

from nanoflax import parallel, peft, report, tokenizers, untrusted
from nanoflax.config import ModelConfig, validate
from nanoflax.errors import UserError
from nanoflax.hf import safetensors_io
from nanoflax.hf.families import family_of_config, family_of_json
from nanoflax.hf.family import Family, differences, from_config, head_of, to_config
from nanoflax.hf.generation import read_generation, write_generation
from nanoflax.hf.gguf import LatentHeads, QuantizedTensor
from nanoflax.hf.gguf_models import open_gguf_model
from nanoflax.hf.layouts import (
    TensorMapping,
    holders,
    parameter_shapes,
    read_parameter,
    shape_problems,
    tensor_mapping,
    too_many_layers,
)
from nanoflax.hf.mxfp4 import PackedTensor, unpack
from nanoflax.hf.packed import read_packed
from nanoflax.nn import build, without_padding

Tensors = Mapping[str, safetensors_io.Tensor | QuantizedTensor | PackedTensor | LatentHeads]
_MAX_CONFIG = 10_000_000  # bytes
_FLOATS = ("float32", "float16", "bfloat16", "float64")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_log = logging.getLogger(__name__)


def load(
    source: str | pathlib.Path,
    dtype: DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    quantize: str = "",
) -> tuple[ModelConfig, dict[str, Any]]:
    """A published model: its configuration, and parameters for `nanoflax.build(config)`.

    One tensor at a time is in memory in addition to the result.

    Args:
      source: a directory with config.json and safetensors, a hub name ("owner/name", through the
        huggingface_hub package and its cache), or a .gguf file, which is dequantised by default.
      dtype: of the parameters; None keeps the dtype of each tensor, but float64 becomes float32.
      mesh: where the parameters are sharded, by default the mesh of `jax.set_mesh`; each host reads only
        its shards. A dimension that the mesh does not divide is not split.
      quantize: "int8" or "int4": matrices become kernels.Quantized, see `peft.quantize_params`. "file": those of the
        types Q8_0, Q4_0 and Q4_1 in a .gguf file stay as they are, and those of its other quantised types become int8.
    Raises:
      UserError: before anything is allocated, with every problem of config.json, or else every missing,
        unexpected or misshapen tensor.
    """
    path = find_source(source)
    if quantize == "file" and path.suffix != ".gguf":
        raise UserError(f"quantize='file' keeps the types of a .gguf file, which {source} is not: use int8 or int4")
    family, config, tensors = _open(path)
    mappings = tensor_mapping(family, config)
    _check(family, config, mappings, tensors, path, dtype)
    if quantize not in ("", "file"):  # raises UserError if that is not possible
        jax.eval_shape(lambda params: peft.quantize_params(params, quantize), parallel.param_shapes(build(config)))
    return config, _read_all(config, mappings, tensors, dtype, mesh, quantize)


def load_config(source: str | pathlib.Path) -> ModelConfig:
    """The configuration of a published model, from config.json and the names of its tensors; see `load`."""
    return _open(find_source(source))[1]


def _open(path: pathlib.Path) -> tuple[Family, ModelConfig, Tensors]:
    return _open_directory(path) if path.is_dir() else open_gguf_model(path)


def save(
    directory: str | pathlib.Path,
    config: ModelConfig,
    params: dict[str, Any],
    tokenizer: Any = None,
    model_type: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Family:
    """Write a directory that Transformers' AutoModel...from_pretrained opens.

    Rows of config.vocab_padding are left out. A model without token types gets the table of one row, of zeros, that
    Transformers needs; an untied table takes the factor config.embed_scale.

    Args:
      params: of `nanoflax.build(config)`, written in their dtypes, one at a time; Quantized matrices in float32.
      tokenizer: its files and the ids of its special tokens are written too.
      model_type: the family; by default the first that can express the configuration.
    Returns: the family.
    Raises: UserError if no family can express the configuration, params are not of this configuration,
      or the directory cannot be written.
    """
    config, params = without_padding(config, peft.dequantize_params(params))
    family = family_of_config(config, model_type)
    config, params = _as_family_has_it(family, config, params)
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    safetensors_io.raise_problems("params", shape_problems(flat, parameter_shapes(config)))

    mappings = {mapping.name: mapping for mapping in tensor_mapping(family, config)}
    if not config.tied:  # then Transformers ties no tensors: write one of our tensors under both names
        mappings |= {a: mappings[b] for a, b in family.copies(config).items() if b in mappings}
    dtype = np.dtype(flat["embed/embedding"].dtype)
    safetensors_io.save_safetensors(
        directory,
        [
            (
                name.removeprefix(family.base) if config.head == "none" else name,
                mapping.shape,
                np.dtype(flat[mapping.paths[0]].dtype),
                lambda mapping=mapping: mapping.join(flat, config.K),
            )
            for name, mapping in mappings.items()
        ]
        + [(name, shape, dtype, np.zeros(shape, dtype)) for name, shape in family.empty(config).items()],
        max_shard_bytes,
    )
    description = from_config(family, config)
    description["torch_dtype"] = str(dtype)
    for_prompts = config.head == "lm" and not config.reads_source
    exported = None if tokenizer is None else tokenizers.to_huggingface(tokenizer, for_prompts)
    own = b"" if tokenizer is None else getattr(tokenizer, "files", {}).get("tokenizer_config.json", b"")
    if exported is not None and family.model_type == "qwen2" and b'"Qwen2Tokenizer' not in own:
        _log.warning(
            "%s: for model_type qwen2, Transformers' AutoTokenizer divides texts as Qwen2 does, not as this tokenizer; "
            "open it with PreTrainedTokenizerFast",
            directory,
        )
    ids = _special_ids(exported, scored=config.is_causal and config.is_regression)
    if config.reads_source:
        ids |= {"decoder_start_token_id": config.start_id, "forced_eos_token_id": None}
    generation = config.generation
    if generation.eos_token_id:  # with the ends of the tokenizer first
        own = ids["eos_token_id"] or []
        ends = dict.fromkeys([*(own if isinstance(own, list) else [own]), *generation.eos_token_id])
        generation = dataclasses.replace(generation, eos_token_id=tuple(ends))
    directory = pathlib.Path(directory)
    try:
        _write_json(directory / "config.json", ids | description)
        if exported is not None:
            exported.save(directory)
            _fit_to_model(directory / "tokenizer_config.json", config)
        if config.head == "lm":
            write_generation(directory, generation, {name: description.get(name, i) for name, i in ids.items()})
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from error
    return family


def _as_family_has_it(
    family: Family, config: ModelConfig, params: dict[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """The same model, with a table of token types if the family has one, and without a scale that it lacks."""
    if "embed_scale" in differences(family, config):
        table = params["embed"]["embedding"]
        scaled = (np.asarray(table, np.float32) * config.embed_scale).astype(table.dtype)
        config, params = dataclasses.replace(config, embed_scale=1.0), params | {"embed": {"embedding": scaled}}
    if not config.token_types and "token_types" in family.fields.values():
        # Transformers adds a row of this table to every token; zeros change nothing.
        config = dataclasses.replace(config, token_types=1)
        table = params["embed"]["embedding"]
        params = params | {"type_embed": {"embedding": np.zeros((1, config.dim), table.dtype)}}
    return config, params


def _special_ids(tokenizer: Any, scored: bool = False) -> dict[str, Any]:
    """scored: for a model that gives a score to a text with its end, so that no end may be taken for padding."""
    if tokenizer is None:
        # Transformers' own defaults may be larger than the vocabulary (Phi-3: 32000).
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    stops = list(tokenizers.stop_ids(tokenizer))
    # A classifier of Transformers reads the last token that is not padding. That may be an eos after the text.
    ends = [*tokenizer.framing.after, *(stops if scored else [])]
    pad = None if tokenizer.pad_id in ends else tokenizer.pad_id
    return {
        "bos_token_id": tokenizer.bos_id,
        "pad_token_id": pad,
        "eos_token_id": stops if len(stops) > 1 else stops[0],
    }


def _fit_to_model(path: pathlib.Path, config: ModelConfig) -> None:
    """Write the context of the model in the settings of its tokenizer, which truncates texts only to a known length;
    and that it gives no token types to a model without them."""
    settings = json.loads(path.read_bytes()) if path.exists() else {}
    given, names = settings.get("model_max_length"), settings.get("model_input_names")
    if not isinstance(given, int | float) or given > config.context:
        settings["model_max_length"] = config.context
    if isinstance(names, list) and not config.token_types:
        settings["model_input_names"] = [name for name in names if name != "token_type_ids"]
    _write_json(path, settings)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(report.to_json(value, indent=2) + "\n")


def _read_all(config, mappings: list[TensorMapping], tensors: Tensors, dtype, mesh, quantize) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    shardings: dict[str, Any] = {}
    if mesh is None and parallel.current_mesh() is not None:
        mesh = jax.sharding.get_mesh()
    if mesh is not None:
        shardings = traverse_util.flatten_dict(
            parallel.shardings(parallel.param_shapes(build(config)), mesh, uneven=True), sep="/"
        )
    shapes = parameter_shapes(config)
    for path, held in holders(mappings).items():
        if quantize == "file" and (packed := read_packed(held, tensors, config.K)):
            flat[path] = packed
            continue

        def read(index, held=held):
            x = read_parameter(held, tensors, index, config.K)
            if dtype is not None:
                return x.astype(dtype)
            return x.astype(np.float32) if x.dtype == np.float64 else x

        if mesh is None:
            flat[path] = jax.device_put(read((slice(None),) * len(shapes[path]))).block_until_ready()
        else:
            flat[path] = jax.make_array_from_callback(shapes[path], shardings[path], read)
        is_packed = quantize == "file" and isinstance(tensors[held[0][0].name], QuantizedTensor)
        kind = "int8" if is_packed else quantize.removesuffix("file")
        if kind and peft.is_quantizable(path, shapes[path]):
            flat[path] = jax.jit(partial(peft.quantize_array, path, kind=kind))(flat[path])
    params = traverse_util.unflatten_dict(flat, sep="/")
    return params if mesh is None else jax.device_put(params, parallel.shardings(params, mesh, uneven=True))


def _check(family: Family, config, mappings: list[TensorMapping], tensors: Tensors, path, dtype) -> None:
    """Raises: UserError with every tensor that is missing, unexpected, not a float or of another shape."""
    problems, expected = [], {mapping.name for mapping in mappings}
    for mapping in mappings:
        tensor = tensors.get(mapping.name)
        if tensor is None:
            problems.append(f"{mapping.name} {list(mapping.shape)} is missing")
        elif tensor.shape != mapping.shape:
            problems.append(f"{mapping.name} has shape {list(tensor.shape)}, not {list(mapping.shape)}")
        elif dtype is None and tensor.dtype.name not in _FLOATS:
            problems.append(f"{mapping.name} has dtype {tensor.dtype}, not {', '.join(_FLOATS)}; pass dtype")
    for name in sorted(tensors.keys() - expected):
        if re.fullmatch(family.ignored, name):
            _log.info("%s: %s is not part of %s", path, name, family.classes[config.head][0])
        else:
            problems.append(f"{tensors[name].name} {list(tensors[name].shape)} is unexpected")
    safetensors_io.raise_problems(path, problems)


def find_source(source: str | pathlib.Path) -> pathlib.Path:
    """The directory or .gguf file of a source; a hub name is downloaded if it is not in the cache.

    Raises: UserError if there is none.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir() or path.suffix == ".gguf":
        return path
    if path.suffix in safetensors_io.PICKLES and path.is_file():
        raise UserError(safetensors_io.refusal_of_pickles(path.parent, [path.name]))
    if path.exists() or not _HUB_NAME.fullmatch(str(source)):
        raise UserError(f"{source}: neither a directory, nor a .gguf file, nor a hub name such as owner/name")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{source} is not a directory; to download it from the hub, pip install huggingface_hub"
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
            f"{source} is neither a directory nor in the hub's local cache, and cannot be downloaded: {reason}"
        ) from error


def _open_directory(directory: pathlib.Path) -> tuple[Family, ModelConfig, Tensors]:
    """The family, the configuration, and the tensors by the names in the family's keys."""
    content = untrusted.read_bytes(directory, "config.json", _MAX_CONFIG)
    hf = untrusted.json_object(content, directory / "config.json")
    family = family_of_json(hf)
    head = head_of(family, hf.get("architectures"))
    tensors = unpack(hf, safetensors_io.open_safetensors(directory), directory)
    tensors = {name: tensor for name, tensor in tensors.items() if 0 not in tensor.shape}
    config = to_config(family, hf, head, too_many_layers(tensors))
    if head == "lm":
        config = dataclasses.replace(config, generation=read_generation(directory, hf, config.start_id))
        validate(config)
    return _normalized(family, config, tensors, directory)


def _normalized(family: Family, config: ModelConfig, tensors: dict, path) -> tuple[Family, ModelConfig, Tensors]:
    """Normalise tensor names, resolve tied and duplicate tensors, and set the fields in `Family.present` and
    moe.stacked.

    A name without the prefix (from a bare model) gets it; gamma and beta of the first BERT become weight and bias.
    """
    if family.stacked and any(name.endswith(".experts.gate_up_proj") for name in tensors):
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, stacked=True))
    keys = family.keys_of(config).values()
    known = {(key if isinstance(key, str) else key[0]).split(".")[0] for key in keys}
    named = {}
    for name, tensor in tensors.items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        name = family.renamed.get(name, name)
        named[name if name.split(".")[0] in known else family.base + name] = tensor
    if len(named) < len(tensors):
        raise UserError(f"{path}: some tensors appear twice, with and without the prefix {family.base!r}")
    for field, name in family.present.items():
        if config.head in ("none", "lm"):
            config = dataclasses.replace(config, **{field: name in named})
    for name, other in family.copies(config).items():
        if name not in named:
            continue
        if other in named and not _equal(named[name], named[other]):
            # As in Transformers: an output layer in the file is used, even if config.json says tied.
            if name != family.unembed(config):
                raise UserError(f"{path}: {name} and {other} must be equal in this model")
            config = dataclasses.replace(config, tied=False)
            continue
        named.setdefault(other, named[name])
        del named[name]
    return family, config, named


def _equal(a, b):
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().tobytes() == b.read().tobytes()
