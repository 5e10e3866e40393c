"""Strict JSON, which every parser reads: NaN and infinities are no JSON numbers."""

import json
import math
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """A value as strict JSON: non-finite floats in it become the strings "nan", "inf" and "-inf".
    options: of json.dumps."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # only the few values with such floats are copied
        return json.dumps(_with_texts(value), allow_nan=False, **options)


def number_of(value: Any) -> Any:
    """The float of one of the three strings; any other value unchanged."""
    return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value


def _with_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {_with_texts(k): _with_texts(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_with_texts, value))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
