"""The process that runs chat templates, for `chat_template`; it imports only jinja2 and the standard library.

A template is an untrusted program. Jinja's sandbox keeps it from Python's objects, but a few characters of a template
can ask for any time and memory, in functions of Python that cannot be stopped from inside. So the operating system
limits this process: its memory, the processor time of each request (SIGPROF ends the process), and no file, pipe or
socket can be opened. A template that leaves the sandbox finds nothing to open, and no program starts without its files.

Requests and answers are lines of JSON on stdin and stdout.
"""

import contextlib
import datetime
import functools
import json
import resource
import secrets
import signal
import sys
from typing import Any

MAX_PRODUCT = 2**20  # characters or items that one "*" in a template may make
MAX_TEXT = 2**25  # characters of a rendered conversation
MAX_MEMORY = 2**30  # bytes of this process, of which jinja2 needs 2**25


@functools.lru_cache
def compiled(template: str) -> tuple[Any, str, bool]:
    """(the compiled template, the mark around {% generation %}, whether it has any). Raises: what jinja2 raises."""
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


def render(template: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The text that a template writes, its mark around {% generation %}, and whether it has such marks."""
    program, mark, has_marks = compiled(template)
    text = program.render(**variables)
    if len(text) > MAX_TEXT:
        raise OverflowError(f"its text has more than {MAX_TEXT} characters")
    return {"text": text, "mark": mark, "has_marks": has_marks}


def dates(template: str) -> dict[str, Any]:
    """Whether the template reads the date, and its constants that may be formats of dates."""
    from jinja2 import nodes

    tree = compiled(template)[0].environment.parse(template)
    names = {node.name for node in tree.find_all(nodes.Name)} - {node.name for node in tree.find_all(nodes.Macro)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return {"reads": "strftime_now" in names, "formats": sorted(text for text in texts if "%" in text)}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to {"do": "render" or "dates", ...}; {"error": its reason} if the template fails."""
    try:
        function = {"render": render, "dates": dates}[request.pop("do")]
        return function(**request)
    except Exception as error:  # an untrusted template may raise anything
        return {"error": (" ".join(str(error).split()) or type(error).__name__)[:200]}


def main() -> None:
    """Answer the requests on stdin until it ends."""
    warm = "{% for x in [1] %}{{ lipsum(1) }}{{ '%Y'|format|trim|tojson }}{{ strftime_now('%d %b') }}{% endfor %}"
    answer({"do": "render", "template": warm, "variables": {}})  # imports all that a template may need
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which then closes stdin
    for what, limit in ((resource.RLIMIT_AS, MAX_MEMORY), (resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_FSIZE, 0),
                        (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):  # fmt: skip
        with contextlib.suppress(OSError, ValueError):  # macOS has no limit of memory
            resource.setrlimit(what, (limit, limit))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request.pop("seconds"))
        try:
            found = json.dumps(answer(request))
        except MemoryError as error:
            found = json.dumps({"error": f"it needs too much memory {error}"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(found + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
