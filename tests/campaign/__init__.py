"""The campaign tries to break runs, and readers of files, for many minutes. See __main__.py; pytest does not run it."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """A line of the table: what was tried, how often, and one line for each trial that lost something."""

    what: str
    trials: int
    problems: list[str]
