"""JSON schemas: what random walks write is valid by the `jsonschema` package, and valid texts are accepted."""

import decimal
import functools
import json
import random
import re

import jsonschema
import numpy as np
import pytest

from nanoflax.constraints import Constraint
from nanoflax.errors import UserError
from nanoflax.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
KEYS = ["a", "b", "ab", "é", '"', "\n", "x/y", ""]
PATTERNS = ["^a+$", "b", "y$", "^(ab|cd)*$", '["\\\\]', "^[^a]{1,3}$", r"^\w+$", "a|b$", "^$"]


def drawn_number(r):
    far = r.choice([1, -1]) * 10 ** r.randint(0, 15)
    return r.choice([0, 1, -1, 5, 10, 99, 0.5, -0.5, 0.25, -2.5, 0.1, -0.01, 123.456, r.randint(-50, 50), far])


def drawn_value(r, depth=2):
    simple = [None, True, drawn_number(r), r.choice([*KEYS, "日本", "😀", "\t", "a\\b"]), r.randint(-5, 5)]
    made = [[drawn_value(r, depth - 1) for _ in range(2)], {r.choice(KEYS): drawn_value(r, depth - 1)}] if depth else []
    return r.choice(simple + made)


def some(r, **keywords):
    return {name: make() for name, make in keywords.items() if r.random() < 0.45}


def drawn_leaf(r):
    number, length = (lambda: drawn_number(r)), (lambda: r.randint(0, 5))
    kind = r.randrange(6)
    if kind < 2:
        bounds = some(r, minimum=number, maximum=number, exclusiveMinimum=number, exclusiveMaximum=number)
        step = some(r, multipleOf=lambda: r.choice([1, 3, 10, 0.5, 0.1, 1.5])) if r.random() < 0.4 else {}
        return {"type": r.choice(["number", "integer"])} | bounds | step
    if kind == 2:
        return {"type": "string"} | some(r, minLength=length, maxLength=length, pattern=lambda: r.choice(PATTERNS))
    if kind == 3:
        return {"enum": [drawn_value(r) for _ in range(r.randint(1, 3))]}
    if kind == 4:
        return {"const": drawn_value(r)}
    return r.choice([{"type": "null"}, {"type": ["string", "boolean"], "maxLength": 3}, {"minimum": 2, "maxLength": 2}])


def drawn_schema(r, depth):
    if not depth or r.random() < 0.3:
        return {"$ref": "#/$defs/" + r.choice("xy")} if r.random() < 0.1 else drawn_leaf(r)
    inner = lambda *_: drawn_schema(r, depth - 1)
    kind = r.randrange(6)
    if kind == 0:
        few, lengths = (lambda: [inner(), inner()][: r.randint(1, 2)]), (lambda: r.randint(0, 3))
        return {"type": "array"} | some(r, prefixItems=few, items=inner, minItems=lengths, maxItems=lengths)
    if kind < 4:
        names = r.sample(KEYS, r.randint(0, 3))
        keywords = dict(
            properties=lambda: dict.fromkeys(names) | {x: inner() for x in names},
            required=lambda: r.sample(sorted({*names, "a", "zz"}), r.randint(0, 2)),
            additionalProperties=lambda: r.choice([True, False, inner()]),
            patternProperties=lambda: {r.choice(["^a", "b$", "é"]): inner()},
            minProperties=lambda: r.randint(0, 2),
            maxProperties=lambda: r.randint(0, 2),
        )
        return {"type": "object"} | some(r, **keywords)
    return {["anyOf", "allOf", "oneOf"][r.randrange(3)]: [inner(), inner()]} | (drawn_leaf(r) if kind == 5 else {})


def exact(schema):
    """The schema with exact decimals, and `$` as the end of the text alone, as in JSON Schema."""
    text = re.sub(r'(?<=[bay*+})^])\$(?=")', r"\\\\Z", json.dumps(schema))
    return json.loads(text, parse_float=decimal.Decimal)


def is_valid(schema, text):
    # More digits than any number here has: the remainder of a division is then exact.
    with decimal.localcontext(decimal.Context(prec=2000)):
        return jsonschema.Draft202012Validator(exact(schema)).is_valid(json.loads(text, parse_float=decimal.Decimal))


def walked(constraint, r, limit=120):
    """A text of random allowed bytes, those that end something preferred; None if it does not end."""
    text = bytearray()
    for _ in range(limit):
        ids = np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")).tolist()
        ends, ids = [i for i in ids if i >= 256], [i for i in ids if i < 256]
        if ends and (not ids or r.random() < 0.4):
            return text.decode()
        liked = r.choice([b'"', b"}],:", b"\\u", b".eE0-", b"ab", b""])
        byte = r.choice([i for i in ids if i in liked] or ids)
        constraint.accept(byte)
        text.append(byte)
        if constraint.finished:
            return text.decode()
    return None


def accepts(schema, text):
    constraint = Constraint(TOKENIZER, json_schema=schema)
    try:
        for byte in text.encode():
            constraint.accept(byte)
    except ValueError:
        return False
    return constraint.matches


