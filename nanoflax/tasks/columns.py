"""Which columns of a file, or fields of its objects, are the fields of our examples."""

import shlex
from collections.abc import Iterable, Mapping, Sequence

from nanoflax.tasks.kinds import Chat, Classification, Preference, Problem


def field_names(kind: type) -> tuple[str, ...]:
    """The names of our fields that examples of a kind may have."""
    more = {Classification: ["labels"], Chat: ["tools"], Preference: ["tools", "margin"]}
    return (*kind.fields, *more.get(kind, []))


def missing_fields(kind: type, found: Iterable[str]) -> list[str]:
    """The fields of a kind that are not in `found`; `labels` may replace `label`, two answers may contain their
    prompt, and a problem may have no answer."""
    found, free = {*found}, {Preference: {"prompt"}, Problem: {"answer"}}.get(kind, set())
    return [n for n in kind.fields if n not in found | free and not (n == "label" and "labels" in found)]


def match_columns(kind: type, renamed: Mapping[str, str], names: Sequence[str]) -> dict[str, int]:
    """{our name: number of its column} for columns with these names. Capitals and blanks around a name may differ."""
    simple, found = [_simple(name) for name in names], {}
    for ours in field_names(kind):
        theirs = renamed.get(ours, ours)
        if theirs in names:
            found[ours] = names.index(theirs)
        elif _simple(theirs) in simple:
            found[ours] = simple.index(_simple(theirs))
    return found


def _simple(name: str) -> str:
    return " ".join(name.split()).casefold()


# Names that other data give to our fields, for the flag in messages.
_OTHER_NAMES = {
    "text": "sentence review content body document comment tweet question input",
    "label": "class category stars rating score sentiment topic intent target",
    "tokens": "words word text sentence",
    "tags": "ner_tags ner labels tag",
    "source": "src input question article document text english en",
    "target": "tgt output answer summary translation response completion",
    "messages": "conversations conversation chat dialog",
    "prompt": "question instruction query input context",
    "answer": "target output solution completion response tests test_list ground_truth",
    "chosen": "preferred better winner response_j chosen_response answer_chosen",
    "rejected": "dispreferred worse loser response_k rejected_response answer_rejected",
}


def mapping_flag(kind: type, names: Sequence[str]) -> str:
    """The flag that says which of these names are our fields; where the names do not tell, the first that is left."""
    left, pairs = [" ".join(name.split()) for name in names], {}
    for ours in kind.fields:
        known = [ours, *_OTHER_NAMES[ours].split()]
        pairs[ours] = next((name for word in known for name in left if _simple(name) == word), "")
        left = [name for name in left if name != pairs[ours]]
    for ours in kind.fields:
        pairs[ours] = pairs[ours] or (left.pop(0) if left and kind is not Chat else "NAME")
    value = shlex.quote(",".join(f"{ours}={theirs}" for ours, theirs in pairs.items() if ours != theirs))
    form = "; messages is a list of objects with role and content" if kind is Chat else ""
    return f"--config.data.fields={value} (evaluate: --fields){form}"
