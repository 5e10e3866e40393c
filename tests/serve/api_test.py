"""OpenAI's API, as the `openai` client sees it."""

import inspect
import json
import operator
import re

import jax
import openai
import pydantic
import pytest

import nanoflax
from nanoflax import tokenizers
from nanoflax.serve import Finish, Request, Token, checks, schemas
from nanoflax.serve.errors import ApiError
from nanoflax.serve.replies import Choice
from tests.compiled import apply
from tests.serve.servers import until

HELLO = [{"role": "user", "content": "Hello there"}]


def expected(run, ids, new, seed=0, **settings):
    """The text of `nanoflax.sample` alone."""
    ends, rng = tokenizers.stop_ids(run.tokenizer), jax.random.PRNGKey(seed)
    [found] = nanoflax.sample(run.model, run.params, [ids], new, rng=rng, eos_id=ends, **settings)
    return text_of(run, ids, found)


def text_of(run, before, ids):
    decoder = tokenizers.StreamingDecoder(run.tokenizer, before)
    return decoder.add(ids) + decoder.finish()


def test_chat_and_its_stream_are_the_text_of_sample(client, run):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    ids = tokenizers.chat_prompt(run.tokenizer, HELLO)
    settings = dict(model="tiny", messages=HELLO, max_tokens=12)
    for sampling in (dict(temperature=0), dict(temperature=0.9, top_p=0.9, seed=3)):
        reply = client.chat.completions.create(**settings, **sampling)
        [choice] = reply.choices
        assert choice.message.content == expected(run, ids, 12, **sampling)
        assert choice.finish_reason in ("length", "stop")
        assert reply.usage.prompt_tokens == len(ids) and reply.usage.completion_tokens <= 12
        stream = list(
            client.chat.completions.create(**settings, **sampling, stream=True, stream_options={"include_usage": True})
        )
        assert stream[-1].usage == reply.usage and not stream[-1].choices
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream[:-1]) == choice.message.content
        assert [chunk.choices[0].finish_reason for chunk in stream[:-1]][-1] == choice.finish_reason


FILTERS = dict(top_h=0.3, typical_p=0.2, epsilon_cutoff=0.02, eta_cutoff=0.9)


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_of_transformers_is_that_of_sample(client, run, name):
    ids, more = run.tokenizer.encode("ab"), {name: FILTERS[name]}
    ask = dict(model="tiny", prompt="ab", max_tokens=12, seed=3, temperature=1.5)
    [choice] = client.completions.create(**ask, extra_body=more).choices
    assert choice.text == expected(run, ids, 12, 3, temperature=1.5, **more)
    assert choice.text != client.completions.create(**ask).choices[0].text


def test_choices_have_seeds_that_follow_each_other(client, run):
    prompts = ["ab", [97, 98, 99]]
    reply = client.completions.create(model="tiny", prompt=[*prompts[:1]], n=2, max_tokens=8, seed=5)
    ids = [run.tokenizer.encode("ab")] * 2
    assert [c.text for c in reply.choices] == [expected(run, x, 8, 5 + i) for i, x in enumerate(ids)]
    assert [c.index for c in reply.choices] == [0, 1] and reply.usage.prompt_tokens == 2
    again = client.completions.create(model="tiny", prompt=prompts[1], max_tokens=8, seed=5)
    assert again.choices[0].text == expected(run, prompts[1], 8, 5)
    both = client.completions.create(model="tiny", prompt=["ab", "c"], max_tokens=8, temperature=0)
    assert [c.text for c in both.choices] == [
        expected(run, run.tokenizer.encode(x), 8, temperature=0) for x in "ab c".split()
    ]
    assert (
        both.usage.completion_tokens <= 16
        and client.completions.create(model="tiny", prompt="ab", temperature=0).usage.completion_tokens == 16
    )  # as OpenAI's default


