"""Requests of OpenAI's API as requests to the engine."""

import functools
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from nanoflax import tokenizers, untrusted
from nanoflax.config import MAX_SEED
from nanoflax.constraints import Constraint
from nanoflax.errors import UserError
from nanoflax.serve import attention
from nanoflax.serve.errors import ApiError
from nanoflax.serve.forms import Served
from nanoflax.serve.programs import FILTERS, PENALTIES
from nanoflax.serve.replies import Choice
from nanoflax.serve.requests import Request
from nanoflax.serve.schemas import MAX_CHOICES, MAX_INPUTS, NOTHING
from nanoflax.serve.tool_choice import ToolChoice, tool_choice

# The rules that a text can follow, by vLLM's names in structured_outputs (formerly after guided_) -> ours.
RULES = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "grammar"}
COMPLETION_TOKENS = 16  # new tokens if a completion does not say how many, as in OpenAI's API


def check_model(served: Served, body: dict[str, Any]) -> None:
    """Raises: ApiError if the body names another model."""
    if body.get("model") not in (None, served.name):
        message = f"model {body['model']!r:.80} is not served here; the only model is {served.name!r}"
        raise ApiError(404, message, "model", "model_not_found")


def completion_choices(served: Served, body: dict[str, Any]) -> list[Choice]:
    """The choices of a request to /v1/completions: n for each prompt. Raises: ApiError."""
    reads_source, echo = served.config.reads_source, bool(body.get("echo"))
    if echo and reads_source:
        raise ApiError(400, "echo: the prompt of an encoder-decoder is no part of its text", "echo")
    limit = COMPLETION_TOKENS if body.get("max_tokens") is None else body["max_tokens"]
    if not limit and not echo:
        raise ApiError(400, "max_tokens: 0 gives an empty text without echo=true", "max_tokens")
    found = []
    for prompt in _each(body["prompt"], "prompt", MAX_CHOICES):
        ids, text = prompt, prompt
        if isinstance(prompt, str):
            ids = tokenizers.prompt_ids(served.tokenizer, prompt, reads_source)
        else:
            check_ids(served, prompt, "prompt")
            text = served.tokenizer.decode(prompt) if echo else ""
        found.append((ids, text if echo else None))
    return _choices(served, body, found, limit, body.get("logprobs"))


def chat_choices(served: Served, body: dict[str, Any]) -> list[Choice]:
    """The n choices of a request to /v1/chat/completions. Raises: ApiError; UserError if the template fails."""
    if served.tokenizer.chat_template is None:
        raise ApiError(400, f"{served.name} has no chat template; use /v1/completions", "model", "no_chat_template")
    if body.get("max_tokens") and body.get("max_completion_tokens"):
        raise ApiError(400, "max_tokens: give it or max_completion_tokens", "max_tokens")
    if body.get("top_logprobs") is not None and not body.get("logprobs"):
        raise ApiError(400, "top_logprobs: needs logprobs=true", "top_logprobs")
    calls = tool_choice(body, served.tokenizer.chat_template)
    tools = body.get("tools") if body.get("tool_choice") != "none" else None
    ids = tokenizers.chat_prompt(served.tokenizer, [_message(m) for m in body["messages"]], tools or None)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    logprobs = (body.get("top_logprobs") or 0) if body.get("logprobs") else None
    return _choices(served, body, [(ids, None)], limit, logprobs, calls)


def _rule(served: Served, body: dict[str, Any], calls: ToolChoice | None) -> tuple[str, Callable[[], Any]]:
    """(the field of the body with a rule for the text, what makes the constraint of each choice).

    response_format is that of a reply without calls.
    Raises: ApiError for two rules, and for one that cannot be followed.
    """
    structured = body.get("structured_outputs")
    given = {f"guided_{name}": (name, body.get(f"guided_{name}")) for name in RULES}
    given |= {f"structured_outputs.{name}": (name, (structured or {}).get(name)) for name in RULES}
    given = {field: (name, rule) for field, (name, rule) in given.items() if rule is not None}
    if structured is not None and not any(field.startswith("structured") for field in given):
        raise ApiError(400, f"structured_outputs: give one of {', '.join(RULES)}", "structured_outputs")
    schema = _schema(body.get("response_format"))
    if calls and (calls.forced or calls.bound or not given):
        if rule := calls.rule(served.tokenizer, schema):
            given["tool_choice" if calls.forced else "tools"] = "grammar", rule
    elif schema is not None:
        given["response_format"] = "json", schema
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)}: a text can follow only one rule; leave one out", min(given))
    for field, (name, rule) in given.items():
        try:
            if name == "json" and isinstance(rule, str):
                rule = untrusted.parse_json(rule, "the text")
            rules: dict[str, Any] = {RULES[name]: rule}
            make = functools.partial(Constraint, served.tokenizer, **rules, begins=served.config.reads_source)
            make()  # compiles the rule; later ones are copies
        except UserError as error:
            raise ApiError(400, f"{field}: {error}", field) from error
        return field, make
    return "", lambda: None


