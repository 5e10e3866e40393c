"""The decode loop's model and its cache, which goes back to an earlier token."""

import dataclasses
from typing import Any

import numpy as np

from nanoflax import generate, parallel
from nanoflax.nn import LanguageModel

# Entries of a layer's cache in which each token has a slot of its own, or that belong to the source.
_BY_SLOT = {"key", "value", "key_scale", "value_scale", "cross_key", "cross_value"}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A model with its parameters in the form that one row (of one token) or several rows are fastest with."""

    one: tuple[LanguageModel, dict]
    several: tuple[LanguageModel, dict]
    mesh: Any

    @classmethod
    def of(cls, model: LanguageModel, params: dict) -> "Decoding":
        one = generate.decoding_params(model, params, 1)
        several = generate.decoding_params(model, one, 2)  # of `one`, so that both share the matrices in its dtype
        forms = (generate.decoding_model(model, 1), one), (generate.decoding_model(model, 2), several)
        return cls(*forms, parallel.mesh_of(params))

    def prefill(self, tokens: np.ndarray, lengths: np.ndarray, room: int) -> tuple[int, dict]:
        """(the last token of a prompt [1, P], the cache before it, with room for `room` tokens)."""
        model, params = self.one
        token, cache = generate.compiled(_prefill, mesh=self.mesh)(model, params, tokens, lengths, room)
        return int(token[0]), cache

    def rewind(self, before: dict, after: dict, tokens: np.ndarray, kept: int) -> dict:
        """The cache with the first `kept` tokens alone. after: the cache `before` with all of them.

        A cache with a slot for each token needs a smaller index. Other states, of recurrent layers, are computed
        again, in pieces of 1, 2, 4 ... tokens, which need few compilations.
        """
        if kept == len(tokens):
            return after
        if by_slot(after):
            return after | {"index": after["index"] - np.int32(len(tokens) - kept)}
        at, cache = 0, before
        for size in (1 << i for i in range(kept.bit_length()) if kept >> i & 1):
            model, params = self.one if size == 1 else self.several
            cache = generate.compiled(_extend, mesh=self.mesh)(model, params, tokens[None, at : at + size], cache)
            at += size
        return cache


def by_slot(cache: dict) -> bool:
    """Whether a smaller index takes the last tokens out of a cache."""
    layers = cache["layers"]
    slots = all(isinstance(layer, dict) and layer.keys() <= _BY_SLOT for layer in layers)
    return slots and cache.keys() <= {"layers", "index", "start", "source_mask"}


def donated(cache: dict) -> list[str]:
    """What a step that extends the cache may overwrite."""
    return ["cache"] if by_slot(cache) else []  # else `rewind` needs the cache before the step


def _prefill(model, params, tokens, lengths, new_tokens):
    return model.prefill(params, tokens, lengths, new_tokens)


def _extend(model, params, tokens, cache):
    return model.decode(params, tokens, cache)[1]
