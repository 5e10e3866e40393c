"""What every tokenizer shares."""

from nanoflax.errors import UserError

SPACE = "\u2581"  # SentencePiece writes a space as this character


def well_formed(text):
    """The text with each unpaired surrogate, which no encoding can write, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def check_ids(ids, vocab_size):
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UserError(f"token id {i} is not in the vocabulary of {vocab_size}")
