"""The class Family, and conversions between config.json and ModelConfig that use a Family."""

import dataclasses
import json
import operator
import typing
from collections.abc import Callable, Mapping
from typing import Any

from nanoflax.config import ROPE_SCALINGS, ModelConfig, MoEConfig, RopeConfig, as_float, validate
from nanoflax.errors import UserError
from nanoflax.hf.watched import Watched

# Activation in config.json -> ours. If several names have the same activation, the last name is written.
ACTIVATIONS = {
    "gelu_python": "gelu", "gelu": "gelu", "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu",
    "silu": "silu", "relu": "relu", "relu2": "relu2", "tanh": "tanh"}  # fmt: skip
THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
FIELD_TYPES = {name: kind for name, kind in typing.get_type_hints(ModelConfig).items() if name != "section"}
# The fields of sections by dotted names, such as moe.experts.
_NAMES = FIELD_TYPES | {
    f"{section}.{name}": kind
    for section in ("rope", "moe", "latent", "recurrent")
    for name, kind in typing.get_type_hints(FIELD_TYPES[section]).items()
}
_MAX_SIZE = 2**30  # the sum of two is an int32
_MAX_CLASSES = 1_000_000

Json = dict[str, Any]  # a parsed config.json
Keys = Mapping[str, str | tuple]


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type of Transformers: its config.json and the names of its tensors. CONTRIBUTING.md: how to add one.

    keys: path of our module -> name of the module in Transformers; {i} is the number of the block. Our leaves kernel,
    scale and embedding are called weight in a file, and a kernel is transposed there. The key may also be the path of
    one parameter; then the name is the full name of the tensor. If the name has {e}, each expert (in norms of
    StableLM each head) has a tensor of its own. Instead of a name, (name, layout) or (name, layout, part) gives the
    layout of the tensor:

      same            unchanged                           (GPT-2's c_proj, every bias)
      transposed      [out, in] for our kernel [in, out]  (the default of a kernel)
      row             [1, V] for [V]
      column          [D] for [D, 1] (GGUF)
      fused           parts 0, 1, ... one after another along the outputs, of any sizes, transposed: a query, key
                      and value in one [H K + 2 G K, D], a gate and up in one [2 F, D]
      fused_columns   the same, not transposed: [D, 3 D]  (GPT-2's c_attn)
      interleaved     parts of equal sizes whose outputs alternate, not transposed: a gate and up in one [D, 2 F]
      fused_by_head   for each head its part of each, transposed: [H 3 K, D] (GPT-NeoX); for groups of heads, their
                      number follows the part (Qwen3-Next)
      rotary_pairs    transposed, and the two halves of each rotary pair are neighbours (GGUF)
      each_transposed [E, out, in] for our kernels [E, in, out] of experts, several one after another (GGUF, Granite)
      plus_one        float32, 1 + ours (GGUF: the norms of Gemma)
    """

    model_type: str
    classes: dict[str, tuple[str, ...]]  # our head -> Transformers' classes; the first one is written
    keys: dict[str, Any]  # as Keys
    # Name in config.json -> name in ModelConfig, if the value is the same. A field of a section has a dotted name,
    # such as moe.experts, here and in preset and read.
    fields: dict[str, str]
    preset: Json  # fields of ModelConfig that are equal in all models of the family
    defaults: Json = dataclasses.field(default_factory=dict)  # values of config.json that it may omit
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)  # other name in config.json -> the name used here
    # Field of config.json -> its allowed values (the first is written), or the field that it must equal.
    only: dict[str, tuple | str] = dataclasses.field(default_factory=dict)
    # config.json, with defaults -> further fields of ModelConfig; a UserError for what is not computed.
    read: Callable[[Json], Json] = lambda hf: {}
    write: Callable[[ModelConfig], Json] = lambda c: {}  # ModelConfig -> further values of config.json
    more_keys: Callable[[ModelConfig], dict[str, Any]] = lambda c: {}  # keys that depend on the configuration
    # Keys of files that have the experts of a layer as Transformers 5 computes them: gate_up_proj [E, 2 F, D] and
    # down_proj [E, D, F] of one module. The adapters of peft for experts have the names of this module.
    stacked: dict[str, Any] = dataclasses.field(default_factory=dict)
    # Field of ModelConfig -> the tensor whose presence decides it.
    present: dict[str, str] = dataclasses.field(default_factory=dict)
    # Name of a tensor that may be a copy of another -> name of the other. A tied output layer needs no entry.
    same: Callable[[ModelConfig], dict[str, str]] = lambda c: {}
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)  # name in some files -> the name of `keys`
    # Name of a tensor without numbers, which Transformers has all the same -> its shape.
    empty: Callable[[ModelConfig], dict[str, tuple[int, ...]]] = lambda c: {}
    ignored: str = r"$^"  # pattern of the names of tensors that are not weights of the model
    base: str = ""  # prefix of tensor names that files of the bare model do not have
    variant: str = ""  # field of config.json that is true in this family, and not in another of the same model_type

    def __post_init__(self):
        unknown = {*self.fields.values(), *self.preset, *self.present} - _NAMES.keys()
        if unknown:
            raise ValueError(f"family {self.model_type}: ModelConfig has no {', '.join(sorted(unknown))}")

    @property
    def name(self) -> str:
        """model_type, and what distinguishes the family from another of the same model_type."""
        return f"{self.model_type} ({self.variant})" if self.variant else self.model_type

    def keys_of(self, config: ModelConfig) -> dict[str, Any]:
        """All keys of a model with this configuration."""
        return self.keys | self.more_keys(config) | (self.stacked if config.moe.stacked else {})

    def unembed(self, config: ModelConfig) -> str:
        """The name of the tensor of the output layer."""
        return f"{self.keys_of(config)['unembed']}.weight"

    def copies(self, config: ModelConfig) -> dict[str, str]:
        """Name of a tensor that may be a copy of another -> name of the other."""
        tied = {self.unembed(config): f"{self.keys['embed']}.weight"} if config.tied else {}
        return self.same(config) | tied


def to_config(family: Family, hf: Json, head: str, max_layers: int = _MAX_SIZE) -> ModelConfig:
    """The ModelConfig of a parsed config.json.

    Raises: UserError with every value that is missing, unsupported or impossible.
    """
    hf = family.defaults | {name: hf[other] for other, name in family.aliases.items() if other in hf} | hf
    ours: Json = {"head": head} | family.preset
    flags = [field for field, x in family.defaults.items() if type(x) is bool and field not in family.fields]
    problems = [wrong for field in flags if (wrong := _wrong_type(field, hf[field], bool | None, _MAX_SIZE))]
    for field, name in family.fields.items():
        value = hf.get(field)
        wrong = f"{field} is missing" if field not in hf else None
        if not wrong and name.endswith("activation"):
            if isinstance(value, str) and value in ACTIVATIONS:
                value = ACTIVATIONS[value]
            else:
                wrong = f"{field}={value!r} is not one of {', '.join(ACTIVATIONS)}"
        elif not wrong:
            limit = max_layers if name.endswith("layers") else _MAX_SIZE
            kind = _NAMES[name] if field in family.defaults else _required(_NAMES[name])
            wrong = _wrong_type(field, value, kind, limit)
        ours[name] = value
        problems += [wrong] if wrong else []
    for field, allowed in family.only.items():
        value = hf.get(field)
        allowed = (hf.get(allowed),) if isinstance(allowed, str) else allowed
        if value is not None and value not in allowed:
            problems.append(f"{field}={value!r} is not supported; it must be " + " or ".join(map(repr, allowed)))
    if not problems:
        seen: list[str] = []
        try:
            config = _assembled(ours | _read_classes(hf, head) | family.read(Watched(hf, seen)))
            validate(config)
        except UserError as error:
            problems.append(str(error))
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            last = ", ".join(f"{name}={str(hf.get(name))[:80]}" for name in [*dict.fromkeys(seen[::-1])][:3])
            problems.append(f"a value that cannot be read, among {last or 'all'}: {type(error).__name__}: {error}")
    if problems:
        raise UserError(f"config.json of model_type {family.model_type!r}: " + "; ".join(problems))
    return config


def _assembled(values: Json) -> ModelConfig:
    """A ModelConfig from its fields; those of sections have dotted names."""
    sections: dict[str, Json] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = as_float(_NAMES[name], value, f"model.{name}")
    own = sections.pop("", {})
    return ModelConfig(**own | {name: FIELD_TYPES[name](**fields) for name, fields in sections.items()})


def _required(kind):
    """The type without None: int for int | None."""
    return next(k for k in (*typing.get_args(kind), kind) if k is not type(None))


def _wrong_type(field: str, value: Any, kind: Any, limit: int) -> str | None:
    """The problem of a value for a field of this type; None if there is none."""
    kinds = typing.get_args(kind) or (kind,)
    if float in kinds:
        kinds = (*kinds, int)
    if type(value) not in kinds and not (value is None and type(None) in kinds):
        return f"{field}={value!r} must be of type {' or '.join(k.__name__ for k in kinds)}"
    if type(value) is int and abs(value) >= limit:
        return f"{field}={value} is too large for the files of this model"
    return None


def _read_classes(hf: Json, head: str) -> Json:
    """The fields of ModelConfig for the classes of a head: their names in id2label, or else in label2id.

    Raises: UserError for names that are not those of classes 0, 1, ..., and for several numbers instead of classes.
    """
    if head not in ("classify", "tag"):
        return {}
    numbers = hf.get("label2id") or {}
    count = len(hf.get("id2label") or numbers) or hf.get("num_labels", 2)
    if type(count) is not int or not 0 < count <= _MAX_CLASSES:
        raise UserError(f"num_labels={count!r} must be a number from 1 to {_MAX_CLASSES}")
    default = {str(i): f"LABEL_{i}" for i in range(count)}
    named = hf.get("id2label") or default
    if named.keys() != default.keys():
        raise UserError(f"id2label must name the classes 0 to {count - 1}, not {', '.join(map(str, named))}")
    in_numbers = {str(i): name for name, i in numbers.items()}
    if named == default and in_numbers.keys() == default.keys():
        named = in_numbers
    names = [named[i] if isinstance(named[i], str) else json.dumps(named[i]) for i in default]
    kind, kinds = hf.get("problem_type"), ("regression", "single_label_classification", "multi_label_classification")
    if head == "classify" and (kind not in (None, *kinds) or kind == "regression" and count > 1):
        raise UserError(
            f"problem_type={kind!r} with {count} outputs is not supported; it must be {' or '.join(kinds[1:])}"
        )
    return {"labels": count, "class_names": tuple(names), "multi_label": head == "classify" and kind == kinds[2]}


def _write_classes(c: ModelConfig) -> Json:
    found: Json = {
        "id2label": {str(i): name for i, name in enumerate(c.class_names)},
        "label2id": {name: i for i, name in enumerate(c.class_names)},
    }
    if c.head == "classify" and not c.is_regression:
        found["problem_type"] = f"{'multi' if c.multi_label else 'single'}_label_classification"
    return found


def from_config(family: Family, config: ModelConfig) -> Json:
    """The config.json of a ModelConfig, without token ids."""
    c = canonical(config)
    hf = {"architectures": [family.classes[c.head][0]], "model_type": family.model_type}
    for field, name in family.fields.items():
        value = operator.attrgetter(name)(c)
        hf[field] = THEIR_ACTIVATIONS[value] if name.endswith("activation") else value
    if c.head in ("classify", "tag"):
        hf |= _write_classes(c)
    for field, allowed in family.only.items():
        hf[field] = hf[allowed] if isinstance(allowed, str) else allowed[0]
    return hf | family.write(c)


def canonical(config: ModelConfig) -> ModelConfig:
    """The configuration with every None resolved, and fields that the model does not use at their defaults.

    Two configurations of one model become equal.
    """
    c, unused = _canonical_layers(config)
    c, more = _canonical_head(c)
    unused += ["dtype", "attention_backend", "init_from", "lstm_attention", "lstm_start", *more]
    window = c.window if any(c.is_local(i) for i in range(c.layers)) else 0
    types = tuple(map(c.layer_type, range(c.layers)))
    same = c.rope.scaling == "none" and c.rope.local_theta == c.rope.theta
    if c.rope.local_theta is not None and (same or not window):
        c = dataclasses.replace(c, rope=dataclasses.replace(c.rope, local_theta=None))
    if c.cross_layers:
        side = c.decoder
        c = dataclasses.replace(c, decoder_layers=c.cross_layers, decoder_heads=side.heads, decoder_mlp_dim=side.F)
    else:
        unused += ["decoder_layers", "decoder_heads", "decoder_mlp_dim", "start_id"]
    biases = {f"{part}_bias": c.has_bias(part) for part in ("qkv", "out", "mlp", "norm")}
    if c.norm == "rmsnorm":
        biases["norm_bias"] = False
    return dataclasses.replace(
        c,
        kv_heads=c.G,
        head_dim=c.K,
        mlp_dim=c.F,
        embed_dim=c.embed_dim or c.dim,
        bias=True,
        **biases,
        window=window,
        layer_types=types,
        pooler=c.has_pooler,
        transform_activation=(c.transform_activation if c.has_transform else None) or c.activation,
        attention_scale=c.attention_scale or c.K**-0.5,
        **{name: getattr(ModelConfig(), name) for name in unused},
    )


def _canonical_layers(c: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """(the configuration with its sections resolved, the fields that its layers do not use)."""
    unused = []
    if c.positions != "rotary":
        unused += ["rope", "nope_layers"]
    else:
        read = {
            "theta",
            "local_theta",
            "fraction",
            "interleaved",
            "reversed",
            "scaling",
            *ROPE_SCALINGS[c.rope.scaling],
            *(("nope_scale", "nope_floor") if c.rope.nope_scale and c.nope_layers else ()),
        }
        rope = {name: value for name, value in vars(c.rope).items() if name in read}
        c = dataclasses.replace(c, rope=RopeConfig(**rope))
        scaled = c.rope.scaling in ("yarn", "longrope")  # otherwise a rotation changes no length
        if c.qk_norm == "head" and not (c.norm_scale or c.nope_layers or scaled):
            c = dataclasses.replace(c, qk_norm="rotated")
    unused += [] if c.swiglu_limit else ["swiglu_alpha"]
    if c.moe.experts:
        dense = tuple(i for i in range(c.layers) if not c.is_sparse(i))
        bias = c.has_bias("mlp") if c.moe.expert_bias is None else c.moe.expert_bias
        moe = dataclasses.replace(c.moe, expert_dim=c.moe.expert_dim or c.F, expert_bias=bias, dense_layers=dense)
        if moe.groups == 1:
            moe = dataclasses.replace(moe, top_groups=1, group_best=MoEConfig().group_best)
        c = dataclasses.replace(c, moe=moe, mlp_dim=c.F if dense else moe.expert_dim)
    else:
        unused += ["moe"]
    unused += [] if c.latent.rank else ["latent"]
    recurrent = [c.is_recurrent(i) for i in range(c.layers)]
    unused += [] if any(recurrent) else ["recurrent"]
    if all(recurrent):  # no attention
        c = dataclasses.replace(c, heads=1, kv_heads=1, head_dim=2, attention_scale=1.0, qkv_bias=False, out_bias=False)
        c = dataclasses.replace(c, positions="none" if c.positions in ("rotary", "relative") else c.positions)
        unused += ["qk_norm", "attention_softcap", "attention_gate", "rope", "nope_layers", "scale_by_layer"]
        unused += ["qkv_clip"]
    if not c.F and not c.moe.experts:
        c = dataclasses.replace(c, gated=False, mlp_bias=False)
    if c.positions != "relative":
        unused += ["relative_buckets", "relative_distance"]
    if not c.positions.startswith(("learned", "sinusoidal")):
        unused += ["position_offset"]
    return c, unused


def _canonical_head(c: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """(the configuration with names of its classes, the fields that its head does not use)."""
    unused = []
    if c.head not in ("classify", "tag"):
        unused += ["labels", "class_names"]
    elif not c.class_names:  # the names that Transformers gives to classes without names
        c = dataclasses.replace(c, class_names=tuple(f"LABEL_{i}" for i in range(c.labels)))
    if c.head != "classify":
        unused += ["multi_label", "pooling"]
    if c.head != "mlm":
        unused += ["mlm_transform"]
    if not c.has_transform:
        unused += ["transform_bias"]
    if c.head not in ("classify", "tag"):
        unused += ["label_transform"]
    if not c.has_pooler:
        unused += ["pooler_activation"]
    if c.head not in ("lm", "mlm"):
        unused += ["tied", "head_bias", "logit_softcap", "logit_scale"]
    return c, unused


def differences(family: Family, config: ModelConfig) -> list[str]:
    """The fields of ModelConfig whose value the family cannot express."""
    c = canonical(config)
    if c.architecture != family.preset.get("architecture", "decoder"):
        return ["architecture"]
    if c.head not in family.classes:
        return ["head"]
    # The tensors of a file decide the fields in `present`, not config.json.
    kept = {name: getattr(c, name) for name in family.present if c.head in ("none", "lm")}
    back = to_config(family, from_config(family, config), c.head)
    own = {name: getattr(c.moe, name) for name in ("balance_loss", "z_loss", "stacked")}  # do not change the logits
    kept["moe"] = dataclasses.replace(back.moe, **own)
    back = canonical(dataclasses.replace(back, **kept, tied=c.tied))
    # Transformers adds a row of the table of token types to every token, so there must be one.
    no_row = not c.token_types and "token_types" in family.fields.values()
    return ["token_types"] * no_row + different_fields(c, back)


def different_fields(a: Any, b: Any) -> list[str]:
    """The fields, as moe.active, with different values in two configurations from `canonical`, without those that do
    not change the logits."""
    found = []
    for name in [name for name in vars(a) if name not in ("dropout", "generation")]:
        x, y = getattr(a, name), getattr(b, name)
        if dataclasses.is_dataclass(x):
            found += [f"{name}.{inner}" for inner in different_fields(x, y)]
        elif not (isinstance(x, float) and isinstance(y, float) and abs(x - y) <= 1e-6 * abs(x)) and x != y:
            found.append(name)  # a square of a square root is not exact
    return found


def with_values(config: ModelConfig, names: list[str]) -> list[str]:
    """`different_fields` as people set them: model.moe.active=2."""
    return [f"model.{name}={operator.attrgetter(name)(canonical(config))!r}" for name in names]


def head_of(family: Family, architectures: Any) -> str:
    """Our head for the architectures of config.json; the family's first head for a bare model or no architecture.

    Raises: UserError naming the supported architectures.
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


def under(ours: str, theirs: str, parts: Keys) -> dict[str, Any]:
    """The keys `parts`, with the prefix `ours` for our names and `theirs` for the names in Transformers."""
    return {
        f"{ours}/{a}": (f"{theirs}.{b}" if isinstance(b, str) else (f"{theirs}.{b[0]}", *b[1:]))
        for a, b in parts.items()
    }
