"""Chat templates: messages to text, by the Jinja template that came with a tokenizer.

A template is a program from a stranger, so it runs in Jinja's sandbox, which protects Python's objects,
with a limit on its processor time and on the size of products.
"""

import datetime
import functools
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from nanoflax.errors import UserError

SECONDS = 5  # of processor time; a long conversation takes some milliseconds
LARGEST = 2**20  # characters or items that a template may make with one "*"


def render(
    template: str, messages: list[dict[str, Any]], variables: dict[str, Any], specials: Iterable[str]
) -> tuple[str, Callable[[str], str]]:
    """The text of a conversation, and a function that restores special strings inside messages.

    Args:
      template: Jinja source.
      messages: list of {"role": str, "content": str, ...}.
      variables: other values that the template may read (add_generation_prompt, bos_token, ...).
      specials: the strings that a tokenizer would read as special tokens.
    Returns: (text, restore). If a message (except its role) contains a special string, or ends with the
      beginning of one, the text has a random mark in its place. Call restore(text) after the special tokens
      that the template wrote are found. Limits: a template that inspects or cuts a content sees the mark, and
      a template that builds a special string out of parts of contents gets a special token.
    Raises: UserError if the template does not compile, raises, or runs too long.
    """
    if not messages or not all(isinstance(message, dict) for message in messages):
        none = "a chat is a list of messages, each with a role and a content; there is none"
        raise UserError("a chat's messages must each be a dict" if messages else none)
    nonce = secrets.token_hex(16)
    held: list[str] = []
    found = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
    beginnings = {s[:n] for s in specials for n in range(1, len(s))}

    def mark(text):
        held.append(text)
        return f"{nonce}{len(held) - 1:06d}"

    def marked(value):
        if isinstance(value, dict):
            # Roles come from our programs, and templates compare them.
            return {k: v if k in ("role", "type") else marked(v) for k, v in value.items() if v is not None}
        if isinstance(value, (list, tuple)):
            return [marked(v) for v in value]
        if not isinstance(value, str):
            return value
        end = len(value.rstrip())  # a template may trim
        start = min((end - len(b) for b in beginnings if value.endswith(b, 0, end)), default=end)
        tail = mark(value[start:end]) if start < end else ""
        return found.sub(lambda match: mark(match[0]), value[:start]) + tail + value[end:]

    try:
        text = _timed(functools.partial(_compile(template).render, messages=marked(messages), **variables))
    except Exception as error:  # of any kind: the template is a stranger's program
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template fails: {reason}") from error
    pattern = re.compile(nonce + r"(\d{6})")
    if nonce in pattern.sub("", text).lower():
        raise UserError(
            "the chat template changes a special token inside a message; take the special token out of the message"
        )
    return text, lambda text: pattern.sub(lambda match: held[int(match[1])], text)


def _timed(function):
    # Jinja compiles a template to Python, so a tracer is called at each of its lines.
    deadline, before = time.thread_time() + SECONDS, sys.gettrace()

    def trace(*_):
        if time.thread_time() > deadline:
            raise TimeoutError(f"it took more than {SECONDS} seconds")
        return trace

    sys.settrace(trace)
    try:
        return function()
    finally:
        sys.settrace(before)


@functools.lru_cache
def _compile(template):
    # The names and settings are those that Transformers gives a template.
    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %} encloses the assistant's words: render them."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            sizes = [len(v) if hasattr(v, "__len__") else v for v in (left, right)]
            if operator == "**" or abs(sizes[0] * sizes[1]) > LARGEST:
                raise OverflowError(f"it computes {operator} of too large values")
            return left * right

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
