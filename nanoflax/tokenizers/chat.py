"""The ids of conversations, which of them are trained, and the prompt for a reply."""

import functools
import os
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from nanoflax.errors import UserError
from nanoflax.report import printable
from nanoflax.tokenizers.base import check_ids
from nanoflax.tokenizers.streaming import StreamingDecoder


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """The ids of a conversation, and their weights: 1.0 for what the model writes in a reply, else 0.0.

    The tokenizer's chat template writes the conversation. Its {% generation %} marks decide what is trained. Without
    marks, this is all that follows the prompt of `chat_prompt`, with the token that ends the reply (`stop_ids`).
    Without a template, a message is its role, ":", a newline, its content and the end-of-sequence token.
    Raises: UserError if the template fails, or if the start or the end of a reply cannot be found.
    """
    if tokenizer.chat_template is None:
        ids, weights = [], []
        for message in messages:
            head, reply = _plain_turn(tokenizer, message)
            ids += head + reply
            weights += [0.0] * len(head) + [float(message["role"] == "assistant")] * len(reply)
        return ids, weights
    chat = tokenizer.render_chat(messages, False)
    if messages[0]["role"] == "assistant":
        raise UserError("message 1 is a reply, so there is no prompt for it")
    if chat.marked is not None:
        return tokenizer.encode_parts(chat.text, chat.marked)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return tokenizer.encode_parts(chat.text, [_reply(tokenizer, messages, i, chat) for i in replies])


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The prompt for the reply to the messages: what precedes the trained part in `chat_ids`."""
    if tokenizer.chat_template is None:
        turns = [i for m in messages for part in _plain_turn(tokenizer, m) for i in part]
        return turns + tokenizer.encode("assistant:\n")
    return tokenizer.encode_parts(_prompt(tokenizer, messages), [])[0]


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a generated text: the tokenizer's own, then those by which its chat template ends a reply."""
    return _stop_ids(tokenizer, tokenizer.chat_template)


def _plain_turn(tokenizer, message):
    # Encoded separately, so that no token contains text of both parts.
    return (tokenizer.encode(f"{message['role']}:\n"), [*tokenizer.encode(message["content"]), tokenizer.eos_id])


# The parts of a rendered conversation. A template is a program, so rendering changed conversations finds them.


def _prompt(tokenizer, messages):
    """The text that the template writes before the reply to the messages."""
    prompt, without = (tokenizer.render_chat(messages, choice) for choice in (True, False))
    text = prompt.text
    if text == without.text or prompt.marked is not None:  # the template may write more before the reply
        mark = _new_mark()
        try:
            chat = tokenizer.render_chat([*messages, {"role": "assistant", "content": mark}], False)
        except UserError:
            return text
        start = chat.text.find(mark)
        if chat.marked is not None:
            start = next((first for first, last in chat.marked if first <= start < last), -1)
        written = chat.text.startswith(text)
        if start >= len(text) if written else start >= 0 and chat.marked is not None:
            text = chat.text[:start]
    return text.rstrip(" ")  # many tokenizers join a space to the next word, which the model writes


def _reply(tokenizer, messages, i, chat):
    """The part (start, end) of the Rendering `chat` that the model writes for message i. Raises: UserError."""
    prompt, text = _prompt(tokenizer, messages[:i]), messages[i].get("content")
    has_text = isinstance(text, str) and bool(text.strip())
    start = at = len(prompt)
    if not chat.text.startswith(prompt):
        # Some templates write an earlier reply in another way than the last one: without its thoughts, for example.
        as_last = tokenizer.render_chat(messages[: i + 1], False).text
        start = _start_of_text(tokenizer, messages, i, chat) if has_text and as_last.startswith(prompt) else None
        if start is None:
            raise UserError(
                f"the chat template does not write message {i + 1} after its prompt (add_generation_prompt), so the "
                "start of the reply is not known; mark the replies with {% generation %} in the template"
            )
    if has_text:
        at = _place(tokenizer, messages, i, len(text.rstrip()), chat)
        if at is None or at < start:
            raise UserError(
                f"the chat template changes or repeats the text of message {i + 1}, so the end of the reply is not "
                "known; mark the replies with {% generation %} in the template"
            )
    return start, _end(tokenizer, messages, i, chat, at)


