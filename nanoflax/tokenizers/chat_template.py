"""Chat templates: messages to text, by the Jinja template that came with a tokenizer.

A template is an untrusted program. So it runs in Jinja's sandbox, in a process of its own (`template_process`) with
little memory, a limited time, and no files.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import re
import secrets
import signal
import subprocess
import sys
import threading
from typing import Any

from nanoflax.errors import UserError
from nanoflax.tokenizers.base import well_formed

MAX_SECONDS = 5  # of processor time; a long conversation takes some milliseconds


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
        found = _process.ask(do="render", template=template, variables=variables)
    except (TypeError, ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else UserError(f"a chat must hold JSON values: {error}") from error
    text, written, marked = _read(found["text"], nonce, found["mark"], originals, special, specials)
    return Rendering(text, written, marked if found["has_marks"] else None)


def _read(text, nonce, mark, originals, special, specials):
    """The three values of a Rendering: the text with the originals of its placeholders and without its marks."""
    # No pattern with the nonce, which would be compiled for every conversation: with 256 special tokens, in 3 ms.
    parts, length, found, marked, open_marks = [], 0, [], [], []

    def write(part):
        nonlocal length
        parts.append(part)
        length += len(part)

    for i, block in enumerate(text.split(nonce)):
        if i:
            number, block = block[:6], block[6:]
            _check_unchanged(re.fullmatch("[0-9]{6}", number) and int(number) < len(originals))
            write(originals[int(number)])
        for k, piece in enumerate(block.split(mark)):
            if k:
                sign, piece = piece[:1], piece[1:]
                _check_unchanged(sign in ("+", "-"))
                if sign == "+":
                    open_marks.append(length)
                elif open_marks:
                    marked.append((open_marks.pop(), length))
            lower, end = piece.lower(), 0
            _check_unchanged(nonce not in lower and mark not in lower)
            for match in special.finditer(piece):
                write(piece[end : match.start()])
                found.append((length, length + len(specials[match[0]]), match[0]))
                write(specials[match[0]])
                end = match.end()
            write(piece[end:])
    return "".join(parts), found, marked


def _check_unchanged(is_so):
    if not is_so:
        raise UserError(
            "the chat template changes a special token inside a message; take the special token out of the message"
        )


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
    found = _process.ask(do="dates", template=template)
    if not found["reads"]:
        return template
    dates = json.dumps({text: now.strftime(text) for text in found["formats"]})
    return (
        f"{{%- macro strftime_now(format) -%}}{{%- set dates = {dates} -%}}{{{{- dates[format] if format in dates else "
        "raise_exception('the date of this run has no format ' ~ format) -}}{%- endmacro %}\n" + template
    )


class _Process:
    """The process of `template_process`: started by the first request, and again after a template ended it."""

    def __init__(self) -> None:
        self.lock, self.popen, self.owner = threading.Lock(), None, 0

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer. Raises: UserError if the template fails or needs too much."""
        line = json.dumps(request | {"seconds": MAX_SECONDS}).encode() + b"\n"
        with self.lock:
            if self.popen is None or self.owner != os.getpid() or self.popen.poll() is not None:
                self._start()
            assert self.popen and self.popen.stdin and self.popen.stdout
            try:
                self.popen.stdin.write(line)
                self.popen.stdin.flush()
                answer = self.popen.stdout.readline()
            except BrokenPipeError:
                answer = b""
            except BaseException:  # Ctrl-C: the next request must not read this answer
                self.popen.kill()
                raise
            ended = None if answer.endswith(b"\n") else self.popen.wait()
        if ended == -signal.SIGPROF:
            raise UserError(f"the chat template fails: it took more than {MAX_SECONDS} seconds")
        if ended is not None:
            raise UserError(f"the chat template fails: its process ended with status {ended}")
        answer = json.loads(answer)
        if "error" in answer:
            raise UserError(f"the chat template fails: {answer['error']}")
        return answer

    def _start(self) -> None:
        program = pathlib.Path(__file__).with_name("template_process.py")
        pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        # -P: the folder of the program is no place of modules.
        self.popen, self.owner = subprocess.Popen([sys.executable, "-P", program], **pipes), os.getpid()


_process = _Process()
