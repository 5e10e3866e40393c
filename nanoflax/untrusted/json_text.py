"""JSON text of a stranger: errors that name the place, and a limit of its levels."""

import collections
import json
from collections.abc import Iterator
from typing import Any

from nanoflax.errors import UserError, listed

MAX_DEPTH = 64  # levels of lists and objects in JSON; functions that call themselves for each level need a limit


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of JSON text, in UTF-8. Raises: UserError that names `where`, also for more than MAX_DEPTH levels."""
    return _parse(text, where, dict)


def json_object(text: bytes, where: object, repeats: bool = True) -> dict[str, Any]:
    """The object in JSON text, whose strings UTF-8 can encode.

    repeats: whether a name may be there twice in an object, so that the last value counts, as in Transformers.
    Raises: UserError that names `where`.
    """
    repeated: list[str] = []

    def without_repeats(pairs):
        table = dict(pairs)
        if len(table) < len(pairs):
            repeated.extend(name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1)
        return table

    value = _parse(text, where, dict if repeats else without_repeats)
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold an object, not {type(value).__name__}")
    if repeated:
        raise UserError(f"{where}: {listed([f'{name!r} is there twice' for name in repeated], 20)}")
    if b"\\ud" in text.lower() and (wrong := [x for x in _strings(value) if any("\ud800" <= c <= "\udfff" for c in x)]):
        raise UserError(f"{where}: {wrong[0][:80]!r} has an unpaired surrogate, which no text can contain")
    return value


def _parse(text, where, from_pairs):
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=None if from_pairs is dict else from_pairs)
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        problem = "a number with too many digits" if isinstance(error, ValueError) else "too many levels"
        raise UserError(f"{where} is not JSON that can be read: {problem}") from error
    level, depth = [value], 0
    while level := [x for x in level if isinstance(x, dict | list)]:
        if (depth := depth + 1) > MAX_DEPTH:
            raise UserError(f"{where} is not JSON that can be read: more than {MAX_DEPTH} levels of lists and objects")
        level = [child for x in level for child in (x.values() if isinstance(x, dict) else x)]
    return value


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    for child in (
        [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _strings(child)
