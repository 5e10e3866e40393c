"""Training: the state as a value, one compiled step, and the loop around it."""

import contextlib
import itertools
import signal
import time
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nanoflax import distributed, hardware, peft, placement, sharding, stacking
from nanoflax.attention import Attention
from nanoflax.config import METRICS
from nanoflax.errors import UserError
from nanoflax.objectives import causal_lm
from nanoflax.windows import evaluation_batches, prefetch


class TrainState(NamedTuple):
    """Everything that one step hands to the next. All of it is checkpointed."""

    step: jax.Array  # () int32, steps taken, skipped ones too
    params: Any  # nested dict of float32
    opt_state: Any
    ema: Any  # averaged params, or None
    rng: jax.Array  # [2] uint32, the run's key; a step's key is folded from it
    skipped: jax.Array  # () int32, non-finite steps in a row


def new_state(model, optimizer, config, rng, params=None):
    """What `compile_init` compiles: the TrainState of step 0. rng: a PRNG key; params: given ones
    (a tree per block), or None to draw them. Blocks are stacked if config.train.scan_layers."""
    if params is None:
        params = sharding.draw(model, rng)
    if config.train.scan_layers:
        params = stacking.stack(params)
    copy = jax.tree.map(jnp.copy, params) if config.optim.ema else None
    return TrainState(jnp.int32(0), params, optimizer.init(params), copy, jnp.copy(rng),
                      jnp.int32(0))


def compile_init(model, optimizer, config, mesh, params=None):
    """A function without arguments that gives the `new_state` of config.train.seed, born sharded
    over the mesh; it may be called once, as it donates params."""
    make = partial(new_state, model, optimizer, config)
    arguments = jax.random.PRNGKey(config.train.seed), params
    shardings = sharding.shardings(jax.eval_shape(make, *arguments), mesh)
    donated = () if config.train.scan_layers else 1  # no stacked block fits a given one's buffer
    made = jax.jit(make, out_shardings=shardings, donate_argnums=donated)
    return partial(made.lower(*arguments).compile(), *arguments)


def init_state(model, optimizer, config, mesh, params=None):
    """`compile_init`, called at once."""
    return compile_init(model, optimizer, config, mesh, params)()


def abstract_state(model, optimizer, config, mesh):
    """The shapes, dtypes and shardings of `init_state`, computing nothing: what a restore fills."""
    shapes = jax.eval_shape(
        lambda: new_state(model, optimizer, config, jax.random.PRNGKey(config.train.seed)))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        shapes, sharding.shardings(shapes, mesh))


def abstract_batch(config, mesh):
    """The shapes, dtypes and shardings of a batch of `windows.Batches`, for `compile_step`."""
    B, T = config.train.batch_size, config.model.context
    arrays = {"targets": ((B, T), jnp.int32), "first": ((B,), jnp.int32),
              "weights": ((B, T), jnp.float32)}
    if config.data.packing == "isolated":
        arrays |= {"segments": ((B, T), jnp.int32), "start": ((B,), jnp.int32)}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch(mesh, len(shape)))
            for name, (shape, dtype) in arrays.items()}


def make_train_step(model, optimizer, config, objective=causal_lm):
    """The pure function (state, batch, frozen=None) -> (state, metrics) of a Config.

    frozen: parameters that are not trained, beside those of the state (peft.split).
    batch: arrays [B, ...]; split into config.train.accumulate micro-batches, whose gradients are
    summed by a scan. Sums are divided once, by the weight of all B windows, so neither padding nor
    accumulation nor the mesh changes the result. A non-finite loss or gradient leaves parameters
    and optimizer as they were.
    """
    t = config.train
    optimizer = optax.with_extra_args_support(optimizer)
    options = dict(chunks=t.loss_chunks, z_loss=t.z_loss, label_smoothing=t.label_smoothing)

    def step(state, batch, frozen=None):
        def sums(params, batch, rng):
            if frozen is not None:
                params = peft.join(params, frozen)
            objective_sum, nll, weight = objective(model, params, batch, rng, **options)
            return objective_sum, (objective_sum, nll, weight)

        gradient = jax.grad(sums, has_aux=True)
        rng = jax.random.fold_in(state.rng, state.step) if model.config.dropout else None
        grads, (total, nll, weight) = accumulate(gradient, state.params, batch, rng, t.accumulate)
        weight = jnp.where(weight > 0, weight, 1)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(total) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params,
                                              step=state.step + 1)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            decay = jnp.minimum(config.optim.ema, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
        state = TrainState(state.step + 1, keep(params, state.params),
                           keep(opt_state, state.opt_state), keep(ema, state.ema), state.rng,
                           jnp.where(good, 0, state.skipped + 1))
        metrics = {"loss": nll / weight, "grad_norm": norm, "tokens": weight,
                   "skipped": state.skipped}
        if t.z_loss or t.label_smoothing:
            metrics["objective"] = total / weight
        return state, metrics

    return step


def accumulate(gradient, params, batch, rng, pieces):
    """Sums of `gradient(params, micro_batch, rng)` over `pieces` micro-batches, one at a time."""
    if pieces == 1:
        return gradient(params, batch, rng)
    # The leading dimension stays the one that the mesh splits.
    split = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total, xs):
        i, micro = xs
        key = None if rng is None else jax.random.fold_in(rng, i)
        return jax.tree.map(jnp.add, total, gradient(params, micro, key)), None

    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                         jax.eval_shape(gradient, params, first, rng))
    return jax.lax.scan(body, zeros, (jnp.arange(pieces), split))[0]


