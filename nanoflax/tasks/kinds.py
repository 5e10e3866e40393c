"""The kinds of examples. `place` is the file and line. The label (labels, tags, target) is None for prediction."""

import dataclasses
from typing import Any, ClassVar


def _place() -> Any:
    return dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Classification:
    text: str
    labels: tuple[str, ...] | None  # one label; with multi_label any number
    place: str = _place()
    fields: ClassVar = ("text", "label")
    input = property(lambda self: self.text)


@dataclasses.dataclass(frozen=True)
class Tagging:
    tokens: tuple[str, ...]  # words
    tags: tuple[str, ...] | None  # one for each word
    place: str = _place()
    fields: ClassVar = ("tokens", "tags")
    input = property(lambda self: self.tokens)


@dataclasses.dataclass(frozen=True)
class Pair:
    source: str
    target: str | None
    place: str = _place()
    fields: ClassVar = ("source", "target")
    input = property(lambda self: self.source)


@dataclasses.dataclass(frozen=True)
class Chat:
    messages: tuple[dict[str, Any], ...]  # each with role and content, or tool_calls
    place: str = _place()
    tools: tuple[dict[str, Any], ...] | None = dataclasses.field(default=None, repr=False)  # functions for the template
    fields: ClassVar = ("messages",)
    input = property(lambda self: self.messages)


@dataclasses.dataclass(frozen=True)
class Text:
    text: str
    place: str = _place()
    fields: ClassVar = ("text",)
    input = property(lambda self: self.text)


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to a prompt, the better one first: three texts, or three tuples of the messages of a chat."""

    prompt: Any
    chosen: Any
    rejected: Any
    place: str = _place()
    tools: tuple[dict[str, Any], ...] | None = dataclasses.field(default=None, repr=False)  # functions for the template
    margin: float = 0.0  # how much better, for reward models
    found_prompt: bool = dataclasses.field(default=False, repr=False)  # it is the common beginning of both texts
    fields: ClassVar = ("prompt", "chosen", "rejected")
    input = property(lambda self: self.prompt)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, a text or the messages of a chat, and what a reward compares the completion with."""

    prompt: str | tuple[dict[str, Any], ...]
    answer: str  # or tests of a program; "" if the reward needs none
    place: str = _place()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # further fields of the record
    fields: ClassVar = ("prompt", "answer")
    input = property(lambda self: self.prompt)


Example = Classification | Tagging | Pair | Chat | Text | Preference | Problem
