"""The trainer of all runs: a Job describes what to train, `run_job` trains it.

`run_job` checks memory from shapes before it allocates, compiles while the data is read, restores the
newest checkpoint or initializes, and trains until the last step, an early stop or a signal.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax

from nanoflax import config as configs
from nanoflax import kernels, parallel, peft, planning, report, train
from nanoflax.config import Config
from nanoflax.errors import UserError
from nanoflax.runs import checkpoint, profile
from nanoflax.runs.checkpoint import Checkpoints
from nanoflax.runs.directory import archive_run, check_same_base, check_same_data, write_run
from nanoflax.runs.opening import Params


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The data of a run, and its evaluation."""

    batches: Any  # batches[step] is the batch of this process; describe(step) names its rows for error messages
    evaluate: Callable[[Params, int], tuple[dict[str, float], str]]  # (parameters, step) -> (metrics, text to show)
    identity: dict[str, str]  # fingerprints of tokenizer, data, validation and base, saved with every checkpoint
    tokens_per_step: float
    measures: Callable[[int], dict[str, float]] | None = None  # (finished steps) -> more metrics of each step, to log


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The description of a training run."""

    config: Config  # with the final sizes of the model
    mesh: jax.sharding.Mesh
    model: Any  # a Linen module
    tokenizer: Callable[[], Any]  # saved in the run's directory; it may be trained while the step is compiled
    shapes: Params  # of all parameters
    load: Callable[[], Params] | None = None  # all initial parameters on the mesh; None: random, from train.seed
    trained: Params | None = None  # tree of bool; None: all parameters are trained
    keeps_initial: bool = False  # a copy of all initial parameters stays beside the state
    other_models: tuple[str, ...] = ()  # subtrees of the parameters that are no part of the trained model: a teacher
    objective: Callable = train.causal_lm
    batch: dict[str, jax.ShapeDtypeStruct]  # shapes of a batch of all processes together
    fixed_batch: bool = False  # every batch has these shapes, so the step is compiled while the data is read
    read_data: Callable[[], TrainingData]
    # (the compiled step (state, batch) -> (state, metrics), the parameters that are not trained) -> a step that does
    # more, such as sampling the texts that it trains on; None: no more
    wrap_step: Callable[[Callable, Params], Callable] | None = None
    flops_per_token: float | None = None  # for the MFU
    replaces: str | None = None  # directory of an old run, which is archived after the data is read
    profile: tuple[int, int] | None = None  # first and last step of a trace; see runs.profile


class Result(NamedTuple):
    """How a job ended."""

    reason: str  # "finished", "early stop" or the name of a signal
    step: int
    signal: int  # its number, or 0
    trained_now: bool  # False if an earlier call had finished the run
    best_step: int
    frozen: Params  # the parameters that are not trained


def run_job(job: Job, workdir: str) -> Result:
    """Train in workdir; the caller holds its lock. The same job again resumes.

    Raises: UserError, before training, if memory is too small, or data or a saved state do not fit.
    """
    return Trainer(job, workdir).run()


class Trainer:
    """A Job in its directory. `__init__` checks shapes only; `run` allocates and trains."""

    def __init__(self, job: Job, workdir: str):
        self.job, self.workdir = job, workdir
        self.checkpoints = os.path.join(workdir, "checkpoints")
        self.optimizer, self.schedule = train.make_optimizer(job.config.optim, job.config.train.steps)
        if isinstance(job.config.peft, configs.AdaLoRA):
            self.optimizer = peft.adalora_optimizer(self.optimizer, job.config.peft, job.config.train.steps)
        self.shapes, self.frozen_shapes = self._state_shapes()
        copy = self._initial_shapes() if job.keeps_initial else ()
        parallel.check_memory((self.shapes, self.frozen_shapes, copy), job.mesh)
        self.attention = planning.attention_backends(job.model, job.shapes, job.batch, job.mesh, job.objective)
        if not job.replaces:
            parallel.run_on_main_process(lambda: checkpoint.check_not_all_damaged(self.checkpoints))
        saved = parallel.run_on_main_process(lambda: checkpoint.list_steps(self.checkpoints))
        self.resuming = bool(saved) and not job.replaces
        self._compile()

    def run(self) -> Result:
        job = self.job
        trained, frozen = self._load_parameters()
        data = job.read_data()
        parallel.check_processes_agree("their data", data.identity)
        self.identity = data.identity | {"config": configs.to_dict(job.config)}
        self._describe()
        if job.replaces:
            parallel.gather_from_processes("restored")
            print(f"the old run is archived in {parallel.run_on_main_process(lambda: archive_run(self.workdir))}")
        with Checkpoints(self.checkpoints, job.config.train.keep) as saves:
            state, tracking = self._restore(saves) if self.resuming else self._begin(saves, trained)
            del trained  # the state contains these parameters
            step = int(state.step)
            if text := finished_before(job.config, step, tracking):
                print(text)
                if job.profile:
                    print(profile.skipped(job.profile, step))
                reason = "finished" if step >= job.config.train.steps else "early stop"
                return Result(reason, step, 0, False, tracking.best_step, parallel.unstack(frozen))
            tracking, outcome = self._fit(data, state, frozen, tracking, saves)
        return Result(outcome.reason, outcome.step, outcome.signal, True, tracking.best_step, parallel.unstack(frozen))

    def _state_shapes(self) -> tuple[train.TrainState, Params]:
        """(the training state, the parameters that are not trained), as shapes with shardings."""
        job = self.job
        trained, frozen = self._split(self._initial_shapes())
        return train.abstract_state(job.model, self.optimizer, job.config, job.mesh, trained), frozen

    def _initial_shapes(self) -> Params:
        """All parameters, as shapes with shardings."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.job.shapes,
            parallel.shardings(self.job.shapes, self.job.mesh),
        )

    def _split(self, params: Params) -> tuple[Params, Params]:
        """(the trained parameters, not stacked; the others, stacked if train.scan_layers)."""
        if self.job.trained is None:
            return params, {}
        trained, frozen = peft.split(params, self.job.trained)
        config = self.job.config
        return trained, parallel.stack(frozen, config.model.layer_groups) if config.train.scan_layers else frozen

    def _compile(self) -> None:
        """Compile in the background: the training step if batches have fixed shapes, and the random initialization."""
        job, arguments = self.job, (self.job.model, self.optimizer, self.job.config)
        step = train.make_train_step(*arguments, job.objective)
        self._step = train.jit_step(step, self.shapes, job.mesh)
        self._compiled_step = self._compiled_init = None
        threads = concurrent.futures.ThreadPoolExecutor(2)
        if job.fixed_batch and job.trained is None:
            self._compiled_step = threads.submit(train.compile_step, step, self.shapes, job.batch, job.mesh)
        if job.load is None and not self.resuming:
            self._compiled_init = threads.submit(train.compile_init, *arguments, job.mesh)
        threads.shutdown(wait=False)  # after an error in the data, the run does not wait for the compiler

    def _load_parameters(self) -> tuple[Params | None, Params]:
        """(initial trained parameters, or None if they are random or restored; parameters that are not trained).

        A resumed run frees the initial trained parameters before it restores the state, to save memory.
        """
        if self.job.load is None or self.resuming and not self.frozen_shapes:
            return None, {}
        trained, frozen = self._split(self.job.load())
        return None if self.resuming else trained, frozen

    def _describe(self) -> None:
        """Print the parameters, and the FLOPs per token."""
        job = self.job
        own, others = without_models(job.shapes, job.other_models)
        print(report.parameter_table(own))
        total, active = planning.count_parameters(job.config.model)
        if active < total:
            print(f"{report.format_count(total)} parameters, {report.format_count(active)} active")
        if job.trained is not None:
            size, total = (
                sum(x.size for x in jax.tree.leaves(t, is_leaf=kernels.is_quantized)) for t in (self.shapes.params, own)
            )
            print(f"{size:,} of {total:,} parameters are trained ({size / total:.2%})")
        for name, shapes in others.items():
            print(f"the {name}, which is not trained, has {sum(x.size for x in jax.tree.leaves(shapes)):,} parameters")
        if job.flops_per_token:
            print(
                f"{report.format_count(job.flops_per_token)} FLOPs per trained token (6 per weight of a product, and "
                f"attention); mesh {dict(job.mesh.shape)} of {job.mesh.devices.flat[0].device_kind}; attention "
                f"{self.attention}"
            )
        elif self.attention:
            print(f"attention {self.attention}")

    def _begin(self, saves: Checkpoints, trained: Params | None) -> tuple[train.TrainState, train.Tracking]:
        """The state of step 0; writes the files of a new run. trained: donated; None: random parameters."""
        job, tracking = self.job, train.Tracking()
        if self._compiled_init:
            state = self._compiled_init.result()()
        else:
            state = train.init_state(job.model, self.optimizer, job.config, job.mesh, trained)
        if parallel.is_main_process():
            write_run(self.workdir, job.config, job.tokenizer())
        if job.replaces:  # save now: only the archived run has these weights
            meta = {"step": 0, "position": 0, "tracking": tracking._asdict()}
            saves.save(0, state._asdict(), self.identity | meta)
        return state, tracking

    def _restore(self, saves: Checkpoints) -> tuple[train.TrainState, train.Tracking]:
        """The state of the newest undamaged checkpoint. Raises: UserError if it was trained on other data, or if
        the parameters that are not trained have changed."""
        state, meta = saves.restore(self.shapes._asdict())
        check_same_data({**self.identity, **meta}, self.identity)
        check_same_base(meta, str(self.identity.get("base", "")), self.job.config.model.init_from)
        tracking = train.Tracking.read(meta["tracking"], meta["step"], saves.metric(meta["step"]))
        print(f"resuming at step {meta['step']}")
        return train.TrainState(**state), tracking

    def _fit(
        self, data: TrainingData, state: train.TrainState, frozen: Params, tracking: train.Tracking, saves: Checkpoints
    ) -> tuple[train.Tracking, Any]:
        """Run `train.fit`; a model from a source is evaluated before the first step. Returns (Tracking, Outcome)."""
        job, start, flops = self.job, int(state.step), self.job.flops_per_token
        step = self._compiled_step.result() if self._compiled_step else partial(self._step, frozen=frozen)
        if job.wrap_step:
            step = job.wrap_step(step, frozen)
        evaluate = lambda params, at: data.evaluate(peft.join(params, frozen) if frozen else params, at)
        peak = peak_flops(job.mesh) if flops else None  # measured now, because compilation has ended
        shown = displays(self.workdir, job.config, start, data.tokens_per_step, flops, peak)
        wanted = job.profile if parallel.is_main_process() else None
        with shown as (log, progress), profile.traced(step, wanted, start, self.workdir, progress.write) as step:
            if start == 0 and job.config.model.init_from:
                metrics, text = evaluate(state.params, 0)
                log.log(0, **metrics)
                progress.write(text)
            return train.fit(
                state,
                step,
                data.batches,
                job.config,
                job.mesh,
                evaluate=evaluate,
                checkpoints=saves,
                log=LogOfData(log, data.measures) if data.measures else log,
                progress=progress,
                meta=self.identity,
                tracking=tracking,
                schedule=self.schedule,
            )[1:]


