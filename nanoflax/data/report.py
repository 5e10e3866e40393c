"""What is wrong in the data, counted; and which texts are held out for validation."""

import collections
import contextlib
import hashlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from nanoflax.errors import UserError


class DataReport:
    """Counts each kind of problem in the data and keeps the first three places of each kind.

    share: the part of the source that has been read, from 0 to 1.
    has_text: whether a text was found in the field of the source. other_fields: {name of another field with text: its
    first place}.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self.counts, self.places = collections.Counter(), collections.defaultdict(list)
        self.has_text, self.other_fields = False, {}

    def add(self, problem: str, place: str) -> None:
        self.counts[problem] += 1
        if len(self.places[problem]) < 3:
            self.places[problem].append(place)

    def merge(self, later: "DataReport") -> None:
        """Adds what another report found after this one."""
        self.counts.update(later.counts)
        for problem, places in later.places.items():
            self.places[problem] = [*self.places[problem], *places][:3]
        self.has_text |= later.has_text
        self.other_fields = later.other_fields | self.other_fields

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for `from_dict`."""
        return {name: vars(self)[name] for name in ("counts", "places", "has_text", "other_fields")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataReport":
        report = cls()
        report.counts.update(values["counts"])
        report.places.update(values["places"])
        report.has_text, report.other_fields = values["has_text"], values["other_fields"]
        return report

    def lines(self) -> list[str]:
        """One readable line for each kind of problem."""
        return [
            f"{problem}: {count} ({', '.join(self.places[problem])}{', ...' * (count > 3)})"
            for problem, count in self.counts.items()
        ]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text is validation data. The hash of the text decides, so equal texts are in the same split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"nanoflax split").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class FieldError(UserError):
    """A source has no text in its field. choices: the fields with text, the likeliest first.

    The message names the flag that chooses a field: `flag` with the value `prefix` and the field.
    """

    def __init__(
        self, problem: str, choices: Sequence[str], flag: str = "--config.data.field", prefix: str = ""
    ) -> None:
        hint = f"choose one of {', '.join(choices)}, as in {flag}={shlex.quote(prefix + choices[0])}" if choices else ""
        super().__init__(f"{problem}; {hint or 'no column holds text'}")
        self.problem, self.choices = problem, choices

    def __reduce__(self) -> Any:  # worker processes send it
        return type(self), (self.problem, self.choices)


@contextlib.contextmanager
def field_flag(flag: str, prefix: str) -> Iterator[None]:
    """A FieldError inside names this flag; see there."""
    try:
        yield
    except FieldError as error:
        raise FieldError(error.problem, error.choices, flag, prefix) from None
