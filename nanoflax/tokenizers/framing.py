"""The ids of texts, tagged words and conversations, and the loss weight of each id."""

from collections.abc import Iterable, Sequence
from typing import Any

from nanoflax.errors import UserError
from nanoflax.report import printable
from nanoflax.tokenizers.base import check_ids


def prefix_and_suffix(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a model expects before and after a text: [CLS] and [SEP], or nothing and </s>."""
    if not hasattr(tokenizer, "encode_with_template"):
        return [], [tokenizer.eos_id]
    probe = "a"
    inner, framed = tokenizer.encode(probe), tokenizer.encode_with_template(probe)
    at = next(i for i in range(len(framed)) if framed[i : i + len(inner)] == inner)
    return framed[:at], framed[at + len(inner) :]


def align_tags(words: Sequence[str], tags: Sequence[int], tokenizer: Any) -> tuple[list[int], list[int], list[float]]:
    """Ids, labels and weights of words and their tags, three lists of one length.

    The text is the words, joined by spaces. The first piece of a word gets the word's label and weight 1, other
    pieces get label 0 and weight 0. A word that the tokenizer encodes as no ids becomes the unknown token, so the
    weights sum to the number of words. Raises: UserError if the tokenizer has no unknown token for such a word.
    """
    ids, labels, weights = [], [], []
    for i, (word, tag) in enumerate(zip(words, tags, strict=True)):
        pieces = tokenizer.encode(f" {word}" if i else word)
        if not pieces:
            if getattr(tokenizer, "unk_id", None) is None:
                raise UserError(f"the tokenizer has no ids for the word {word!r}, and no unknown token to replace it")
            pieces = [tokenizer.unk_id]
        ids += pieces
        labels += [tag, *[0] * (len(pieces) - 1)]
        weights += [1.0, *[0.0] * (len(pieces) - 1)]
    return ids, labels, weights


def word_tags(predictions: Iterable[int], weights: Iterable[float], names: Sequence[str], n_words: int) -> list[str]:
    """The predicted tag of each of `n_words` words; "O" for words that truncation cut off.

    predictions, weights: [T] each, for the pieces; only the first piece of a word has a weight other than 0.
    """
    tags = [names[p] for p, w in zip(predictions, weights, strict=False) if w]
    return tags + ["O"] * (n_words - len(tags))


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


def prompt_ids(tokenizer: Any, text: str, is_source: bool = False) -> list[int]:
    """The ids of a prompt, with the special tokens before it; after a source also the end-of-sequence token."""
    if hasattr(tokenizer, "encode_with_template"):
        return (
            tokenizer.encode_with_template(text)
            or [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]
        )
    if is_source:
        return [*tokenizer.encode(text), tokenizer.eos_id]
    return [tokenizer.bos_id, *tokenizer.encode(text)]
