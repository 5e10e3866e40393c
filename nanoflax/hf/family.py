"""The engine of model families: a Family row to a ModelConfig and back."""

import dataclasses
import typing

from nanoflax.config import ModelConfig, validate
from nanoflax.errors import UserError

# Theirs to ours; of several names for one, the last is written.
ACTIVATIONS = {
    "gelu_python": "gelu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
    "relu": "relu",
    "tanh": "tanh",
}
_THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
_TYPES = typing.get_type_hints(ModelConfig)
_MAX_SIZE = 2**31


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    keys: our module -> theirs, {i} the block. kernel, scale and embedding are called weight there,
    and a kernel is transposed. A pair (name, layout) or a triple (name, layout, part) says
    otherwise, see hf._read.
    """

    model_type: str
    classes: dict  # our head -> Transformers' classes; the first one is written
    keys: dict
    fields: dict  # of config.json -> of ModelConfig, where only the name differs
    preset: dict  # fields of ModelConfig that are the same in all its models
    defaults: dict = dataclasses.field(default_factory=dict)  # of config.json, if absent there
    only: dict = dataclasses.field(default_factory=dict)  # field -> allowed values or equal field
    read: typing.Callable = lambda hf: {}  # config.json -> what `fields` cannot say
    write: typing.Callable = lambda c: {}  # and back
    more_keys: typing.Callable = lambda c: {}  # keys that depend on the configuration
    present: dict = dataclasses.field(default_factory=dict)  # our field -> the tensor that decides
    same: typing.Callable = lambda c: {}  # names that may repeat a tensor in a file -> its own
    ignored: str = r"$^"  # names (a pattern) of what is no weight of this model
    base: str = ""  # the prefix that a file of the bare model does not have


def to_config(family, hf, head, max_layers=_MAX_SIZE):
    """The ModelConfig of a parsed config.json.

    Raises: UserError with every value that is missing, unsupported or impossible.
    """
    hf, found, ours = family.defaults | hf, [], {"head": head} | family.preset
    for field, name in family.fields.items():
        value = hf.get(field)
        wrong = field not in hf and f"{field} is missing"
        if not wrong and name.endswith("activation"):
            wrong = (not isinstance(value, str) or value not in ACTIVATIONS) and (
                f"{field}={value!r} is not one of {', '.join(ACTIVATIONS)}"
            )
            value = value if wrong else ACTIVATIONS[value]
        elif not wrong:
            limit = max_layers if name.endswith("layers") else _MAX_SIZE
            kind = _TYPES[name] if field in family.defaults else _required(_TYPES[name])
            wrong = _wrong_type(field, value, kind, limit)
        ours[name] = value
        found += [wrong] if wrong else []
    for field, allowed in family.only.items():
        value = hf.get(field)
        allowed = (hf.get(allowed),) if isinstance(allowed, str) else allowed
        if value is not None and value not in allowed:
            found.append(f"{field}={value!r} is not supported; it must be " + " or ".join(map(repr, allowed)))
    if not found:
        try:
            config = ModelConfig(**ours | family.read(hf))
            validate(config)
        except UserError as error:
            found.append(str(error))
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            found.append(f"a value that cannot be read: {type(error).__name__}: {error}")
    if found:
        raise UserError(f"config.json of model_type {family.model_type!r}: " + "; ".join(found))
    return config


def _required(kind):
    """int of int | None."""
    return next(k for k in (*typing.get_args(kind), kind) if k is not type(None))


def _wrong_type(field, value, kind, limit):
    """What is wrong with a value for a field of ours of this type; None if nothing."""
    kinds = typing.get_args(kind) or (kind,)
    if float in kinds:
        kinds = (*kinds, int)
    if type(value) not in kinds and not (value is None and type(None) in kinds):
        return f"{field}={value!r} must be of type {' or '.join(k.__name__ for k in kinds)}"
    if type(value) is int and abs(value) >= limit:
        return f"{field}={value} is more than this model's file can hold"
    return None


def from_config(family, config):
    """config.json of a ModelConfig, without what is not the model's."""
    c = canonical(config)
    hf = {"architectures": [family.classes[c.head][0]], "model_type": family.model_type}
    for field, name in family.fields.items():
        value = getattr(c, name)
        hf[field] = _THEIR_ACTIVATIONS[value] if name.endswith("activation") else value
    if c.head in ("classify", "tag"):
        hf["id2label"] = {str(i): f"LABEL_{i}" for i in range(c.labels)}
        hf["label2id"] = {f"LABEL_{i}": i for i in range(c.labels)}
    for field, allowed in family.only.items():
        hf[field] = hf[allowed] if isinstance(allowed, str) else allowed[0]
    return hf | family.write(c)


