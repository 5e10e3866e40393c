"""Calls of tools in replies, as the `openai` client sees them. The template is Qwen's, from trl."""

import json
import random

import openai
import pydantic
import pytest

from nanoflax.serve.tool_calls import ToolCalls
from tests.serve.servers import SPECIAL, TOOL_TEMPLATE
from tests.tokenizers.chat_test import make

ASK = [{"role": "user", "content": "2+3?"}]


class Add(pydantic.BaseModel):
    a: int
    text: str = ""


TOOLS = [openai.pydantic_function_tool(Add, name="add")]
ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "text": "é\\n</x>"}}\n</tool_call>'
TWO = '<tool_call>{"name": "add", "arguments": {"a": 3}}</tool_call>'
# A reply: (its text, its calls).
REPLIES = {
    ONE: (None, [{"a": 2, "text": "é\n</x>"}]),
    f"I add.\n{ONE}\n{TWO}\n": ("I add.", [{"a": 2, "text": "é\n</x>"}, {"a": 3}]),
    f"\n{TWO}\n Done. \n": ("Done. \n", [{"a": 3}]),
    "No call, 1 < 2.\n": ("No call, 1 < 2.\n", []),
    "<tool_call>{bad}</tool_call> ": ("<tool_call>{bad}</tool_call> ", []),
    # Keys that look like the arguments, and one with an escape.
    '<tool_call>{"arg\\u0075ments": {"a": 1}, "name": "f"}</tool_call>': (None, [{"a": 1}]),
    '<tool_call>{"name": "f", "x": {"arguments": {"b": NaN}}, "arguments": {"a": 1}}</tool_call>': (None, [{"a": 1}]),
    '<tool_call>{"name": "f", "x": {"arguments": {"a": true}}, "arguments": {"a": 1}}</tool_call>': (None, [{"a": 1}]),
    # Markers that are not closed, that come twice, and that are in strings.
    f"1 {TWO[:-12]}\n": ("1", [{"a": 3}]),
    f"{TWO[:-12]} {ONE}{TWO[:-9]}": (None, [{"a": 3}, {"a": 2, "text": "é\n</x>"}, {"a": 3}]),
    f"1 <tool_call>\n{ONE}\n</tool_call></tool_call>\n2": ("12", [{"a": 2, "text": "é\n</x>"}]),
    f'{TWO[:-14]}, "text": "\\"<tool_call></tool_call>\\\\"}}}}</tool_call>': (
        None,
        [{"a": 3, "text": '"<tool_call></tool_call>\\'}],
    ),
    f"<tool_call><tool_call>{{</tool_call> {TWO}": ("<tool_call><tool_call>{</tool_call>", [{"a": 3}]),
    f'<tool_call>{{"name": "add, "a": 1}}</tool_call>"{TWO}': (
        '<tool_call>{"name": "add, "a": 1}</tool_call>"',
        [{"a": 3}],
    ),
    f"<tool_call> I think {TWO}": ("<tool_call> I think", [{"a": 3}]),
    "a </tool_call> b": ("a </tool_call> b", []),
    '<tool_call>{"name": "add"': ('<tool_call>{"name": "add"', []),
    '<tool_call>{"name": "a", "arguments": {"a": [NaN]}}</tool_call>': (
        '<tool_call>{"name": "a", "arguments": {"a": [NaN]}}</tool_call>',
        [],
    ),
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>': ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', []),
    '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>': (
        '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>',
        [],
    ),
}


@pytest.fixture
def client(tool_client):
    return tool_client


def asked(reply, **more):
    """A request whose reply the server's constraint writes."""
    ask = dict(model="tiny", messages=ASK, tools=TOOLS, extra_body={"structured_outputs": {"choice": [reply]}})
    return ask | more


def arguments(calls):
    return [json.loads(call.function.arguments) for call in calls or []]


@pytest.mark.parametrize("reply", REPLIES)
def test_calls_of_a_reply_and_of_its_stream(client, reply):
    text, calls = REPLIES[reply]
    [choice] = client.chat.completions.create(**asked(reply), logprobs=True).choices
    assert (choice.message.content, arguments(choice.message.tool_calls)) == (text, calls)
    assert choice.finish_reason == ("tool_calls" if calls else "stop")
    assert b"".join(bytes(token.bytes or []) for token in choice.logprobs.content).decode() == reply
    assert len({call.id for call in choice.message.tool_calls or []}) == len(calls)
    with client.chat.completions.stream(**asked(reply)) as stream:
        whole = stream.get_final_completion().choices[0]
    assert (whole.message.content or None, arguments(whole.message.tool_calls)) == (text, calls)
    assert whole.finish_reason == choice.finish_reason
    [plain] = client.chat.completions.create(**asked(reply, tool_choice="none")).choices
    assert (plain.message.content, plain.message.tool_calls, plain.finish_reason) == (reply, None, "stop")


