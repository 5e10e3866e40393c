"""The bytes of text that each token stands for."""

import functools
import json
from typing import Any

from nanoflax.tokenizers.export import to_huggingface, token_ids
from nanoflax.tokenizers.sentinels import TokenizerWithSentinels
from nanoflax.tokenizers.streaming import REPLACEMENT
from nanoflax.tokenizers.vocabularies import bytes_to_letters


@functools.lru_cache(maxsize=8)
def token_bytes(tokenizer: Any) -> tuple[bytes | None, ...]:
    """The bytes that each token adds to a text that has begun; None for special tokens, which give no text.

    Their concatenation is the text of `decode`, with three exceptions: SentencePiece and WordPiece drop the first space
    of a text, bytes that are not UTF-8 become U+FFFD, and tokenizers with `cleans_up` remove spaces before punctuation.
    """
    plain = tokenizer.plain if isinstance(tokenizer, TokenizerWithSentinels) else tokenizer
    special = {*getattr(tokenizer, "special", {}).values()}
    is_visible = lambda text: text.strip() and REPLACEMENT not in text
    context = next(i for i in range(plain.vocab_size) if i not in special and is_visible(plain.decode([i])))
    before = len(plain.decode([context]))
    texts = ["" if i in special else plain.decode([context, i])[before:] for i in range(plain.vocab_size)]
    found = [text.encode() or None for text in texts]
    if incomplete := {i for i, text in enumerate(texts) if REPLACEMENT in text}:  # tokens with parts of characters
        values = _letters(plain)
        for name, i in token_ids(plain).items():
            if i not in incomplete:
                continue
            if name in values:
                found[i] = bytes([values[name]])
            elif all(letter in values for letter in name):
                found[i] = bytes(values[letter] for letter in name)
    return (*found, *[None] * (tokenizer.vocab_size - plain.vocab_size))


def _letters(tokenizer: Any) -> dict[str, int]:
    """Names of bytes in the vocabulary -> byte: characters of a byte-level vocabulary, or <0x00> to <0xFF>."""
    exported = to_huggingface(tokenizer)
    spec = getattr(exported, "contents", lambda: ({}, {}))()[0]
    if '"ByteLevel"' in json.dumps(spec.get("decoder")):
        return {letter: byte for byte, letter in bytes_to_letters().items()}
    return {f"<0x{byte:02X}>": byte for byte in range(256)}
