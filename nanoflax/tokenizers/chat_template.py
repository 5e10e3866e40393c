"""Chat templates: messages to text, by the Jinja template that came with a tokenizer.

A template is a program from somewhere else, so it runs in Jinja's sandbox, which keeps it from
Python's objects, with a limit on its processor time and on the size of what it multiplies.
"""

import datetime
import functools
import json
import re
import secrets
import sys
import time

from nanoflax.errors import UserError

SECONDS = 5  # of processor time; a long conversation takes some milliseconds
LARGEST = 2**20  # characters or items that a template may make with one "*"


def render(template, messages, variables, specials):
    """The text of a conversation, and how to put back what must stay ordinary text in it.

    Args:
      template: Jinja source.
      messages: list of {"role": str, "content": str, ...}.
      variables: dict, what else the template may read (add_generation_prompt, bos_token, ...).
      specials: the strings that a tokenizer would read as special tokens.
    Returns: (text, restore). Wherever a message (but for its role) holds a special string, or ends
      in the beginning of one, the text holds a mark that no one can guess; restore(text) puts the
      strings back, once the special tokens of the template are found. A template that inspects or
      cuts a content sees the mark, and one that builds a special string out of pieces of contents
      gets a special token.
    Raises: UserError if the template does not compile, raises, or runs too long.
    """
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError(
            "a chat is a list of messages, each with a role and a content; there is none"
            if not messages
            else "a chat's messages must each be a dict"
        )
    nonce, held = secrets.token_hex(16), []
    found = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
    beginnings = {s[:n] for s in specials for n in range(1, len(s))}

    def mark(text):
        held.append(text)
        return f"{nonce}{len(held) - 1:06d}"

    def marked(value):
        if isinstance(value, dict):
            # Roles are the program's, and templates compare them.
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
    except Exception as error:  # whatever a stranger's program does
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template fails: {reason}") from error
    pattern = re.compile(nonce + r"(\d{6})")
    if nonce in pattern.sub("", text).lower():
        raise UserError(
            "the chat template changes a special token inside a message; take the special token out of the message"
        )
    return text, lambda text: pattern.sub(lambda match: held[int(match[1])], text)


def _timed(function):
    # Jinja compiles a template to Python, so a tracer sees each line of it, whatever it loops over.
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
        """{% generation %} ... {% endgeneration %} marks the assistant's words: render them."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
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