def test_a_call_that_is_held_back_sends_no_empty_chunks(client):
    """Unless they have ids of tokens."""
    for reply, calls in ((TWO, 1), (TWO[:-14], 0)):
        ask = asked(f"I.\n{reply}", n=2) | dict(stream=True)
        found = [chunk.choices[0] for chunk in client.chat.completions.create(**ask)]
        assert all(c.delta.role or c.delta.content or c.delta.tool_calls or c.finish_reason for c in found)
        assert sum(len(choice.delta.tool_calls or []) for choice in found) == 2 * calls
        ask["extra_body"] |= {"return_token_ids": True}
        found = [chunk.choices[0].model_dump() for chunk in client.chat.completions.create(**ask)]
        assert sum(len(choice.get("token_ids", ())) for choice in found) >= 2 * len(f"I.\n{reply}")


def test_a_conversation_with_a_tool(client):
    """The client parses the arguments; its message and the tool's result are the next history."""
    [choice] = client.chat.completions.parse(**asked(ONE)).choices
    [call] = choice.message.tool_calls
    assert call.function.parsed_arguments == Add(a=2, text="é\n</x>")
    history = [choice.message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    for entry in history:  # of this helper alone
        for item in entry.get("tool_calls") or ():
            item["function"].pop("parsed_arguments")
    history[0].pop("parsed")
    reply = client.chat.completions.create(**asked("Five.", messages=[*ASK, *history])).choices[0]
    assert (reply.message.content, reply.finish_reason) == ("Five.", "stop")
    wrong = [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": "\\ud800"}'}}]}]
    with pytest.raises(openai.BadRequestError, match="unpaired surrogate"):
        client.chat.completions.create(**asked(ONE, messages=[*ASK, *wrong]))


def test_a_call_that_is_cut_is_text(client):
    for new, calls in ((12, []), (len(ONE.encode()) + 12, REPLIES[ONE][1])):
        [choice] = client.chat.completions.create(**asked(ONE + TWO, max_tokens=new)).choices
        assert (arguments(choice.message.tool_calls), choice.finish_reason) == (calls, "length")
        assert (TWO if calls else ONE).startswith(choice.message.content)


@pytest.mark.parametrize("reply", REPLIES)
def test_pieces_of_any_sizes_give_the_same(reply):
    draw = random.Random(0)
    for _ in range(50):
        reader, at, text, calls = ToolCalls(), 0, "", []
        while at < len(reply):
            n = draw.randint(0, 9)
            shown, found = reader.add(reply[at : at + n])
            text, calls, at = text + shown, calls + found, at + n
        shown, found = reader.add("", last=True)
        calls += found
        assert (text + shown or None, [json.loads(call["function"]["arguments"]) for call in calls]) == REPLIES[reply]
        assert [call["index"] for call in calls] == [*range(len(calls))]


@pytest.mark.parametrize(
    "said", ['{ "a":1E999 }', '{"arguments": {"a": 2}}', "{}", r'{"\"arguments\"": "\"arguments\": 5"}']
)
def test_arguments_are_the_text_that_the_model_writes(said):
    _, [call] = ToolCalls().add(f'<tool_call>{{"id": 1, "arguments" :{said} , "name": "f"}}</tool_call>')
    assert call["function"] == {"name": "f", "arguments": said}


def test_calls_that_the_template_writes_are_read(tmp_path):
    _, theirs = make(tmp_path, SPECIAL, TOOL_TEMPLATE)
    for given in ([{"a": 2, "text": 'é <b> "x"\n'}], [{"a": 3}, {}, {"a": {"b": [None, 1.5]}}]):
        calls = [{"type": "function", "function": {"name": f"f{i}", "arguments": x}} for i, x in enumerate(given)]
        messages = [*ASK, {"role": "assistant", "content": "I add.", "tool_calls": calls}]
        text = theirs.apply_chat_template(messages, tokenize=False, tools=TOOLS).split("<|im_start|>assistant\n")[-1]
        shown, found = ToolCalls().add(text.removesuffix("<|im_end|>\n"), last=True)
        assert shown == "I add." and [call["function"]["name"] for call in found] == [
            f"f{i}" for i in range(len(given))
        ]
        assert [json.loads(call["function"]["arguments"]) for call in found] == given
