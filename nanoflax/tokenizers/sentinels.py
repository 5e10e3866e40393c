"""Mask and sentinel tokens, for models that learn to restore a text."""

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from nanoflax.tokenizers.streaming import decode_parts

SENTINELS = 100  # the number in T5


class TokenizerWithSentinels:
    """A tokenizer with a mask and sentinels: its own (BERT's [MASK], T5's <extra_id_0> to _99), or new ids after its
    vocabulary, for which the model needs embeddings.

    Attributes: mask_id; sentinels, the id for the first span, the second and so on, descending; ordinary, the ids
    of the tokenizer that are not special tokens; vocab_size and special, which include the mask and the sentinels.
    plain is the tokenizer and added its new tokens, {name: id}. All other attributes, files and fingerprint too, are
    those of the tokenizer.
    """

    def __init__(self, tokenizer: Any, sentinels: bool = False) -> None:
        self.plain, self.vocab_size, self.added = tokenizer, tokenizer.vocab_size, {}
        self.special = dict(getattr(tokenizer, "special", {}))
        self.mask_id = getattr(tokenizer, "mask_id", None)
        if self.mask_id is None:
            self.mask_id = self._add("<mask>")
        names = [f"<extra_id_{i}>" for i in range(SENTINELS)]
        if sentinels and names[0] not in self.special:
            for name in reversed(names):
                self._add(name)
        self.sentinels = [self.special[name] for name in names if name in self.special]
        self._names = {i: name for name, i in self.special.items() if i == self.mask_id or i in self.sentinels}
        self._names.setdefault(self.mask_id, "<mask>")
        roles = (getattr(tokenizer, f"{role}_id", None) for role in ("pad", "eos", "bos", "sep"))
        special = [self.mask_id, *self.special.values(), *(i for i in roles if i is not None)]
        self.ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), special)

    def _add(self, name: str) -> int:
        self.special[name] = self.added[name] = self.vocab_size
        self.vocab_size += 1
        return self.special[name]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    def decode(self, ids: Iterable[int]) -> str:
        """The text. A mask or sentinel becomes its name, such as "<mask>"."""
        runs = [list(run) for _, run in itertools.groupby(map(int, ids), key=self._names.__contains__)]
        texts = decode_parts(self.plain, [[i for i in run if i not in self._names] for run in runs])
        return "".join(
            "".join(self._names.get(i, "") for i in run) + text for run, text in zip(runs, texts, strict=True)
        )