def _end(tokenizer, messages, i, chat, at):
    """The end of the stop token after message i, whose text ends at `at`; `at` if the template writes none there."""
    stops, place = stop_ids(tokenizer), at
    for start, end, token in _special_from(tokenizer, chat, at):
        if chat.text[place:start].strip():
            break
        if token in stops:
            return end
        place = end
    # The message may go on after its text, such as with tool calls, and other messages may follow.
    as_last, there = chat, at
    if i + 1 < len(messages):
        as_last = tokenizer.render_chat(messages[: i + 1], False)
        if as_last.text[:at] != chat.text[:at]:
            there = _place(tokenizer, messages[: i + 1], i, len(messages[i]["content"].rstrip()), as_last)
    found = [] if there is None else _special_from(tokenizer, as_last, there)
    end = next((end - there for _, end, token in found if token in stops), None)
    if end is None:
        raise UserError("the chat template writes no special token after a reply, so a model cannot learn to stop")
    shared = len(os.path.commonprefix([chat.text[at:], as_last.text[there:]]))
    return at + end if end <= shared else at


def _special_from(tokenizer, chat, at):
    """(start, end, id) of the special tokens that the template wrote from `at` on."""
    return [(start, end, tokenizer.special[name]) for start, end, name in chat.special if start >= at]


def _place(tokenizer, messages, i, k, chat):
    """The place in the Rendering `chat` of character k of the text of message i; None if it has not exactly one."""
    mark, text = _new_mark(), messages[i]["content"]
    changed = [*messages]
    changed[i] = messages[i] | {"content": text[:k] + mark + text[k:]}
    try:
        before, *after = tokenizer.render_chat(changed, False).text.split(mark)
    except UserError:
        return None
    return len(before) if len(after) == 1 and before + after[0] == chat.text else None


def _start_of_text(tokenizer, messages, i, chat):
    """The place in the Rendering `chat` of the first character of message i that the template writes; or None."""
    text = messages[i]["content"]
    low, high = 0, len(text.rstrip())
    while low < high:  # the template leaves out a first part: spaces, or thoughts
        middle = (low + high) // 2
        if _place(tokenizer, messages, i, middle, chat) is None:
            low = middle + 1
        else:
            high = middle
    return _place(tokenizer, messages, i, high, chat)


def _new_mark():
    return "x" + secrets.token_hex(8)


@functools.lru_cache(maxsize=8)
def _stop_ids(tokenizer, template):
    known = tuple(getattr(tokenizer, "stop_ids", (tokenizer.eos_id,)))
    return known if template is None else tuple(dict.fromkeys([*known, *_reply_ends(tokenizer, known)]))


def _reply_ends(tokenizer, known):
    """The ids of the special tokens that the template writes after a reply: as the last message, and before another."""
    user, reply = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}
    after = []  # for each conversation, the text and special tokens after the reply, and the token after the user
    for messages in ([user, reply], [user, reply, user]):
        try:
            chat = tokenizer.render_chat(messages, False)
        except UserError:  # a template may want other messages
            continue
        of_user, at = (_place(tokenizer, messages, k, 5, chat) for k in (0, 1))
        if at is not None:
            special = [(start - at, end - at, token) for start, end, token in _special_from(tokenizer, chat, at)]
            of_user = [token for start, _, token in _special_from(tokenizer, chat, of_user or 0) if start == of_user]
            after.append((chat.text[at:], special, of_user))
    if not after:
        return []
    shared = len(os.path.commonprefix([text for text, _, _ in after])) if len(after) > 1 else 0
    first = lambda tokens: [token for token in tokens if token in known][:1] or tokens[:1]
    if both := first([token for _, end, token in after[0][1] if end <= shared]):
        return both
    # The template ends the last message in another way. Before another message, the token must end other messages too.
    ends = first([token for _, _, token in after[0][1]])
    return ends + [
        token for _, special, of_user in after[1:] for at, _, token in special if not at and token in of_user
    ]


def show_mask(tokenizer: Any, ids: Iterable[int], weights: Iterable[float]) -> str:
    """The text of the ids with names of special tokens; ⟦ and ⟧ enclose the trained parts (weight not 0)."""
    check_ids(ids, tokenizer.vocab_size)
    names = {i: name for name, i in getattr(tokenizer, "special", {}).items()}
    names.setdefault(tokenizer.eos_id, "<eos>")
    text, before, pending, trained = [], [], [], False

    def flush():
        decoder = StreamingDecoder(tokenizer, before)
        text.append(decoder.add(pending) + decoder.finish())
        before.extend(pending)
        pending.clear()

    for i, weight in zip(ids, weights, strict=True):
        if bool(weight) != trained:
            flush()
            trained = bool(weight)
            text.append("⟦" if trained else "⟧")
        if i in names:
            flush()
            text.append(names[i])
        else:
            pending.append(int(i))
    flush()
    return printable("".join(text) + "⟧" * trained)
