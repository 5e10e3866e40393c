"""What all configurations share: types checked by name, and the way to and from JSON."""

import dataclasses
import difflib
import types
import typing

from nanoflax.errors import UserError


def type_problems(config, prefix):
    found = []
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(kind) and isinstance(value, kind):
            found += type_problems(value, f"{prefix}{name}.")
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
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    return names.get(kind) or f"a {kind.__name__}"


def choice(found, name, value, choices):
    if value not in choices:
        found.append(f"{name}={value!r} is not one of {', '.join(choices)}")


def at_least(found, section, config, least, *names):
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
    if found := type_problems(config, f"{where}."):
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
