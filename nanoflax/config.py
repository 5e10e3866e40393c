"""Every choice of a run, as frozen dataclasses: what the model is, what it reads, how it is trained.

A configuration is a value: `dataclasses.replace` changes it, `validate` refuses a bad one with every
problem in one go, `to_dict` and `from_dict` carry it through JSON.
"""

import dataclasses
import difflib
import types
import typing

from nanoflax.errors import UserError

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu")
NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "sinusoidal", "rotary")
DTYPES = ("auto", "float32", "bfloat16")
PACKINGS = ("joined", "isolated")
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
REMATS = ("none", "dots", "blocks")
MAX_SEED = 2**32 - 1  # of larger ones JAX would read the low half


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer (pre-norm). Sizes in the dimension letters of the design."""

    vocab_size: int = 0  # V; 0 takes the tokenizer's
    context: int = 256  # the longest T the model is made for
    layers: int = 4  # L
    dim: int = 256  # D
    heads: int = 4  # H
    kv_heads: int | None = None  # G; None means H (multi-head), 1 is multi-query
    head_dim: int | None = None  # K; None means D / H
    mlp_dim: int | None = None  # F; None means 4 D, or 8/3 D rounded up to 32 when gated
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    gated: bool = False  # down(act(gate(x)) * up(x)), Shazeer 2020, instead of down(act(up(x)))
    positions: str = "learned"
    rope_theta: float = 10_000.0
    bias: bool = True  # in every Linear and LayerNorm
    tied: bool = True  # the output head is the embedding, transposed
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
    ema: float = 0.0  # decay of an averaged copy used to evaluate and sample; 0 means none


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
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
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
    """Refuse a configuration that cannot work; config is a Config or a ModelConfig.

    Raises: UserError with every problem found, one per clause, before anything is allocated.
    """
    is_model = isinstance(config, ModelConfig)
    # What has a wrong type cannot be compared with anything, so these come alone.
    found = (_type_problems(config, "model." if is_model else "")
             or (_model_problems if is_model else _problems)(config))
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
    _choice(found, "model.norm", m.norm, NORMS)
    _choice(found, "model.activation", m.activation, ACTIVATIONS)
    _choice(found, "model.positions", m.positions, POSITIONS)
    _choice(found, "model.dtype", m.dtype, DTYPES)
    for name in ("context", "layers", "dim", "heads", "kv_heads", "head_dim", "mlp_dim"):
        value = getattr(m, name)
        if value is not None and value < 1:
            found.append(f"model.{name}={value} must be at least 1")
    if m.vocab_size < 0:
        found.append(f"model.vocab_size={m.vocab_size} must be positive, or 0 for the tokenizer's")
    if not 0 <= m.dropout < 1:
        found.append(f"model.dropout={m.dropout} must be in [0, 1)")
    if not (m.norm_eps > 0 and m.rope_theta > 0):  # NaN is neither
        found.append(f"model.norm_eps={m.norm_eps} and model.rope_theta={m.rope_theta} "
                     "must be positive")
    if found:
        return found
    if m.head_dim is None and m.dim % m.heads:
        found.append(f"model.heads={m.heads} does not divide model.dim={m.dim}; "
                     "change one or set model.head_dim")
    if m.heads % m.G:
        found.append(f"model.kv_heads={m.G} does not divide model.heads={m.heads}")
    if m.positions == "rotary" and m.K % 2:
        found.append(f"model.head_dim={m.K} must be even for rotary positions")
    if m.positions == "sinusoidal" and m.dim % 2:
        found.append(f"model.dim={m.dim} must be even for sinusoidal positions")
    return found


def _problems(c):
    found = _model_problems(c.model)
    d, o, t = c.data, c.optim, c.train
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
