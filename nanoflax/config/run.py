"""What a run is: its data, optimizer, adapters, task and loop, beside the model."""

import dataclasses
import re

from nanoflax.config import model as models
from nanoflax.config.checks import at_least, choice, type_problems
from nanoflax.config.model import ModelConfig
from nanoflax.errors import UserError

TASKS = ("classify", "tag", "translate", "instruct", "language_model", "masked_lm", "denoise")
NOISES = ("spans", "infilling", "none")
# What an evaluation may measure, and whether more of it is better.
METRICS = {
    "validation_loss": False,
    "perplexity": False,
    "bits_per_byte": False,
    "accuracy": True,
    "masked_accuracy": True,
    "token_accuracy": True,
    "macro_f1": True,
    "f1": True,
    "exact_match": True,
    "bleu": True,
    "chrf": True,
    "rouge_l": True,
}
PACKINGS = ("joined", "isolated")
BLEU_TOKENIZERS = ("13a", "intl", "zh", "char", "none")  # those that need no other package
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
REMATS = ("none", "dots", "offload", "blocks")
PEFT_KINDS = ("none", "lora", "dora", "adalora", "houlsby", "pfeiffer", "prompt", "prefix")
MAX_SEED = 2**32 - 1  # of larger ones JAX would read the low half


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes windows of tokens."""

    train: str = "pydocs"  # pydocs | text:GLOB | tfds:NAME[:FIELD]; of finetune: see task_sources
    validation: str = ""  # another source; empty takes the source's own split, or a hash split
    validation_fraction: float = 0.05  # of the documents, by a hash of each
    field: str = "text"  # of a JSON line
    fields: str = ""  # of finetune: what the data calls our fields, as text=sentence,label=stars
    limit: int = 0  # of finetune: examples of a split, which it holds in memory; 0 means all
    unicode: str = "NFC"  # of finetune: or NFKC, or empty to leave characters as they are
    whitespace: str = "trim"  # of finetune: at the ends of lines and texts, or collapse, or empty
    keep_duplicates: bool = False  # of finetune: exact ones of a training example
    tokenizer: str = "bpe:2048"  # bytes | bpe:V | unigram:V | a .model file | a tokenizer directory
    packing: str = "joined"  # or isolated: documents of a window cannot see each other
    workers: int = 0  # tokenizing processes; 0 means one per core
    cache: str = ""  # directory of token files; empty means the user's cache directory


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"
    learning_rate: float = 1e-3  # peak, per step; Muon's own matrices take muon_learning_rate
    muon_learning_rate: float = 0.02
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # of the steps, for wsd: the last part, linear to the end value
    end_factor: float = 0.1  # the schedule ends at this fraction of the peak
    weight_decay: float = 0.1  # on matrices alone: no norm, bias or embedding
    b1: float = 0.9  # momentum of sgd and lion too
    b2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # global norm of the gradient; 0 means none
    layer_decay: float = 1.0  # each layer's learning rate is this times that of the one above
    ema: float = 0.0  # decay of an averaged copy used to evaluate and sample; 0 means none


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """How a model is adapted: which few parameters are added to it, and which are trained."""

    kind: str = "none"
    # What is trained, separated by commas: all | adapters | head | biases | last:N (blocks and what
    # follows them) | a pattern of paths. Empty: the adapters, or all if kind is none.
    trained: str = ""
    targets: str = "query|key|value|out|up|gate|down"  # pattern: the ends of adapted Linears' paths
    rank: int = 8  # of lora and dora; of adalora at first
    alpha: float = 16.0  # the scale of low-rank adapters is alpha / rank
    rank_stabilized: bool = False  # or alpha / sqrt(rank) (Kalajdzievski 2023)
    bottleneck: int = 64  # of houlsby (after attention and MLP) and pfeiffer (after the MLP)
    virtual_tokens: int = 20  # of prompt and prefix
    target_rank: int = 4  # adalora: of each matrix in the end, on average
    warmup_steps: int = 100  # adalora: before the first rank goes
    final_steps: int = 100  # adalora: after the last one went
    orthogonality: float = 0.1  # adalora: weight of the penalty
    beta1: float = 0.85  # adalora: smoothing of the sensitivities
    beta2: float = 0.85  # adalora: smoothing of their uncertainties


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    batch_size: int = 16  # windows in a step, over all devices and micro-batches
    accumulate: int = 1  # micro-batches in a step
    seed: int = 0
    z_loss: float = 0.0  # weight of log(Z)^2 (PaLM, section 5)
    label_smoothing: float = 0.0
    loss_chunks: int = 0  # pieces of T in the loss; 0 chooses so that a piece of logits is small
    # What the backward pass computes again: none | dots (all but products) | offload (the same, the
    # products waiting in the host's memory) | blocks (all).
    remat: str = "none"
    scan_layers: bool = False  # one block compiled and scanned over L, for deep models: see stacking
    max_skipped: int = 10  # non-finite steps in a row that stop the run
    evaluate_every: int = 200
    evaluate_batches: int = 0  # of the validation split, from its start; 0 means all
    metric: str = "validation_loss"  # or another of METRICS: it decides which step is the best
    patience: int = 0  # evaluations without a better metric before stopping; 0 means never
    checkpoint_every: int = 200
    checkpoint_seconds: float = 0.0  # or whenever so much time has passed; 0 means never
    keep: int = 2  # newest checkpoints kept, besides the best
    sample_prompt: str = ""  # continued at each evaluation and at the end
    sample_tokens: int = 64
    mesh: str = "-1,1,1"  # devices along data, fsdp, tensor[, context]; -1 takes the rest
    watchdog_seconds: float = 600.0  # without a step end a run of several processes; 0 means never
    tensorboard: bool = True
    wandb: str = ""  # project name; empty means none


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What finetune teaches, and how it is measured."""

    kind: str = "language_model"
    length: int = 128  # tokens of an example (of a source) at most, with the special ones
    target_length: int = 128  # of a target, in training and when written
    truncate: bool = True  # longer examples are cut (texts: split), counted; or else refused
    beams: int = 1  # of the evaluation of translate and denoise
    bleu_tokenize: str = "13a"  # sacrebleu's; of languages without spaces zh or char, or BLEU is 0
    noise: str = "spans"  # of denoise: T5's spans, BART's infilling, or none, an autoencoder
    noise_rate: float | None = None  # tokens masked or hidden; None: 0.15, of infilling 0.3
    noise_span: float = 3.0  # tokens that are hidden together, on average
    # Shift training, of translate's sources or of language_model's texts: see batching.moved.
    max_shift: int = 0  # tokens; where it is set, shifted validation examples are measured too
    shift_probability: float = 0.0  # of a training example
    # In training, of classify and tag: balanced, or name=2,other=0.5 (1 for names not there).
    class_weights: str = ""
    show: int = 3  # validation examples printed at the end, with what the model says


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    peft: PeftConfig = PeftConfig()
    task: TaskConfig = TaskConfig()
    train: TrainConfig = TrainConfig()


