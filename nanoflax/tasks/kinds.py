"""The kinds of examples. To predict, a label is None."""

import dataclasses


def _place():
    return dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Classification:
    text: str
    labels: tuple | None  # of str, one unless a text may have several; None where unknown
    place: str = _place()  # file:line
    fields = ("text", "label")
    input = property(lambda self: self.text)


@dataclasses.dataclass(frozen=True)
class Tagging:
    tokens: tuple  # words
    tags: tuple | None  # one for each word; None where unknown
    place: str = _place()
    fields = ("tokens", "tags")
    input = property(lambda self: self.tokens)


@dataclasses.dataclass(frozen=True)
class Pair:
    source: str
    target: str | None  # None where unknown
    place: str = _place()
    fields = ("source", "target")
    input = property(lambda self: self.source)


@dataclasses.dataclass(frozen=True)
class Chat:
    messages: tuple  # of dicts with role and content
    place: str = _place()
    fields = ("messages",)
    input = property(lambda self: self.messages)


@dataclasses.dataclass(frozen=True)
class Text:
    text: str
    place: str = _place()
    fields = ("text",)
    input = property(lambda self: self.text)