def test_a_stop_string_is_held_back_and_frees_the_slot(client, server, long):
    long |= dict(temperature=1, seed=0)  # so that the text does not repeat itself
    text = client.completions.create(**long).choices[0].text
    at = next(i for i in range(8, 100) if text.index(text[i : i + 3]) == i)
    stop, shown = text[at : at + 3], text[:at]
    for stops in (stop, [stop, "never there"]):
        [choice] = client.completions.create(**long, stop=stops, logprobs=0).choices
        assert (choice.text, choice.finish_reason) == (shown, "stop")
        assert choice.logprobs.text_offset[-1] < len(shown)
    stream = list(client.completions.create(**long, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in stream) == shown and stream[-1].choices[0].finish_reason == "stop"
    until(lambda: server[1].unfinished == 0)


def test_a_stop_string_that_the_end_completes_is_the_reason():
    class Cleans(tokenizers.ByteTokenizer):
        cleans_up = True  # the last characters are held back until the end

    choice = Choice(Cleans(), Request([97]), ["cd"], [97], None)
    assert [choice.add(Token(token)) for token in b"bcd"] == [None] * 3
    piece = choice.add(Finish("length"))
    assert piece and (piece.text, piece.finish_reason) == ("b", "stop")


def test_log_probabilities_have_the_forms_of_both_apis(client, run):
    ask = dict(model="tiny", max_tokens=6, temperature=0, seed=1)
    [choice] = client.completions.create(**ask, prompt="ab cd", logprobs=3, echo=True).choices
    found, ids = choice.logprobs, run.tokenizer.encode("ab cd")
    assert choice.text.startswith("ab cd") and len(found.tokens) >= len(ids) + 1
    logits = apply(run.model, run.params, jax.numpy.array([ids]))[0][0]
    known = jax.nn.log_softmax(logits)
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for i, token in enumerate(ids[1:]):
        assert found.token_logprobs[i + 1] == pytest.approx(float(known[i, token]), abs=2e-5)
        best = sorted(map(float, known[i]))[::-1][:3]
        assert sorted(found.top_logprobs[i + 1].values())[::-1][:3] == pytest.approx(best, abs=2e-5)
    assert found.text_offset[: len(ids)] == list(range(5)) and found.tokens[:5] == list("ab cd")
    greedy = len(ids)
    assert found.token_logprobs[greedy] == max(found.top_logprobs[greedy].values())
    [scored] = client.completions.create(**(ask | dict(max_tokens=0)), prompt="ab cd", logprobs=3, echo=True).choices
    assert scored.text == "ab cd" and scored.logprobs.token_logprobs == found.token_logprobs[: len(ids)]
    chat = client.chat.completions.create(**ask, messages=HELLO, logprobs=True, top_logprobs=2).choices[0]
    for token in chat.logprobs.content:
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob
        assert token.token.startswith("bytes:") or bytes(token.bytes or []).decode() in (token.token, "")
    chunks = client.chat.completions.create(**ask, messages=HELLO, logprobs=True, top_logprobs=2, stream=True)
    streamed = [token for chunk in chunks if (p := chunk.choices[0].logprobs) for token in p.content]
    assert streamed == chat.logprobs.content


def test_a_prompt_as_long_as_the_context_is_scored(client, run):
    context = run.model.config.context
    ids = [97 + i % 9 for i in range(context)]
    ask = lambda ids, new: client.completions.create(model="tiny", prompt=ids, max_tokens=new, echo=True, logprobs=0)
    found = ask(ids, 0).choices[0].logprobs.token_logprobs
    logp = jax.nn.log_softmax(apply(run.model, run.params, jax.numpy.array([ids]))[0][0])
    assert found[1:] == pytest.approx([float(logp[i, x]) for i, x in enumerate(ids[1:])], abs=2e-5)
    for wrong, new in ((ids, 1), ([*ids, 97], 0)):
        with pytest.raises(openai.BadRequestError) as error:
            ask(wrong, new)
        assert error.value.code == "context_length_exceeded"
    assert ask(ids[:1], 0).choices[0].logprobs.token_logprobs == [None]


def test_messages_and_tools_reach_the_template(client, run):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Short."},
        {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    reply = client.chat.completions.create(model="tiny", messages=messages, tools=[tool], max_tokens=4)
    plain = [{"role": "system", "content": "Short."}, {"role": "user", "content": "2+2?"}]
    read = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    more = [{"role": "assistant", "content": "", "tool_calls": read}, {"role": "tool", "content": "4"}]
    ids = tokenizers.chat_prompt(run.tokenizer, plain + more, [tool])
    assert reply.usage.prompt_tokens == len(ids)


def test_json_is_of_the_schema(client):
    """A random model writes any JSON that the schema allows."""
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    strict = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema | {"additionalProperties": False}}}
    ask = lambda form, **more: client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=form, max_tokens=60, **more
    )
    reply = ask(strict, seed=1, n=4)
    assert {json.loads(choice.message.content)["colour"] for choice in reply.choices} <= {"red", "blue"}
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    [free] = ask({"type": "json_object"}, seed=1).choices
    assert free.finish_reason == "length" or isinstance(json.loads(free.message.content), dict)
    wrong = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"type": "colour"}}}
    for form in (wrong, {"type": "json_schema"}, strict | {"type": "text"}):
        with pytest.raises(openai.BadRequestError, match="response_format") as error:
            ask(form)
        assert error.value.param == "response_format"


RULES = {  # name in structured_outputs: (rule, an expression that every text matches)
    "regex": ("[0-9]{3}-[ab]", "[0-9]{3}-[ab]"),
    "choice": (["red", "dark blue", 'a "q"\n'], 'red|dark blue|a "q"\n'),
    "grammar": ('start: "<" inner ">"\ninner: "x" | "(" inner ")"', r"<\(*x\)*>"),
    "json": ({"enum": [12, "ab"]}, '12|"ab"'),
}


@pytest.mark.parametrize("name", RULES)
def test_a_text_follows_a_rule_by_both_names_of_vllm(client, name):
    rule, right = RULES[name]
    ask = dict(model="tiny", max_tokens=100, n=3, seed=4, temperature=1.0)
    texts = []
    for extra in ({"structured_outputs": {name: rule}}, {f"guided_{name}": rule, "structured_outputs": None}):
        found = client.completions.create(**ask, prompt="x", extra_body=extra)
        texts.append([choice.text for choice in found.choices])
        chat = client.chat.completions.create(**ask, messages=HELLO, extra_body=extra)
        texts.append([choice.message.content for choice in chat.choices])
        ended = [c.finish_reason == "stop" for c in (*found.choices, *chat.choices)]
        for text, end in zip(sum(texts[-2:], []), ended, strict=True):
            assert re.fullmatch(right, text) or not end, text
        assert any(ended)
    assert texts[:2] == texts[2:]
    if name == "json":
        again = client.completions.create(
            **ask, prompt="x", extra_body={"structured_outputs": {name: json.dumps(rule)}}
        )
        assert [choice.text for choice in again.choices] == texts[0]
    chunks = client.completions.create(**ask, prompt="x", extra_body=extra, stream=True)
    assert sorted("".join(c.text for c in cs) for cs in by_index(chunks)) == sorted(texts[0])


def by_index(chunks):
    choices = [choice for chunk in chunks for choice in chunk.choices]
    return [[c for c in choices if c.index == i] for i in range(3)]


@pytest.mark.parametrize("words, extra", [
    ("guided_regex and structured_outputs.choice: a text can follow only one rule",
     {"guided_regex": "a", "structured_outputs": {"choice": ["a"]}}),
    ("structured_outputs.json and structured_outputs.regex: a text can",
     {"structured_outputs": {"regex": "a", "json": {}}}),
    ("guided_json and response_format: a text can", {"guided_json": {}, "response_format": {"type": "json_object"}}),
    ("structured_outputs: give one of json, regex, choice, grammar", {"structured_outputs": {"regex": None}}),
    ("structured_outputs.regex: regex is wrong or not supported", {"structured_outputs": {"regex": "a("}}),
    ("guided_grammar: grammar is wrong", {"guided_grammar": "root ::= a"}),
    ("guided_json: the text is not JSON", {"guided_json": "{"}),
    ("guided_json: json_schema must be an object", {"guided_json": "[1]"}),
    ("structured_outputs.structural_tag: not a field of structured_outputs, which has json, regex, choice, grammar",
     {"structured_outputs": {"structural_tag": "a"}}),
    ("guided_choice: ", {"guided_choice": ["a"] * 2001}),
    ("guided_choice[1]: ", {"guided_choice": ["a", ""]}),
])  # fmt: skip
def test_rules_that_cannot_be_followed_are_one_line(client, words, extra):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)
    assert words in error.value.message, error.value.message
    assert error.value.param in words and "\n" not in error.value.message


def test_a_schema_that_needs_too_much_work_ends_only_its_reply(client):
    names = [f"p{i}" for i in range(2000)]
    items = [{"type": "object", "properties": dict.fromkeys(names[i : i + 20], {})} for i in range(0, 2000, 20)]
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"anyOf": items}}}
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        for seed in range(20):  # an empty object is no work
            client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, seed=seed)
    assert client.completions.create(model="tiny", prompt="x", max_tokens=1).usage.completion_tokens == 1


WRONG = {
    "temperature": dict(temperature=-1), "top_p": dict(top_p=0), "n": dict(n=1000), "seed": dict(seed=1.5),
    "stop": dict(stop=""), "logit_bias": dict(logit_bias={"9999": 1}), "max_tokens": dict(max_tokens=-1),
    "prompt: [] has a wrong form. A text or": dict(prompt=[]),
    "suffix": dict(suffix="x"), "best_of": dict(best_of=2), "presence_penalty": dict(presence_penalty=2.5),
    'stop: "x': dict(stop="x" * 1001), "surprise": dict(extra_body={"surprise": 1}), "prompt": dict(prompt=[99999]),
    "stream_options": dict(stream_options={"include_usage": True}), "logprobs": dict(logprobs=99),
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_an_error_names_the_field(client, field):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**(dict(model="tiny", prompt="x") | WRONG[field]))
    assert error.value.param == field.split(":")[0] and field in error.value.message and "\n" not in error.value.message
    assert error.value.type == "invalid_request_error"