def validate(config):
    """Refuse a configuration that cannot work: a Config, a ModelConfig or a PeftConfig.

    Raises: UserError with every problem found, one per clause, before anything is allocated.
    """
    prefix, problems = {
        ModelConfig: ("model.", models.problems),
        PeftConfig: ("peft.", _peft_problems),
        Config: ("", _problems),
    }[type(config)]
    # What has a wrong type cannot be compared with anything, so these come alone.
    found = type_problems(config, prefix) or problems(config)
    if found:
        raise UserError("; ".join(found))


def _peft_problems(p):
    found = []
    choice(found, "peft.kind", p.kind, PEFT_KINDS)
    at_least(found, "peft", p, 1, "rank", "bottleneck", "virtual_tokens", "target_rank")
    at_least(found, "peft", p, 0, "warmup_steps", "final_steps", "orthogonality")
    if not p.alpha > 0:
        found.append(f"peft.alpha={p.alpha} must be positive")
    for name in ("beta1", "beta2"):
        if not 0 < getattr(p, name) < 1:
            found.append(f"peft.{name}={getattr(p, name)} must be in (0, 1)")
    for name in ("targets", "trained"):
        try:
            re.compile(getattr(p, name))
        except re.error as error:
            found.append(f"peft.{name}={getattr(p, name)!r} is no regular expression: {error}")
    if p.kind == "adalora" and p.target_rank > p.rank:
        found.append(f"peft.target_rank={p.target_rank} must be at most peft.rank={p.rank}")
    if p.rank_stabilized and p.kind not in ("lora", "dora"):
        found.append(f"peft.rank_stabilized needs peft.kind='lora' or 'dora', not {p.kind!r}")
    return found


