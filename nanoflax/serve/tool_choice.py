"""tool_choice and parallel_tool_calls of a request: which tools a reply may call, and whether it must."""

import dataclasses
from typing import Any

from nanoflax.constraints import MAX_CHARACTERS, Constraint, json_rule
from nanoflax.errors import UserError
from nanoflax.serve import tool_calls
from nanoflax.serve.errors import ApiError


@dataclasses.dataclass(frozen=True)
class ToolChoice:
    """The calls that a reply may have.

    tools: functions that may be called, by their numbers in the request. forced: there must be a call. several: there
    may be more than one. bound: without a rule, the model could call what it may not. finish_reason: of a reply with
    calls, as OpenAI's: "stop" if the request names the function.
    """

    tools: dict[int, dict[str, Any]]
    forced: bool
    several: bool
    bound: bool
    finish_reason: str

    def rule(self, tokenizer: Any, answer: dict[str, Any] | None) -> str:
        """The grammar of the reply; empty: it needs none. answer: the JSON schema of a reply without calls, if it has
        one.

        Arguments follow the function's schema if a call is forced or the function is strict; else they are any object.
        Raises: ApiError that names the schema that cannot be followed.
        """
        followed = {i for i, function in self.tools.items() if self.forced or function.get("strict")}
        if not (followed or self.bound or answer is not None):
            return ""
        rules = []
        for i, function in self.tools.items():
            field = f"tools[{i}].function.parameters"
            schema = _arguments(function, field) if i in followed else {"type": "object"}
            rules.append((function["name"], _json_rule(tokenizer, schema, field)))
        text = None if self.forced else "" if answer is None else _json_rule(tokenizer, answer, "response_format")
        found = tool_calls.grammar(rules, text, self.several)
        if (size := len(found)) > MAX_CHARACTERS:
            problem = f"names and schemas of {size} characters, but at most {MAX_CHARACTERS} are read; leave some out"
            raise ApiError(400, f"tools: {problem}", "tools")
        return found


def tool_choice(body: dict[str, Any], template: str | None) -> ToolChoice | None:
    """The choice of a request to /v1/chat/completions; None: calls in the reply are text. template: the chat template.

    Raises: ApiError for a choice that the tools or the template do not have.
    """
    tools: list[Any] = body.get("tools") or []
    given = body.get("tool_choice", "auto")
    choice: dict[str, Any] = given if isinstance(given, dict) else {"type": given}
    wanted, mode = tools, (kind := choice["type"])
    if isinstance(given, dict) and kind not in given:
        raise ApiError(400, f"tool_choice.{kind}: is missing", f"tool_choice.{kind}")
    if isinstance(given, dict) and (other := sorted(given.keys() - {"type", kind})):
        raise ApiError(400, f"tool_choice.{other[0]:.80}: is no part of a choice of type {kind!r}", "tool_choice")
    if kind == "function":
        wanted, mode = [choice], "required"
    elif kind == "allowed_tools":
        wanted, mode = choice[kind]["tools"], choice[kind]["mode"]
    known, names = ([tool["function"]["name"] for tool in listed] for listed in (tools, wanted))
    problem, shown = "", tool_calls.writes_calls(template)
    if kind not in ("auto", "none") and not tools:
        problem = "needs tools"
    elif unknown := sorted({*names} - {*known}):
        problem = f"{unknown[0]!r:.80} is none of the tools, which are {', '.join(known):.200}"
    elif mode == "required" and not shown:
        problem = "the chat template of this model shows no calls of tools; only auto and none are possible"
    if problem:
        raise ApiError(400, f"tool_choice: {problem}", "tool_choice")
    if mode == "none" or not tools or not shown:
        return None
    several = kind != "function" and body.get("parallel_tool_calls") is not False
    functions = {i: tool["function"] for i, tool in enumerate(tools) if tool["function"]["name"] in names}
    reason = "stop" if kind == "function" else "tool_calls"
    return ToolChoice(functions, mode == "required", several, not several or len(functions) < len(tools), reason)


def _arguments(function, field):
    """The schema of a function's arguments, which are an object."""
    schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    kind = schema.get("type", "object")
    if kind != "object":
        raise ApiError(400, f'{field}.type: {kind!r:.40} must be "object"', field)
    return schema | {"type": "object"}


def _json_rule(tokenizer, schema, field):
    try:
        Constraint(tokenizer, json_schema=schema)  # alone, so that an error names the schema
        return json_rule(schema)
    except UserError as error:
        raise ApiError(400, f"{field}: {error}", field) from error