@pytest.mark.parametrize("prompt", [[*["a"] * 999, 1], [1.5] * 1000, [[1], *[["a"] * 9] * 100], [*[1] * 999, -1]])
def test_a_long_wrong_list_is_few_errors(prompt):
    [error] = checks._Validator(schemas.COMPLETION).iter_errors({"prompt": prompt})
    assert len(error.context) < 9
    with pytest.raises(ApiError, match="^prompt"):
        checks.checked({"prompt": prompt}, schemas.COMPLETION)


@pytest.mark.parametrize(
    "api, schema", [("chat.completions", "CHAT"), ("completions", "COMPLETION"), ("embeddings", "EMBEDDING")]
)
def test_every_field_of_the_client_is_decided(client, api, schema):
    function, known = operator.attrgetter(api)(client).create, getattr(schemas, schema)["properties"]
    ours = {name for name in inspect.signature(function).parameters if name != "timeout" and "extra_" not in name}
    assert len(ours) >= 5 and not ours - known.keys()
    assert all("description" in known[name] for name in ours - {"messages"})


UNUSED = dict(
    metadata={"a": "b"}, store=True, service_tier="auto", parallel_tool_calls=False, user="me", verbosity="low",
    safety_identifier="x", prompt_cache_key="x", prompt_cache_retention="24h", prompt_cache_options={},
    prediction={"type": "content", "content": "x"}, reasoning_effort="low", modalities=["text"], functions=[],
    function_call="none", audio=None, web_search_options=None, top_p=1.0, extra_body={"best_of": None, "other": None},
)  # fmt: skip


def test_fields_without_effect_leave_the_reply(client):
    ask = dict(model="tiny", messages=HELLO, max_tokens=9, seed=2)
    plain = client.chat.completions.create(**ask).choices
    assert client.chat.completions.create(**ask, **UNUSED).choices == plain
    same = ask | dict(max_tokens=9.0, seed=2.0 + 2**32, extra_body={"n": 1.0})
    assert client.chat.completions.create(**same).choices == plain
    assert client.chat.completions.create(**ask | dict(seed=2 - 2**32)).choices == plain
    options = {"include_usage": True, "include_obfuscation": False}
    [*chunks, _] = client.chat.completions.create(**ask, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain[0].message.content


def test_a_reply_of_the_client_can_be_a_message(client, run):
    reply = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=9, temperature=0).choices[0].message
    empty = {"annotations": [], "audio": {}, "tool_calls": [], "refusal": "", "function_call": None, "unknown": None}
    clean = [*HELLO, {"role": "assistant", "content": reply.content}, *HELLO]
    ids = tokenizers.chat_prompt(run.tokenizer, clean)
    for more in ({}, empty):
        messages = [*HELLO, reply.model_dump() | more, *HELLO]
        usage = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1).usage
        assert usage.prompt_tokens == len(ids)
    for field in ("audio", "function_call", "annotations"):
        with pytest.raises(
            openai.BadRequestError, match=rf'messages\[0\].{field}: {{"id": "x"}} must be null'
        ) as error:
            message = HELLO[0] | {field: {"id": "x"}}
            client.chat.completions.create(model="tiny", messages=[message])
        assert error.value.param == f"messages[0].{field}"


def test_penalties_of_new_tokens(client, long):
    """The logits of this model are small, so that a penalty lets each token come once."""
    ask = dict(extra_body={"return_token_ids": True}, max_tokens=40)
    for name in ("presence_penalty", "frequency_penalty"):
        [free] = client.completions.create(**long | ask).choices
        [new] = client.completions.create(**long | ask | {name: 2.0}).choices
        assert len({*new.token_ids}) == 40 > len({*free.token_ids})


def test_tools_of_pydantic_are_accepted(client):
    class Add(pydantic.BaseModel):
        a: int

    [tool] = [openai.pydantic_function_tool(Add)]
    assert tool["function"]["strict"] is True
    usage = client.chat.completions.create(model="tiny", messages=HELLO, tools=[tool], max_tokens=1).usage
    assert usage.completion_tokens == 1


