"""The exception that programs print as one line with exit status 2, what else they print so, and lists of problems."""

import errno
import re
from collections.abc import Sequence

# Of a line or a terminal: C0, DEL, C1, bidirectional controls, line separators, lone surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 5000  # characters
# Numbers of an OSError: the disk is full, so a run goes on and saves later; or it cannot be written at all.
FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_ERRORS = (*FULL, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class UserError(ValueError):
    """Something the user gave (a flag, a field, a file) cannot be used.

    Its text is one line that names the thing, its value and what would be right. Values and names in it can be a
    stranger's, so control characters are escaped, and a very long text is cut.
    """

    def __init__(self, text: object = "") -> None:
        line = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))
        super().__init__(line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ... ({len(line)} characters)")


def listed(problems: Sequence[str], limit: int = 8) -> str:
    """The problems in one line, such as "a; b; and 3 more"; at most `limit` of them in full."""
    more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return "; ".join([*problems[:limit], *more])
