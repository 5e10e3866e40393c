"""Every choice of a run, as frozen dataclasses: what the model is, what it reads, how it is trained.

A configuration is a value: `dataclasses.replace` changes it, `validate` refuses a bad one with every
problem in one go, `to_dict` and `from_dict` carry it through JSON.
"""

import dataclasses
import difflib
import re
import types
import typing

from nanoflax.errors import UserError

ARCHITECTURES = ("decoder", "encoder", "encoder_decoder", "lstm")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "tanh")
NORMS = ("layernorm", "rmsnorm")
NORM_PLACES = ("pre", "post", "sandwich", "after")
QK_NORMS = ("none", "head", "full")
POSITIONS = ("learned", "sinusoidal", "sinusoidal_halves", "rotary", "relative", "none")
ROPE_SCALINGS = ("none", "linear", "llama3")
TASKS = ("classify", "tag", "translate", "instruct", "language_model")
HEADS = {"decoder": ("lm",), "encoder": ("none", "mlm", "classify", "tag"),
         "encoder_decoder": ("lm",), "lstm": ("lm",)}
LSTM_ATTENTIONS = ("additive", "multiplicative")
LSTM_STARTS = ("encoder", "zeros")
DTYPES = ("auto", "float32", "bfloat16")
PACKINGS = ("joined", "isolated")
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
REMATS = ("none", "dots", "blocks")
PEFT_KINDS = ("none", "lora", "dora", "adalora", "houlsby", "pfeiffer", "prompt", "prefix")
MAX_SEED = 2**32 - 1  # of larger ones JAX would read the low half


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of any architecture. Sizes in the dimension letters of the design; the published
    families differ in these values alone."""

    architecture: str = "decoder"
    vocab_size: int = 0  # V; 0 takes the tokenizer's
    # Of finetune: a workdir, Transformers directory, hub name or .gguf, which then decides every field
    # but head, labels and dropout.
    init_from: str = ""
    context: int = 256  # the longest T (and S of a source) the model is made for
    layers: int = 4  # L; of an encoder-decoder, on the encoder's side
    decoder_layers: int | None = None  # None means L
    dim: int = 256  # D
    heads: int = 4  # H
    kv_heads: int | None = None  # G; None means H (multi-head), 1 is multi-query
    head_dim: int | None = None  # K; None means D / H
    mlp_dim: int | None = None  # F; None means 4 D, or 8/3 D rounded up to 32 when gated
    activation: str = "gelu_tanh"
    gated: bool = False  # down(act(gate(x)) * up(x)), Shazeer 2020, instead of down(act(up(x)))
    parallel: bool = False  # attention and MLP read the same x (GPT-J, GPT-NeoX)

    norm: str = "layernorm"
    norm_eps: float = 1e-5
    norm_place: str = "pre"  # see blocks.Block
    norm_unit_offset: bool = False  # the scale is 1 + its parameter (Gemma)
    embed_norm: bool = False  # a norm right after the embeddings (BERT, BART)
    qk_norm: str = "none"  # RMSNorm of queries and keys: over each head's K, or full: over H K

    positions: str = "learned"
    position_offset: int = 0  # rows of the learned table before position 0 (OPT, RoBERTa, BART: 2)
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None  # in the layers with a window (Gemma 3); None: the same
    rope_fraction: float = 1.0  # of K that is rotated (GPT-NeoX)
    rope_scaling: str = "none"
    rope_factor: float = 1.0  # how many times longer than trained for
    rope_low: float = 1.0  # llama3: slower turns a context than this are all slowed by the factor
    rope_high: float = 4.0  # llama3: faster ones are kept
    rope_context: int = 8192  # llama3: the context trained for
    relative_buckets: int = 32  # T5
    relative_distance: int = 128  # T5: the last bucket holds all beyond

    window: int = 0  # a query sees its own and the window - 1 keys before it; 0 means all
    global_layers: tuple[int, ...] = ()  # these ignore the window
    attention_scale: float | None = None  # None means K^-1/2
    attention_softcap: float = 0.0  # cap tanh(score / cap) (Gemma 2); 0 means none

    bias: bool = True  # in every Linear and LayerNorm, unless one of these says otherwise
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    norm_bias: bool | None = None

    head: str = "lm"  # an encoder's: none, mlm, classify or tag
    labels: int = 2  # of classify and tag
    pooler: bool = False  # a Linear and activation on the first state; classify has it always
    pooler_activation: str = "tanh"
    token_types: int = 0  # kinds of input segment (BERT: 2)
    tied: bool = True  # the output head is the embedding, transposed
    head_bias: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0  # of the states before the head (T5: D^-1/2)
    logit_softcap: float = 0.0
    start_id: int = 0  # the token before the first target of an encoder-decoder

    lstm_attention: str = "additive"
    lstm_start: str = "encoder"  # the decoder's first state: the encoder's last, or zeros

    dropout: float = 0.0
    dtype: str = "auto"  # of activations: float32 on CPU, bfloat16 elsewhere; parameters: float32

    @property
    def G(self):
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def K(self):
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def F(self):
        if self.mlp_dim is not None:
            return self.mlp_dim
        return -(-8 * self.dim // 3 // 32) * 32 if self.gated else 4 * self.dim

    @property
    def rotary_dim(self):
        """How many of a head's K are rotated."""
        return int(self.K * self.rope_fraction)

    def has_bias(self, part):
        """Whether the Linears or norms of `part` (qkv, out, mlp, norm) have a bias."""
        own = getattr(self, f"{part}_bias")
        return self.bias if own is None else own

    def is_local(self, layer):
        """Whether a layer sees only its window."""
        return self.window > 0 and layer not in self.global_layers


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes windows of tokens."""

    train: str = "pydocs"  # pydocs | text:GLOB | tfds:NAME[:FIELD]
    validation: str = ""  # another source; empty takes the source's own split, or a hash split
    validation_fraction: float = 0.05  # of the documents, by a hash of each
    field: str = "text"  # of a JSON line
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
    remat: str = "none"  # recompute in the backward pass: none | dots (keep products) | blocks
    max_skipped: int = 10  # non-finite steps in a row that stop the run
    evaluate_every: int = 200
    evaluate_batches: int = 0  # of the validation split, from its start; 0 means all
    patience: int = 0  # evaluations without a better loss before stopping; 0 means never
    checkpoint_every: int = 200
    checkpoint_seconds: float = 0.0  # or whenever so much time has passed; 0 means never
    keep: int = 2  # newest checkpoints kept, besides the best
    sample_prompt: str = ""  # continued at each evaluation and at the end
    sample_tokens: int = 64
    mesh: str = "-1,1,1"  # devices along data, fsdp, tensor; -1 takes the rest
    tensorboard: bool = True
    wandb: str = ""  # project name; empty means none


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What finetune teaches, and how it is measured."""

    kind: str = "language_model"
    length: int = 128  # tokens of an example (of a source) at most, with the special ones
    target_length: int = 128  # of a target, in training and when written
    truncate: bool = True  # longer examples are cut and counted, or else refused
    beams: int = 1  # of translate's evaluation
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


