"""The ids of conversations, which of them are trained, and the prompt for a reply."""

from collections.abc import Iterable, Sequence
from typing import Any

from nanoflax.errors import UserError
from nanoflax.report import printable
from nanoflax.tokenizers.base import check_ids


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """The ids of a conversation, and their weights: 1.0 for the assistant's replies and their end tokens, else 0.0.

    The tokenizer's chat template writes the conversation. Without a template, a message is its role, ":", a newline,
    its content and the end-of-sequence token.
    Raises: UserError if the first or last token of a reply cannot be found.
    """
    if tokenizer.chat_template is None:
        ids, weights = [], []
        for message in messages:
            head, reply = _plain_turn(tokenizer, message)
            ids += head + reply
            weights += [0.0] * len(head) + [float(message["role"] == "assistant")] * len(reply)
        return ids, weights
    ids = tokenizer.apply_chat(messages, add_generation_prompt=False)
    weights = [0.0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # In training, a reply must follow the same prompt as in generation.
        head = chat_prompt(tokenizer, messages[:i]) if i else []
        if not i or ids[: len(head)] != head:
            raise UserError(
                f"the chat template does not write message {i + 1} after its prompt "
                "(add_generation_prompt), so the start of the reply is not known"
            )
        end = _end_of_reply(tokenizer, ids, len(head))
        weights[len(head) : end] = [1.0] * (end - len(head))
    return ids, weights


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The prompt for the reply to the messages, for a model trained on `chat_ids`."""
    if tokenizer.chat_template is None:
        turns = [i for m in messages for part in _plain_turn(tokenizer, m) for i in part]
        return turns + tokenizer.encode("assistant:\n")
    return tokenizer.apply_chat(messages, add_generation_prompt=True)


def _plain_turn(tokenizer, message):
    # Encoded separately, so that no token contains text of both parts.
    return (tokenizer.encode(f"{message['role']}:\n"), [*tokenizer.encode(message["content"]), tokenizer.eos_id])


def _end_of_reply(tokenizer, ids, start):
    # The unknown token may be a part of a reply.
    special = {*tokenizer.special.values()} - {tokenizer.unk_id} | {*tokenizer.stop_ids}
    for end in range(start, len(ids)):
        if ids[end] in special:
            return end + 1
    raise UserError("the chat template writes no special token after a reply, so a model cannot learn to stop")


def show_mask(tokenizer: Any, ids: Iterable[int], weights: Iterable[float]) -> str:
    """The text of the ids with names of special tokens; ⟦ and ⟧ enclose the trained parts (weight not 0)."""
    check_ids(ids, tokenizer.vocab_size)
    names = {i: name for name, i in getattr(tokenizer, "special", {}).items()}
    names.setdefault(tokenizer.eos_id, "<eos>")
    text, pending, trained = [], [], False

    def flush():
        text.append(tokenizer.decode(pending))
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
