"""The ids of texts and tagged words, and the loss weight of each id."""

from collections.abc import Iterable, Sequence
from typing import Any

from nanoflax.errors import UserError


def align_tags(words: Sequence[str], tags: Sequence[int], tokenizer: Any) -> tuple[list[int], list[int], list[float]]:
    """Ids, labels and weights of words and their tags, three lists of one length.

    The text is the words, joined by spaces. The first piece of a word gets the word's label and weight 1, other
    pieces get label 0 and weight 0. A word that the tokenizer encodes as no ids becomes the unknown token, so the
    weights sum to the number of words. Raises: UserError if the tokenizer has no unknown token for such a word.
    """
    parts = [tokenizer.encode(f" {word}" if i else word) for i, word in enumerate(words)]
    alone = [tokenizer.encode(word) for word in words]  # some tokenizers add the space before a word themselves
    if sum(alone, []) == tokenizer.encode(" ".join(words)):
        parts = alone
    ids, labels, weights = [], [], []
    for word, tag, pieces in zip(words, tags, parts, strict=True):
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


def prompt_ids(tokenizer: Any, text: str, is_source: bool = False) -> list[int]:
    """The ids of a prompt for a decoder, or of a source. Never empty."""
    if is_source and (ids := tokenizer.framing.whole(tokenizer.encode_source(text))):
        return ids
    return tokenizer.framing.prompt(tokenizer.encode(text))


def continuation_ids(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """(ids of a prompt for a decoder, ids of the text after it).

    Both are encoded as one text, if this does not change the ids of the prompt; else each alone, because the model
    will read the prompt alone.
    """
    ids, both = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + text)
    same = len(both) > len(ids) and both[: len(ids)] == ids
    return ids, both[len(ids) :] if same else tokenizer.encode(text)
