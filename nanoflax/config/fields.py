"""Fields of configurations: their help, choices and ranges, the checks of these, and the way to and from JSON."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from nanoflax.errors import UserError

T = TypeVar("T")


def field(
    default: T,
    help: str,
    *,
    unit: str = "",
    choices: Iterable[Any] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    within: str = "",
) -> T:
    """A dataclass field with what `validate` checks and the flag's help says.

    choices: the only values allowed. at_least, at_most, above: bounds of a number; within: an interval such as
    "[0, 1)". None is never checked, where the type of the field allows it.
    """
    checks = dict(choices=tuple(choices), at_least=at_least, at_most=at_most, above=above, within=within)
    found: Any = dataclasses.field(default=default, metadata={"help": help, "unit": unit} | checks)
    return found  # to type checkers the default, as dataclasses.field is


def describe(field: dataclasses.Field, kind: Any) -> str:
    """The help of a field in one line, with its choices or type, its unit and its range."""
    m = field.metadata
    parts = [f"one of {', '.join(map(str, m['choices']))}" if m.get("choices") else type_name(kind)]
    parts += [f"{words} {m[name]}" for name, words in _LIMITS.items() if m.get(name) not in (None, "")]
    return f"{m.get('help', '')} ({', '.join(parts)})".strip()


_LIMITS = {"unit": "in", "at_least": "at least", "at_most": "at most", "above": "above", "within": "in"}


def hints(cls: type) -> dict[str, Any]:
    """{name: type} of the fields of a dataclass."""
    found = typing.get_type_hints(cls)
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def kinds(hint: Any) -> dict[str, type]:
    """{kind: class} of a dataclass that has a `kind`, or of a union of such classes; {} of other types."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {cls.kind: cls for cls in members if hasattr(cls, "kind")}


def as_kind(cls: type, config: Any) -> Any:
    """A configuration of class `cls`: fields that `config` has too keep its values, the others take their defaults."""
    return config if type(config) is cls else cls(**{name: v for name, v in vars(config).items() if name in hints(cls)})


def fields_of_kinds(hint: Any) -> dict[tuple[str, str], list[str]]:
    """{(name, help): kinds} of every field of a union of kinds."""
    found: dict[tuple[str, str], list[str]] = {}
    for kind, cls in kinds(hint).items():
        for f in dataclasses.fields(cls):
            found.setdefault((f.name, describe(f, hints(cls)[f.name])), []).append(kind)
    return found


# Checks.


def validate(config: Any) -> None:
    """Refuse a configuration that cannot work: a Config, or one section of it.

    Raises: UserError with every problem found, one per clause, before anything is allocated.
    """
    section = getattr(config, "section", "")
    prefix = f"{section}." if section else ""
    # Values of a wrong type cannot be compared, so these problems come alone.
    if found := type_problems(config, prefix) or value_problems(config, prefix):
        raise UserError("; ".join(found))


def type_problems(config: Any, prefix: str) -> list[str]:
    found = []
    for name, kind in hints(type(config)).items():
        value = getattr(config, name)
        if not _is_of(kind, value):
            found.append(f"{prefix}{name}={value!r} must be {type_name(kind)}")
        elif dataclasses.is_dataclass(value):
            found += type_problems(value, f"{prefix}{name}.")
    return found


def value_problems(config: Any, prefix: str) -> list[str]:
    """Values out of their range; where none is, what the method `problems` finds between fields."""
    inside, own = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            inside += value_problems(value, f"{prefix}{f.name}.")
        elif value is not None and (problem := _out_of_range(value, f.metadata)):
            own.append(f"{prefix}{f.name}={value!r} {problem}")
    between = config.problems() if not own and hasattr(config, "problems") else []
    return own + inside + between


