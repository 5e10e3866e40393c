"""Tags of entities in the schemes of other programs, read as BIO and written as a model's classes need them."""

import re
from collections.abc import Iterable, Sequence

TAG = re.compile("O|[BIESULMW]-.+")
_CONTINUES, _ENDS = "IMEL", "ESULW"  # E and L are last words, S, U and W single ones, M is a middle one


def to_bio(tags: Sequence[str]) -> tuple[list[str], list[int]]:
    """The same entities in BIO tags (IOB2), and the indices of tags that should continue an entity, but begin one.

    Reads IOB1, IOB2, IOE, BIOES, BILOU and BMEOW. Entities are those of seqeval by default.
    """
    found, begins, open_type = [], [], None
    for i, tag in enumerate(tags):
        prefix, _, name = tag.partition("-")
        if tag == "O":
            found.append("O")
        elif prefix in _CONTINUES and name == open_type:
            found.append(f"I-{name}")
        else:
            begins += [i] * (prefix in _CONTINUES)
            found.append(f"B-{name}")
        open_type = None if tag == "O" or prefix in _ENDS else name
    return found, begins


def from_bio(tags: Sequence[str], labels: Iterable[str]) -> list[str]:
    """BIO tags in the scheme of these labels: BIOES, BILOU, IO or BIO."""
    prefixes = {label[0] for label in labels if TAG.fullmatch(label) and label != "O"} or {*"BI"}
    single = next((prefix for prefix in "SU" if prefix in prefixes), "B" if "B" in prefixes else "I")
    last = next((prefix for prefix in "EL" if prefix in prefixes), "I")
    found = []
    for tag, following in zip(tags, [*tags[1:], "O"], strict=True):
        goes_on = following == f"I-{tag[2:]}"
        names = {"B": single if not goes_on else "B" if "B" in prefixes else "I", "I": "I" if goes_on else last}
        found.append(tag if tag == "O" else f"{names[tag[0]]}-{tag[2:]}")
    return found
