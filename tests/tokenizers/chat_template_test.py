"""A chat template is a stranger's program: it gets no objects, files or processes, and little time and memory."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

import nanoflax
from nanoflax.errors import UserError
from nanoflax.tokenizers import chat_template

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi</s>"}]
PROGRAM = pathlib.Path(nanoflax.__file__).parent / "tokenizers" / "template_process.py"


def render(template, **variables):
    return chat_template.render(template, CHAT, {"bos_token": "<s>"} | variables, {"</s>": "|1|"}).text


# Published ways out of Jinja, and what this environment adds to it.
ESCAPES = """
{{ ''.__class__.__mro__[1].__subclasses__() }}
{{ messages.__class__.__base__ }}
{{ (1).__class__ }}
{{ dict.mro() }}
{{ cycler.__init__.__globals__.os.popen('id').read() }}
{{ lipsum.__globals__['os'].popen('id').read() }}
{{ joiner.__init__.__globals__ }}
{{ namespace.__init__.__globals__ }}
{{ self._TemplateReference__context.cycler.__init__.__globals__ }}
{{ self.__init__.__globals__ }}
{{ range.__class__.__base__ }}
{{ raise_exception.__globals__ }}
{{ raise_exception.__closure__[0].cell_contents }}
{{ strftime_now.__code__ }}
{{ strftime_now.__globals__.datetime }}
{{ ()|attr('__class__')|attr('__base__') }}
{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}
{{ ''['__cl' ~ 'ass__'] }}
{{ '{0.__class__}'.format(1) }}
{{ '{0.__init__.__globals__}'.format(cycler) }}
{{ '{a.__class__}'.format_map({'a': 1}) }}
{{ ('{0.__class__}'|attr('format'))(1) }}
{% set f = '{0.__class__}'.format %}{{ f(1) }}
{% macro m(f) %}{{ f(1) }}{% endmacro %}{{ m('{0.__class__}'.format) }}
{% set ns = namespace(f='{0.__class__}'.format) %}{{ ns.f(1) }}
{{ '%s'|format('x'.__class__) }}
{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}
{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}
{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}
{{ messages|map(attribute='__class__')|join }}
{{ [cycler]|map(attribute='__init__.__globals__')|join }}
{{ [cycler]|map('attr', '__init__')|join }}
{{ messages|selectattr('__class__.__base__')|first }}
{{ messages|groupby('__class__')|first }}
{{ [1]|map('attr', '__class__')|join }}
{{ undefined_name.__class__ }}
{{ messages.append(1) }}
{{ messages[0].update(role='x') }}
{{ messages[0].pop('role') }}
{% include '/etc/passwd' %}
{% import 'os' as os %}{{ os }}
{% extends '/etc/passwd' %}
{% from '/etc/passwd' import x %}
{{ request.application.__globals__.__builtins__.__import__('os').popen('id').read() }}
{{ config.items() }}
{{ get_flashed_messages.__globals__ }}
{{ url_for.__globals__ }}
{% set x = messages.__setitem__(0, 1) %}
{{ ''.encode().__class__.fromhex('41') }}
{{ tojson.__globals__ }}
{{ [].sort.__self__.__class__ }}
{% do messages.append(1) %}
""".strip().split("\n")


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_leaves_the_sandbox(template):
    try:
        text = render(template)
    except UserError as error:
        assert str(error).startswith("the chat template fails: ")
        text = ""
    signs = ("<class", "<function", "<module", "<code", "<built-in", "builtins", "uid=", "root:", "<bound")
    assert not any(sign in text for sign in signs), text
    assert render("{{ messages[0].role ~ messages|length }}") == "user2"  # nothing has changed for the next


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a'|center(10000000000) }}",
        "{{ 'a'.ljust(3000000000) }}",
        "{{ '\t'.expandtabs(3000000000) }}",
        "{{ '%3000000000d' % 1 }}",
        "{{ '{:3000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w='3000000000') }}",
        "{{ [1]|tojson(indent=3000000000) }}",
        "{{ ('x' * 1000000).join('y' * 1000000) }}",
        "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
        "{{ 'x' * 1000000000 }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'x' * 1000000 }}{% endfor %}",
        "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 1.5|round(1000000000, 'ceil') }}",
        "{% macro f() %}{{ f() ~ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 50_000,
        "{{ " + "not " * 5_000 + "1 }}",
        "{{ " + "-" * 5_000 + "1 }}",
        "{% if 1 %}" * 200,
        "{{ lipsum(1000000000) }}",
        "{{ x" + ".a" * 50_000 + " }}",
    ],
)
def test_no_template_takes_long_or_much(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    with pytest.raises(UserError, match="the chat template fails: ") as error:
        render(template)
    assert len(str(error.value)) < 300
    monkeypatch.undo()
    assert render("{{ messages[0].content }}") == "Hello"


def test_the_process_can_open_and_start_nothing(tmp_path):
    # A template that had left the sandbox would run as this function does.
    attack = f"""
import sys; sys.path.insert(0, {str(PROGRAM.parent)!r})
import template_process, os, socket, subprocess
os.chdir({str(tmp_path)!r})
def render(template, variables):
    found = []
    for act in (lambda: open("/etc/hostname"), lambda: open("x", "w"), socket.socket, lambda: os.listdir("/"),
                lambda: subprocess.run("id"), lambda: os.system("exit 9") == 9 or bytes(2**31)):
        try:
            act()
            found.append("done")
        except (OSError, MemoryError) as error:
            found.append(type(error).__name__)
    return {{"text": found}}
warm = template_process.render
template_process.render = lambda **request: (render if request["template"] == "attack" else warm)(**request)
template_process.main()
"""
    line = json.dumps({"do": "render", "template": "attack", "variables": {}, "seconds": 5}) + "\n"
    done = subprocess.run([sys.executable, "-c", attack], input=line, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)["text"]
    assert len(found) == 6 and "done" not in found and not [*tmp_path.iterdir()]


def test_a_process_that_ends_is_started_again():
    assert render("{{ bos_token }}") == "<s>"
    assert chat_template._process.popen
    first = chat_template._process.popen.pid
    os.kill(first, signal.SIGKILL)
    time.sleep(0.2)
    assert render("{{ bos_token }}") == "<s>"
    assert chat_template._process.popen.pid != first


def test_threads_get_their_own_answers():
    wrong = []

    def ask(name):
        for i in range(100):
            if (text := render("{{ name ~ messages[0].content }}", name=f"{name}-{i}")) != f"{name}-{i}Hello":
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_is_not_json_is_refused():
    with pytest.raises(UserError, match="a chat must hold JSON values"):
        render("{{ x }}", x=object())