def _schema(form: dict[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema of a response_format, or None for any text. Raises: ApiError."""
    kind = form["type"] if form else "text"
    if form and (kind == "json_schema") != ("json_schema" in form):
        raise ApiError(
            400, "response_format: type json_schema, and only this type, needs json_schema", "response_format"
        )
    if not form or kind == "text":
        return None
    return form["json_schema"]["schema"] if kind == "json_schema" else {"type": "object"}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """The message as chat templates read it: content is a text, and arguments of tools are objects."""
    found = {key: value for key, value in message.items() if value not in NOTHING}
    content = found.get("content", "")
    found["content"] = content if isinstance(content, str) else "".join(part["text"] for part in content)
    found["role"] = {"developer": "system"}.get(found["role"], found["role"])
    for call in found.get("tool_calls", ()):
        arguments = (call["function"].get("arguments") or "{}").encode()
        try:
            call["function"]["arguments"] = untrusted.json_object(arguments, "messages: arguments of a tool call")
        except UserError as error:
            raise ApiError(400, str(error), "messages") from error
    return found


def check_ids(served: Served, ids: Iterable[int], field: str) -> None:
    """Raises: ApiError for ids that the tokenizer does not have."""
    size = served.tokenizer.vocab_size
    if wrong := [i for i in ids if i >= size]:
        raise ApiError(400, f"{field}: token id {wrong[0]} is not in the vocabulary of {size}", field)


def _choices(served, body, prompts, limit, logprobs, calls=None):
    n, tokenizer = body.get("n") or 1, served.tokenizer
    field, rule = _rule(served, body, calls)
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"n: {len(prompts)} prompts with n={n} are more than {MAX_CHOICES} texts", "n")
    given = {name: value for name in FILTERS if (value := body.get(name)) is not None}
    filters = {name: value for name, value in (served.defaults | given).items() if name in FILTERS}
    stops = body.get("stop") or served.defaults.get("stop", ())
    bias = {int(i): float(x) for i, x in (body.get("logit_bias") or {}).items()}
    check_ids(served, bias, "logit_bias")
    with_ids = bool(body.get("return_token_ids"))
    seed = body.get("seed", secrets.randbelow(MAX_SEED + 1))
    found = []
    for ids, echo in prompts:
        most = _room(served, ids, limit, "messages" if "messages" in body else "prompt")
        for i in range(n):
            request = Request(
                ids,
                most,
                **filters,
                **{name: body.get(name, 0) for name in PENALTIES},
                seed=(seed + i) % (MAX_SEED + 1),
                logit_bias=bias,
                log_probabilities=logprobs,
                prompt_log_probabilities=echo is not None and (logprobs is not None or not most),
                constraint=rule(),
            )
            before = () if served.config.reads_source else ids
            ends = [stops] if isinstance(stops, str) else stops
            with_calls = calls.finish_reason if calls else ""
            found.append(Choice(tokenizer, request, ends, before, echo, field, with_ids, with_calls))
    return found


def _room(served, ids, limit, field):
    """The number of new tokens: `limit`, else the model's own; at most what the server and the context allow."""
    context = served.context
    free = context if served.config.reads_source else context - len(ids)
    if len(ids) > context or free < (limit != 0):  # 0: the prompt alone is scored
        room = "" if len(ids) > context else " and leaves no room for a new one"
        message = f"the prompt has {len(ids)} tokens{room}; the model's context is {context}"
        raise ApiError(400, message, field, "context_length_exceeded")
    own = served.config.generation.max_new_tokens or served.max_tokens
    return int(min(own if limit is None else limit, served.max_tokens, free))


def embedding_ids(served: Served, encode: Callable[[str], list[int]], body: dict[str, Any]) -> list[list[int]]:
    """The ids of each text of a request to /v1/embeddings. Raises: ApiError."""
    found, most = [], served.context
    for i, text in enumerate(_each(body["input"], "input", MAX_INPUTS)):
        ids = encode(text) if isinstance(text, str) else text
        check_ids(served, ids, "input")
        if len(ids) > most:
            message = f"input: text {i} has {len(ids)} tokens, but the model's context is {most}"
            raise ApiError(400, message, "input", "context_length_exceeded")
        found.append(ids)
    return found


def attention_request(served: Served, body: dict[str, Any]) -> Request:
    """The engine's request for a body of /v1/attention. Raises: ApiError."""
    shown, reads_source = attention.layers_of(served.config), served.config.reads_source
    layer, head, at, completion = (body.get(name) for name in ("layer", "head", "position", "completion"))
    if not shown.kinds:
        raise ApiError(400, f"{served.name} has no attention to show: {shown.missing}", "model", "no_attention")
    if layer is not None and layer not in shown.kinds:
        known = f"{', '.join(map(str, shown.kinds))}{shown.missing and '; ' + shown.missing}"
        raise ApiError(400, f"layer: {layer} is none of the layers with attention: {known}", "layer")
    if head is not None and head >= shown.heads:
        raise ApiError(400, f"head: {head} must be below the number of heads, {shown.heads}", "head")
    prompt, completion = body["prompt"], completion or []
    if at is not None and at > len(completion):
        raise ApiError(400, f"position: {at} is after the completion's {len(completion)} tokens", "position")
    if isinstance(prompt, str):
        prompt = tokenizers.prompt_ids(served.tokenizer, prompt, reads_source)
    check_ids(served, prompt, "prompt")
    check_ids(served, completion, "completion")
    completion = completion[:at]
    read = len(completion) + 1  # with the next token
    most = max(len(prompt), read) if reads_source else len(prompt) + read
    if most > served.context:
        message = f"prompt: the tokens and the next one are {most}, but the model's context is {served.context}"
        raise ApiError(400, message, "prompt", "context_length_exceeded")
    factors = attention.factors(shown, layer, head)
    if reads_source:
        return Request(prompt, 0, attention=factors, target=completion)
    return Request([*prompt, *completion], 0, attention=factors)


def _each(texts: Any, field: str, most: int) -> list[Any]:
    """A list of texts or of lists of ids; one of them alone becomes a list. Raises: ApiError for too many."""
    found = [texts] if isinstance(texts, str) or isinstance(texts[0], int) else texts
    if len(found) > most:
        raise ApiError(400, f"{field}: {len(found):,} {field}s, at most {most:,}", field)
    return found
