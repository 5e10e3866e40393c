"""Calls of tools in a reply, in the form of Hermes and Qwen: <tool_call>{"name": ..., "arguments": ...}</tool_call>."""

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from nanoflax import untrusted
from nanoflax.errors import UserError
from nanoflax.report import to_json

BEGIN, END = "<tool_call>", "</tool_call>"
_BEGINS = re.compile(rf"{BEGIN}(?:\s*{BEGIN})*")
_AFTER = re.compile(rf"\A(?:\s|{END})+")
_MARKER = re.compile(f"{BEGIN}|{END}")
# Markers in a string of JSON are text: such a string, also one that is not complete yet, or else a marker.
_STRING_OR_MARKER = re.compile(rf'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|({BEGIN}|{END})', re.DOTALL)
_ARGUMENTS = re.compile(r'"arguments"\s*:\s*')
_STRICT = json.JSONDecoder(parse_constant=int)  # of "NaN" and "Infinity", which raises ValueError


def writes_calls(template: str | None) -> bool:
    """Whether a chat template shows the model this form."""
    return template is not None and BEGIN in template and END in template


def grammar(tools: Sequence[tuple[str, str]], text: str | None, several: bool) -> str:
    """The rule of replies that call tools, in llguidance's form of Lark.

    Args:
      tools: the name of each, and the rule of its arguments.
      text: the rule of a reply without a call; "": any text, which may also stand before and after calls; None: there
        is no such reply.
      several: whether a reply may have more than one call.
    """
    heads = [to_json('{"name": ' + to_json(name, ensure_ascii=False) + ', "arguments": ') for name, _ in tools]
    kinds = " | ".join(f"{head} {rule}" for head, (_, rule) in zip(heads, tools, strict=True))
    lines = [f'call: "\\n"? ({kinds}) "}}" "\\n"? "{END}"']
    if text == "":
        start = "(until_call call)* TEXT" if several else "TEXT | until_call call"
        lines += ["TEXT: /(.|\\n)*/", f'until_call[lazy]: TEXT "{BEGIN}"']  # lazy: the first marker ends it
    else:
        start = f'"{BEGIN}" call' + f' ("\\n"? "{BEGIN}" call)*' * several + (f" | {text}" if text else "")
    return "\n".join([f"start: {start}", *lines])


class ToolCalls:
    """Separates the calls of a reply that comes in pieces from its other text.

    A call begins after one or more markers <tool_call> and ends before the next marker of either kind, or with the
    reply. What follows such a marker and is no call remains text. White space and further markers </tool_call> beside
    a call belong to neither.
    """

    def __init__(self) -> None:
        self.number = 0  # of calls so far
        self._held = ""  # may become a call, or is white space that may be beside one
        self._after_call = False

    def add(self, text: str, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """(the text that is no call, the calls in OpenAI's form) of all that is complete. last: no text follows."""
        held, shown, calls = self._held + text, "", []
        while (begin := held.find(BEGIN)) >= 0 and (block := _block(held, begin, last)):
            end, call = block
            if call is None:
                shown += self._text(held[:end])
            else:
                shown += self._text(held[:begin].rstrip())
                calls.append({"index": self.number, **call})
                self.number, self._after_call = self.number + 1, True
            held = held[end:]
        if begin < 0:  # the end may become a marker
            begin = len(held) - max(_begun(held, BEGIN), _begun(held, END))
        cut = len(held) if last else len(held[:begin].rstrip())
        self._held = held[cut:]
        return shown + self._text(held[:cut]), calls

    def _text(self, text):
        text = _AFTER.sub("", text) if self._after_call else text
        self._after_call &= not text
        return text


def _block(text: str, begin: int, last: bool) -> tuple[int, dict[str, Any] | None] | None:
    """(where the block at a marker <tool_call> ends, the call in it or None); None: more text will decide it."""
    start = next(_BEGINS.finditer(text, begin)).end()
    first = _MARKER.search(text, start)
    marker = first and next((m for m in _STRING_OR_MARKER.finditer(text, start) if m[1]), None)
    if not marker and not last:
        return None
    call = _call(text[start : marker.start() if marker else len(text) - _begun(text, END)])
    if call is None:  # perhaps no JSON: then a marker in its strings counts too
        marker = first
    if marker and marker[0] == BEGIN:  # of the next block
        return len(text[: marker.start()].rstrip()), call
    return (marker.end() if marker else len(text)), call


def _begun(text: str, marker: str) -> int:
    """How many last characters of a text are the beginning of a marker."""
    return next(n for n in range(len(marker) - 1, -1, -1) if text.endswith(marker[:n]))


def _call(text: str) -> dict[str, Any] | None:
    """The call in a block, or None."""
    try:
        found = untrusted.json_object(text.encode(), "the call")
    except UserError:
        return None
    name, arguments = found.get("name"), found.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    said = _said(text, arguments) if arguments else "{}"
    if said is None:
        return None
    function = {"name": name, "arguments": said}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _said(text: str, arguments: dict[str, Any]) -> str | None:
    """The arguments as the model wrote them, because 1e999 is JSON but no float; in our own words where `text` has
    several keys of this name or an escaped one. None for NaN and Infinity, which are no JSON."""
    matches = [*_ARGUMENTS.finditer(text)]
    if len(matches) == 1:
        begin = matches[0].end()
        try:
            found, end = _STRICT.raw_decode(text, begin)
        except ValueError:
            return None
        if found == arguments:
            return text[begin:end]
    said = to_json(arguments, ensure_ascii=False)
    return said if untrusted.parse_json(said, "the arguments") == arguments else None