class LogOfData(NamedTuple):
    """A log that adds measures(step) to the metrics of a step, and leaves out losses of sources that it has no row of,
    which are NaN."""

    of_run: Any  # a report.MetricsLog
    measures: Callable[[int], dict[str, float]]

    def log(self, step: int, **values: Any) -> None:
        found = {name: x for name, x in values.items() if not (name.startswith("loss/") and math.isnan(x))}
        self.of_run.log(step, **found, **(self.measures(step) if "loss" in values else {}))


def without_models(params: Params, names: Collection[str]) -> tuple[Params, Params]:
    """(parameters without these subtrees, the subtrees)."""
    own = {name: x for name, x in params.items() if name not in names}
    return own, {name: params[name] for name in names if name in params}


def finished_before(config: Config, step: int, tracking: train.Tracking) -> str:
    """A message if the run is already complete; "" if there are steps left."""
    if tracking.evaluation_pending:
        return ""
    if step >= config.train.steps:
        return f"the run is complete: {step} steps"
    if 0 < config.train.patience <= tracking.waited:
        return f"the run stopped early at step {step}; a larger train.patience continues it"
    return ""


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
    """FLOP/s of all devices of the mesh together. On a CPU it is measured, so call it while nothing compiles."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return parallel.quiet_peak_flops()
    peak = parallel.peak_flops(device)
    return peak and peak * mesh.size


@contextlib.contextmanager
def displays(
    workdir: str | os.PathLike,
    config: Config,
    start_step: int,
    tokens_per_step: float,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
) -> Iterator[tuple[Any, Any]]:
    """The (log, progress) for `train.fit`; silent on all processes except process 0. The last two arguments are
    for the MFU; peak_flops is of all devices together."""
    if not parallel.is_main_process():
        yield report.NoDisplay(), report.NoDisplay()
        return
    t = config.train
    sizes = t.steps, start_step, tokens_per_step, flops_per_token, peak_flops
    with (
        report.MetricsLog(workdir, t.tensorboard, t.wandb or None, start_step, configs.to_dict(config)) as log,
        report.TrainingProgress(*sizes, ignored=parallel.compile_seconds) as progress,
    ):
        yield log, progress


# Before a run.


def setup_jax(trains: bool = False) -> None:
    """Cache compiled programs on disk, if JAX has no cache directory yet. Compiling takes 0.13 s instead of 1.4 s.

    trains: this process will train, so it keeps the memory that steps free.
    """
    from nanoflax.data import default_cache_dir

    if trains:
        parallel.keep_freed_memory()
    # On a full disk, JAX warns for each program. Without the cache, only the next start takes longer.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        jax.config.update("jax_compilation_cache_dir", os.path.join(default_cache_dir(), "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def check_metric(config: Config, measured: tuple[str, ...], measures_loss: bool = True) -> None:
    """Raises: UserError if train.metric is not in `measured`, nor validation_loss if that is measured."""
    known = ("validation_loss",) * measures_loss + measured
    if config.train.metric not in known:
        raise UserError(f"train.metric={config.train.metric!r} is not measured here; choose one of {', '.join(known)}")


def check_wandb(config: Config) -> None:
    """Raises: UserError if train.wandb is set and wandb is not installed."""
    if config.train.wandb and not importlib.util.find_spec("wandb"):
        raise UserError(f"train.wandb={config.train.wandb} needs Weights & Biases: pip install nanoflax[wandb]")
