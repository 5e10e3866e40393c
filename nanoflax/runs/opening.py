"""Opens trained and published models, and makes the initial parameters of a new run."""

import dataclasses
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Set
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from nanoflax import config as configs
from nanoflax import hf, nn, parallel, peft, report, tokenizers
from nanoflax.config import Config, ModelConfig
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, remote
from nanoflax.runs.directory import check_same_base, is_run, model_directory, read_run

Params = dict[str, Any]  # nested dict of arrays, with one subtree for each block


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """An opened model. Its parameters are read by `load`."""

    config: ModelConfig  # without the padding of the vocabulary
    tokenizer: Any  # None if nanoflax cannot read a tokenizer from the source
    load: Callable[[], Params]  # reads the parameters


def open_source(source: str | os.PathLike, which: str = "best", merged: bool = True, quantize: str = "") -> ModelSource:
    """Open a run's directory, a directory of Transformers, a hub name, a .gguf file, or adapters of the peft library
    with their base model.

    which: the "best" or the "latest" checkpoint of a run. merged: merge low-rank adapters of the peft library.
    quantize: "int8", "int4", or "file" to keep the types of a .gguf file; see hf.load. "": as they are.
    Raises: UserError if the source cannot be opened, or its tokenizer has more tokens than the model has embeddings.
    """
    source = remote.local_copy(str(source))
    path = None if is_run(source) else hf.find_source(source)
    if quantize == "file" and (path is None or path.suffix != ".gguf"):
        raise UserError(f"quantize='file' keeps the types of a .gguf file, which {source} is not: use int8 or int4")
    packed = lambda params: peft.quantize_params(params, quantize) if quantize else params
    if path is None:
        directory = model_directory(source, which)
        config, tokenizer = read_run(directory)
        plain = dataclasses.replace(
            config.model, vocab_size=config.model.vocab_size - config.model.vocab_padding, vocab_padding=0
        )
        return ModelSource(plain, tokenizer, lambda: packed(restore_model(directory, config, tokenizer, which)[1]))
    if base := hf.base_of_adapter(path):
        if hf.base_of_adapter(base):
            raise UserError(f"the base model of {source} is {base}, which has adapters too; merge those first")
        model = open_source(base, which)
        config = hf.adapted_config(path, model.config)
        own = tokenizers.load(path) if (path / "tokenizer_config.json").exists() else None
        tokenizer = own if own and own.vocab_size <= config.vocab_size else model.tokenizer

        def load() -> Params:
            params, adapters = hf.load_adapter(path, config, model.load())
            return packed(peft.merge(params) if merged and isinstance(adapters, configs.LowRank) else params)

        return ModelSource(config, tokenizer, load)
    config = hf.load_config(path)
    if path.suffix == ".gguf":
        tokenizer = tokenizers.from_gguf(hf.open_gguf(path)[0], str(path))
    else:
        tokenizer = tokenizers.load(path)
    tokenizers.check_fits(tokenizer, config.vocab_size)
    return ModelSource(config, tokenizer, lambda: hf.load(path, quantize=quantize)[1])


def load_split(source: ModelSource, mesh: jax.sharding.Mesh) -> Params:
    """The parameters of a source, split over a mesh: a device reads its part of a published model or of a run. A
    dimension that the mesh does not divide is not split."""
    with jax.set_mesh(mesh):
        params = source.load()
    return jax.device_put(params, parallel.shardings(params, mesh, uneven=True))


def open_initial(model: ModelConfig) -> ModelSource:
    """The source model.init_from, its adapters not merged; its config gets init_from, dropout and attention_backend of
    `model`.

    Raises: UserError if the source has no tokenizer.
    """
    source = open_source(model.init_from, merged=False)
    if source.tokenizer is None:
        raise UserError(f"model.init_from={model.init_from} has no tokenizer")
    own = {name: getattr(model, name) for name in ("init_from", "dropout", "attention_backend")}
    return dataclasses.replace(source, config=dataclasses.replace(source.config, **own))


def open_model(source: str | os.PathLike, which: str = "best") -> tuple[Any, Params, Any]:
    """(Linen module, parameters, tokenizer or None) of a source; see `open_source`."""
    found = open_source(source, which)
    return nn.build(found.config), found.load(), found.tokenizer