def make_evaluation(model, config, mesh, objective=causal_lm):
    """A function (params, windows) -> (cross entropy in nats, target tokens), summed over windows.

    Compiled once; every window counts once, whatever the batch size.
    """
    @jax.jit
    @partial(placement.traced_on, mesh)
    def step(params, batch):
        _, nll, weight = objective(model, params, batch, chunks=config.train.loss_chunks)
        return nll, weight

    def evaluate(params, windows):
        B = sharding.whole_batch(config.train.batch_size, mesh)
        batches = evaluation_batches(windows, B, sharding.rows(mesh, B))
        nats = tokens = 0.0  # float64: a sum over millions of tokens
        waiting = []
        with contextlib.closing(
                prefetch(itertools.islice(batches, config.train.evaluate_batches or None))) as queue:
            for batch in queue:
                waiting.append(step(params, sharding.put_batch(batch, mesh)))
                if len(waiting) > 1 or mesh.size > 1:
                    nll, weight = waiting.pop(0)
                    nats, tokens = nats + float(nll), tokens + float(weight)
                    distributed.alive()
        for nll, weight in waiting:
            nats, tokens = nats + float(nll), tokens + float(weight)
        return nats, tokens

    return evaluate


def jit_step(step, state, mesh):
    """`step` to be compiled for each shape of batch; state (or its shapes) is donated."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    options = hardware.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(placement.traced_on(mesh, step), donate_argnums=0,
                   out_shardings=(shardings, None), compiler_options=options)


def compile_step(step, state, batch, mesh):
    """`jit_step` compiled at once for a batch or its shapes."""
    return jit_step(step, state, mesh).lower(state, batch).compile()


def attention_backends(model, params, batch, mesh, objective=causal_lm):
    """What computes the attention of a step on the mesh, in words: "" of a model without any.

    params, batch: arrays or their shapes. Nothing is compiled.
    Raises: UserError if config.attention_backend names a kernel that cannot serve.
    """
    found = []

    def look(method, arguments, named, context):
        result = method(*arguments, **named)
        if isinstance(context.module, Attention) and context.method_name == "backend":
            name, why = result
            found.append(f"{name} ({why})" if why else name)
        return result

    with nn.intercept_methods(look):
        jax.eval_shape(placement.traced_on(mesh, lambda params, batch: objective(
            model, params, batch)), params, batch)
    return ", ".join(dict.fromkeys(found))


class Outcome(NamedTuple):
    """How a run ended."""

    reason: str  # "finished", "early stop", or the name of a signal
    step: int
    signal: int = 0


class Tracking(NamedTuple):
    """What evaluations have shown so far; it is checkpointed beside the state."""

    best: float = float("inf")  # of train.metric; negative where more is better
    best_step: int = 0
    waited: int = 0  # evaluations since the best
    owed: bool = False  # a signal came before the evaluation of this step

    @classmethod
    def read(cls, saved, step=0, metric=None):
        """From the `_asdict` in a checkpoint of a step; at first `best` was called best_loss, and
        nothing owed. metric: that of the step, where what was owed has been done since."""
        found = cls(saved.get("best", saved.get("best_loss")), saved["best_step"], saved["waited"],
                    saved.get("owed", False))
        if found.owed and metric is not None:
            found = found.after(metric, step)
        return found

    def after(self, metric, step):
        """With the evaluation of a step."""
        if metric < self.best:
            return Tracking(metric, step)
        return self._replace(waited=self.waited + 1, owed=False)


def fit(state, step, batches, config, mesh, *, evaluate, checkpoints, log, progress, meta,
        tracking=Tracking(), schedule=None):
    """Run compiled `step` from state.step to config.train.steps; save, evaluate, stop in time.

    batches[i]: this process's rows of the batch of step i, a dict of numpy arrays;
    evaluate(params, step): -> (metrics dict with config.train.metric, text to show); checkpoints:
    a Checkpoints; log, progress: of `report`; meta: dict saved with every checkpoint. AdaLoRA's
    best step is one of those with no more ranks than its budget: the last final_steps. An evaluation
    that a signal came before is done first when the run goes on.
    Returns (state, tracking, Outcome). SIGTERM and SIGINT save and return; a second one interrupts.
    Of several processes all do the same at the same step: a signal to one is one to all, and the
    clock and the metrics are those of process 0.
    Raises: UserError after config.train.max_skipped non-finite steps in a row, naming the batch.
    """
    t = config.train
    # Queued steps of several fake CPU devices can wait for each other for ever on few cores.
    eager = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    counted = t.steps - config.peft.final_steps if config.peft.kind == "adalora" else 0
    begin, saved_at, waiting = int(state.step), time.monotonic(), []
    done = begin

    def settle():
        """Record the oldest step whose numbers have not been read yet."""
        at, metrics = waiting.pop(0)
        values = {k: np.asarray(v).item() for k, v in metrics.items()}
        if schedule is not None:
            values["learning_rate"] = float(schedule(at - 1))
        progress.update(at, values["loss"])
        if progress.tokens_per_second is not None:
            values["tokens_per_second"] = progress.tokens_per_second
        log.log(at, **values)
        distributed.alive()
        if values["skipped"] >= t.max_skipped:
            raise UserError(f"{values['skipped']} steps in a row had a non-finite loss or "
                            f"gradient; the last, step {at}, read {batches.where(at - 1)}; "
                            "lower optim.learning_rate or look at those documents")

    def save(metric=None):
        nonlocal saved_at
        checkpoints.save(done, state._asdict(), meta | {
            "step": done, "position": done * t.batch_size, "tracking": tracking._asdict()}, metric)
        saved_at = time.monotonic()

    reason, caught = "finished", 0
    distributed.gather("ready")  # compiled
    with (Signals() as signals, distributed.watchdog(t.watchdog_seconds), contextlib.closing(
            prefetch(batches[i] for i in range(begin, t.steps))) as queue):
        votes = distributed.Votes(begin)
        for batch in itertools.chain([None] * tracking.owed, queue):
            if batch is not None:
                state, metrics = step(state, sharding.put_batch(batch, mesh))
                done += 1
                waiting.append((done, metrics))
                if eager or len(waiting) > 1 or done == begin + 1:
                    settle()
            told = votes(done, [int(signals.caught),
                                0 < t.checkpoint_seconds < time.monotonic() - saved_at])
            caught = next((number for number, _ in told if number), 0)
            last = done == t.steps or caught
            due = done % t.checkpoint_every == 0 or bool(told) and told[0][1]
            metric, evaluates = None, done % t.evaluate_every == 0 or done == t.steps
            tracking = tracking._replace(owed=bool(evaluates and caught))
            if evaluates and not caught:
                while waiting:
                    settle()
                with progress.pause():
                    found, text = evaluate(state.params if state.ema is None else state.ema, done)
                found = distributed.gather({k: float(v) for k, v in found.items()})[0]
                distributed.alive()
                log.log(done, **found)
                progress.write(text)
                if done < counted:
                    progress.write(f"  not for the best step: before step {counted} AdaLoRA has "
                                   "more ranks than its budget")
                else:
                    metric = found[t.metric] * (-1 if METRICS[t.metric] else 1)
                    tracking = tracking.after(metric, done)
                    due |= tracking.best_step == done
                if 0 < t.patience <= tracking.waited:
                    reason, last = "early stop", True
            if due or last:
                while waiting:
                    settle()
                save(metric)
            if last:
                break
    checkpoints.wait()
    return state, tracking, Outcome(signal.Signals(caught).name if caught else reason, done, caught)


class Signals:
    """While entered, the first SIGTERM or SIGINT is remembered in `caught`, not acted on."""

    def __enter__(self):
        self.caught, self._old = 0, {}
        with contextlib.suppress(ValueError):  # not in the main thread: a notebook's worker
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number, frame):
        if self.caught:
            raise KeyboardInterrupt
        self.caught = number

    def __exit__(self, *_):
        for number, old in self._old.items():
            signal.signal(number, old)