_GPT2 = ModelConfig(vocab_size=50257, context=1024, dropout=0.0)
_LLAMA = ModelConfig(norm="rmsnorm", activation="silu", gated=True, positions="rotary",
                     bias=False, tied=False)


def _with(base, **changes):
    return dataclasses.replace(base, **changes)


PRESETS = {
    "nano-1m": _with(_LLAMA, layers=4, dim=128, heads=4, context=128, tied=True),
    "nano-5m": _with(_LLAMA, layers=4, dim=256, heads=4, context=256, tied=True),
    "nano-15m": _with(_LLAMA, layers=8, dim=384, heads=6, context=512, tied=True),
    "gpt2": _with(_GPT2, layers=12, dim=768, heads=12),
    "gpt2-medium": _with(_GPT2, layers=24, dim=1024, heads=16),
    "gpt2-large": _with(_GPT2, layers=36, dim=1280, heads=20),
    "gpt2-xl": _with(_GPT2, layers=48, dim=1600, heads=25),
    # The base model of Vaswani et al. 2017, table 3, to be trained from scratch.
    "transformer-base": ModelConfig(
        architecture="encoder_decoder", context=512, layers=6, dim=512, heads=8, mlp_dim=2048,
        activation="relu", norm_place="post", positions="sinusoidal", embed_scale=512**0.5,
        qkv_bias=False, out_bias=False, dropout=0.1),
    # Llama 3.2 1B (Meta, 2024), without its rotary scaling.
    "llama-1b": _with(_LLAMA, vocab_size=128256, context=8192, layers=16, dim=2048, heads=32,
                      kv_heads=8, head_dim=64, mlp_dim=8192, rope_theta=500_000.0, tied=True),
}


