"""One training step and one evaluation, as pure functions for jax.jit."""

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanoflax import parallel, peft
from nanoflax.config import Config
from nanoflax.data import evaluation_batches, prefetch
from nanoflax.nn import LanguageModel
from nanoflax.train.objectives import causal_lm, with_router
from nanoflax.train.optim import at_step
from nanoflax.train.state import TrainState


def make_train_step(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: Config, objective: Callable = causal_lm
) -> Callable[..., tuple[TrainState, dict]]:
    """The pure function (state, batch, frozen=None) -> (state, metrics) of a Config.

    batch: arrays [B, ...]. A scan sums the gradients of config.train.accumulate micro-batches. The
    sums are divided once, by the weight of all B rows, so padding, accumulation and mesh do not change
    the result, except that experts are balanced in each micro-batch. After a non-finite loss or gradient,
    parameters and optimizer stay unchanged, and the next step has the learning rate of its own number.
    frozen: parameters that are not trained (peft.split).
    """
    t = config.train
    optimizer = optax.with_extra_args_support(optimizer)
    options = dict(chunks=t.loss_chunks, z_loss=t.z_loss, label_smoothing=t.label_smoothing)
    objective, router = with_router(objective), config.model.moe

    def step(state, batch, frozen=None):
        def objective_sum(params, batch, rng):
            if frozen is not None:
                params = peft.join(params, frozen)
            found = objective(model, params, batch, rng, **options)
            return found.objective, found

        gradient = jax.grad(objective_sum, has_aux=True)
        rng = jax.random.fold_in(state.rng, state.step) if model.config.dropout else None
        grads, sums = accumulate(gradient, state.params, batch, rng, t.accumulate)
        total, loss, weight, logged = sums
        weight = jnp.where(weight > 0, weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(total) & jnp.isfinite(norm)
        opt_state = at_step(state.opt_state, state.step)
        updates, opt_state = optimizer.update(grads, opt_state, state.params, step=state.step + 1)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            decay = jnp.minimum(config.optim.ema, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
        kept = keep(params, state.params), keep(opt_state, state.opt_state), keep(ema, state.ema)
        state = TrainState(state.step + 1, *kept, state.rng, jnp.where(good, 0, state.skipped + 1))
        metrics = {"loss": loss / weight, "grad_norm": norm, "tokens": weight, "skipped": state.skipped}
        metrics |= {name: x[0] / x[1] if isinstance(x, list) else x / weight for name, x in logged.items()}
        if t.z_loss or t.label_smoothing or router.experts and (router.balance_loss or router.z_loss):
            metrics["objective"] = total / weight
        return state, metrics

    return step


def accumulate(gradient: Callable, params: dict, batch: dict, rng: jax.Array | None, pieces: int) -> Any:
    """Sums of `gradient(params, micro_batch, rng)` over `pieces` micro-batches, one at a time."""
    if pieces == 1:
        return gradient(params, batch, rng)
    # [B, ...] -> [pieces, B / pieces, ...]; the mesh splits the rows of each piece.
    split = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total, xs):
        i, micro = xs
        key = None if rng is None else jax.random.fold_in(rng, i)
        return jax.tree.map(jnp.add, total, gradient(params, micro, key)), None

    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, rng))
    return jax.lax.scan(body, zeros, (jnp.arange(pieces), split))[0]


def make_evaluation(
    model: LanguageModel, config: Config, mesh: Mesh, objective: Callable = causal_lm
) -> Callable[[Any, Any], tuple[float, float]]:
    """A function (params, windows) -> (cross entropy in nats, target tokens), summed over windows.

    It is compiled once. Every window counts once, for every batch size.
    """

    @jax.jit
    @partial(parallel.with_mesh, mesh)
    def step(params, batch):
        sums = objective(model, params, batch, chunks=config.train.loss_chunks)
        return sums.loss, sums.weight

    def evaluate(params, windows):
        B = parallel.divisible_batch_size(config.train.batch_size, mesh)
        batches = evaluation_batches(windows, B, parallel.own_rows(mesh, B))
        nats = tokens = 0.0  # float64: a sum over millions of tokens
        pending = []
        with contextlib.closing(prefetch(itertools.islice(batches, config.train.evaluate_batches or None))) as queue:
            for batch in queue:
                pending.append(step(params, parallel.put_batch(batch, mesh)))
                if len(pending) > 1 or mesh.size > 1:
                    nll, weight = pending.pop(0)
                    nats, tokens = nats + float(nll), tokens + float(weight)
                    parallel.reset_watchdog()
        for nll, weight in pending:
            nats, tokens = nats + float(nll), tokens + float(weight)
        return nats, tokens

    return evaluate


def jit_step(step: Callable, state: TrainState, mesh: Mesh) -> Any:
    """jax.jit of a train step, compiled for each shape of batch. state: the state or its shapes; the
    state is donated."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    options = parallel.compiler_options(mesh.devices.flat[0].platform)
    run = parallel.with_mesh(mesh, step)
    return jax.jit(run, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def compile_step(step: Callable, state: TrainState, batch: dict, mesh: Mesh) -> Any:
    """`jit_step`, compiled for a batch or its shapes."""
    return jit_step(step, state, mesh).lower(state, batch).compile()
