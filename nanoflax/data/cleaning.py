"""Cleaning: a list of steps, each (words for the report if the text changes, function)."""

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from nanoflax.data.report import DataReport
from nanoflax.tokenizers import well_formed

REPAIR = ("unpaired surrogates, read as U+FFFD", well_formed)  # UTF-8 cannot encode unpaired surrogates
# Not \x1c-\x1e and \x85: Python treats them as line ends, so the whitespace step handles them.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ufeff]")
WHITESPACE = {
    "trim": lambda text: "\n".join(line.rstrip() for line in text.splitlines()).strip(),
    "collapse": lambda text: " ".join(text.split()),
    "": lambda text: text,
}
UNICODE = ("NFC", "NFKC", "")
CleaningStep = tuple[str, Callable[[str], str]]


def _normalize(form: Any, text: str) -> str:
    return unicodedata.normalize(form, text) if form else text


def cleaning_steps(unicode: str, whitespace: str) -> list[CleaningStep]:
    """The steps for examples. unicode: one of UNICODE; whitespace: a key of WHITESPACE; "" for no change."""
    return [
        REPAIR,
        (f"texts normalized to {unicode}", lambda text: _normalize(unicode, text)),
        ("texts with control characters, removed", lambda text: _CONTROL.sub("", text)),
        (f"texts with whitespace to {whitespace}", WHITESPACE[whitespace]),
    ]


def clean(text: str, steps: Iterable[CleaningStep], place: str, report: DataReport) -> str:
    """The text after all steps. The report counts each step that changes the text."""
    for problem, step in steps:
        changed = step(text)
        if changed != text:
            report.add(problem, place)
        text = changed
    return text
