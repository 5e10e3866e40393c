"""Chats of records: their messages and tools, checked and cleaned."""

import contextlib
from collections.abc import Callable
from typing import Any

from nanoflax.data import DataReport
from nanoflax.errors import UserError
from nanoflax.untrusted import parse_json

Clean = Callable[[str, str], str]  # (text, place) -> the cleaned text
Messages = tuple[dict[str, Any], ...]


def messages_of(value: Any, place: str, clean: Clean, report: DataReport) -> Messages | None:
    """The cleaned messages of a record; None if they are no messages or one is empty, which is counted."""
    if not (isinstance(value, list) and value and all(map(_is_message, value))):
        report.add("examples without messages of role and content, left out", place)
        return None
    messages = tuple(m | {"content": clean(m["content"], place)} if m.get("content") else m for m in value)
    if not all(message.get("content") or message.get("tool_calls") for message in messages):
        report.add("examples with an empty message, left out", place)
        return None
    return messages


def tools_of(record: dict[str, Any], place: str, report: DataReport) -> Messages | None:
    """The tools of a record, () if it has none; None if they are no list of objects, which is counted."""
    tools = record.get("tools") or ()
    with contextlib.suppress(UserError):
        tools = parse_json(tools, place) if isinstance(tools, str) else tools
    if not (isinstance(tools, list | tuple) and all(isinstance(tool, dict) for tool in tools)):
        report.add("examples whose tools are not a list of objects, left out", place)
        return None
    return tuple(tools)


def has_reply(messages: Messages) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def _is_message(value: Any) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("role"), str)):
        return False
    content = value.get("content")
    return isinstance(content, str) or content is None and isinstance(value.get("tool_calls"), list)
