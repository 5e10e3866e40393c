"""tool_choice, parallel_tool_calls and strict: what a random model may write, as the `openai` client sees it.

jsonschema says whether arguments are right.
"""

import json

import jsonschema
import openai
import pytest

from nanoflax import tokenizers
from nanoflax.constraints import Constraint, json_rule
from nanoflax.serve import tool_calls

HELLO = [{"role": "user", "content": "Hello"}]
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "on": {"type": "boolean"}},
    "required": ["x", "on"],
    "additionalProperties": False,
}
SCHEMAS = {
    "now": None,
    "draw": {
        "$defs": {"point": POINT},
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", 'a "q" </tool_call>', "é"]},
            "points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 2},
        },
        "required": ["colour", "points"],
        "additionalProperties": False,
    },
    'say "é"': {"$ref": "#/$defs/point", "$defs": {"point": POINT}},
}


def tool(name, schema, **more):
    return {"type": "function", "function": {"name": name} | ({"parameters": schema} if schema else {}) | more}


def named(*names):
    return [{"type": "function", "function": {"name": name}} for name in names]


def allowed(mode, *names):
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named(*names)}}


TOOLS = [tool(*pair) for pair in SCHEMAS.items()]
ASK = dict(model="tiny", messages=HELLO, tools=TOOLS, seed=3, temperature=1.0, max_tokens=800)


def calls_of(choice):
    """The (name, arguments) of the calls; they have a schema."""
    found = []
    for call in choice.message.tool_calls or []:
        name, arguments = call.function.name, json.loads(call.function.arguments)
        jsonschema.validate(arguments, SCHEMAS[name] or {"maxProperties": 0})
        found.append((name, arguments))
    return found


def streamed(client, ask):
    """(the text, the arguments of the calls, the finish_reason) of each choice of a stream."""
    found = {i: ["", [], None] for i in range(ask["n"])}
    for [choice] in (chunk.choices for chunk in client.chat.completions.create(**ask, stream=True)):
        said = found[choice.index]
        said[0] += choice.delta.content or ""
        said[1] += [call.function.arguments for call in choice.delta.tool_calls or []]
        said[2] = said[2] or choice.finish_reason
    return [*map(tuple, found.values())]


CHOICES = [  # tool_choice, the names that may be called, the finish_reason
    ("required", [*SCHEMAS], "tool_calls"),
    *((named(name)[0], [name], "stop") for name in SCHEMAS),
    (allowed("required", "draw", "now"), ["draw", "now"], "tool_calls"),
]


@pytest.mark.parametrize("choice, names, reason", CHOICES)
def test_a_forced_call_has_arguments_of_the_schema(tool_client, choice, names, reason):
    ask = ASK | dict(tool_choice=choice, n=8)
    found = tool_client.chat.completions.create(**ask).choices
    ended = [c for c in found if c.finish_reason == reason]
    assert len(ended) > 4 and {c.finish_reason for c in found} <= {reason, "length"}
    called = [calls_of(c) for c in ended]
    assert all(called) and {name for calls in called for name, _ in calls} == {*names}
    assert all(c.message.content is None for c in ended)
    assert (max(map(len, called)) > 1) == (reason == "tool_calls")
    assert streamed(tool_client, ask) == [
        (c.message.content or "", [call.function.arguments for call in c.message.tool_calls or []], c.finish_reason)
        for c in found
    ]
    one = tool_client.chat.completions.create(**ask, parallel_tool_calls=False).choices
    assert {len(calls_of(c)) for c in one if c.finish_reason == reason} == {1}


def test_none_offers_no_tools_and_auto_all(tool_client):
    read = lambda **more: tool_client.chat.completions.create(**ASK | dict(max_tokens=1) | more).usage.prompt_tokens
    assert read(tools=openai.omit) == read(tool_choice="none") < read() == read(tool_choice="auto")
    assert read() == read(tool_choice="required") == read(tool_choice=named("now")[0])


def test_text_that_is_no_call_is_free(tool_client):
    """With rules for calls, the most probable text of characters is the same."""
    free = dict(tool_choice="auto", parallel_tool_calls=True, extra_body={"structured_outputs": {"regex": r"(.|\n)*"}})
    strict = [tool(name, schema, strict=True) for name, schema in SCHEMAS.items()]
    for more in (dict(parallel_tool_calls=False), dict(tools=strict), dict(tool_choice=allowed("auto", "now"))):
        ask = ASK | dict(temperature=0, max_tokens=60) | more
        found = [tool_client.chat.completions.create(**ask | rule).choices for rule in ({}, free)]
        assert found[0] == found[1] and len(found[0][0].message.content) > 20


