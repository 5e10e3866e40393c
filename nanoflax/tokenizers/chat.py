"""The ids of conversations, which of them are trained, and the prompt for a reply."""

import contextlib
import datetime
import functools
import os
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from nanoflax.errors import UserError
from nanoflax.report import printable
from nanoflax.tokenizers import chat_template
from nanoflax.tokenizers.base import check_ids
from nanoflax.tokenizers.export import to_huggingface
from nanoflax.tokenizers.huggingface import HFTokenizer
from nanoflax.tokenizers.streaming import StreamingDecoder

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def chat_ids(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
) -> tuple[list[int], list[float]]:
    """The ids of a conversation, and their weights: 1.0 for what the model writes in a reply, else 0.0.

    The tokenizer's chat template writes the conversation. Its {% generation %} marks decide what is trained. Without
    marks, this is all that follows the prompt of `chat_prompt`, with the token that ends the reply (`stop_ids`).
    Without a template, a message is its role, ":", a newline, its content and the end-of-sequence token.
    tools: descriptions of functions, for the template.
    Raises: UserError if the template fails, or if the start or the end of a reply cannot be found.
    """
    if tokenizer.chat_template is None:
        ids = _plain_start(tokenizer)
        weights = [0.0] * len(ids)
        for message, (head, reply) in zip(messages, _plain_turns(tokenizer, messages, tools), strict=True):
            ids += head + reply
            weights += [0.0] * len(head) + [float(message["role"] == "assistant")] * len(reply)
        return ids, weights
    render = functools.partial(tokenizer.render_chat, tools=tools)
    chat = render(messages, False)
    if messages[0]["role"] == "assistant":
        raise UserError("message 1 is a reply, so there is no prompt for it")
    parts = chat.marked
    if parts is not None and all(start == end for start, end in parts):
        raise UserError("the chat template has {% generation %} marks, but marks nothing in this conversation")
    if parts is None:
        stops = {name for name, i in tokenizer.special.items() if i in stop_ids(tokenizer)}
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        parts = [_reply(render, messages, i, chat, stops) for i in replies]
    return tokenizer.encode_parts(chat.text, parts)


def chat_prompt(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None = None
) -> list[int]:
    """The prompt for the reply to the messages: what precedes a reply in `chat_ids` (that begins without a space)."""
    if tokenizer.chat_template is None:
        turns = _plain_turns(tokenizer, messages, tools)
        ids = _plain_start(tokenizer) + [i for turn in turns for part in turn for i in part]
        return ids + tokenizer.encode("assistant:\n")
    render = functools.partial(tokenizer.render_chat, tools=tools)
    prompt, (reply, _) = _prompt(render, messages), _example_reply(render, messages)
    if reply is None or not reply.text.startswith(prompt):
        return tokenizer.encode_parts(prompt, [])[0]
    # A token may hold characters of both: a space of the prompt and the first word of the reply. The model writes it.
    ids, weights = tokenizer.encode_parts(reply.text, [(len(prompt), len(reply.text))])
    return ids[: weights.index(1.0)] if 1.0 in weights else tokenizer.encode_parts(prompt, [])[0]


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a generated text: the tokenizer's own, then those by which its chat template ends a reply."""
    return _stop_ids(tokenizer, tokenizer.chat_template)


def with_date(tokenizer: Any, now: datetime.datetime) -> Any:
    """The tokenizer; if its chat template reads the date, the template always writes the date of `now`."""
    if tokenizer.chat_template is None:
        return tokenizer
    template = chat_template.with_date(tokenizer.chat_template, now)
    return tokenizer if template == tokenizer.chat_template else tokenizer.with_chat_template(template)


