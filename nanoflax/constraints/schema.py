"""JSON schemas as llguidance keeps them: what it would break is written in another way, or refused by name."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, TypeGuard

from nanoflax.errors import UserError

# llguidance reads a number exactly if its digits are an integer below this, and its power of ten is at most 22.
EXACT = 2**53
PLACES = 22
DIGITS = 15  # every number with so many is read exactly
_VALUES = {"const", "enum", "default", "example", "examples"}  # their parts are no schemas
_NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}  # their keys are no keywords
_BOUNDS = {"minimum": ("exclusiveMinimum", 1), "maximum": ("exclusiveMaximum", -1)}
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "enum")
# Characters that llguidance writes only as \uXXXX. That escape is switched off, because a key in such a form is another
# one for llguidance; then a text with such a character would lose it.
_ESCAPED = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_ONE = re.compile(r"\\[xuU]\{([0-9a-fA-F]{1,8})\}|\\x(..)|\\u(.{4})|\\U(.{8})|\\([av])|\\.|.", re.DOTALL)


def followed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema in a form that llguidance follows. Raises: UserError with all that it would not keep."""
    found: Any = _rewritten(schema)
    if problems := [*dict.fromkeys(_problems(schema))]:
        raise UserError(f"json_schema: {'; '.join(problems[:3])}")
    return found


def _rewritten(node: Any) -> Any:
    """A copy of a schema in which llguidance cannot write an excluded number: in 0 < x < 0.5 it would write 0.

    An exclusive bound that is an integer (a minimum from 0 up, a maximum from 0 down) becomes an inclusive one 1e-9
    inside, or more for a large number, which has fewer digits left.
    """
    if isinstance(node, list):
        return [_rewritten(x) for x in node]
    if not isinstance(node, dict):
        return node
    found = {}
    for name, value in node.items():
        if name in _NAMED and isinstance(value, dict):
            value = {key: _rewritten(x) for key, x in value.items()}
        found[name] = value if name in _VALUES else _rewritten(value)
    for name, (exclusive, sign) in _BOUNDS.items():
        bound, own = found.get(exclusive), found.get(name)
        if bound is True:  # as in draft 4
            bound = own
        if _is_number(bound) and 0 <= sign * bound < EXACT and bound % 1 == 0:
            del found[exclusive]
            step = Decimal(10) ** -max(0, min(9, DIGITS - len(str(abs(int(bound))))))
            inside = float(int(bound) + sign * step)
            found[name] = max(inside, own, key=lambda x: sign * x) if _is_number(own) else inside
    return found


def _problems(node: Any) -> Iterator[str]:
    """What llguidance would not keep."""
    if isinstance(node, list):
        for x in node:
            yield from _problems(x)
    if not isinstance(node, dict):
        return
    for name in _NUMBERS:
        for x in _leaves(node.get(name)):
            if _is_number(x) and (right := _instead(x)):
                yield f"{name} has {x!r:.40}, which would be rounded: give a number {right}"
            if isinstance(x, str) and _ESCAPED.search(x):
                yield f"{name} has {x!r:.40}, with a control character that no text here can have"
    pattern = node.get("pattern")
    if isinstance(pattern, str) and _has_control(pattern):
        yield f"pattern {pattern!r:.40} has a control character that no text here can have"
    least, required = node.get("minProperties"), node.get("required")
    closed = node.get("additionalProperties") is False and not node.get("patternProperties")
    if isinstance(least, int) and not closed and least > len({*_leaves(required)}) + 1:
        yield f"minProperties={least} counts a key that comes twice; name more keys in required"
    for name, value in node.items():
        if name in _NAMED and isinstance(value, dict):
            yield from _problems([*value.values()])
        elif name not in _VALUES:
            yield from _problems(value)


def _has_control(pattern: str) -> bool:
    """Whether a pattern names a control character, other than in a class with a range or ^, such as [\\x00-\\x1f]."""
    inside = first = False  # a class; at its first character
    found = wide = False  # in the class: a control character; a range or ^, with which other characters match too
    for match in _ONE.finditer(pattern):
        text, code = match[0], next(filter(None, match.groups()[:4]), "")
        is_hex = re.fullmatch("[0-9a-fA-F]+", code)
        character = chr(min(int(code, 16), 128)) if is_hex else "" if text.startswith("\\") else text
        is_control = bool(match[5] or _ESCAPED.match(character))
        if not inside:
            if is_control:
                return True
            inside = first = text == "["
            found = wide = False
        elif text == "]" and not first:
            if found and not wide:
                return True
            inside = False
        else:
            found |= is_control
            wide |= text == "-" or first and text == "^"
            first &= text == "^"
    return inside and found


def _leaves(value: Any) -> Iterator[Any]:
    """The numbers and texts in a value."""
    if isinstance(value, list | dict):
        for x in value if isinstance(value, list) else [*value, *value.values()]:
            yield from _leaves(x)
    elif value is not None:
        yield value


def _instead(x: float) -> str:
    """What a number must be so that llguidance reads it exactly; empty if it does."""
    if x in (float("inf"), -float("inf")) or x != x:
        return ""  # no JSON, which the caller says
    _, digits, power = Decimal(repr(x)).as_tuple()
    if abs(x) >= EXACT or int("".join(map(str, digits))) >= EXACT:
        return f"below 2^53 with at most {DIGITS} digits"
    return "" if int(power) >= -PLACES else f"with at most {PLACES} decimal places"


def _is_number(x: Any) -> TypeGuard[float]:
    return isinstance(x, int | float) and not isinstance(x, bool)
