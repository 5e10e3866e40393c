"""Chat templates: messages to text, by the Jinja template that came with a tokenizer.

A template is an untrusted program. So Jinja's sandbox runs it without access to Python's objects, and
processor time and the size of products are limited.
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

MAX_SECONDS = 5  # of processor time; a long conversation takes some milliseconds
MAX_PRODUCT = 2**20  # characters or items that one "*" in a template may make


def render(
    template: str, messages: list[dict[str, Any]], variables: dict[str, Any], specials: Iterable[str]
) -> tuple[str, Callable[[str], str]]:
    """The text of a conversation, and a function that restores special strings inside messages.

    Args:
      template: Jinja source.
      messages: list of {"role": str, "content": str, ...}.
      variables: other values that the template may read (add_generation_prompt, bos_token, ...).
      specials: the strings that a tokenizer would read as special tokens.
    Returns: (text, restore). Where a message (except its role) contains a special string, or ends with a prefix
      of one, the text has a random placeholder. First find the special tokens that the template wrote, then
      call restore(text). Limits: a template that inspects or cuts a content sees the placeholder, and a
      template that joins parts of contents to a special string gets a special token.
    Raises: UserError if the template does not compile, raises, or runs too long.
    """
    if not messages or not all(isinstance(message, dict) for message in messages):
        problem = "the messages of a chat must be dicts" if messages else "a chat must have one or more messages"
        raise UserError(problem + ', such as {"role": "user", "content": "Hello"}')
    nonce = secrets.token_hex(16)
    originals: list[str] = []
    special = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
    prefixes = {s[:n] for s in specials for n in range(1, len(s))}

    def placeholder(text):
        originals.append(text)
        return f"{nonce}{len(originals) - 1:06d}"

    def protected(value):
        if isinstance(value, dict):
            # Roles come from our programs, and templates compare them.
            return {k: v if k in ("role", "type") else protected(v) for k, v in value.items() if v is not None}
        if isinstance(value, (list, tuple)):
            return [protected(v) for v in value]
        if not isinstance(value, str):
            return value
        end = len(value.rstrip())  # a template may trim
        start = min((end - len(p) for p in prefixes if value.endswith(p, 0, end)), default=end)
        tail = placeholder(value[start:end]) if start < end else ""
        return special.sub(lambda match: placeholder(match[0]), value[:start]) + tail + value[end:]

    try:
        text = _time_limited(functools.partial(_compile(template).render, messages=protected(messages), **variables))
    except Exception as error:  # an untrusted template may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template fails: {reason}") from error
    pattern = re.compile(nonce + r"(\d{6})")
    if nonce in pattern.sub("", text).lower():
        raise UserError(
            "the chat template changes a special token inside a message; take the special token out of the message"
        )
    return text, lambda text: pattern.sub(lambda match: originals[int(match[1])], text)


def _time_limited(function):
    # Jinja compiles a template to Python, which calls the tracer at each line.
    deadline, before = time.thread_time() + MAX_SECONDS, sys.gettrace()

    def trace(*_):
        if time.thread_time() > deadline:
            raise TimeoutError(f"it took more than {MAX_SECONDS} seconds")
        return trace

    sys.settrace(trace)
    try:
        return function()
    finally:
        sys.settrace(before)


@functools.lru_cache
def _compile(template):
    # Templates get the same names and settings as in Transformers.
    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        """Renders the text of the assistant inside {% generation %} ... {% endgeneration %}."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            sizes = [len(v) if hasattr(v, "__len__") else v for v in (left, right)]
            if operator == "**" or abs(sizes[0] * sizes[1]) > MAX_PRODUCT:
                raise OverflowError(f"the result of {operator} is too large")
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
