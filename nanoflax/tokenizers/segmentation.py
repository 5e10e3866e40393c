"""Random segmentations of a text by a unigram model: subword regularization (Kudo, 2018, arXiv:1804.10959).

SentencePiece draws them too, but other ones in each process. Here they are a function of the text and a Segmentation.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import math
import random

from nanoflax.tokenizers.base import SPACE, well_formed
from nanoflax.tokenizers.sentencepiece_schema import model_class

CACHED = 32  # characters; longer words, as of languages without spaces, are rarely the same
UNKNOWN_PENALTY = 10.0  # of SentencePiece: the logarithm of an unknown character is so much less than the lowest one
Choice = tuple[list[float], list[tuple[int, list[int]]]]  # sums of weights; (where a piece begins, its ids)


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The random segmentation of each text with this number. alpha: probabilities are those of the model to this power;
    less is more random."""

    number: int
    alpha: float


class SegmentationSampler:
    """Draws segmentations from a SentencePiece model that is unigram, restores every text and has a piece for each
    byte; see `sampler_of`."""

    def __init__(self, model: bytes) -> None:
        found = [*enumerate(model_class().FromString(model).pieces)]
        pieces = {p.piece.replace(SPACE, " "): ([i], p.score) for i, p in found if p.type in (p.NORMAL, p.USER_DEFINED)}
        self._pieces = pieces
        self._bytes = [i for i, p in sorted(found, key=lambda pair: pair[1].piece) if p.type == p.BYTE]  # <0x00>, ...
        self._prefixes = {piece[:n] for piece in pieces for n in range(1, len(piece) + 1)}
        self._pairs = {pair for piece in pieces for pair in itertools.pairwise(piece)}
        self._unknown = min((score for _, score in pieces.values()), default=0.0) - UNKNOWN_PENALTY
        self._cached = functools.lru_cache(maxsize=1 << 15)(self._choices)

    def sample(self, text: str, segmentation: Segmentation) -> list[int]:
        """The ids of a text; the same call gives the same ids."""
        text, number = well_formed(text), segmentation.number.to_bytes(8, "little")
        draw = random.Random(hashlib.blake2b(text.encode(), key=number).digest()).random
        ids = []
        for word in self._words(text):
            choices = (self._cached if len(word) <= CACHED else self._choices)(word, segmentation.alpha)
            end, chosen = len(word), []
            while end:
                weights, edges = choices[end - 1]
                at = bisect.bisect(weights, draw() * weights[-1], hi=len(edges) - 1) if weights else 0
                end, of_piece = edges[at]
                chosen.append(of_piece)
            ids.extend(itertools.chain.from_iterable(reversed(chosen)))
        return ids

    def _words(self, text: str) -> list[str]:
        """The text, cut between all characters that are next to each other in no piece: the parts are independent."""
        pairs = enumerate(itertools.pairwise(text), 1)
        cuts = [0, *(i for i, pair in pairs if pair not in self._pairs), len(text)]
        return [text[begin:end] for begin, end in itertools.pairwise(cuts)]

    def _choices(self, word: str, alpha: float) -> list[Choice]:
        """For each end of a piece in the word, the pieces and their weights, by forward filtering: a piece that begins
        at b has exp(forward[b] + alpha * score), and `forward` is the logarithm of the sum of these."""
        ending = [([], []) for _ in range(len(word) + 1)]  # at each place: (edges, their logarithms)
        forward, choices = 0.0, []
        for begin in range(len(word)):
            for end in range(begin + 1, len(word) + 1):
                if (piece := word[begin:end]) not in self._prefixes:
                    break
                if found := self._pieces.get(piece):
                    ending[end][0].append((begin, found[0]))
                    ending[end][1].append(forward + alpha * found[1])
            edges, logs = ending[begin + 1]
            if word[begin] not in self._pieces:
                edges.append((begin, [self._bytes[byte] for byte in word[begin].encode()]))
                logs.append(forward + alpha * self._unknown)
            if len(edges) == 1:
                forward = logs[0]
                choices.append(([], edges))
                continue
            highest = max(logs)
            weights = [*itertools.accumulate(math.exp(log - highest) for log in logs)]
            forward = highest + math.log(weights[-1])
            choices.append((weights, edges))
        return choices


def sampler_of(model: bytes, is_exact: bool) -> SegmentationSampler | None:
    """The SegmentationSampler of a SentencePiece model; None if it is not of the kind that is needed. is_exact: it
    restores every text."""
    trainer = model_class().FromString(model).trainer_spec
    return SegmentationSampler(model) if is_exact and trainer.model_type == trainer.UNIGRAM else None
