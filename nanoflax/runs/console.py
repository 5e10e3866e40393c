"""A Run at the keyboard: its text is printed as it is generated, messages are typed and answered."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nanoflax import report
from nanoflax.errors import UserError
from nanoflax.runs.run import Run


def print_answers(run: Run, prompts: Sequence[str], as_task: bool = False, **settings: Any) -> None:
    """Print what the model writes after each prompt, or with as_task what its task finds for it.

    The text of a single prompt appears piece by piece; several are printed at the end, numbered.
    """
    if as_task and not run.task.prompt:
        texts = [run.task.show(prediction) for prediction in run.predict(prompts)]
    else:
        pieces = run.stream(prompts, as_task, **settings)
        if as_task and run.task.needs_prompt or run.model.config.reads_source:
            prompts = [""] * len(prompts)  # an answer is shown without its prompt
        if len(prompts) == 1:
            _print_pieces(prompts[0], (piece for (piece,) in pieces))
            return
        texts = [prompt + "".join(new) for prompt, new in zip(prompts, zip(*pieces, strict=True), strict=True)]
    for i, text in enumerate(texts, 1):
        print((f"--- {i}\n" if len(texts) > 1 else "") + _safe(text))


def answer_typed_prompts(run: Run, as_task: bool = False, **settings: Any) -> None:
    """Answer each line that is typed, until an empty one."""
    for prompt in _typed_lines():
        try:
            print_answers(run, [prompt], as_task, **settings)
        except UserError as error:
            print(error, file=sys.stderr)


def chat(run: Run, system: str = "", **settings: Any) -> None:
    """Reply to each message that is typed, until an empty one; the model reads the conversation so far.

    system: the system's message.
    """
    messages = [{"role": "system", "content": system}] if system else []
    for text in _typed_lines():
        turn = [*messages, {"role": "user", "content": text}]
        try:
            messages = [*turn, {"role": "assistant", "content": _print_pieces("", run.reply(turn, **settings))}]
        except UserError as error:
            print(error, file=sys.stderr)


def _print_pieces(prompt: str, pieces: Iterable[str]) -> str:
    """Print a prompt and the pieces after it as they come; returns the pieces as one text."""
    written = []
    print(_safe(prompt), end="", flush=True)
    for piece in pieces:
        print(_safe(piece), end="", flush=True)
        written.append(piece)
    print()
    return "".join(written)


def _safe(text: str) -> str:
    """On a terminal, text with escaped control characters, which could drive it."""
    return report.printable(text) if sys.stdout.isatty() else text


def _typed_lines() -> Iterator[str]:
    """The lines that a person types, until an empty one or the end of the input."""
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(errors="replace")  # bytes that are not UTF-8
    try:
        while line := input("> "):
            yield line
    except EOFError:
        print()
