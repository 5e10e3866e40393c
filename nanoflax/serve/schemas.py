"""The requests of the API as JSON Schema. The server checks bodies with them and shows them in /openapi.json.

Each field of OpenAI's API is computed, or not used because the answer is right without it, or refused: then only null
and the values without effect are possible.
"""

from typing import Any

from nanoflax.config import MAX_SEED
from nanoflax.serve.programs import ALTERNATIVES

Schema = dict[str, Any]
MAX_CHOICES = 128  # texts of one request: prompts times n
MAX_INPUTS = 2048  # texts of a request for embeddings, as in OpenAI's API


def _or_null(kind: str, text: str, **rules: Any) -> Schema:
    return {"type": [kind, "null"], "description": text, **rules}


def _object(required: list[str], properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _only(values: list, text: str) -> Schema:
    return {"enum": values, "description": text}


def _not_used(kind: str, why: str = "") -> Schema:
    return _or_null(kind, f"Not used{why and ': ' + why}.")


NOTHING = [None, [], {}, ""]  # how clients write that a field is not there
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
_STOP = {"type": "string", "minLength": 1, "maxLength": 1000}


def _texts(most: int) -> Schema:
    """api.py counts them: one error of `anyOf` cannot say that there are too many."""
    return {
        "anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS, "minItems": 1}],
        "description": f"A text or token ids, or a list of texts or of lists of token ids, at most {most:,}.",
    }


_JSON = {"type": ["object", "string", "null"], "description": "JSON of this schema: an object, or its text."}
_RULES = {
    "json": _JSON,
    "regex": _or_null("string", "An expression for the complete text, in Rust's syntax.", minLength=1),
    "choice": _or_null(
        "array", "One of these texts.", items={"type": "string", "minLength": 1}, minItems=1, maxItems=2000
    ),
    "grammar": _or_null("string", "In Lark's form; its first rule is start.", minLength=1),
}
_JSON_SCHEMA = _object(
    ["schema"],
    {
        "name": {"type": "string"},
        "description": {"type": ["string", "null"]},
        "schema": {"type": "object"},
        "strict": {"type": ["boolean", "null"]},
    },
)
_FORMAT = {
    **_object(["type"], {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": _JSON_SCHEMA}),
    "type": ["object", "null"],
    "description": "What the reply must be: any text, a JSON object, or JSON of a schema.",
}
_SAMPLING = {
    "model": _or_null("string", "A name that /v1/models lists; null: the only one."),
    "temperature": _or_null("number", "0: the most probable token. null: the model's own.", minimum=0, maximum=100),
    "top_p": _or_null("number", "The fewest tokens with this probability.", exclusiveMinimum=0, maximum=1),
    "top_k": _or_null("integer", "The K most probable tokens; 0: all.", minimum=0, maximum=2**31 - 1),
    "min_p": _or_null("number", "Tokens with this share of the highest probability.", minimum=0, maximum=1),
    "top_h": _or_null(
        "number", "The most probable tokens with this share of the entropy; 0: all.", minimum=0, maximum=1
    ),
    "typical_p": _or_null(
        "number", "The most typical tokens with this probability; 1: all.", exclusiveMinimum=0, maximum=1
    ),
    "epsilon_cutoff": _or_null(
        "number", "Tokens with this probability, such as 3e-4; 0: all.", minimum=0, exclusiveMaximum=1
    ),
    "eta_cutoff": _or_null(
        "number", "As epsilon_cutoff, lower where many tokens are probable.", minimum=0, exclusiveMaximum=1
    ),
    "repetition_penalty": _or_null(
        "number", "Above 1: earlier tokens become less probable.", exclusiveMinimum=0, maximum=100
    ),
    "seed": _or_null(
        "integer",
        f"The same seed draws the same texts; choice i has seed + i. Any integer; it counts modulo {MAX_SEED + 1}.",
    ),
    "n": _or_null("integer", "Number of texts for each prompt.", minimum=1, maximum=MAX_CHOICES),
    "stop": {
        "anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": 16}, {"type": "null"}],
        "description": "A text ends before any of these strings.",
    },
    "logit_bias": _or_null(
        "object",
        "Token id: number that is added to its logit.",
        patternProperties={"^[0-9]{1,9}$": {"type": "number", "minimum": -100, "maximum": 100}},
        additionalProperties=False,
        maxProperties=1024,
    ),
    "stream": _or_null("boolean", "Send parts of the text as server-sent events."),
    "stream_options": {
        **_object(
            [],
            {
                "include_usage": _or_null("boolean", "The last event counts the tokens."),
                "include_obfuscation": _not_used("boolean", "no event is padded"),
            },
        ),
        "type": ["object", "null"],
        "description": "Of a stream.",
    },
    "presence_penalty": _or_null(
        "number", "Subtracted from the logits of the tokens that the new text has.", minimum=-2, maximum=2
    ),
    "frequency_penalty": _or_null("number", "The same, as often as the new text has the token.", minimum=-2, maximum=2),
    "response_format": _FORMAT,
    "user": _not_used("string"),
    "return_token_ids": _or_null("boolean", "Report prompt_token_ids and token_ids, as in vLLM."),
    "structured_outputs": {
        **_object([], _RULES),
        "type": ["object", "null"],
        "description": "What the text must be, by one of these; as in vLLM.",
    },
    **{
        f"guided_{name}": rule | {"description": f"The older name of structured_outputs.{name}."}
        for name, rule in _RULES.items()
    },
}


def _most_new(text: str, least: int) -> Schema:
    text += " Above the server's limit or the room in the context, that many, with finish_reason length."
    return _or_null("integer", text, minimum=least, maximum=2**31 - 1)


COMPLETION = _object(
    ["prompt"],
    {
        "prompt": _texts(MAX_CHOICES),
        "max_tokens": _most_new("Most new tokens, with echo=true also 0; null: 16.", 0),
        "echo": _or_null("boolean", "Begin the text with the prompt."),
        "logprobs": _or_null(
            "integer", "How many alternatives of each token to report.", minimum=0, maximum=ALTERNATIVES
        ),
        "best_of": _only([1, None], "Not computed; see n."),
        "suffix": _only([None, ""], "Not computed."),
        **_SAMPLING,
    },
)
_TEXT_PARTS = {
    "type": "array",
    "items": _object(["type", "text"], {"type": {"const": "text"}, "text": {"type": "string"}}),
    "maxItems": 1024,
}
_CALL = _object(
    ["function"],
    {
        "id": {"type": "string"},
        "type": {"const": "function"},
        "function": _object(["name"], {"name": {"type": "string"}, "arguments": {"type": "string"}}),
    },
)
_MESSAGE = _object(
    ["role"],
    {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [{"type": "string"}, _TEXT_PARTS, {"type": "null"}],
            "description": 'A text, or a list of {"type": "text", "text": "..."}.',
        },
        "name": {"type": ["string", "null"]},
        "tool_calls": {"type": ["array", "null"], "items": _CALL, "maxItems": 128},
        "tool_call_id": {"type": ["string", "null"]},
        "reasoning_content": {"type": ["string", "null"]},
        "refusal": {"type": ["string", "null"]},
        "annotations": _only(NOTHING, "Chat templates read no annotations."),
        "audio": _only(NOTHING, "Messages are texts."),
        "function_call": _only(NOTHING, "See tool_calls."),
    },
)
_TOOL = _object(
    ["type", "function"],
    {
        "type": {"const": "function"},
        "function": _object(
            ["name"],
            {
                "name": {"type": "string"},
                "description": {"type": ["string", "null"]},
                "parameters": {"type": ["object", "null"]},
                "strict": _or_null("boolean", "Arguments have this schema, if the chat template shows calls."),
            },
        ),
    },
)
_NAMED = _object(["name"], {"name": {"type": "string"}})
_ALLOWED = {
    "type": "array",
    "items": _object(["type", "function"], {"type": {"const": "function"}, "function": _NAMED}),
}
_TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["auto", "none", "required", None]},
        _object(
            ["type"],
            {
                "type": {"enum": ["function", "allowed_tools"]},
                "function": _NAMED,
                "allowed_tools": _object(
                    ["mode", "tools"], {"mode": {"enum": ["auto", "required"]}, "tools": _ALLOWED | {"minItems": 1}}
                ),
            },
        ),
    ],
    "description": 'auto; none: the template gets no tools; required: the reply calls tools; {"type": "function", '
    '"function": {"name": "..."}}: it calls this one; or {"type": "allowed_tools", "allowed_tools": {"mode": "auto" or '
    '"required", "tools": [...]}}: only these.',
}
CHAT = _object(
    ["messages"],
    {
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 2048},
        "max_tokens": _most_new("Most new tokens; null: as many as there is room for.", 1),
        "max_completion_tokens": _most_new("The newer name of max_tokens.", 1),
        "tools": _or_null(
            "array",
            "For the chat template. If it has the form <tool_call>{JSON}</tool_call>, the reply has tool_calls.",
            items=_TOOL,
            maxItems=128,
        ),
        "tool_choice": _TOOL_CHOICE,
        "logprobs": _or_null("boolean", "Report the log-probability of each token."),
        "top_logprobs": _or_null("integer", "And of so many alternatives.", minimum=0, maximum=ALTERNATIVES),
        "modalities": _only([["text"], None], "Replies are texts."),
        "audio": _only([None], "Replies are texts."),
        "functions": _only([None, []], "See tools."),
        "function_call": _only(["auto", "none", None], "See tools."),
        "moderation": _only([None], "No text is judged."),
        "web_search_options": _only([None], "The server reads no web pages."),
        "metadata": _not_used("object"),
        "store": _not_used("boolean", "nothing is stored"),
        "service_tier": _not_used("string"),
        "safety_identifier": _not_used("string"),
        "prompt_cache_key": _not_used("string", "every shared beginning is found"),
        "prompt_cache_options": _not_used("object"),
        "prompt_cache_retention": _not_used("string"),
        "prediction": _not_used("object", "the reply is the same without it"),
        "parallel_tool_calls": _or_null("boolean", "false: at most one call, if the chat template shows calls."),
        "reasoning_effort": _not_used("string", "a hint that chat templates do not get"),
        "verbosity": _not_used("string", "a hint that chat templates do not get"),
        **_SAMPLING,
    },
)
EMBEDDING = _object(
    ["input"],
    {
        "model": _SAMPLING["model"],
        "input": _texts(MAX_INPUTS),
        "encoding_format": _only(["float", "base64", None], "base64: of float32 numbers, little-endian."),
        "dimensions": _or_null("integer", "Only the model's own number.", minimum=1, maximum=2**31 - 1),
        "user": _SAMPLING["user"],
    },
)
ATTENTION = _object(
    ["prompt"],
    {
        "model": _SAMPLING["model"],
        "prompt": {
            "anyOf": [{"type": "string", "minLength": 1}, _IDS],
            "description": "A text or token ids; for a model with a source, the source.",
        },
        "completion": _or_null("array", "Token ids after the prompt; null: none.", items=_IDS["items"]),
        "position": _or_null(
            "integer", "Of which token of the completion; null: of the one after it.", minimum=0, maximum=2**31 - 1
        ),
        "layer": _or_null("integer", "One of /v1/models; null: the mean of all.", minimum=0, maximum=2**31 - 1),
        "head": _or_null("integer", "From 0; null: the mean of all.", minimum=0, maximum=2**31 - 1),
    },
)


def openapi() -> dict[str, Any]:
    """The OpenAPI description of the server. https://spec.openapis.org/oas/v3.1.0"""
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
    }
    failed = {"description": "an error", "content": {"application/json": {"schema": error}}}
    refused = {str(status): failed for status in (400, 401, 404, 408, 413, 415, 429, 503)}
    answer = {"description": "the answer", "content": {"application/json": {"schema": {"type": "object"}}}}
    get = lambda text, **more: {"get": {"summary": text, "responses": {"200": answer, "401": failed} | more}}
    post = lambda text, schema: {
        "post": {
            "summary": text,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {"200": answer} | refused,
        }
    }
    model = get("Describe a model.", **{"404": failed})
    model["get"]["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanoflax", "version": "1"},
        "paths": {
            "/v1/models": get("List the model."),
            "/v1/models/{model}": model,
            "/v1/completions": post("Continue prompts.", COMPLETION),
            "/v1/chat/completions": post("Reply to a conversation.", CHAT),
            "/v1/embeddings": post("Vectors of texts, of length 1.", EMBEDDING),
            "/v1/attention": post("How a token attends to those before it (nanoflax only).", ATTENTION),
        },
        "security": [{}, {"key": []}],
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }
