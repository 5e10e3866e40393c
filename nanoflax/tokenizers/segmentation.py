"""Random segmentations of a text by a unigram model: subword regularization (Kudo, 2018, arXiv:1804.10959).

SentencePiece draws them too, but other ones in each process. Here they are a function of the text and a Segmentation.

A segmentation has the weight exp(alpha * the sum of the scores of its pieces). Forward filtering computes, for each
place of a word, the logarithm of the total weight of all segmentations of the characters before it. Backward sampling
draws the last piece of the word, then the last piece of the characters before that piece, and so on.
"""

import array
import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from nanoflax.tokenizers.base import SPACE, well_formed
from nanoflax.tokenizers.sentencepiece_schema import model_class

CACHED = 32  # characters; longer words, as of languages without spaces, are rarely the same
UNKNOWN_PENALTY = 10.0  # of SentencePiece: the logarithm of an unknown character is so much less than the lowest one
USER_SCORE = -0.1  # of SentencePiece, for each piece that its user defined, whatever its score in the model


class Choice(NamedTuple):
    """The pieces that can end at one place of a word.

    log_total: the logarithm of the weight of all segmentations up to this place. weights: the cumulative weights of the
    pieces, up to a factor. pieces: (where it begins, its ids), in order of their begins.
    """

    log_total: float
    weights: list[float]
    pieces: list[tuple[int, list[int]]]


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The random segmentation of each text with this number. alpha: probabilities are those of the model to this power;
    less is more random."""

    number: int
    alpha: float


class SegmentationSampler:
    """Draws segmentations from the SentencePiece models that `sampler_of` accepts."""

    def __init__(self, model: bytes) -> None:
        found = [*enumerate(model_class().FromString(model).pieces)]
        normal = {p.piece.replace(SPACE, " "): ([i], p.score) for i, p in found if p.type == p.NORMAL}
        of_user = {p.piece.replace(SPACE, " "): ([i], USER_SCORE) for i, p in found if p.type == p.USER_DEFINED}
        self._pieces = pieces = normal | of_user
        self._bytes = [i for i, p in sorted(found, key=lambda pair: pair[1].piece) if p.type == p.BYTE]  # <0x00>, ...
        self._suffixes = {piece[n:] for piece in pieces for n in range(len(piece))}
        self._pairs = {pair for piece in pieces for pair in itertools.pairwise(piece)}
        self._unknown = min((score for _, score in normal.values()), default=0.0) - UNKNOWN_PENALTY
        self._cached = functools.lru_cache(maxsize=1 << 15)(self._choices)

    def sample(self, text: str, segmentation: Segmentation) -> list[int]:
        """The ids of a text; the same call gives the same ids."""
        text, number = well_formed(text), segmentation.number.to_bytes(8, "little")
        draw = random.Random(hashlib.blake2b(text.encode(), key=number).digest()).random
        ids = []
        for word in self._words(text):
            choices = (self._cached if len(word) <= CACHED else self._choices)(word, segmentation.alpha)
            end, chosen = len(word), []
            while end:  # from the last piece to the first
                _, weights, pieces = choices(end)
                last = len(pieces) - 1
                end, ids_of_piece = pieces[bisect.bisect(weights, draw() * weights[-1], hi=last) if last else 0]
                chosen.append(ids_of_piece)
            ids.extend(itertools.chain.from_iterable(reversed(chosen)))
        return ids

    def _words(self, text: str) -> Iterator[str]:
        """The text, cut between all characters that are next to each other in no piece: the parts are independent."""
        cuts = (i for i, pair in enumerate(itertools.pairwise(text), 1) if pair not in self._pairs)
        for begin, end in itertools.pairwise(itertools.chain([0], cuts, [len(text)])):
            yield text[begin:end]

    def _choices(self, word: str, alpha: float) -> Callable[[int], Choice]:
        """A function that computes the Choice at a place of the word when it is needed: of a long word, as a text
        without spaces, only the log_total of each place is stored."""
        log_totals = array.array("d", [0.0])
        for end in range(1, len(word) + 1):
            log_totals.append(self._choice(word, end, log_totals, alpha).log_total)
        choice = lambda end: self._choice(word, end, log_totals, alpha)
        return functools.cache(choice) if len(word) <= CACHED else choice

    def _choice(self, word: str, end: int, log_totals: Sequence[float], alpha: float) -> Choice:
        """The Choice at a place. log_totals: of all places before it."""
        pieces, logs = [], []
        for begin in range(end - 1, -1, -1):
            if (text := word[begin:end]) not in self._suffixes:
                break
            if found := self._pieces.get(text):
                ids, score = found
                pieces.insert(0, (begin, ids))
                logs.insert(0, log_totals[begin] + alpha * score)
        if (character := word[end - 1]) not in self._pieces:
            pieces.append((end - 1, [self._bytes[byte] for byte in character.encode()]))
            logs.append(log_totals[end - 1] + alpha * self._unknown)
        highest = max(logs)  # subtracted, so that exp gives no 0 for all
        weights = [*itertools.accumulate(math.exp(log - highest) for log in logs)]
        return Choice(highest + math.log(weights[-1]), weights, pieces)


def sampler_of(model: bytes) -> SegmentationSampler | None:
    """The SegmentationSampler of a SentencePiece model; None if it is not unigram, lacks pieces for bytes, or changes
    texts before it cuts them."""
    found = model_class().FromString(model)
    trainer, rules = found.trainer_spec, found.normalizer_spec
    changes_texts = rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces
    is_suitable = trainer.model_type == trainer.UNIGRAM and trainer.byte_fallback and not changes_texts
    return SegmentationSampler(model) if is_suitable else None
