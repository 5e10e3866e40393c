"""Checks a body with its schema: one error, which names the field, its value and what would be right."""

import math
import re
from typing import Any

from jsonschema import Draft202012Validator, ValidationError, exceptions, validators

from nanoflax.report import to_json
from nanoflax.serve.errors import ApiError
from nanoflax.serve.schemas import Schema

# JSON has no NaN, 1.0 is no token id, and Python's True is no number.
_TYPES = Draft202012Validator.TYPE_CHECKER.redefine_many(
    {
        "integer": lambda _, x: isinstance(x, int) and not isinstance(x, bool),
        "number": lambda _, x: isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < math.inf,
    }
)
_TYPE_NAMES = {"integer": "an integer", "number": "a finite number", "string": "a text", "boolean": "true or false"}
_TYPE_NAMES |= {"array": "a list", "object": "an object", "null": "null"}


def _items(validator, rule, items, schema):
    """The first wrong item of a list: a body with a million wrong ones must not make a million errors."""
    if not isinstance(items, list):
        return  # `type` reports it
    low, high = rule.get("minimum", -math.inf), rule.get("maximum", math.inf)
    if rule.get("type") == "integer" and all(type(x) is int and low <= x <= high for x in items):
        return  # the same check, 100 times as fast
    items = items[:1] if len(items) > schema.get("maxItems", math.inf) else items
    for i, item in enumerate(items):
        if errors := [*validator.descend(item, rule, path=i)]:
            yield from errors
            return


_Validator = validators.extend(Draft202012Validator, {"items": _items}, type_checker=_TYPES)


def checked(body: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """The body without fields that are null, also in messages, and with 50 for a setting of 50.0.

    Raises: ApiError that names the field, if the body does not have the schema.
    """
    body = {name: _as_integer(x, schema["properties"].get(name, {})) for name, x in body.items() if x is not None}
    if isinstance(messages := body.get("messages"), list):
        body["messages"] = [_given(message) for message in messages]
    error = exceptions.best_match(_Validator(schema).iter_errors(body))
    if error is not None:
        field, message = _described(error)
        raise ApiError(400, f"{field}: {message}", field)
    return body


def _as_integer(x, schema):
    wanted = "integer" in schema.get("type", ())
    return int(x) if wanted and isinstance(x, float) and x.is_integer() else x


def _given(message):
    return {name: x for name, x in message.items() if x is not None} if isinstance(message, dict) else message


def _described(error: ValidationError) -> tuple[str, str]:
    """(the field, what is wrong with it)."""
    field, schema, kind = error.json_path.removeprefix("$").removeprefix("."), error.schema, str(error.validator)
    rule: Any = error.validator_value
    value: Any = error.instance
    assert isinstance(schema, dict)
    if kind == "additionalProperties" and "patternProperties" in schema:
        name = next(name for name in value if not re.fullmatch("[0-9]{1,9}", name))
        return field, f"{_shown(name)} must be a token id"
    if kind == "additionalProperties":
        known = schema["properties"]
        name = min(value.keys() - known.keys())[:80]
        if field:
            return f"{field}.{name}", f"not a field of {field}, which has {', '.join(known)}"
        return name, "not a field of this request, or not available here"
    if kind == "required":
        name = next(name for name in rule if name not in value)
        return f"{field}.{name}" if field else name, "is missing"
    if kind in ("maxItems", "maxProperties"):
        return field, f"{len(value):,} items, at most {rule:,}"
    if kind == "maxLength":
        return field, f"{_shown(value)} has {len(value):,} characters, at most {rule:,}"
    if kind in ("minItems", "minLength"):
        return field, f"{_shown(value)} must not be empty"
    if kind == "anyOf":
        return field, f"{_shown(value)} has a wrong form. {schema.get('description', '')}"
    right = {
        "type": lambda: _either([_TYPE_NAMES[name] for name in ([rule] if isinstance(rule, str) else rule)]),
        "enum": lambda: _either([to_json(x) for x in rule]),
        "const": lambda: to_json(rule),
        "minimum": lambda: f"at least {rule}",
        "maximum": lambda: f"at most {rule}",
        "exclusiveMinimum": lambda: f"above {rule}",
        "exclusiveMaximum": lambda: f"below {rule}",
    }[kind]()
    text = f". {schema['description']}" if kind == "enum" and "description" in schema else ""
    return field, f"{_shown(value)} must be {right}{text}"


def _either(words):
    return " or ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])


def _shown(value):
    text = to_json(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-16:]}"
