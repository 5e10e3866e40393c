"""A Run in a terminal: prints text while it is generated, and answers typed prompts and chat messages."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nanoflax import report
from nanoflax.errors import UserError
from nanoflax.runs.run import Run


def print_answers(run: Run, prompts: Sequence[str], as_task: bool = False, **settings: Any) -> None:
    """Print the continuation of each prompt, or with as_task the prediction of the run's task.

    With one prompt, text is printed while it is generated; with several, at the end and with numbers.
    """
    if as_task and not run.task.prompt:
        texts = [run.task.show(prediction) for prediction in run.predict(prompts, **settings)]
    else:
        pieces = run.stream(prompts, as_task, **settings)
        if as_task and run.task.needs_prompt or run.model.config.reads_source:
            prompts = [""] * len(prompts)  # print only the answer
        if len(prompts) == 1:
            _print_pieces(prompts[0], (piece for (piece,) in pieces))
            return
        texts = [prompt + "".join(new) for prompt, new in zip(prompts, zip(*pieces, strict=True), strict=True)]
    for i, text in enumerate(texts, 1):
        print((f"--- {i}\n" if len(texts) > 1 else "") + _safe(text))


def answer_typed_prompts(run: Run, as_task: bool = False, **settings: Any) -> None:
    """Answer each typed line, until an empty line."""
    for prompt in _typed_lines():
        try:
            print_answers(run, [prompt], as_task, **settings)
        except UserError as error:
            print(error, file=sys.stderr)


def chat(run: Run, system: str = "", **settings: Any) -> None:
    """Reply to each typed message, until an empty line. The model reads the conversation so far.

    system: the system message. Raises: UserError for a model that cannot chat.
    """
    if run.model.config.head != "lm":
        raise UserError(f"chat: the model has model.head={run.model.config.head!r}, so it generates no text")
    if not run.tokenizer.chat_template:
        raise UserError("chat: the tokenizer of this model has no chat template")
    messages = [{"role": "system", "content": system}] if system else []
    for text in _typed_lines():
        turn = [*messages, {"role": "user", "content": text}]
        try:
            messages = [*turn, {"role": "assistant", "content": _print_pieces("", run.reply(turn, **settings))}]
        except UserError as error:
            print(error, file=sys.stderr)


def _print_pieces(prompt: str, pieces: Iterable[str]) -> str:
    """Print a prompt, then each piece when it is generated; returns the joined pieces."""
    written = []
    print(_safe(prompt), end="", flush=True)
    for piece in pieces:
        print(_safe(piece), end="", flush=True)
        written.append(piece)
    print()
    return "".join(written)


def _safe(text: str) -> str:
    """The text; on a terminal with escaped control characters."""
    return report.printable(text) if sys.stdout.isatty() else text


def _typed_lines() -> Iterator[str]:
    """Yields typed lines, until an empty line or the end of the input."""
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(errors="replace")  # bytes that are not UTF-8
    try:
        while line := input("> "):
            yield line
    except EOFError:
        print()