def test_a_response_format_is_that_of_a_reply_without_calls(tool_client):
    schema = {"enum": ["red", "blue"]}
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}
    ask = ASK | dict(response_format=form, n=16)
    found = [c for c in tool_client.chat.completions.create(**ask).choices if c.finish_reason != "length"]
    texts = [json.loads(c.message.content) for c in found if not c.message.tool_calls]
    assert {*texts} <= {"red", "blue"} and 0 < len(texts) < len(found)
    assert all(c.message.content is None for c in found if c.message.tool_calls)
    found = tool_client.chat.completions.create(**ask, tool_choice="required").choices
    assert all(calls_of(c) for c in found if c.finish_reason == "tool_calls")


CALL = '<tool_call>\n{"name": "f", "arguments": {"on": true}}\n</tool_call>'
ON = {"type": "object", "properties": {"on": {"const": True}}, "required": ["on"], "additionalProperties": False}
# A text: whether it is a reply with (no text, several calls), (any text, several calls), (any text, one call).
TEXTS = {
    CALL: (True, True, True),
    f"{CALL}\n{CALL}{CALL}": (True, True, False),
    CALL.replace("\n", ""): (True, True, True),
    f"é {CALL}\n{CALL} 1 < 2": (False, True, False),
    f"a <tool {CALL}": (False, True, True),
    "a\n</tool_call> <": (False, True, True),
    "": (False, True, True),
    CALL.replace("true", "false"): (False, False, False),
    CALL.replace('"f"', '"g"'): (False, False, False),
    f"a <tool_call> b {CALL}": (False, False, False),
    "<tool_call>": (False, False, False),
}


@pytest.mark.parametrize("column, rule", enumerate([(None, True), ("", True), ("", False)]))
def test_a_rule_lets_the_right_replies_through(column, rule):
    tokenizer = tokenizers.ByteTokenizer()
    grammar = tool_calls.grammar([("f", json_rule(ON))], *rule)
    for text, right in TEXTS.items():
        constraint = Constraint(tokenizer, grammar=grammar)
        try:
            for token in tokenizer.encode(text):
                constraint.accept(token)
            assert constraint.matches == right[column], text
        except ValueError:
            assert not right[column], text


PARAMETERS = "tools[1].function.parameters"
WRONG = {  # the beginning of the message: (its param, the request)
    "tool_choice: needs tools": ("tool_choice", dict(tool_choice="required", tools=[])),
    "tool_choice: 'dra' is none of the tools, which are now, draw": ("tool_choice", dict(tool_choice=named("dra")[0])),
    "tool_choice: 'x' is none": ("tool_choice", dict(tool_choice=allowed("auto", "now", "x"))),
    'tool_choice: "any" has a wrong form. auto; none': ("tool_choice", dict(tool_choice="any")),
    f"{PARAMETERS}.type: 'array' must be \"object\"": (
        PARAMETERS,
        dict(tools=[TOOLS[0], tool("f", {"type": "array"})], tool_choice="required"),
    ),
    "tool_choice.allowed_tools: is no part of a choice of type 'function'": (
        "tool_choice",
        dict(tool_choice=allowed("auto", "draw") | named("now")[0]),
    ),
    "tools: names and schemas of": (
        "tools",
        dict(tools=[tool(f"f{i}", {"description": "x" * 9000}) for i in range(12)], tool_choice="required"),
    ),
    "structured_outputs.regex and tools: a text can follow only one rule": (
        "structured_outputs.regex",
        dict(parallel_tool_calls=False, extra_body={"structured_outputs": {"regex": "a"}}),
    ),
    f"{PARAMETERS}: json_schema": (PARAMETERS, dict(tools=[TOOLS[0], tool("f", {"not": {}}, strict=True)])),
    "structured_outputs.regex and tool_choice: a text can follow only one rule": (
        "structured_outputs.regex",
        dict(tool_choice="required", extra_body={"structured_outputs": {"regex": "a"}}),
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_choice_is_one_line(tool_client, said):
    param, more = WRONG[said]
    with pytest.raises(openai.BadRequestError) as error:
        tool_client.chat.completions.create(**ASK | more)
    assert error.value.body["message"].startswith(said), error.value.message
    assert error.value.param == param and "\n" not in error.value.message


def test_a_template_without_calls_cannot_be_forced(client):
    ask = dict(model="tiny", messages=HELLO, tools=TOOLS, max_tokens=1)
    assert client.chat.completions.create(**ask, parallel_tool_calls=False).usage.completion_tokens == 1
    with pytest.raises(openai.BadRequestError, match="tool_choice: the chat template of this model shows no calls"):
        client.chat.completions.create(**ask, tool_choice="required")
