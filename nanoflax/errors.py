"""The exception that programs print as one line with exit status 2, and the text of a list of problems."""

from collections.abc import Sequence


class UserError(ValueError):
    """Something the user gave (a flag, a field, a file) cannot be used.

    Its text is one line that names the thing, its value and what would be right.
    """


def listed(problems: Sequence[str], limit: int = 8) -> str:
    """The problems in one line, such as "a; b; and 3 more"; at most `limit` of them in full."""
    more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return "; ".join([*problems[:limit], *more])