@functools.lru_cache(maxsize=1)  # a chat asks for it with each message
def open_draft(source: str) -> tuple[Any, Params, Any]:
    """`open_model` of a model that guesses tokens for another one."""
    return open_model(source)


def restore_model(workdir: str, config: Config, tokenizer: Any, which: str = "best") -> tuple[Any, Params]:
    """The model of a run and its parameters (their moving average, with optim.ema), without the padding of the
    vocabulary.

    Checkpoints of finetune contain only trained parameters; the others are read from config.model.init_from. Under
    jax.set_mesh they are split.
    Raises: UserError if there is no undamaged checkpoint, the tokenizer is not the tokenizer of the run, or
    model.init_from has changed.
    """
    subtree = "ema" if config.optim.ema else "params"
    mesh = jax.sharding.get_mesh() if parallel.current_mesh() else None
    params, meta = checkpoint.restore_params(
        os.path.join(workdir, "checkpoints"),
        which=which,
        shardings=mesh and (lambda shapes: parallel.shardings(shapes, mesh, uneven=True)),
        subtree=subtree,
    )
    if (known := str(meta.get("tokenizer"))) != tokenizer.fingerprint:
        raise UserError(
            f"the tokenizer in --workdir={workdir} (fingerprint {tokenizer.fingerprint[:12]}) is not the one that the "
            f"checkpoint was trained with ({known[:12]}); restore that tokenizer"
        )
    model = nn.build(config.model)
    if not _has_all(params, model) and config.peft != configs.FullFineTuning():
        load = open_source(config.model.init_from, merged=False).load if config.model.init_from else None
        initial, base = initial_parameters(model, load, config, mesh or parallel.make_mesh("-1,1,1"))
        check_same_base(meta, base, config.model.init_from)
        params = peft.join(params, peft.split(initial, peft.trainable(initial, config.peft))[1])
    if not _has_all(params, model):
        raise UserError(
            f"the checkpoint in --workdir={workdir} does not hold the parameters of its config.json; it may be of an "
            "older nanoflax"
        )
    model_config, params = nn.without_padding(config.model, params)
    return nn.build(model_config), params


def _has_all(params: Params, model: Any) -> bool:
    """Whether params contain every parameter of the model; they may contain adapters too."""
    own = _flat(params)
    return all(path in own and own[path].shape == x.shape for path, x in _flat(parallel.param_shapes(model)).items())


# The parameters that a run starts from.


def parameter_shapes(model: Any, config: Config) -> Params:
    """The shapes of `initial_parameters`; nothing is allocated."""
    return jax.eval_shape(lambda params: _add_adapters(params, config), parallel.param_shapes(model))


def initial_parameters(model: Any, load: Callable[[], Params] | None, config: Config, mesh: Any) -> tuple[Params, str]:
    """float32 parameters on the mesh, with the adapters of config.peft. Parameters of load() are used if their path
    and shape match; the rest are random, from config.train.seed. Prints to stderr which are random or not used.

    Returns (the parameters, the fingerprint of those of load() that are not trained; "" if there are none).
    Raises: UserError for a source with adapters that cannot be merged.
    """
    mask = _flat(peft.trainable(parameter_shapes(model, config), config.peft))
    frozen, base = {path for path, trained in mask.items() if not trained}, ""

    def load_and_hash():
        nonlocal base
        source = load() if load else {}
        base = base_fingerprint(source, frozen)
        return source

    kind, packed = peft.quantization_of(config.peft), frozen if peft.quantization_of(config.peft) else set()
    params = initialize_from(model, load and load_and_hash, config.train.seed, mesh, packed=(kind, packed))
    add = lambda params: _add_adapters(params, config)
    places = parallel.shardings(jax.eval_shape(add, params), mesh)
    return jax.jit(add, donate_argnums=0, out_shardings=places)(params), base


