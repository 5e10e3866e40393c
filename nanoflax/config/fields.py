"""Fields of configurations: help texts, choices and ranges, their checks, and the conversion to and from JSON."""

import dataclasses
import difflib
import functools
import math
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
    """A dataclass field with its help text and the limits that `validate` checks.

    choices: the only allowed values. at_least, at_most, above: bounds of a number; within: an interval such as
    "[0, 1)". The value None has no limits.
    """
    checks = dict(choices=tuple(choices), at_least=at_least, at_most=at_most, above=above, within=within)
    made: Any = dataclasses.field(default=default, metadata={"help": help, "unit": unit} | checks)
    return made  # type checkers see the type of the default, as for dataclasses.field


def describe(field: dataclasses.Field, kind: Any) -> str:
    """One line: the help text of a field, its choices or type, its unit and its range."""
    m = field.metadata
    parts = [f"one of {', '.join(str(c) or 'empty' for c in m['choices'])}" if m.get("choices") else type_name(kind)]
    parts += [f"{words} {m[name]}" for name, words in _LIMITS.items() if m.get(name) not in (None, "")]
    return f"{m.get('help', '')} ({', '.join(parts)})".strip()


_LIMITS = {"unit": "in", "at_least": "at least", "at_most": "at most", "above": "above", "within": "in"}


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """{name: type} of the fields of a dataclass."""
    found = typing.get_type_hints(cls)
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def kinds(hint: Any) -> dict[str, type]:
    """{kind: class} for a dataclass with a `kind`, or for a union of such dataclasses; {} for other types."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return {cls.kind: cls for cls in members if hasattr(cls, "kind")}


def as_kind(cls: type, config: Any) -> Any:
    """A configuration of class `cls`, with the values of `config` for the fields of both and defaults for the rest."""
    kept = {name: value for name, value in vars(config).items() if name in field_types(cls)}
    return config if type(config) is cls else cls(**kept)


def fields_of_kinds(hint: Any) -> dict[tuple[str, str, Any], list[str]]:
    """{(name, help, default): the kinds with this field} for every field of a union of kinds."""
    found: dict[tuple[str, str, Any], list[str]] = {}
    for kind, cls in kinds(hint).items():
        for f in dataclasses.fields(cls):
            found.setdefault((f.name, describe(f, field_types(cls)[f.name]), f.default), []).append(kind)
    return found


# Checks.


def validate(config: Any) -> None:
    """Raises: UserError that names all problems of a Config or of one section of it."""
    section = getattr(config, "section", "")
    prefix = f"{section}." if section else ""
    # A value of a wrong type has no range, so ranges are checked only if all types are right.
    if found := type_problems(config, prefix) or value_problems(config, prefix):
        raise UserError("; ".join(found))


def type_problems(config: Any, prefix: str) -> list[str]:
    found = []
    for name, kind in field_types(type(config)).items():
        value = getattr(config, name)
        if not _is_of(kind, value):
            found.append(f"{prefix}{name}={value!r} must be {type_name(kind)}")
        elif dataclasses.is_dataclass(value):
            found += type_problems(value, f"{prefix}{name}.")
    return found


def value_problems(config: Any, prefix: str) -> list[str]:
    """The values outside their ranges; if there are none, the conflicts that the method `problems` finds."""
    nested, own = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            nested += value_problems(value, f"{prefix}{f.name}.")
        elif value is not None and (problem := _out_of_range(value, f.metadata)):
            own.append(f"{prefix}{f.name}={value!r} {problem}")
    conflicts = config.problems() if not own and hasattr(config, "problems") else []
    return own + nested + conflicts


def _out_of_range(value, limits):
    if limits.get("choices") and value not in limits["choices"]:
        return f"is not one of {', '.join(str(choice) or 'empty' for choice in limits['choices'])}"
    # Each comparison is written so that NaN fails it.
    if limits.get("at_least") is not None and not value >= limits["at_least"]:
        return f"must be at least {limits['at_least']}"
    if limits.get("at_most") is not None and not value <= limits["at_most"]:
        return f"must be at most {limits['at_most']}"
    if limits.get("above") is not None and not value > limits["above"]:
        return "must be positive" if limits["above"] == 0 else f"must be above {limits['above']}"
    if interval := limits.get("within"):
        low, high = map(float, interval[1:-1].split(","))
        if not (low < value < high or value == low and interval[0] == "[" or value == high and interval[-1] == "]"):
            return f"must be in {interval}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    return ""


def _is_of(kind, value):
    if isinstance(kind, types.UnionType):
        return any(_is_of(k, value) for k in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(typing.get_args(kind)[0], v) for v in value)
    if isinstance(value, bool):  # bool is a subclass of int
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
    """A value of type `kind` from the text of a flag: "none" for None, "0,2,4" for a tuple, "0,2;4" for a
    tuple of tuples. Raises: ValueError."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        member = typing.get_args(kind)[0]
        separator = ";" if typing.get_origin(member) is tuple else ","
        return tuple(parse(member, part) for part in text.split(separator) if text)
    if kind is bool and text.lower() not in ("true", "1", "false", "0"):
        raise ValueError(text)
    return text.lower() in ("true", "1") if kind is bool else kind(text)


