"""The configuration of a run: model, data, optimizer, adapters, task and training loop."""

import dataclasses
from typing import ClassVar

from nanoflax.config.data import AnyData, TextData
from nanoflax.config.fields import field
from nanoflax.config.model import ModelConfig
from nanoflax.config.peft import AdaLoRA, AnyPeft, FullFineTuning
from nanoflax.config.task import GRPO, PREFERENCE_LOSSES, AnyTask, DistillTask, LabelTask, PairTask, Prefer, Pretrain

# Metrics of evaluations, and whether a larger value is better.
METRICS = dict.fromkeys(("validation_loss", "perplexity", "bits_per_byte", "kl"), False) | dict.fromkeys(
    (
        "accuracy",
        "masked_accuracy",
        "token_accuracy",
        "macro_f1",
        "f1",
        "exact_match",
        "bleu",
        "chrf",
        "rouge_l",
        "preference_accuracy",
        "reward_margin",
        "reward",
        "pass_at_k",
    ),
    True,
)
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
REMATS = ("none", "dots", "offload", "blocks")
MAX_SEED = 2**32 - 1  # JAX ignores the upper 32 bits of larger seeds


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. What a run trains decides the fields that are none: see `recipes`."""

    section: ClassVar[str] = "optim"
    name: str | None = field(None, "Optimizer; none: by what is trained.", choices=OPTIMIZERS)
    learning_rate: float | None = field(
        None, "Peak learning rate (muon: for parameters that AdamW trains); none: by what is trained.", at_least=0
    )
    muon_learning_rate: float = field(0.02, "Peak learning rate of the matrices that Muon trains.", at_least=0)
    schedule: str | None = field(
        None, "Decay of the learning rate; wsd: only at the end; none: by what is trained.", choices=SCHEDULES
    )
    warmup_steps: int | None = field(
        None, "Steps in which the learning rate rises linearly from 0; none: a tenth, at most 100.", at_least=0
    )
    decay_fraction: float = field(0.2, "wsd: share of the steps, at the end, with decay.", within="(0, 1]")
    end_factor: float | None = field(
        None, "Last learning rate as a fraction of the peak; none: by what is trained.", at_least=0
    )
    weight_decay: float = field(0.1, "Weight decay on matrices; no norm, bias or embedding.", at_least=0)
    b1: float = field(0.9, "Decay of the first moment; the momentum of sgd and lion.", within="[0, 1)")
    b2: float = field(0.95, "Decay of the second moment.", within="[0, 1)")
    eps: float = field(1e-8, "Added to the square root of the second moment.", at_least=0)
    clip: float = field(1.0, "Largest global norm of the gradient; 0: no clipping.", at_least=0)
    layer_decay: float = field(1.0, "Learning rate of a layer relative to the layer above.", within="(0, 1]")
    ema: float = field(0.0, "Decay of a parameter average for evaluation and sampling; 0: none.", within="[0, 1)")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    section: ClassVar[str] = "train"
    steps: int = field(1000, "Steps of the run.", at_least=1)
    batch_size: int = field(
        0, "Rows of a step (windows, examples), over all devices and micro-batches; 0: by what is trained.", at_least=0
    )
    accumulate: int = field(1, "Micro-batches of a step.", at_least=1)
    seed: int = field(0, "Seed of all random numbers of the run.", at_least=0, at_most=MAX_SEED)
    z_loss: float = field(0.0, "Weight of log(Z)^2 in the loss (PaLM, section 5).", at_least=0)
    label_smoothing: float = field(0.0, "Share of the target probability for all classes equally.", within="[0, 1)")
    loss_chunks: int = field(0, "Number of parts of T, so that the loss needs less memory; 0: automatic.", at_least=0)
    remat: str = field(
        "none",
        "What the backward pass recomputes: dots (all but matrix products), offload (as dots, with the products kept "
        "in host memory) or blocks (all).",
        choices=REMATS,
    )
    scan_layers: bool = field(False, "Compile one block and scan it over L, for deep models.")
    max_skipped: int = field(10, "Non-finite steps in a row that stop the run.", at_least=1)
    evaluate_every: int = field(200, "Steps between evaluations.", at_least=1)
    evaluate_batches: int = field(
        0, "Evaluate on the first N validation batches of each source; 0: on all.", at_least=0
    )
    metric: str = field("validation_loss", "Metric that decides which step is the best.", choices=METRICS)
    patience: int = field(0, "Stop after N evaluations without a better metric; 0: never.", at_least=0)
    checkpoint_every: int = field(200, "Steps between checkpoints.", at_least=1)
    checkpoint_seconds: float = field(0.0, "Longest time between checkpoints; 0: no limit.", unit="seconds", at_least=0)
    keep: int = field(2, "Number of newest checkpoints that are kept, besides the best one.", at_least=1)
    sample_prompt: str = field("", "Pretraining: text that is continued at each evaluation and at the end.")
    sample_tokens: int = field(
        64, "Pretraining: length of that continuation, or what fits the context; 0: none.", unit="tokens", at_least=0
    )
    mesh: str = field("-1,1,1", "Devices along data, fsdp, tensor[, context[, expert]]; -1: the remaining devices.")
    watchdog_seconds: float = field(
        600.0, "End a run of several processes after this time without a step; 0: never.", unit="seconds", at_least=0
    )
    tensorboard: bool = field(True, "Write TensorBoard event files.")
    wandb: str = field("", "Project of Weights & Biases; empty: none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a run."""

    model: ModelConfig = ModelConfig()
    data: AnyData = TextData()
    optim: OptimConfig = OptimConfig()
    peft: AnyPeft = FullFineTuning()
    task: AnyTask = Pretrain()
    train: TrainConfig = TrainConfig()

    @property
    def window(self) -> int:
        """T, the length of a training window in tokens."""
        return isinstance(self.data, TextData) and self.data.window or self.model.context

    def problems(self) -> list[str]:
        """The conflicts between sections. A value within a section may be out of range."""
        return _step_problems(self) + _block_problems(self) + _adalora_problems(self) + _task_problems(self)


