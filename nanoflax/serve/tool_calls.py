"""Calls of tools in a reply, in the form of Hermes and Qwen: <tool_call>{"name": ..., "arguments": ...}</tool_call>."""

import secrets
from typing import Any

from nanoflax import untrusted
from nanoflax.errors import UserError
from nanoflax.report import to_json

BEGIN, END = "<tool_call>", "</tool_call>"


def writes_calls(template: str | None) -> bool:
    """Whether a chat template shows the model this form."""
    return template is not None and BEGIN in template and END in template


class ToolCalls:
    """Separates the calls of a reply that comes in pieces from its other text.

    A block that is no call remains text. White space beside a call belongs to neither.
    """

    def __init__(self) -> None:
        self.number = 0  # of calls so far
        self._held = ""  # may become a call, or is white space that may be beside one
        self._after_call = False

    def add(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """(the text that is no call, the calls in OpenAI's form) of all that is complete. last: no text follows."""
        held, shown, calls = self._held + text, "", []
        while (begin := held.find(BEGIN)) >= 0 and (end := held.find(END, begin)) >= 0:
            call, rest = _call(held[begin + len(BEGIN) : end]), end + len(END)
            if call is None:
                shown += self._text(held[:rest])
            else:
                shown += self._text(held[:begin].rstrip())
                calls.append({"index": self.number, **call})
                self.number, self._after_call = self.number + 1, True
            held = held[rest:]
        cut = len(held) if last else _begin(held, begin)
        self._held = held[cut:]
        return shown + self._text(held[:cut]), calls

    def _text(self, text):
        text = text.lstrip() if self._after_call else text
        self._after_call &= not text
        return text


def _begin(text: str, begin: int) -> int:
    """Where the part of a text begins that may become a call, with the white space before it."""
    if begin < 0:
        most = min(len(text), len(BEGIN) - 1)
        begin = len(text) - next(n for n in range(most, -1, -1) if text.endswith(BEGIN[:n]))
    return len(text[:begin].rstrip())


def _call(text: str) -> dict[str, Any] | None:
    """The call in a block, or None."""
    try:
        found = untrusted.json_object(text.encode(), "the call")
    except UserError:
        return None
    name, arguments = found.get("name"), found.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    said = to_json(arguments, ensure_ascii=False)
    if untrusted.parse_json(said, "the arguments") != arguments:  # NaN and Infinity, which JSON does not have
        return None
    function = {"name": name, "arguments": said}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