def preset(name, **changes):
    """The ModelConfig of a published or shipped size, with some fields changed.

    Raises: UserError for an unknown name or field.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    return from_dict(ModelConfig, dataclasses.asdict(PRESETS[name]) | changes, where="preset")


def validate(config):
    """Refuse a configuration that cannot work: a Config, a ModelConfig or a PeftConfig.

    Raises: UserError with every problem found, one per clause, before anything is allocated.
    """
    prefix, problems = {ModelConfig: ("model.", _model_problems),
                        PeftConfig: ("peft.", _peft_problems), Config: ("", _problems)}[type(config)]
    # What has a wrong type cannot be compared with anything, so these come alone.
    found = _type_problems(config, prefix) or problems(config)
    if found:
        raise UserError("; ".join(found))


def _type_problems(config, prefix):
    found = []
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(kind) and isinstance(value, kind):
            found += _type_problems(value, f"{prefix}{name}.")
        elif not _is_of(kind, value):
            found.append(f"{prefix}{name}={value!r} must be {type_name(kind)}")
    return found


def _is_of(kind, value):
    if isinstance(kind, types.UnionType):
        return any(_is_of(k, value) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(typing.get_args(kind)[0], v) for v in value)
    if isinstance(value, bool):  # an int to Python
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def type_name(kind):
    """A field's type in words: one of int, float, bool, str, a tuple of one of them, or None."""
    if isinstance(kind, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"a list, each {type_name(typing.get_args(kind)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text",
             types.NoneType: "none"}
    return names.get(kind) or f"a {kind.__name__}"


def _model_problems(m):
    found = []
    for name, choices in [
            ("architecture", ARCHITECTURES), ("norm", NORMS), ("norm_place", NORM_PLACES),
            ("qk_norm", QK_NORMS), ("activation", ACTIVATIONS), ("pooler_activation", ACTIVATIONS),
            ("positions", POSITIONS), ("rope_scaling", ROPE_SCALINGS),
            ("head", HEADS.get(m.architecture, ())), ("lstm_attention", LSTM_ATTENTIONS),
            ("lstm_start", LSTM_STARTS), ("dtype", DTYPES)]:
        _choice(found, f"model.{name}", getattr(m, name), choices)
    optional = [name for name in ("decoder_layers", "kv_heads", "head_dim", "mlp_dim")
                if getattr(m, name) is not None]
    _at_least(found, "model", m, 1, "context", "layers", "dim", "heads", "labels", "rope_context",
              "relative_buckets", "relative_distance", *optional)
    _at_least(found, "model", m, 0, "window", "attention_softcap", "logit_softcap", "token_types",
              "position_offset", "start_id")
    if m.vocab_size < 0:
        found.append(f"model.vocab_size={m.vocab_size} must be positive, or 0 for the tokenizer's")
    if not 0 <= m.dropout < 1:
        found.append(f"model.dropout={m.dropout} must be in [0, 1)")
    if not 0 < m.rope_fraction <= 1:
        found.append(f"model.rope_fraction={m.rope_fraction} must be in (0, 1]")
    for name in ("norm_eps", "rope_theta", "rope_local_theta", "rope_factor", "rope_low",
                 "rope_high", "attention_scale"):
        value = getattr(m, name)
        if value is not None and not value > 0:  # NaN is not
            found.append(f"model.{name}={value} must be positive")
    if found:
        return found
    if m.head_dim is None and m.dim % m.heads:
        found.append(f"model.heads={m.heads} does not divide model.dim={m.dim}; "
                     "change one or set model.head_dim")
    if m.heads % m.G:
        found.append(f"model.kv_heads={m.G} does not divide model.heads={m.heads}")
    if m.positions == "rotary" and (m.rotary_dim % 2 or m.rotary_dim < 2):
        part = "" if m.rope_fraction == 1 else f" times model.rope_fraction={m.rope_fraction}"
        found.append(f"model.head_dim={m.K}{part} must be even for rotary positions")
    if m.positions.startswith("sinusoidal") and m.dim % 2:
        found.append(f"model.dim={m.dim} must be even for sinusoidal positions")
    if m.parallel and m.norm_place != "pre":
        found.append(f"model.parallel needs model.norm_place='pre', not {m.norm_place!r}")
    if m.rope_scaling == "llama3" and not m.rope_low < m.rope_high:
        found.append(f"model.rope_low={m.rope_low} must be less than model.rope_high={m.rope_high}")
    if m.architecture == "lstm" and m.decoder_layers not in (None, m.layers):
        found.append(f"model.decoder_layers={m.decoder_layers} must equal model.layers={m.layers} "
                     "in an lstm: each layer starts where the encoder's ended")
    if m.vocab_size and m.start_id >= m.vocab_size:
        found.append(f"model.start_id={m.start_id} must be below model.vocab_size={m.vocab_size}")
    return found


def _peft_problems(p):
    found = []
    _choice(found, "peft.kind", p.kind, PEFT_KINDS)
    _at_least(found, "peft", p, 1, "rank", "bottleneck", "virtual_tokens", "target_rank")
    _at_least(found, "peft", p, 0, "warmup_steps", "final_steps", "orthogonality")
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


def _problems(c):
    found = _model_problems(c.model) + _peft_problems(c.peft)
    d, o, p, t = c.data, c.optim, c.peft, c.train
    _choice(found, "data.packing", d.packing, PACKINGS)
    _choice(found, "optim.name", o.name, OPTIMIZERS)
    _choice(found, "optim.schedule", o.schedule, SCHEDULES)
    _choice(found, "train.remat", t.remat, REMATS)
    _at_least(found, "train", t, 1, "steps", "batch_size", "accumulate", "evaluate_every",
              "checkpoint_every", "keep", "max_skipped")
    _at_least(found, "train", t, 0, "seed", "z_loss", "loss_chunks", "evaluate_batches",
              "patience", "checkpoint_seconds", "sample_tokens")
    _at_least(found, "optim", o, 0, "learning_rate", "muon_learning_rate", "warmup_steps",
              "end_factor", "weight_decay", "clip", "eps")
    _at_least(found, "data", d, 0, "workers")
    _choice(found, "task.kind", c.task.kind, TASKS)
    _at_least(found, "task", c.task, 4, "length", "target_length")
    _at_least(found, "task", c.task, 1, "beams")
    _at_least(found, "task", c.task, 0, "show")
    for name, value in [("optim.b1", o.b1), ("optim.b2", o.b2), ("optim.ema", o.ema),
                        ("train.label_smoothing", t.label_smoothing)]:
        if not 0 <= value < 1:
            found.append(f"{name}={value} must be in [0, 1)")
    if not 0 < d.validation_fraction < 1:
        found.append(f"data.validation_fraction={d.validation_fraction} must be in (0, 1)")
    if t.seed > MAX_SEED:
        found.append(f"train.seed={t.seed} must be at most {MAX_SEED}")
    if not 0 < o.decay_fraction <= 1:
        found.append(f"optim.decay_fraction={o.decay_fraction} must be in (0, 1]")
    if t.accumulate >= 1 and t.batch_size % t.accumulate:
        found.append(f"train.accumulate={t.accumulate} does not divide "
                     f"train.batch_size={t.batch_size}")
    if p.kind == "adalora" and p.warmup_steps + p.final_steps >= t.steps:
        found.append(f"peft.warmup_steps={p.warmup_steps} and peft.final_steps={p.final_steps} must "
                     f"leave some of train.steps={t.steps} in which ranks go")
    if not 0 < o.layer_decay <= 1:
        found.append(f"optim.layer_decay={o.layer_decay} must be in (0, 1]")
    if o.warmup_steps >= t.steps > 1:
        found.append(f"optim.warmup_steps={o.warmup_steps} must be less than "
                     f"train.steps={t.steps}")
    if t.loss_chunks > 0 and c.model.context % t.loss_chunks:
        found.append(f"train.loss_chunks={t.loss_chunks} does not divide "
                     f"model.context={c.model.context}; 0 chooses")
    if t.sample_tokens >= c.model.context:
        found.append(f"train.sample_tokens={t.sample_tokens} must be less than "
                     f"model.context={c.model.context}")
    return found


def _choice(found, name, value, choices):
    if value not in choices:
        found.append(f"{name}={value!r} is not one of {', '.join(choices)}")


def _at_least(found, section, config, least, *names):
    for name in names:
        value = getattr(config, name)
        if not value >= least:  # also catches NaN
            found.append(f"{section}.{name}={value} must be at least {least}")


def to_dict(config):
    """Nested plain dict of a configuration, for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls, values, where="config"):
    """A configuration of class `cls` from `to_dict`'s output; absent fields take their defaults.

    Lists become tuples, which JSON does not have.
    Raises: UserError for a field that does not exist, naming the nearest that does, and for values
    of a wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}={values!r} must be the fields of a {cls.__name__}")
    kinds, known = typing.get_type_hints(cls), {}
    for name, value in values.items():
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, n=1, cutoff=0.0)
            raise UserError(f"{where}.{name} does not exist; did you mean {where}.{near[0]}?")
        if dataclasses.is_dataclass(kinds[name]):
            value = from_dict(kinds[name], value, f"{where}.{name}")
        known[name] = tuple(value) if isinstance(value, list) else value
    config = cls(**known)
    if found := _type_problems(config, f"{where}."):
        raise UserError("; ".join(found))
    return config


def diff(old, new):
    """Lines naming each leaf in which two `to_dict` values differ, as `model.dim: 256 -> 384`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}.{line}" for line in diff(a, b)]
        elif a != b:
            lines.append(f"{key}: {a!r} -> {b!r}")
    return lines
