"""Text to ids, and which of them are trained: the ends of texts, words and tags, conversations."""

from nanoflax.errors import UserError
from nanoflax.report import printable
from nanoflax.tokenizers.base import check_ids


def ends(tokenizer):
    """The ids that a model wants before and after a text, such as ([CLS], [SEP]) or ((), </s>)."""
    if not hasattr(tokenizer, "encode_with_template"):
        return [], [tokenizer.eos_id]
    probe = "a"
    inner, whole = tokenizer.encode(probe), tokenizer.encode_with_template(probe)
    at = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:at], whole[at + len(inner) :]


def align_tags(words, tags, tokenizer):
    """Words and their labels as subwords -> ids, labels, weights: lists of one length.

    The text is the words with a space between. The first piece of a word, which may be that space,
    carries its label and weight 1, every other piece label 0 and weight 0. No word is without a
    piece: one that a tokenizer reads as nothing becomes its unknown token, so weights sum to the
    number of words.
    """
    ids, labels, weights = [], [], []
    for i, (word, tag) in enumerate(zip(words, tags, strict=True)):
        pieces = tokenizer.encode(f" {word}" if i else word)
        if not pieces:
            if getattr(tokenizer, "unk_id", None) is None:
                raise UserError(
                    f"the tokenizer reads the word {word!r} as nothing, and it has no unknown token to stand for it"
                )
            pieces = [tokenizer.unk_id]
        ids += pieces
        labels += [tag, *[0] * (len(pieces) - 1)]
        weights += [1.0, *[0.0] * (len(pieces) - 1)]
    return ids, labels, weights


def word_tags(predictions, weights, names, n_words):
    """What a model said of each word: the names of the predictions [T] where weights [T] are not 0;
    "O" for the words that truncation cut off. The tags of `n_words` words."""
    found = [names[p] for p, w in zip(predictions, weights) if w]
    return found + ["O"] * (n_words - len(found))


def chat_ids(tokenizer, messages):
    """A conversation -> ids, weights: 1.0 for the replies of the assistant and the token that ends
    each, 0.0 for all else.

    By the tokenizer's chat template, or without one in this form: for each message its role, ":",
    a newline, its content and the end-of-sequence token.
    Raises: UserError if the template does not show where a reply begins or ends.
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
        # What stands before a reply is what the model is given to continue when it is used.
        head = chat_prompt(tokenizer, messages[:i]) if i else []
        if not i or ids[: len(head)] != head:
            raise UserError(
                f"the chat template does not write message {i + 1} after the prompt "
                "for it, so where the reply begins is not known"
            )
        end = _end_of_reply(tokenizer, ids, len(head))
        weights[len(head) : end] = [1.0] * (end - len(head))
    return ids, weights


def chat_prompt(tokenizer, messages):
    """The ids after which a model, trained on chat_ids, answers the messages."""
    if tokenizer.chat_template is None:
        turns = [i for m in messages for part in _plain_turn(tokenizer, m) for i in part]
        return turns + tokenizer.encode("assistant:\n")
    return tokenizer.apply_chat(messages, add_generation_prompt=True)


def _plain_turn(tokenizer, message):
    # Encoded apart, so that no token spans the border.
    return (tokenizer.encode(f"{message['role']}:\n"), [*tokenizer.encode(message["content"]), tokenizer.eos_id])


def _end_of_reply(tokenizer, ids, start):
    # Words that a tokenizer does not know end nothing.
    special = {*tokenizer.special.values()} - {tokenizer.unk_id} | {*tokenizer.stop_ids}
    for end in range(start, len(ids)):
        if ids[end] in special:
            return end + 1
    raise UserError("the chat template ends a reply with no special token, so a model could not learn to end")


def show_mask(tokenizer, ids, weights):
    """The text of the ids with what is trained (weight not 0) between ⟦ and ⟧, and the names of
    special tokens."""
    check_ids(ids, tokenizer.vocab_size)
    names = {i: name for name, i in getattr(tokenizer, "special", {}).items()}
    names.setdefault(tokenizer.eos_id, "<eos>")
    text, run, trained = [], [], False

    def flush():
        text.append(tokenizer.decode(run))
        run.clear()

    for i, weight in zip(ids, weights, strict=True):
        if bool(weight) != trained:
            flush()
            trained = bool(weight)
            text.append("⟦" if trained else "⟧")
        if i in names:
            flush()
            text.append(names[i])
        else:
            run.append(int(i))
    flush()
    return printable("".join(text) + "⟧" * trained)


def prompt_ids(tokenizer, text, is_source=False):
    """The ids of a prompt as its model expects them, with the tokens that begin (and, of a source,
    end) a text."""
    if hasattr(tokenizer, "encode_with_template"):
        return (
            tokenizer.encode_with_template(text)
            or [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]
        )
    if is_source:
        return [*tokenizer.encode(text), tokenizer.eos_id]
    return [tokenizer.bos_id, *tokenizer.encode(text)]
