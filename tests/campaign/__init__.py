"""The campaign tries to break runs, and readers of files, for many minutes. See __main__.py; pytest does not run it."""

import importlib
import random
import time
import traceback
from typing import NamedTuple


class Outcome(NamedTuple):
    """A line of the table: what was tried, how often, and one line for each trial that lost something."""

    what: str
    trials: int
    problems: list[str]


def outcomes_of(found: dict[str, list[str]]) -> list[Outcome]:
    """The outcomes of a part. found: for each thing that was tried, the problem of each trial, or ""."""
    return [Outcome(what, len(problems), [*filter(None, problems)]) for what, problems in found.items()]


def run_part(name: str, seconds: float, seed: int) -> tuple[list[Outcome], float]:
    """(the outcomes of a part, its seconds). An exception in a part is a problem too."""
    begin = time.monotonic()
    try:
        module = importlib.import_module(f"tests.campaign.{name}")
        outcomes = module.run(seconds, random.Random(f"{name} {seed}")) or [Outcome("nothing was tried", 0, [])]
    except Exception:
        outcomes = [Outcome("the part itself", 0, [traceback.format_exc()])]
    return outcomes, time.monotonic() - begin
