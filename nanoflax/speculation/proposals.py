"""Guesses of the next tokens: from the text itself, or by a smaller model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nanoflax import generate
from nanoflax.config import ModelConfig
from nanoflax.kernels import argmax, categorical
from nanoflax.nn import LanguageModel
from nanoflax.speculation.caches import Decoding, donated


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Guess that the text goes on as it did after the last place with the same few tokens (prompt lookup decoding,
    Saxena 2023; Yang et al. 2023). It costs nothing, and pays where a text repeats itself or its prompt.

    tokens: the largest number of guesses. A first guess has half of them, as a pass with few tokens is cheaper; one
    after a guess of which the text keeps everything has all. longest, shortest: numbers of tokens that are compared.
    """

    tokens: int = 7
    longest: int = 3
    shortest: int = 2

    def problems(self, config: ModelConfig, prompt: int, new: int) -> list[str]:
        """Why it cannot guess for a model of this configuration, with a prompt and new tokens of these numbers."""
        return _too_small(self, "tokens", "longest", "shortest")

    def start(self, tokens: np.ndarray, lengths: np.ndarray, room: int, filters: generate.Filters) -> "_Looking":
        """The guesser for one prompt [1, P], padded on the left."""
        return _Looking(self)

    def continuation(self, text: Sequence[int], count: int) -> np.ndarray:
        """`count` tokens that may follow the text, int32; none if its last tokens are new."""
        x = np.asarray(text, np.int32)
        for n in range(min(self.longest, len(x) - 1), self.shortest - 1, -1):
            windows = np.lib.stride_tricks.sliding_window_view(x[:-1], n)
            (places,) = np.nonzero((windows == x[-n:]).all(1))
            if len(places):
                return np.resize(x[places[-1] + n :], count)  # what ends here is repeated
        return x[:0]


class _Looking:
    """How much a lookup guesses in one text."""

    def __init__(self, lookup):
        self.lookup, self.count = lookup, (lookup.tokens + 1) // 2

    def guess(self, text: Sequence[int], rng: jax.Array | None) -> tuple[np.ndarray, None]:
        """(guesses of what follows the text, no logits)."""
        self.guessed = len(found := self.lookup.continuation(text, self.count))
        return found, None

    def keep(self, kept: int) -> None:
        """Called after a pass with the number of guesses that the text keeps."""
        if self.guessed:
            most = self.lookup.tokens
            self.count = most if kept == self.guessed else (most + 1) // 2


@dataclasses.dataclass(frozen=True)
class Draft:
    """Guesses drawn from a smaller model with the same vocabulary (Leviathan et al. 2023; Chen et al. 2023)."""

    model: LanguageModel
    params: dict
    tokens: int = 4

    def problems(self, config: ModelConfig, prompt: int, new: int) -> list[str]:
        """Why it cannot guess for a model of this configuration, with a prompt and new tokens of these numbers."""
        found, own = _too_small(self, "tokens"), self.model.config
        if own.head != "lm":
            found.append(f"the draft has model.head={own.head!r}, so it generates no text")
        if own.reads_source != config.reads_source:
            found.append("the draft and the model must both be decoders, or both read a source")
        sizes = [c.vocab_size - c.vocab_padding for c in (own, config)]
        if sizes[0] != sizes[1]:
            found.append(
                f"the draft has a vocabulary of {sizes[0]} tokens, the model of {sizes[1]}; they must be equal"
            )
        if (max(prompt, new) if own.reads_source else prompt + new) > own.max_length:
            found.append(f"the draft's context of {own.max_length} is too short for {prompt} and {new} new tokens")
        return found

    def start(self, tokens: np.ndarray, lengths: np.ndarray, room: int, filters: generate.Filters) -> "_Drafting":
        """The guesser for one prompt [1, P], padded on the left."""
        return _Drafting(self, tokens, lengths, room, filters)


class _Drafting:
    """The draft's state for one text."""

    def __init__(self, draft, tokens, lengths, room, filters):
        self.draft, self.decoding = draft, Decoding.of(draft.model, draft.params)
        _, self.cache = self.decoding.prefill(tokens, lengths, room)
        self.filters = filters._replace(repetition_penalty=None, logit_bias=None, allowed=None)

    def guess(self, text: Sequence[int], rng: jax.Array | None) -> tuple[Any, Any]:
        """(guesses [k], the logits that they were drawn from [k, V], None if greedy), on the device."""
        model, params = self.decoding.one
        run = generate.compiled(_guess, *donated(self.cache), mesh=self.decoding.mesh)
        self.before, self.last = self.cache, np.int32(text[-1])
        V = model.config.vocab_size - model.config.vocab_padding
        self.cache, self.guesses, logits = run(
            model, params, self.last, self.cache, self.filters, rng, steps=self.draft.tokens, vocab_size=V
        )
        return self.guesses, logits

    def keep(self, kept: int) -> None:
        """Called after a pass with the number of guesses that the text keeps."""
        if kept < self.draft.tokens:
            tokens = np.array([self.last, *np.asarray(self.guesses)], np.int32)
            self.cache = self.decoding.rewind(self.before, self.cache, tokens, kept + 1)


def _guess(model, params, token, cache, filters, rng, steps, vocab_size):
    """(the cache with the token and all guesses, guesses [steps], logits [steps, V] or None)."""

    def step(carry, key):
        cache, token = carry
        logits, cache = model.decode(params, token[None, None], cache)
        logits = generate.only_below(vocab_size, logits[:, -1])
        if rng is None:
            token = argmax(logits[0])
            return (cache, token), (token, None)
        logits = generate.filtered(logits, filters)[0]
        token = categorical(key, logits)
        return (cache, token), (token, logits[:vocab_size])

    keys = None if rng is None else jax.random.split(rng, steps)
    (cache, token), (guesses, logits) = jax.lax.scan(step, (cache, token), keys, length=steps)
    return model.decode(params, token[None, None], cache)[1], guesses, logits


def _too_small(proposer, *names):
    return [f"{name}={x!r} must be at least 1" for name in names if (x := getattr(proposer, name)) < 1]


Proposer = Lookup | Draft
