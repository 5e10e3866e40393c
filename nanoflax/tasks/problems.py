"""Problems with verifiable answers: their records, and the same examples for supervised training.

A policy learns to write answers from supervised examples, then by their rewards. Both read the same source with the
same split: the hash of the prompt decides.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nanoflax.data import DataReport, is_held_out
from nanoflax.tasks.kinds import Chat, Pair, Problem, Text
from nanoflax.tasks.messages import Clean, messages_of

Record = dict[str, Any]
Records = Iterable[tuple[str, Record]]


def problem(record: Record, place: str, clean: Clean, report: DataReport) -> Problem | None:
    """The Problem of a record; None if it cannot be used, which is counted."""
    prompt, answer = record.get("prompt"), record.get("answer")
    if isinstance(answer, list) and all(isinstance(line, str) for line in answer):  # lines of tests
        answer = "\n".join(answer)
    if isinstance(answer, bool | int | float):
        answer = str(answer)
    if not (answer is None or isinstance(answer, str)):
        report.add("problems whose answer is neither a text nor a number, left out", place)
        return None
    if isinstance(prompt, list):
        messages = messages_of(prompt, place, clean, report)
        if messages and messages[-1]["role"] == "assistant":
            report.add("problems whose prompt ends with a reply, left out", place)
            return None
    elif isinstance(prompt, str):
        messages = clean(f"{prompt}.", place)[:-1]  # the spaces before the answer stay
        if not messages.strip():
            report.add("problems with an empty prompt, left out", place)
            return None
    else:
        report.add("problems whose prompt is neither a text nor messages, left out", place)
        return None
    return Problem(messages, clean(answer or "", place), place, record.get("extra") or {}) if messages else None


def _as_chat(record: Record) -> Record:
    prompt, answer = record.get("prompt"), record.get("answer")
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return {"messages": [*before, {"role": "assistant", "content": _text_of(answer)}]}


def _as_text(record: Record) -> Record:
    prompt = record.get("prompt")
    return {"text": prompt + _text_of(record.get("answer")) if isinstance(prompt, str) else None}


def _text_of(answer: Any) -> Any:
    return str(answer) if isinstance(answer, bool | int | float) else answer or ""


# {(kind of the records of a source, wanted kind): how one is made}.
CONVERSIONS: dict[tuple[type, type], Callable[[Record], Record]] = {
    (Problem, Text): _as_text,
    (Problem, Chat): _as_chat,
    (Problem, Pair): lambda r: {"source": r.get("prompt"), "target": _text_of(r.get("answer"))},
    (Pair, Problem): lambda r: {"prompt": r["source"], "answer": r["target"]},
    (Pair, Chat): lambda r: _as_chat({"prompt": r["source"], "answer": r["target"]}),
}


def converted(
    splits: Mapping[str, Records], given: type, wanted: type, clean: Clean, fraction: float | None
) -> dict[str, Records]:
    """The records of a source as another kind of example. fraction: of the prompts, for validation, if the source has
    no such split; None: no split is made."""
    key = {Problem: "prompt", Pair: "source"}[given]
    if "validation" not in splits and fraction is not None:
        parts: dict[str, list] = {"train": [], "validation": []}
        for place, record in splits["train"]:
            made = problem({"prompt": record.get(key)}, place, clean, DataReport()) if given is Problem else None
            value = made.prompt if made else record.get(key)  # what `load` splits by
            parts["validation" if is_held_out(repr(value), fraction) else "train"].append((place, record))
        if not parts["validation"] and len(parts["train"]) > 1:  # also as in `load`
            parts["validation"].append(parts["train"].pop())
        splits = parts
    make = CONVERSIONS[given, wanted]
    return {name: ((place, make(record)) for place, record in records) for name, records in splits.items()}