def canonical(config):
    """The configuration with every None filled in, and at its default what it does not use: two
    configurations of one model are equal then."""
    c, default = config, ModelConfig()
    unused = ["dtype", "attention_backend", "init_from", "lstm_attention", "lstm_start"]
    if c.positions != "rotary":
        unused += ["rope_theta", "rope_local_theta", "rope_fraction", "rope_scaling"]
    if c.positions != "rotary" or c.rope_scaling != "llama3":
        unused += ["rope_low", "rope_high", "rope_context"]
    if c.positions != "rotary" or c.rope_scaling == "none":
        unused += ["rope_factor"]
    if c.positions != "relative":
        unused += ["relative_buckets", "relative_distance"]
    if c.positions != "learned":
        unused += ["position_offset"]
    window = c.window if any(c.is_local(i) for i in range(c.layers)) else 0
    if not window:
        unused += ["global_layers", "rope_local_theta"]
    if c.head not in ("classify", "tag"):
        unused += ["labels"]
    if not c.has_pooler:
        unused += ["pooler_activation"]
    if c.head not in ("lm", "mlm"):
        unused += ["tied", "head_bias", "logit_softcap", "logit_scale"]
    if c.cross_layers:
        c = dataclasses.replace(c, decoder_layers=c.cross_layers)
    else:
        unused += ["decoder_layers", "start_id"]
    biases = {f"{part}_bias": c.has_bias(part) for part in ("qkv", "out", "mlp", "norm")}
    if c.norm == "rmsnorm":
        biases["norm_bias"] = False
    return dataclasses.replace(
        c,
        kv_heads=c.G,
        head_dim=c.K,
        mlp_dim=c.F,
        bias=True,
        **biases,
        window=window,
        pooler=c.has_pooler,
        attention_scale=c.attention_scale or c.K**-0.5,
        **{name: getattr(default, name) for name in unused},
    )


def differences(family, config):
    """The fields of ModelConfig that a family cannot express as they are in config."""
    c = canonical(config)
    if c.architecture != family.preset.get("architecture", "decoder"):
        return ["architecture"]
    if c.head not in family.classes:
        return ["head"]
    # What the tensors of a file say, not config.json.
    kept = {name: getattr(c, name) for name in family.present if c.head in ("none", "lm")}
    back = to_config(family, from_config(family, config), c.head)
    back = canonical(dataclasses.replace(back, **kept, tied=c.tied))
    return [
        name
        for name in _TYPES
        if name != "dropout"  # no part of what the model computes
        and not _close(getattr(c, name), getattr(back, name))
    ]


def _close(a, b):
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-6 * abs(a)  # a square root squared
    return a == b


def head_of(family, architectures):
    """Our head of config.json's architectures; that of the bare model where it names none.

    Raises: UserError naming those supported.
    """
    names = architectures if isinstance(architectures, list) else []
    for head, classes in family.classes.items():
        if any(name in classes for name in names):
            return head
    bare = [name for name in names if isinstance(name, str) and name.endswith("Model")]
    if names and not bare:
        known = ", ".join(name for classes in family.classes.values() for name in classes)
        raise UserError(
            f"architectures={names!r} of model_type {family.model_type!r} is not supported; supported are {known}"
        )
    return next(iter(family.classes))