def with_plain_template(tokenizer: Any) -> Any:
    """For Transformers: the tokenizer with a chat template that writes the chats of tokenizers without a template.

    Unchanged if it has a template, or if a template would give other ids.
    """
    exported = to_huggingface(tokenizer, for_prompts=True)
    if exported.chat_template is not None or not isinstance(exported, HFTokenizer):
        return tokenizer
    made = exported.with_chat_template(("{{ bos_token }}" if _plain_start(tokenizer) else "") + PLAIN_TEMPLATE)
    roles = enumerate(["system", "user", "assistant", "user", "assistant"])
    messages = [{"role": role, "content": f"Message {i}, with a word."} for i, role in roles]
    with contextlib.suppress(UserError):  # the template of a tokenizer without eos_token ends no reply
        if chat_ids(made, messages) == chat_ids(tokenizer, messages):
            return made
    return tokenizer


def _plain_start(tokenizer):
    return [i for i in tokenizer.framing.start if i != tokenizer.eos_id]  # an eos only separates documents


def _plain_turns(tokenizer, messages, tools):
    """(ids of the role, ids of the content and its end) of each message, for tokenizers without a chat template."""
    if tools or any(message.get("tool_calls") for message in messages):
        raise UserError("the tokenizer has no chat template, so a chat cannot have tools")
    # Encoded separately, so that no token contains text of both parts.
    encode = tokenizer.encode
    return [(encode(f"{m['role']}:\n"), [*encode(m["content"]), tokenizer.eos_id]) for m in messages]


# The parts of a rendered conversation. A template is a program, so rendering changed conversations finds them.
# render: (messages, add_generation_prompt) -> chat_template.Rendering. A part is (start, end) in characters.


def _prompt(render, messages):
    """The text that the template writes before the reply to the messages."""
    prompt = render(messages, True)
    if prompt.marked is None and prompt.text != render(messages, False).text:
        return prompt.text
    # A template without a generation prompt still writes something before a reply, and so may one with marks.
    reply, start = _example_reply(render, messages)
    if reply is None or start < 0:
        return prompt.text
    is_written = reply.text.startswith(prompt.text)
    if reply.marked is not None:
        start = next((first for first, last in reply.marked if first <= start < last), -1)
    else:
        start = len(reply.text[:start].rstrip(" ")) if is_written else -1  # tokenizers join a space to the next word
    return reply.text[:start] if start > (len(prompt.text) if is_written else -1) else prompt.text


def _example_reply(render, messages):
    """(Rendering of the messages and a reply, the place of its text); (None, -1) if the template refuses a reply."""
    mark = _new_mark()
    try:
        chat = render([*messages, {"role": "assistant", "content": mark}], False)
    except UserError:
        return None, -1
    return chat, chat.text.find(mark)


def _reply(render, messages, i, chat, stops):
    """The part of the Rendering `chat` that the model writes for message i. Raises: UserError."""
    advice = "mark the replies with {% generation %} in the template"
    prompt, text = _prompt(render, messages[:i]), messages[i].get("content")
    has_text = isinstance(text, str) and bool(text.strip())
    start = at = len(prompt)
    if not chat.text.startswith(prompt):
        # Some templates write an earlier reply in another way than the last one: without its thoughts, for example.
        as_last = render(messages[: i + 1], False).text
        start = _start_of_text(render, messages, i, chat) if has_text and as_last.startswith(prompt) else None
        if start is None:
            other = prompt[len(os.path.commonprefix([prompt, as_last])) :]
            raise UserError(
                f"the chat template's prompt for message {i + 1} (add_generation_prompt) has {other[:40]!r}, which it "
                f"does not write there in the conversation, so the start of the reply is not known; {advice}"
            )
    if has_text:
        at = _place(render, messages, i, len(text.rstrip()), chat)
        if at is None or at < start:
            raise UserError(
                f"the chat template changes or repeats the text of message {i + 1}, so the end of the reply is not "
                f"known; {advice}"
            )
    return start, _end(render, messages, i, chat, at, stops)