def base_fingerprint(source: Params, frozen: Set[str]) -> str:
    """A hash of the parameters of a source with a path in `frozen`, and of their adapters; "" if there are none.

    The values decide, in float32: not the files, their dtype, the mesh or the machine.
    """
    total = hashlib.sha1(usedforsecurity=False)
    flat = _flat(source)
    used = sorted(path for path in flat if {path, f"{path.rpartition('/lora_')[0]}/kernel"} & frozen)
    for path in used:
        x = np.ascontiguousarray(parallel.fetch(flat[path]), np.float32)
        total.update(f"{path}{x.shape}".encode())
        total.update(x.view(np.uint8).data)
    return total.hexdigest()[:32] if used else ""


def _add_adapters(params: Params, config: Config) -> Params:
    params = peft.add(params, config.peft, jax.random.PRNGKey(config.train.seed + 1))
    return peft.quantize_frozen(params, config.peft)


def initialize_from(
    model: Any,
    load: Callable[[], Params] | None,
    seed: int,
    mesh: Any,
    dtype: str = "float32",
    packed: tuple[str, Set[str]] = ("", frozenset()),
) -> Params:
    """Parameters copied from load() if their path and shape match; the rest are random, from the seed, in float32. A
    device reads its part of those of load(), which may be too large for one.

    dtype: of those that are copied. packed: a kind of peft.quantize_params, and the paths of matrices that are packed
    when they are copied, so that they are in memory as floats only one after another.
    """
    if load is None:
        return parallel.init(model, jax.random.PRNGKey(seed), mesh)
    shapes = _flat(parallel.param_shapes(model))
    places = _flat(parallel.shardings(parallel.param_shapes(model), mesh))
    with jax.set_mesh(mesh):
        given = _flat(peft.merge(load()))
    # After those of the source, the vocabulary may have new tokens (a mask, sentinels, padding), the head new classes.
    growing = nn.VOCABULARY | {"labels/kernel", "labels/bias"}
    longer = {p for p in growing & shapes.keys() & given.keys() if given[p].shape != shapes[p].shape}
    same = {path for path, x in shapes.items() if path in given and given[path].shape == x.shape}
    tokens = model.config.vocab_size - model.config.vocab_padding
    rows = {path: given[path].shape[0 if path == "embed/embedding" else -1] for path in longer & nn.VOCABULARY}
    params = _draw_only(model, {path: places[path] for path in shapes.keys() - same}, seed)
    for path in sorted(longer):  # sorted: all processes must fetch in the same order
        extended = np.array(parallel.fetch(params[path]))
        extended[tuple(map(slice, given[path].shape))] = parallel.fetch(given[path])
        given[path] = extended
    _print_modules("not in the source, initialized randomly", shapes.keys() - same - longer)
    _print_modules("rows of new tokens, drawn anew", {path for path, n in rows.items() if n < tokens})
    _print_modules("in the source, not needed", given.keys() - same - longer)
    for path in sorted(same | longer):  # one by one, so that each array of the source is freed early
        x = given.pop(path)
        if parallel.mesh_of(x) is not None:
            params[path] = jax.device_put(x.astype(dtype), places[path])
        else:
            x = np.asarray(x).astype(dtype)
            params[path] = jax.make_array_from_callback(x.shape, places[path], lambda index, x=x: x[index])
        if path in packed[1] and peft.is_quantizable(path, x.shape):
            params[path] = jax.jit(partial(peft.quantize_array, path, kind=packed[0]))(params[path])
    return traverse_util.unflatten_dict(params, sep="/")


def _draw_only(model: Any, places: dict[str, jax.sharding.Sharding], seed: int) -> dict[str, jax.Array]:
    """The parameters of `parallel.init` with a path in `places`; the others are not allocated."""
    if not places:
        return {}

    def draw(rng):
        drawn = _flat(parallel.initial_params(model, rng))
        return {path: drawn[path] for path in places}

    return jax.jit(draw, out_shardings=places)(jax.random.PRNGKey(seed))


def _flat(tree: Params) -> dict[str, Any]:
    """{path: leaf} of a nested dict, such as {"decoder/norm/scale": ...}."""
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def _print_modules(what: str, paths: set[str]) -> None:
    """Print the modules of these paths to stderr, on process 0."""
    if paths and parallel.is_main_process():
        modules = sorted({path.split("/")[0] for path in paths})
        print(report.printable(f"{what}: {', '.join(modules)}"), file=sys.stderr)