# To and from JSON.


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as a nested dict for JSON. A section with several kinds contains its kind."""
    values = {name: to_dict(v) if dataclasses.is_dataclass(v) else v for name, v in vars(config).items()}
    return {"kind": config.kind} | values if hasattr(config, "kind") else values


def from_dict(cls: Any, values: Any, where: str = "config") -> Any:
    """A configuration from the output of `to_dict`. cls: its class, or a union; then values["kind"] chooses the class.

    Missing fields take their defaults. Lists become tuples, because JSON has no tuples.
    Raises: UserError for values of a wrong type, or for an unknown field (the message names the most similar one).
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}={values!r} must be the fields of {type_name(cls)}")
    if known := kinds(cls):
        values = dict(values)
        kind = values.pop("kind", None if len(known) > 1 else [*known][0])
        if kind not in [*known]:
            raise UserError(f"{where}.kind={kind!r} is not one of {', '.join(known)}")
        cls = known[kind]
    values = cls.upgrade(values) if hasattr(cls, "upgrade") else values
    types_of, defaults, found = field_types(cls), {f.name: f.default for f in dataclasses.fields(cls)}, {}
    for name, value in values.items():
        if name not in types_of:
            raise UserError(no_such_field(str(name), cls, known, where))
        if dataclasses.is_dataclass(default := defaults[name]) and not dataclasses.is_dataclass(value):
            if isinstance(value, dict) and (kind := getattr(default, "kind", None)):
                value = {"kind": kind} | value
            value = from_dict(types_of[name], value, f"{where}.{name}")
        found[name] = as_float(types_of[name], _tuples(value), f"{where}.{name}")
    config = cls(**found)
    if problems := type_problems(config, f"{where}."):
        raise UserError("; ".join(problems))
    return config


def as_float(kind: Any, value: Any, where: str) -> Any:
    """The value; a large integer for a field of this type becomes a float, because JAX has no integer above 2^31.

    Raises: UserError, which begins with `where`, for an integer beyond the largest float.
    """
    if type(value) is not int or abs(value) < 2**31 or float not in (kind, *typing.get_args(kind)):
        return value
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{where}={str(value)[:20]}... is too large for a float") from None


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def no_such_field(name: str, cls: type, known: dict[str, type], where: str) -> str:
    """The error message for an unknown field: the `known` kinds that have it, or the most similar field."""
    own, kind_of = [*field_types(cls)], f"{where.removeprefix('config.')}.kind"
    elsewhere: dict[str, list[str]] = {}
    for kind, other in known.items():
        for field_name in field_types(other):
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
    """The words joined as "a, b or c"."""
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each value that differs between two outputs of `to_dict`, as `model.dim: 256 -> 384`.

    Sections of different kinds are compared in their kind and in the fields of both.
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