def test_more_new_tokens_than_there_is_room_for_are_as_many_as_there_is(client, run, long):
    [choice] = client.completions.create(**long | dict(max_tokens=100_000)).choices
    assert choice.finish_reason == "length"
    assert choice.text == client.completions.create(**long).choices[0].text  # the server's limit
    context = run.model.config.context
    for new in (11, 2048):
        reply = client.completions.create(**long | dict(prompt=[97] * (context - 10), max_tokens=new))
        assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 10)


def test_a_completion_has_a_response_format(client):
    form = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"enum": ["red", "blue"]}}}
    ask = dict(model="tiny", prompt="x", max_tokens=60)
    [choice] = client.completions.create(**ask, extra_body={"response_format": form}).choices
    assert choice.finish_reason == "stop" and json.loads(choice.text) in ("red", "blue")


SAID = {
    "max_tokens: 1.5 must be an integer or null": dict(max_tokens=1.5),
    'temperature: "warm" must be a finite number or null': dict(temperature="warm"),
    "temperature: -1 must be at least 0": dict(temperature=-1),
    "temperature: 101 must be at most 100": dict(temperature=101),
    "top_p: 0 must be above 0": dict(top_p=0),
    "epsilon_cutoff: 1 must be below 1": dict(epsilon_cutoff=1),
    "best_of: 2 must be 1 or null. Not computed; see n.": dict(best_of=2),
    'stream: "yes" must be true or false or null': dict(stream="yes"),
    'stop[1]: "" must not be empty': dict(stop=["a", ""]),
    'logit_bias: "a" must be a token id': dict(logit_bias={"a": 1}),
    'logit_bias: "١" must be a token id': dict(logit_bias={"١": 1}),
    "min_p: 1000000000000000000000000000000000000000 ... 0000000000000000 must be at most 1": dict(min_p=10**400),
    "prompt: 129 prompts, at most 128": dict(prompt=["a"] * 129),
    "n: 100 prompts with n=2 are more than 128 texts": dict(prompt=["a"] * 100, n=2),
    "prompt: [1, 2.5] has a wrong form. A text or token ids": dict(prompt=[1, 2.5]),
    "logit_bias: 1,025 items, at most 1,024": dict(logit_bias={str(i): 0 for i in range(1025)}),
    "response_format.type: is missing": dict(response_format={}),
}


ASSISTANT = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}
SAID_OF_MESSAGES = {
    "messages: arguments of a tool call must hold an object": ASSISTANT,
    "messages[0].content: 5 has a wrong form. A text, or a list": {"role": "user", "content": 5},
    'messages[0].content[0].type: "image_url" must be "text"': {"role": "user", "content": [{"type": "image_url"}]},
    "messages[0].role: is missing": {"role": None, "content": "x"},
    "messages[0].colour: not a field of messages[0], which has role, content": HELLO[0] | {"colour": 1},
    "messages[0]: null must be an object": None,
}


@pytest.mark.parametrize("said", SAID_OF_MESSAGES)
def test_an_error_names_the_message(client, said):
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/chat/completions", body={"messages": [SAID_OF_MESSAGES[said]]}, cast_to=object)
    assert error.value.body["message"].startswith(said), error.value.message
    assert error.value.param == said.split(":")[0]


@pytest.mark.parametrize("said", SAID)
def test_an_error_names_the_value_and_what_would_be_right(client, said):
    with pytest.raises(openai.BadRequestError) as error:
        client.post("/completions", body={"prompt": "x"} | SAID[said], cast_to=object)
    assert error.value.body["message"].startswith(said), error.value.message


def test_a_missing_field_is_named(client):
    with pytest.raises(openai.BadRequestError, match="prompt: is missing") as error:
        client.post("/completions", body={"model": "tiny"}, cast_to=object)
    assert error.value.param == "prompt"


def test_what_the_model_cannot_do_is_an_error(client):
    chat = lambda **more: client.chat.completions.create(**(dict(model="tiny", messages=HELLO) | more))
    with pytest.raises(openai.NotFoundError) as error:
        chat(model="gpt-9")
    assert error.value.code == "model_not_found" and "'tiny'" in error.value.message
    deep = {"type": "function", "function": {"name": "f", "arguments": "[" * 900 + "]" * 900}}
    for code, more in (
        (None, dict(messages=[*HELLO, {"role": "assistant", "tool_calls": [deep]}])),
        ("context_length_exceeded", dict(messages=[{"role": "user", "content": "word " * 80}])),
        (None, dict(messages=[])),
        (None, dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])),
        (None, dict(tool_choice="required")),
        (None, dict(top_logprobs=2)),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            chat(**more)
        assert error.value.code == code and error.value.message
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)
