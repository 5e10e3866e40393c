"""The caches of the last prompts, so that a new prompt with the same beginning reads only its end."""

import collections
from collections.abc import Sequence
from typing import Any


class Prefixes:
    """At most `most` caches by the tokens in them; the one that was not used for the longest time is dropped.

    exact: only all tokens of a cache can be reused, because its state sums over them; else any number of them, so that
    a cache replaces those of its beginnings. step: reused lengths are multiples of it, unless `exact` or the whole
    prompt is reused.
    """

    def __init__(self, most: int, exact: bool, step: int) -> None:
        self.most, self.exact, self.step = most, exact, step
        self._caches: collections.OrderedDict[tuple[int, ...], Any] = collections.OrderedDict()

    def find(self, prompt: Sequence[int]) -> tuple[Any, int, int]:
        """(a cache or None, how many first tokens of the prompt it holds, how many an earlier prompt had too)."""
        best, found, shared = 0, None, 0
        for tokens in self._caches:
            n = common_prefix(tokens, prompt)
            shared = max(shared, n)
            n = (n if n == len(tokens) else 0) if self.exact else n if n == len(prompt) else n - n % self.step
            if n > best:
                best, found = n, tokens
        if found is None:
            return None, 0, shared
        self._caches.move_to_end(found)
        return self._caches[found], best, shared

    def add(self, tokens: Sequence[int], cache: Any) -> None:
        """Keep the cache that holds the tokens, if it is long enough to be of use."""
        if not self.most or len(tokens) < self.step:
            return
        new, shared = tuple(tokens), {held: common_prefix(held, tokens) for held in self._caches}
        if not self.exact:
            for held, n in shared.items():
                if n == len(new) < len(held):
                    return self._caches.move_to_end(held)
                if n == len(held):
                    del self._caches[held]
        self._caches[new] = cache
        self._caches.move_to_end(new)
        if len(self._caches) > self.most:
            self._caches.popitem(last=False)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of equal items at the beginning of both."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
