"""Corruptions of text, for models that learn to restore the text: masked tokens, hidden spans, infilling.

The corruptions are functions of ids and a NumPy Generator. A `Noise` uses them to make the rows of a task.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from nanoflax.tokenizers import TokenizerWithSentinels

# Noise.


def mask_tokens(
    ids: Int[np.ndarray, " T"], rng: np.random.Generator, rate: float, mask_id: int, ordinary: Int[np.ndarray, " V"]
) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """BERT's noise (Devlin et al. 2019, section 3.1): a share `rate` of the tokens is chosen, at least one. Of the
    chosen tokens 80% become mask_id, 10% a random token, and 10% do not change.

    ordinary: ascending ids; only these are chosen and used as random tokens. Returns: the new ids, and a mask of the
    chosen tokens, which the model must predict.
    """
    places = np.flatnonzero(np.isin(ids, ordinary))
    number = min(len(places), max(1, round(rate * len(places))))
    chosen = rng.choice(places, number, replace=False)
    u, noisy = rng.random(number), ids.copy()
    noisy[chosen[u < 0.8]] = mask_id
    randomized = chosen[u >= 0.9]
    noisy[randomized] = rng.choice(ordinary, len(randomized))
    return noisy, np.isin(np.arange(len(ids)), chosen)


def span_sizes(n: int, rate: float, mean_span: float) -> tuple[int, int]:
    """(number of hidden tokens, number of spans) of span corruption on n tokens."""
    hidden = min(max(round(n * rate), 1), n - 1)
    return (hidden, min(max(round(hidden / mean_span), 1), hidden, n - hidden)) if n > 1 else (0, 0)


def span_corruption(
    ids: Int[np.ndarray, " n"], rng: np.random.Generator, rate: float, mean_span: float, sentinels: Sequence[int]
) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " T"]]:
    """T5's noise (Raffel et al. 2020, section 3.1.4): in the source a sentinel replaces each hidden span. The target
    has each sentinel, followed by the tokens of its span.

    As in T5's random_spans_noise_mask, the visible and the hidden tokens are cut at random places into the same
    number of pieces, which alternate; a text begins with visible tokens. Returns: source, target.
    """
    hidden, spans = span_sizes(len(ids), rate, mean_span)
    if not spans:
        return ids, ids[:0]

    def cut(total):
        return np.diff([0, *np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1, total])

    lengths = np.stack([cut(len(ids) - hidden), cut(hidden)], axis=1).reshape(-1)
    pieces = np.split(ids, np.cumsum(lengths)[:-1])
    source, target = [], []
    for sentinel, visible, span in zip(sentinels[:spans], pieces[::2], pieces[1::2], strict=True):
        source += [*visible, sentinel]
        target += [sentinel, *span]
    return np.asarray(source, np.int32), np.asarray(target, np.int32)


def infilling(
    ids: Int[np.ndarray, " n"], rng: np.random.Generator, rate: float, mean_span: float, mask_id: int
) -> Int[np.ndarray, " S"]:
    """BART's noise (Lewis et al. 2020, section 2.2): one mask replaces each span, until a share `rate` of the tokens
    is hidden; the lengths of the spans are drawn from a Poisson distribution, and a span of length 0 inserts a mask.
    """
    budget = round(len(ids) * rate)
    lengths = rng.poisson(mean_span, budget)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), budget) + 1]
    lengths[-1:] += budget - lengths.sum()
    slots = len(ids) - lengths.sum() + len(lengths)  # of the source: visible tokens and masks
    masks = np.isin(np.arange(slots), rng.choice(slots, len(lengths), replace=False))
    steps = np.ones(slots, int)
    steps[masks] = rng.permutation(lengths)
    at = np.minimum(np.cumsum(steps) - steps, len(ids) - 1)  # for each slot, the position of its token
    return np.where(masks, mask_id, ids[at]).astype(np.int32)


def permuted_sentences(
    ids: Int[np.ndarray, " n"], rng: np.random.Generator, closing: Sequence[int]
) -> Int[np.ndarray, " n"]:
    """The ids with their sentences in random order (Lewis et al. 2020). closing: ids that end a sentence."""
    after = np.flatnonzero(np.isin(ids[:-1], closing)) + 1
    sentences = np.split(ids, after)
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


# Rows.


class Noise:
    """noise(ids, rng) corrupts a text and returns a row of Rows, for a MaskedLM or Denoise task.

    This base class corrupts nothing: the target equals the source, as for an autoencoder.
    ids: a text without special tokens, of at most `max_ids` tokens. target_length: the largest length of the targets
    of a row, with special tokens.
    """

    default_rate = 0.15  # share of the tokens, if task.noise_rate is None

    def __init__(self, task: Any, tokenizer: Any) -> None:
        """tokenizer: as `prepare` returns it."""
        self.task, self.tokenizer = task, tokenizer
        self.framing = tokenizer.framing
        self.rate = getattr(task, "noise_rate", None) or self.default_rate
        limits = self.limits()
        self.target_length = limits[1]
        self.max_ids = self._max_ids(limits[0] - len(self.framing.whole(())), limits[1] - len(self.framing.target(())))

    @staticmethod
    def prepare(tokenizer: Any) -> Any:
        """The tokenizer with the mask or the sentinels that this noise needs."""
        return tokenizer

    def limits(self) -> tuple[int, int]:
        """The largest lengths of source and target, with special tokens."""
        return self.task.length, self.task.target_length

    def _max_ids(self, source: int, target: int) -> int:
        """The largest length of a text whose source and target fit these lengths, all without special tokens."""
        return min(source, target)

    def __call__(self, ids: Int[np.ndarray, " n"], rng: np.random.Generator) -> dict[str, np.ndarray]:
        source, target = self._corrupt(ids, rng)
        framed = {"source": self.framing.whole(source.tolist()), "targets": self.framing.target(target.tolist())}
        return {name: np.asarray(ids, np.int32) for name, ids in framed.items()}

    def _corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return ids, ids


class Masking(Noise):
    """BERT's masks: see `mask_tokens`."""

    prepare = staticmethod(TokenizerWithSentinels)

    def limits(self) -> tuple[int, int]:
        return self.task.length, self.task.length

    def __call__(self, ids: Int[np.ndarray, " n"], rng: np.random.Generator) -> dict[str, np.ndarray]:
        targets, t = np.asarray(self.framing.whole(ids.tolist()), np.int32), self.tokenizer
        tokens, chosen = mask_tokens(targets, rng, self.rate, t.mask_id, t.ordinary)
        return {"tokens": tokens, "targets": targets, "weights": chosen.astype(np.float32)}


