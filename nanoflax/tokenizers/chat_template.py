"""Chat templates: messages to text, by the Jinja template that came with a tokenizer.

A template is an untrusted program. So Jinja's sandbox runs it without access to Python's objects, and
processor time and the size of products are limited.
"""

import dataclasses
import datetime
import functools
import json
import re
import secrets
import sys
import time
from typing import Any

from nanoflax.errors import UserError
from nanoflax.tokenizers.base import well_formed

MAX_SECONDS = 5  # of processor time; a long conversation takes some milliseconds
MAX_PRODUCT = 2**20  # characters or items that one "*" in a template may make


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A conversation as a template writes it. Parts of the text are (start, end) in characters."""

    text: str  # with the given replacements of special tokens
    special: list[tuple[int, int, str]]  # the special tokens that the template wrote: start, end, name
    marked: list[tuple[int, int]] | None  # what {% generation %} marks; None: the template has no such marks


def render(
    template: str, messages: list[dict[str, Any]], variables: dict[str, Any], specials: dict[str, str]
) -> Rendering:
    """The text of a conversation.

    Args:
      template: Jinja source.
      messages: list of {"role": str, "content": str, ...}.
      variables: other values that the template may read (add_generation_prompt, bos_token, ...).
      specials: the strings that a tokenizer would read as special tokens, and the replacement of each. Only those
        that the template writes are replaced; those inside a message stay as they are.
    Limits: the template sees a random placeholder instead of a special string inside a message (except its role), or
      of a prefix of one at the end. So a template that inspects or cuts a content sees the placeholder, and a
      template that joins parts of contents to a special string gets a special token.
    Raises: UserError if the template does not compile, raises, or runs too long.
    """
    if not messages or not all(isinstance(message, dict) for message in messages):
        problem = "the messages of a chat must be dicts" if messages else "a chat must have one or more messages"
        raise UserError(problem + ', such as {"role": "user", "content": "Hello"}')
    nonce = secrets.token_hex(16)
    originals: list[str] = []
    any_special = "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)"
    special = re.compile(any_special)
    prefixes = {s[:n] for s in specials for n in range(1, len(s))}

    def placeholder(text):
        originals.append(text)
        return f"{nonce}{len(originals) - 1:06d}"

    def protected(value):
        if isinstance(value, dict):
            # Roles come from our programs, and templates compare them.
            return {k: v if k in ("role", "type") else protected(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [protected(v) for v in value]
        if not isinstance(value, str):
            return value
        value = well_formed(value)
        end = len(value.rstrip())  # a template may trim
        start = min((end - len(p) for p in prefixes if value.endswith(p, 0, end)), default=end)
        tail = placeholder(value[start:end]) if start < end else ""
        return special.sub(lambda match: placeholder(match[0]), value[:start]) + tail + value[end:]

    tools = protected(variables.get("tools"))
    variables = variables | {"messages": [protected(_as_in_transformers(m)) for m in messages], "tools": tools}
    try:
        program, mark, has_marks = _compile(template)
        text = _time_limited(functools.partial(program.render, **variables))
    except Exception as error:  # an untrusted template may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template fails: {reason}") from error
    pattern = re.compile(rf"{nonce}(?P<original>\d{{6}})|{mark}(?P<mark>[+-])|{any_special}")
    if re.search(f"{nonce}|{mark}", pattern.sub("", text), re.IGNORECASE):
        raise UserError(
            "the chat template changes a special token inside a message; take the special token out of the message"
        )
    parts, length, end, found, marked, open_marks = [], 0, 0, [], [], []
    for match in pattern.finditer(text):
        before, part = text[end : match.start()], ""
        length, end = length + len(before), match.end()
        if match["original"]:
            part = originals[int(match["original"])]
        elif match["mark"] == "+":
            open_marks.append(length)
        elif match["mark"] and open_marks:
            marked.append((open_marks.pop(), length))
        elif not match["mark"]:
            part = specials[match[0]]
            found.append((length, length + len(part), match[0]))
        parts += [before, part]
        length += len(part)
    return Rendering("".join(parts) + text[end:], found, marked if has_marks else None)


def _as_in_transformers(message):
    """The message without keys of None, and with its thoughts under the names that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    thoughts = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message), None)
    return message if thoughts is None else {"thinking": thoughts} | message | {"reasoning_content": thoughts}


def with_date(template: str, now: datetime.datetime) -> str:
    """The template, which writes the date of `now` instead of the date of each rendering.

    A template calls strftime_now with a format. The new template begins with a macro of this name, which knows the
    dates for all formats in the template, so other programs write the same date. A format that the template makes
    from parts raises an error when it is rendered. Raises: UserError if the template does not compile.
    """
    from jinja2 import TemplateError, nodes

    try:
        tree = _compile(template)[0].environment.parse(template)
    except TemplateError as error:
        raise UserError(f"the chat template fails: {error}") from error
    names = {node.name for node in tree.find_all(nodes.Name)} - {node.name for node in tree.find_all(nodes.Macro)}
    if "strftime_now" not in names:
        return template
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    dates = json.dumps({text: now.strftime(text) for text in sorted(texts) if "%" in text})
    return (
        f"{{%- macro strftime_now(format) -%}}{{%- set dates = {dates} -%}}{{{{- dates[format] if format in dates else "
        "raise_exception('the date of this run has no format ' ~ format) -}}{%- endmacro %}\n" + template
    )


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

    mark, found = secrets.token_hex(16), []

    class Generation(ext.Extension):
        """Writes the text inside {% generation %} ... {% endgeneration %} between two marks."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            found.append(line)
            start, end = (nodes.Output([nodes.TemplateData(mark + sign)]) for sign in "+-")
            return nodes.Scope([start, *body, end], lineno=line)

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
    return environment.from_string(template), mark, bool(found)