def _out_of_range(value, m):
    if m.get("choices") and value not in m["choices"]:
        return f"is not one of {', '.join(m['choices'])}"
    # Each comparison is written so that NaN fails it.
    if m.get("at_least") is not None and not value >= m["at_least"]:
        return f"must be at least {m['at_least']}"
    if m.get("at_most") is not None and not value <= m["at_most"]:
        return f"must be at most {m['at_most']}"
    if m.get("above") is not None and not value > m["above"]:
        return "must be positive" if m["above"] == 0 else f"must be above {m['above']}"
    if interval := m.get("within"):
        low, high = map(float, interval[1:-1].split(","))
        if not (low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"):
            return f"must be in {interval}"
    return ""


def _is_of(kind, value):
    if isinstance(kind, types.UnionType):
        return any(_is_of(k, value) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(typing.get_args(kind)[0], v) for v in value)
    if isinstance(value, bool):  # Python counts it as an int
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def type_name(kind: Any) -> str:
    """A field's type in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"a list, each {type_name(typing.get_args(kind)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    return names.get(kind) or f"a {kind.__name__}"


def parse(kind: Any, text: str) -> Any:
    """A value of type `kind` from the text of a flag: None is written none, a tuple 0,2,4. Raises: ValueError."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return tuple(parse(typing.get_args(kind)[0], part) for part in text.split(",") if text)
    if kind is bool and text.lower() not in ("true", "1", "false", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1") if kind is bool else kind(text)


# To and from JSON.


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a configuration, for JSON. A section of several kinds names its kind."""
    values = {name: to_dict(v) if dataclasses.is_dataclass(v) else v for name, v in vars(config).items()}
    return {"kind": config.kind} | values if hasattr(config, "kind") else values


def from_dict(cls: Any, values: Any, where: str = "config") -> Any:
    """A configuration of class `cls`, or of the class among a union's that values["kind"] names, from `to_dict`'s
    output. Absent fields take their defaults, and lists become tuples, which JSON lacks.

    Raises: UserError for a field that does not exist, naming the nearest that does, and for values of a wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}={values!r} must be the fields of {type_name(cls)}")
    if known := kinds(cls):
        values = dict(values)
        kind = values.pop("kind", None if len(known) > 1 else [*known][0])
        if kind not in [*known]:
            raise UserError(f"{where}.kind={kind!r} is not one of {', '.join(known)}")
        cls = known[kind]
    types_of, defaults, found = hints(cls), {f.name: f.default for f in dataclasses.fields(cls)}, {}
    for name, value in values.items():
        if name not in types_of:
            raise UserError(no_such_field(str(name), cls, known, where))
        if dataclasses.is_dataclass(default := defaults[name]):
            if isinstance(value, dict) and (kind := getattr(default, "kind", None)):
                value = {"kind": kind} | value
            value = from_dict(types_of[name], value, f"{where}.{name}")
        found[name] = tuple(value) if isinstance(value, list) else value
    config = cls(**found)
    if problems := type_problems(config, f"{where}."):
        raise UserError("; ".join(problems))
    return config


def no_such_field(name: str, cls: type, known: dict[str, type], where: str) -> str:
    """What to say of a name that is no field of `cls`: which of the `known` kinds have it, or the nearest field."""
    own, kind_of = [*hints(cls)], f"{where.removeprefix('config.')}.kind"
    elsewhere: dict[str, list[str]] = {}
    for kind, other in known.items():
        for field_name in hints(other):
            elsewhere.setdefault(field_name, []).append(kind)
    if name in elsewhere:
        return f"{where}.{name} is a field of {kind_of}={either(elsewhere[name])}, not of {cls.__dict__['kind']}"
    near = difflib.get_close_matches(name, own, 1) or difflib.get_close_matches(name, elsewhere, 1)
    near = near or difflib.get_close_matches(name, own, 1, cutoff=0.0)
    if not near:
        return f"{where}.{name} does not exist"
    of = "" if near[0] in own else f" (of {kind_of}={either(elsewhere[near[0]])})"
    return f"{where}.{name} does not exist; did you mean {where}.{near[0]}{of}?"


def either(words: list[str]) -> str:
    """Words as a choice, such as: a, b or c."""
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines naming each leaf in which two `to_dict` values differ, as `model.dim: 256 -> 384`.

    Of sections of different kinds: the kinds, and the fields that both have.
    """
    lines, keys = [], old.keys() | new.keys()
    if old.get("kind") != new.get("kind"):
        keys = old.keys() & new.keys() | {"kind"}
    for key in sorted(keys):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}.{line}" for line in diff(a, b)]
        elif a != b:
            lines.append(f"{key}: {a!r} -> {b!r}")
    return lines