def test_every_random_text_is_valid():
    texts = followed = 0
    for seed in range(900):
        r = random.Random(seed)
        schema = drawn_schema(r, r.randint(0, 3))
        if "$ref" in json.dumps(schema):
            schema |= {"$defs": {name: drawn_schema(r, 0) for name in "xy"}}
            if "$ref" in json.dumps(schema["$defs"]):  # jsonschema does not end for a schema that is itself
                continue
        try:
            start = functools.partial(Constraint, TOKENIZER, json_schema=schema)
            start()
        except UserError:  # nothing is valid, or nobody can follow it
            continue
        followed += 1
        for _ in range(3):
            if (text := walked(start(), r)) is not None:
                texts += 1
                assert is_valid(schema, text), (seed, schema, text)
    assert followed > 500 and texts > 1500


@pytest.mark.parametrize("kind, values", [("integer", range(-12, 13)), ("number", np.arange(-25, 26) / 10)])
def test_numbers_are_accepted_if_they_are_valid(kind, values):
    texts, valid = [f"{x:g}" for x in values], 0
    for seed in range(60):
        r = random.Random(seed)
        near = lambda: r.choice([0, 0, 1, -1, 2, -2, 0.5, -0.5, 0.3, 1.7, -1.2, r.randint(-9, 9)])  # noqa: B023
        schema = {"type": kind} | some(r, minimum=near, maximum=near, exclusiveMinimum=near, exclusiveMaximum=near)
        want = [is_valid(schema, text) for text in texts]
        valid += sum(want)
        if not any(want):  # then it may be refused
            continue
        assert [accepts(schema, text) for text in texts] == want, schema
    assert valid > 300


A = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, ["0.25", "0.4999"], ["0", "0.0", "0.5"]),
        ({"type": "number", "exclusiveMinimum": 0}, ["0.1", "7"], ["0", "-1", "0.00"]),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 0.5}, ["0.1"], ["0", "-0.1"]),
        ({"type": "integer", "exclusiveMinimum": 2**52}, [str(2**52 + 1)], [str(2**52)]),
        (A, ['{"a":1}', '{"b":"x"}', '{"a":1, "c\\n":"\\t"}'],
         ['{"\\u0061":"x"}', '{"a":1,"\\u0061":"x"}', '{"a":"x"}']),
        ({"properties": {"é\n": {"type": "null"}}}, ['{"é\\n":null}'], ['{"\\u00e9\\n":1}', '{"é\\u000a":1}']),
        ({"type": "object", "minProperties": 2, "required": ["a"]}, ['{"a":1,"b":2}'], ['{"a":1}', '{"b":1,"b":2}']),
        ({"type": "string", "pattern": "^[\\x20-\\x7e]+$"}, ['"a b"', '"\\\\"'], ['"é"', '""']),
        ({"type": "string", "pattern": "^[^\\x7f]\\\\x01$"}, ['"b\\\\x01"'], ['"b"']),
        ({"type": "string", "pattern": "^[a\\x00-\\x1f]\\[b]$"}, ['"a[b]"', '"\\n[b]"'], ['"[b]"']),
        ({"enum": ["é", {"b": [1.5, None]}]}, ['"é"', '{"b":[1.5,null]}'], ['"e"', '{"b":[1.50,null]}']),
        ({"properties": {"minProperties": {"enum": [1]}, "const": {"exclusiveMinimum": 1}}},
         ['{"const":2}'], ['{"const":1}']),
        ({"const": {"exclusiveMinimum": 0, "minProperties": 9}}, ['{"exclusiveMinimum":0,"minProperties":9}'], ["{}"]),
    ],
)  # fmt: skip
def test_valid_texts_are_accepted_and_others_not(schema, right, wrong):
    assert [accepts(schema, text) for text in right + wrong] == [True] * len(right) + [False] * len(wrong)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer", "minimum": 2**53 + 1}, "minimum has 9007199254740993, which would be rounded"),
        ({"type": "number", "maximum": 0.12345678901234568}, "at most 15 digits"),
        ({"items": {"enum": ["a", [-(2**60)]]}}, "enum has -1152921504606846976"),
        ({"multipleOf": 1e-30}, "multipleOf has 1e-30, which would be rounded: give a number with at most 22 decimal"),
        ({"const": {"a": "b\x7f"}}, "const has 'b\\x7f', with a control character"),
        ({"type": "string", "pattern": "^a\\x01b$"}, "has a control character"),
        ({"type": "string", "pattern": "^[\\u007f]\\+$"}, "has a control character"),
        ({"type": "string", "pattern": "^[a-z][]]\\[\x01"}, "has a control character"),
        ({"type": "string", "pattern": "[" * 90_000}, "json_schema is wrong"),  # in little time
        ({"type": "object", "minProperties": 3, "required": ["a"]}, "minProperties=3 counts a key that comes twice"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "color"}, "Unknown format: color"),
        ({"oneOf": [{"type": "number"}, {"minimum": 0}]}, "oneOf"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(schema, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        Constraint(TOKENIZER, json_schema=schema)
    assert "is not JSON" not in str(error.value) and "\n" not in str(error.value)