def read_class_weights(text):
    """{class name: weight} of a task.class_weights that names them. Raises: ValueError."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.rpartition("=")
        weights[name.strip()] = float(weight)
        if not name.strip() or not 0 < weights[name.strip()] < float("inf"):
            raise ValueError(part)
    return weights


def _noise_problems(task):
    """The fields of noise that are set and that nothing reads."""
    reader, read = (
        f"task.kind={task.kind!r}",
        {"masked_lm": ("noise_rate",), "denoise": ("noise", "noise_rate", "noise_span")},
    )
    read = read.get(task.kind, ())
    if task.kind == "denoise" and task.noise == "none":
        reader, read = "task.noise='none'", ("noise",)
    return [
        f"task.{name}={getattr(task, name)!r} is not read with {reader}"
        for name in ("noise", "noise_rate", "noise_span")
        if name not in read and getattr(task, name) != getattr(TaskConfig, name)
    ]


def _class_weight_problems(task):
    if not task.class_weights:
        return []
    if task.kind not in ("classify", "tag"):
        return [f"task.class_weights={task.class_weights!r} needs task.kind='classify' or 'tag', not {task.kind!r}"]
    try:
        if task.class_weights != "balanced":
            read_class_weights(task.class_weights)
    except ValueError:
        return [
            f"task.class_weights={task.class_weights!r} must be empty, balanced, or positive "
            "weights as name=2,other=0.5"
        ]
    return []


def _problems(c):
    found = models.problems(c.model) + _peft_problems(c.peft)
    d, o, p, t = c.data, c.optim, c.peft, c.train
    choice(found, "data.packing", d.packing, PACKINGS)
    choice(found, "optim.name", o.name, OPTIMIZERS)
    choice(found, "optim.schedule", o.schedule, SCHEDULES)
    choice(found, "train.remat", t.remat, REMATS)
    choice(found, "train.metric", t.metric, METRICS)
    at_least(
        found,
        "train",
        t,
        1,
        "steps",
        "batch_size",
        "accumulate",
        "evaluate_every",
        "checkpoint_every",
        "keep",
        "max_skipped",
    )
    at_least(
        found,
        "train",
        t,
        0,
        "seed",
        "z_loss",
        "loss_chunks",
        "evaluate_batches",
        "patience",
        "checkpoint_seconds",
        "sample_tokens",
        "watchdog_seconds",
    )
    at_least(
        found,
        "optim",
        o,
        0,
        "learning_rate",
        "muon_learning_rate",
        "warmup_steps",
        "end_factor",
        "weight_decay",
        "clip",
        "eps",
    )
    at_least(found, "data", d, 0, "workers")
    choice(found, "task.kind", c.task.kind, TASKS)
    choice(found, "task.noise", c.task.noise, NOISES)
    at_least(found, "task", c.task, 4, "length", "target_length")
    at_least(found, "task", c.task, 1, "noise_span")
    if c.task.noise_rate is not None and not 0 < c.task.noise_rate < 1:
        found.append(f"task.noise_rate={c.task.noise_rate} must be in (0, 1)")
    at_least(found, "task", c.task, 1, "beams")
    choice(found, "task.bleu_tokenize", c.task.bleu_tokenize, BLEU_TOKENIZERS)
    at_least(found, "task", c.task, 0, "show", "max_shift")
    if c.task.max_shift and c.task.kind not in ("translate", "language_model"):
        found.append(
            f"task.max_shift={c.task.max_shift} needs task.kind='translate' or 'language_model', not {c.task.kind!r}"
        )
    if not 0 <= c.task.shift_probability <= 1:
        found.append(f"task.shift_probability={c.task.shift_probability} must be in [0, 1]")
    if c.task.shift_probability and not c.task.max_shift:
        found.append(f"task.shift_probability={c.task.shift_probability} needs task.max_shift of at least 1")
    found += _noise_problems(c.task) + _class_weight_problems(c.task)
    if t.z_loss and c.task.kind in ("classify", "tag"):
        found.append(f"train.z_loss={t.z_loss} does not go with task.kind={c.task.kind!r}")
    for name, value in [
        ("optim.b1", o.b1),
        ("optim.b2", o.b2),
        ("optim.ema", o.ema),
        ("train.label_smoothing", t.label_smoothing),
    ]:
        if not 0 <= value < 1:
            found.append(f"{name}={value} must be in [0, 1)")
    if not 0 < d.validation_fraction < 1:
        found.append(f"data.validation_fraction={d.validation_fraction} must be in (0, 1)")
    if t.seed > MAX_SEED:
        found.append(f"train.seed={t.seed} must be at most {MAX_SEED}")
    if not 0 < o.decay_fraction <= 1:
        found.append(f"optim.decay_fraction={o.decay_fraction} must be in (0, 1]")
    if t.accumulate >= 1 and t.batch_size % t.accumulate:
        found.append(f"train.accumulate={t.accumulate} does not divide train.batch_size={t.batch_size}")
    if p.kind == "adalora" and p.warmup_steps + p.final_steps >= t.steps:
        found.append(
            f"peft.warmup_steps={p.warmup_steps} and peft.final_steps={p.final_steps} must "
            f"leave some of train.steps={t.steps} in which ranks go"
        )
    if p.kind == "adalora" and o.ema:
        found.append(
            f"optim.ema={o.ema} does not go with peft.kind='adalora': the average would have more ranks than the budget"
        )
    if t.scan_layers and p.kind == "adalora":
        found.append(
            "train.scan_layers=true does not go with peft.kind='adalora', which weighs the "
            "matrices of all blocks against each other"
        )
    if t.scan_layers and not c.model.has_blocks:
        found.append("train.scan_layers=true needs blocks, and model.architecture='lstm' has none")
    if o.layer_decay != 1 and not c.model.has_blocks:
        found.append(f"optim.layer_decay={o.layer_decay} needs blocks, and model.architecture='lstm' has none")
    if not 0 < o.layer_decay <= 1:
        found.append(f"optim.layer_decay={o.layer_decay} must be in (0, 1]")
    if o.warmup_steps >= t.steps > 1:
        found.append(f"optim.warmup_steps={o.warmup_steps} must be less than train.steps={t.steps}")
    if t.loss_chunks > 0 and c.model.context % t.loss_chunks:
        found.append(f"train.loss_chunks={t.loss_chunks} does not divide model.context={c.model.context}; 0 chooses")
    if t.sample_tokens >= c.model.context:
        found.append(f"train.sample_tokens={t.sample_tokens} must be less than model.context={c.model.context}")
    return found