def _step_problems(c: Config) -> list[str]:
    t, found = c.train, []
    if t.accumulate >= 1 and t.batch_size % t.accumulate:
        found.append(f"train.accumulate={t.accumulate} does not divide train.batch_size={t.batch_size}")
    if c.optim.warmup_steps is not None and c.optim.warmup_steps >= t.steps > 1:
        found.append(f"optim.warmup_steps={c.optim.warmup_steps} must be less than train.steps={t.steps}")
    name = "model.context" if c.window == c.model.context else "data.window"
    if c.window > c.model.context:
        found.append(f"data.window={c.window} must be at most model.context={c.model.context}")
    if t.loss_chunks > 0 and c.window % t.loss_chunks:
        found.append(f"train.loss_chunks={t.loss_chunks} does not divide {name}={c.window}; 0 chooses")
    return found


def _block_problems(c: Config) -> list[str]:
    found = []
    if c.train.scan_layers and not c.model.has_blocks:
        found.append("train.scan_layers=true needs blocks, and model.architecture='lstm' has none")
    elif c.train.scan_layers and max(c.model.layers, c.model.cross_layers) == sum(c.model.layer_groups[0]) > 1:
        found.append(
            "train.scan_layers=true needs kinds of layers that repeat: model.layer_types, model.moe.dense_layers, "
            "model.first_norm, model.scale_by_layer"
        )
    if c.optim.layer_decay != 1 and not c.model.has_blocks:
        found.append(f"optim.layer_decay={c.optim.layer_decay} needs blocks, and model.architecture='lstm' has none")
    return found


def _adalora_problems(c: Config) -> list[str]:
    p, found = c.peft, []
    if not isinstance(p, AdaLoRA):
        return found
    warmup, final = p.schedule(c.train.steps)
    if warmup + final >= c.train.steps:
        found.append(
            f"peft.warmup_steps={warmup} and peft.final_steps={final} must leave some of "
            f"train.steps={c.train.steps} for pruning ranks"
        )
    if c.optim.ema:
        found.append(
            f"optim.ema={c.optim.ema} does not work with peft.kind='adalora': the average would keep pruned ranks"
        )
    if c.train.scan_layers:
        found.append("train.scan_layers=true does not work with peft.kind='adalora', which ranks all blocks together")
    return found


def _task_problems(c: Config) -> list[str]:
    t, found = c.train, []
    cross_entropy = {name: getattr(t, name) for name in ("z_loss", "label_smoothing")}
    unused = cross_entropy if isinstance(c.task, PairTask | GRPO) else {}
    if isinstance(c.task, LabelTask):
        unused = {"z_loss": t.z_loss}
    for name, value in unused.items():
        hint = "; task.label_noise is for wrong preferences" * (
            name == "label_smoothing" and isinstance(c.task, Prefer)
        )
        if value:
            found.append(f"train.{name}={value} does not work with task.kind={c.task.kind!r}{hint}")
    if isinstance(c.task, Prefer) and c.task.needs_reference and not c.model.init_from:
        free = " or ".join(name for name, loss in PREFERENCE_LOSSES.items() if not loss.reference)
        found.append(
            f"task.loss={c.task.loss!r} compares with the model before training, and a new model is random: set "
            f"model.init_from, or task.loss to {free}"
        )
    if isinstance(c.task, DistillTask) and c.task.start == "teacher":
        given = [f"model.init_from={c.model.init_from}"] * bool(c.model.init_from)
        given += [f"peft.kind={c.peft.kind!r} and peft.trained={c.peft.trained!r}"] * (c.peft != FullFineTuning())
        found += [f"task.start='teacher' is for all parameters of a new model, not for {what}" for what in given]
    if isinstance(c.task, DistillTask) and not c.task.mix:
        found += [
            f"train.{name}={value} has no effect with task.mix=0: it changes the cross entropy"
            for name, value in cross_entropy.items()
            if value
        ]
    if isinstance(c.task, GRPO) and c.task.group >= 1 and t.batch_size % c.task.group:
        found.append(f"train.batch_size={t.batch_size} counts completions, so task.group={c.task.group} must divide it")
    if not isinstance(c.task, Pretrain) and t.sample_prompt:
        found.append(f"train.sample_prompt={t.sample_prompt!r} is for pretraining, not task.kind={c.task.kind!r}")
    return found
