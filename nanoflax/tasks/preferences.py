"""Preferences of records, in all layouts of trl's data sets.

prompt, chosen, rejected: three texts, or three lists of messages
chosen, rejected: two texts or two lists of messages, which begin with their prompt
prompt a text, chosen and rejected lists of messages: with that prompt, or only the answers
"""

from collections.abc import Sequence
from typing import Any

from nanoflax.data import DataReport
from nanoflax.tasks.kinds import Preference
from nanoflax.tasks.messages import Clean, Messages, has_reply, messages_of, tools_of

MAX_MARGIN = 1e30  # of float32


def preference(record: dict[str, Any], place: str, clean: Clean, report: DataReport) -> Preference | None:
    """The Preference of a record; None if it cannot be used, which is counted."""
    prompt: Any
    prompt, *answers = (record.get(name) for name in Preference.fields)
    margin = 0.0 if record.get("margin") is None else record["margin"]
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) < MAX_MARGIN:
        report.add("pairs whose margin is not a number, left out", place)
        return None
    kinds = {type(answer) for answer in answers}
    if len(kinds) > 1 or not kinds <= {str, list} or not isinstance(prompt, str | list | None):
        report.add("pairs that are not texts or lists of messages in 'chosen' and 'rejected', left out", place)
        return None
    if isinstance(prompt, list) and kinds == {str}:
        answers, kinds = [[{"role": "assistant", "content": answer}] for answer in answers], {list}
    made = _texts(prompt, answers, place, clean) if kinds == {str} else _chats(prompt, answers, place, clean, report)
    tools = tools_of(record, place, report)
    if made is None or tools is None:
        return None
    prompt, chosen, rejected, found = made
    problem = _problem(prompt, chosen, rejected, found)
    if problem:
        report.add(f"{problem}, left out", place)
        return None
    return Preference(prompt, chosen, rejected, place, tools or None, float(margin), found)


def _problem(prompt: Any, chosen: Any, rejected: Any, found: bool) -> str:
    """Why a pair cannot be used, or "". found: its prompt is the common beginning of two texts."""
    if chosen == rejected:
        return "pairs with equal answers"
    if isinstance(prompt, tuple):
        if not prompt:
            return "pairs of chats with an empty prompt"
        return "" if has_reply(chosen) and has_reply(rejected) else "pairs without a reply of the role 'assistant'"
    # If the prompt was found, an answer may only end where the other goes on.
    return "pairs with an empty answer" if not found and not (chosen.strip() and rejected.strip()) else ""


def _texts(prompt: Any, answers: list, place: str, clean: Clean) -> tuple[str, str, str, bool]:
    """The texts, cleaned but for the spaces between prompt and answer."""
    if prompt is not None:
        chosen, rejected = (clean(f".{answer}", place)[1:] for answer in answers)
        return clean(f"{prompt}.", place)[:-1], chosen, rejected, False
    chosen, rejected = (clean(answer, place) for answer in answers)
    at = common_length(chosen, rejected)
    if chosen != rejected and chosen[at - 1 : at] == " ":  # the space before a word is a part of its token
        at -= 1
    return chosen[:at], chosen[at:], rejected[at:], True


def _chats(
    prompt: Any, answers: list, place: str, clean: Clean, report: DataReport
) -> tuple[Messages, Messages, Messages, bool] | None:
    chosen, rejected = (messages_of(answer, place, clean, report) for answer in answers)
    if chosen is None or rejected is None:
        return None
    shared = common_length(chosen, rejected)
    if prompt is None or isinstance(prompt, str) and shared:
        return chosen[:shared], chosen[shared:], rejected[shared:], False
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if given == [{"role": "user", "content": ""}] or not given:
        return (), chosen, rejected, False
    messages = messages_of(given, place, clean, report)
    if messages is None:
        return None
    if messages == chosen[: len(messages)] == rejected[: len(messages)]:  # it is in the answers too
        chosen, rejected = chosen[len(messages) :], rejected[len(messages) :]
    return messages, chosen, rejected, False


def common_length(a: Sequence, b: Sequence) -> int:
    """The length of the common beginning."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)
