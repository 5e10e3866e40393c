"""The training state: a tree of arrays, created in shards."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanoflax import parallel
from nanoflax.config import Config, TextData
from nanoflax.nn import LanguageModel


class TrainState(NamedTuple):
    """Everything that one step passes to the next. All of it is checkpointed."""

    step: jax.Array  # () int32, steps taken, skipped ones too
    params: Any  # nested dict of float32
    opt_state: Any
    ema: Any  # exponential moving average of params, or None
    rng: jax.Array  # [2] uint32, the run's key; the key of a step is folded from it
    skipped: jax.Array  # () int32, non-finite steps in a row


def new_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, rng: jax.Array, params: Any = None
) -> TrainState:
    """The TrainState of step 0. params: initial values (a tree per block), or None to draw them from
    rng. Blocks are stacked if config.train.scan_layers."""
    if params is None:
        params = parallel.initial_params(model, rng)
    if config.train.scan_layers:
        params = parallel.stack(params, config.model.layer_groups)
    copy = jax.tree.map(jnp.copy, params) if config.optim.ema else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), copy, jnp.copy(rng), jnp.int32(0))


def compile_init(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: parallel.AnyMesh,
    params: dict | None = None,
) -> Callable[[], TrainState]:
    """A compiled function without arguments that returns the `new_state` of config.train.seed, created
    in shards over the mesh. It donates params, so it can be called only once."""
    make = partial(new_state, model, optimizer, config)
    arguments = jax.random.PRNGKey(config.train.seed), params
    shardings = parallel.shardings(jax.eval_shape(make, *arguments), mesh)
    donated = () if config.train.scan_layers else 1  # buffers of single blocks cannot hold stacked blocks
    made = jax.jit(make, out_shardings=shardings, donate_argnums=donated)
    return partial(made.lower(*arguments).compile(), *arguments)


def init_state(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: parallel.AnyMesh,
    params: dict | None = None,
) -> TrainState:
    """The result of `compile_init`."""
    return compile_init(model, optimizer, config, mesh, params)()


def abstract_state(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: parallel.AnyMesh,
    params: Any = None,
) -> TrainState:
    """The shapes, dtypes and shardings of `init_state`, without computing it: the target of a restore.
    params: shapes of the trained parameters (a tree per block); None means all of the model's."""
    make = partial(new_state, model, optimizer, config)
    shapes = jax.eval_shape(make, jax.random.PRNGKey(config.train.seed), params)
    in_shards = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(in_shards, shapes, parallel.shardings(shapes, mesh))


def abstract_batch(config: Config, mesh: parallel.AnyMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and shardings of a batch of packed windows, for `compile_step`."""
    B, T = config.train.batch_size, config.window
    arrays = {"targets": ((B, T), jnp.int32), "first": ((B,), jnp.int32), "weights": ((B, T), jnp.float32)}
    if isinstance(config.data, TextData) and config.data.packing == "isolated":
        arrays |= {"segments": ((B, T), jnp.int32), "start": ((B,), jnp.int32)}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.batch_sharding(mesh, len(shape)))
        for name, (shape, dtype) in arrays.items()
    }