class SpanCorruption(Noise):
    """T5's noise: see `span_corruption`."""

    @staticmethod
    def prepare(tokenizer: Any) -> Any:
        return TokenizerWithSentinels(tokenizer, sentinels=True)

    def _max_ids(self, source: int, target: int) -> int:
        def fits(n: int) -> bool:
            hidden, spans = span_sizes(n, self.rate, self.task.noise_span)
            visible = n - hidden
            return visible + spans <= source and hidden + spans <= target and spans <= len(self.tokenizer.sentinels)

        return next(n for n in itertools.count(1) if not fits(n + 1))

    def _corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return span_corruption(ids, rng, self.rate, self.task.noise_span, self.tokenizer.sentinels)


class Infilling(Noise):
    """BART's noise: see `permuted_sentences` and `infilling`."""

    default_rate = 0.3
    prepare = staticmethod(TokenizerWithSentinels)

    def __init__(self, task: Any, tokenizer: Any) -> None:
        super().__init__(task, tokenizer)
        self.closing = [
            i for i in tokenizer.ordinary.tolist() if tokenizer.decode([i]).rstrip()[-1:] in (".", "!", "?")
        ]

    def _corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        source = permuted_sentences(ids, rng, self.closing)
        return infilling(source, rng, self.rate, self.task.noise_span, self.tokenizer.mask_id), ids


DENOISING: dict[str, type[Noise]] = {"spans": SpanCorruption, "infilling": Infilling, "none": Noise}  # by task.noise