def _end(render, messages, i, chat, at, stops):
    """The end of the stop token after message i, whose text ends at `at`; `at` if the template writes none there."""
    place = at
    for start, end, name in _special_from(chat, at):
        if chat.text[place:start].strip():
            break
        if name in stops:
            return end
        place = end
    # The message may go on after its text, such as with tool calls, and other messages may follow.
    as_last, there = chat, at
    if i + 1 < len(messages):
        as_last = render(messages[: i + 1], False)
        if as_last.text[:at] != chat.text[:at]:
            text = messages[i].get("content")
            there = _place(render, messages[: i + 1], i, len(text.rstrip()), as_last) if text else None
    found = [] if there is None else _special_from(as_last, there)
    end = next((end - there for _, end, name in found if name in stops), None)
    if end is None and found:
        raise UserError(
            f"the chat template ends message {i + 1} with {found[-1][2]}, which does not end a generated text; add it "
            "to eos_token_id in generation_config.json"
        )
    if end is None:
        raise UserError("the chat template writes no special token after a reply, so a model cannot learn to stop")
    shared = len(os.path.commonprefix([chat.text[at:], as_last.text[there:]]))
    return at + end if end <= shared else at


def _special_from(chat, at):
    return [(start, end, name) for start, end, name in chat.special if start >= at]


def _place(render, messages, i, k, chat):
    """The place in the Rendering `chat` of character k of the text of message i; None if it has not exactly one."""
    mark, text = _new_mark(), messages[i]["content"]
    changed = [*messages]
    changed[i] = messages[i] | {"content": text[:k] + mark + text[k:]}
    try:
        before, *after = render(changed, False).text.split(mark)
    except UserError:
        return None
    return len(before) if len(after) == 1 and before + after[0] == chat.text else None


def _start_of_text(render, messages, i, chat):
    """The place in the Rendering `chat` of the text of message i, with the spaces before it; None if not found."""
    text = messages[i]["content"]
    low, high = 0, len(text.rstrip())
    while low < high:  # the template may leave out a first part: spaces, or thoughts
        middle = (low + high) // 2
        if _place(render, messages, i, middle, chat) is None:
            low = middle + 1
        else:
            high = middle
    place = _place(render, messages, i, high, chat)
    return None if place is None else len(chat.text[:place].rstrip(" "))


def _new_mark():
    return "Hi" + secrets.token_hex(8)


@functools.lru_cache(maxsize=8)
def _stop_ids(tokenizer, template):
    known = tuple(getattr(tokenizer, "stop_ids", (tokenizer.eos_id,)))
    if template is None:
        return known
    names = {name for name, i in tokenizer.special.items() if i in known}
    ends = _reply_ends(tokenizer.render_chat, names)
    return tuple(dict.fromkeys([*known, *(tokenizer.special[name] for name in ends)]))


def _reply_ends(render, known):
    """The special tokens that the template writes after a reply: if it is the last message, and before another one."""
    user, reply = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}
    after = []  # for each conversation, the text and special tokens after the reply, and the token after the user
    for messages in ([user, reply], [user, reply, user]):
        try:
            chat = render(messages, False)
        except UserError:  # a template may want other messages
            continue
        of_user, at = (_place(render, messages, k, 5, chat) for k in (0, 1))
        if at is not None:
            special = [(start - at, end - at, name) for start, end, name in _special_from(chat, at)]
            after.append((chat.text[at:], special, [name for start, _, name in chat.special if start == of_user]))
    if not after:
        return []
    shared = len(os.path.commonprefix([text for text, _, _ in after])) if len(after) > 1 else 0
    first = lambda names: [name for name in names if name in known][:1] or names[:1]
    if both := first([name for _, end, name in after[0][1] if end <= shared]):
        return both
    # The template ends the last message in another way. Before another message, the token must end other messages too.
    ends = first([name for _, _, name in after[0][1]])
    return ends + [name for _, special, of_user in after[1:] for at, _, name in special if not at and name in of_user]


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
