"""Steps that compare the documents of a corpus: exact duplicates, near-duplicates, copies of evaluation text."""

import array
import collections
import hashlib
import importlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt64

from nanoflax.data.quality import Quality
from nanoflax.data.report import DataReport
from nanoflax.report import ProgressBar, format_count, format_duration

EXACT = "exact duplicates of earlier documents, left out"
NEAR = "near-duplicates of earlier documents, left out"
SHINGLE = 5  # words; near-duplicates share most of their runs of five words
SKETCH, SEED = 128, 42  # numbers in a MinHash; the error of an estimated similarity is about 0.04
RECALL = 0.9  # share of the pairs at the threshold that are compared; of more similar pairs, almost all are
COMMON = 10  # documents: a run of words in more of them is a common phrase, not a copy of evaluation text
SHORTEST = 8  # words; shorter evaluation texts are not searched for
# A word, or one letter of a script without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
_SCRIPTS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORDS = re.compile(f"[{_SCRIPTS}]|[^\\W{_SCRIPTS}]+")
_ASCII = {i: " " for i in range(128) if not _WORDS.match(chr(i))}
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / the golden ratio: a product with it spreads a hash over all bits
_LOW = np.uint64(2**22 - 1)  # the low bits of a hash, which are its place in the table `Copies.may_be`


def left_out(
    quality: Quality, parts: Iterable[Iterable[str]], evaluation: Iterable[str] = ()
) -> tuple[dict[int, str], ...]:
    """For each part, {number of a document: why it is left out}. parts: the documents of each part, in order.
    evaluation: the documents of evaluation text.

    Of equal or similar documents the first is kept.
    """
    seen = Seen(quality.threshold) if quality.dedup else None
    copies = Copies(quality.decontaminate, evaluation) if quality.decontaminate else None
    reads_words = copies or quality.threshold
    found: list[dict[int, str]] = []
    for texts in parts:
        found.append({})
        for i, text in enumerate(texts):
            hashes = word_hashes(text if reads_words else "")
            if seen and (reason := seen.add(text, hashes)):
                found[-1][i] = reason
            elif copies:
                copies.add((len(found) - 1, i), hashes)
    if copies:
        for part, i in copies.found():
            found[part][i] = copies.reason
    return tuple(found)


class Comparing(ProgressBar):
    """The progress bar of `left_out`. It prints no plain lines in the first ten seconds."""

    quiet = 10.0

    def __init__(self, what: str, **options: Any) -> None:
        super().__init__(1.0, **options)
        self.what, self.documents = what, 0

    def count(self, texts: Iterable[str], report: DataReport) -> Iterator[str]:
        """Yields the texts; `report.share` is the share that has been read."""
        for text in texts:
            yield text
            self.documents += 1
            if self.documents % 100 == 0:
                self.advance(min(report.share, 0.99))

    def title(self) -> str:
        return f"comparing documents of {self.what}"

    def status(self) -> str:
        seconds = self._clock() - self._begin
        left = f"  {format_duration(seconds * (1 - self.done) / self.done)} left" if 0 < self.done < 1 else ""
        return f"{format_count(self.documents)} documents{left}"


class Seen:
    """The documents so far: their hashes, and their MinHash sketches for near-duplicates.

    A document is a near-duplicate if the estimated Jaccard similarity of its set of five-word runs and the set of an
    earlier document that was kept is at least `threshold`. Broder (1997), "On the resemblance and containment of
    documents"; for corpora Lee et al. (2022), https://arxiv.org/abs/2107.06499, section 4.2, appendix A. Case
    and punctuation do not count. A document takes about 100 bytes of memory, and 2 to 4 kB with a threshold.
    """

    def __init__(self, threshold: float | None = None) -> None:
        self.digests: set[bytes] = set()
        self.sketches = None
        if threshold is not None:
            self.rensa: Any = importlib.import_module("rensa")
            # Sketches are compared if they agree in a whole band of SKETCH // bands numbers: 1 - (1 - t^r)^b of them.
            enough = [b for b in (8, 16, 32, 64) if 1 - (1 - threshold ** (SKETCH // b)) ** b >= RECALL]
            self.sketches = self.rensa.RMinHashDeduplicator(threshold, SKETCH, True, enough[0] if enough else 128, SEED)

    def add(self, text: str, hashes: UInt64[np.ndarray, " words"]) -> str:
        """Why this document is left out, or "" if it is kept. hashes: its word_hashes; not read without a threshold."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in self.digests:
            return EXACT
        self.digests.add(digest)
        if self.sketches is None or not len(hashes):
            return ""
        sketch, shingles = self.rensa.RMinHash(SKETCH, SEED), runs(hashes, min(SHINGLE, len(hashes))).tobytes()
        sketch.update([shingles[i : i + 8] for i in range(0, len(shingles), 8)])
        return "" if self.sketches.add(str(len(self.digests)), sketch) else NEAR


class Copies:
    """The documents so far that share `length` words in a row with evaluation text.

    As in GPT-3, https://arxiv.org/abs/2005.14165, appendix C: case and punctuation do not count, runs in more than ten
    documents are common phrases, and an evaluation text of fewer words than `length`, but at least 8, is one run.
    Unlike GPT-3 the whole document is left out, not the text around the run.
    """

    def __init__(self, length: int, evaluation: Iterable[str]) -> None:
        self.reason = f"documents that share {length} words in a row with evaluation text, left out"
        by_length: dict[int, list[np.ndarray]] = collections.defaultdict(list)
        for text in evaluation:
            hashes = word_hashes(text)
            if len(hashes) >= min(SHORTEST, length):
                n = min(length, len(hashes))
                by_length[n].append(np.unique(runs(hashes, n)))
        self.runs = {n: np.unique(np.concatenate(found)) for n, found in by_length.items()}
        self.counts = {n: np.zeros(len(found), np.int32) for n, found in self.runs.items()}
        self.may_be = {n: np.zeros(int(_LOW) + 1, bool) for n in self.runs}
        for n, found in self.runs.items():
            self.may_be[n][found & _LOW] = True
        self.documents: list[tuple[tuple[int, int], int, array.array]] = []

    def add(self, place: tuple[int, int], hashes: UInt64[np.ndarray, " words"]) -> None:
        """place: (part, number) of the document with these word_hashes."""
        for length, wanted in self.runs.items():
            if len(hashes) >= length:
                found = runs(hashes, length)
                found = np.unique(found[self.may_be[length][found & _LOW]])  # a table is faster than a search
                at = np.searchsorted(wanted, found)
                at = at[wanted[np.minimum(at, len(wanted) - 1)] == found]
                if len(at):
                    self.counts[length][at] += 1
                    self.documents.append((place, length, array.array("l", at)))

    def found(self) -> Iterator[tuple[int, int]]:
        """The places of the documents that are left out."""
        for place, length, at in self.documents:
            if self.counts[length][np.asarray(at)].min() <= COMMON:
                yield place


class _WordHashes(dict):
    """word -> its hash, which is computed when it is first needed."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 1 << 20:  # numbers and names have no end
            self.clear()
        self[word] = zlib.crc32(word.encode())
        return self[word]


_hashes = _WordHashes()


def word_hashes(text: str) -> UInt64[np.ndarray, " words"]:
    """A hash of each word of a text, without case and punctuation."""
    text = text.lower()
    words = text.translate(_ASCII).split() if text.isascii() else _WORDS.findall(text)  # `translate` is faster
    return np.fromiter(map(_hashes.__getitem__, words), np.uint64, len(words))


def runs(hashes: UInt64[np.ndarray, " words"], length: int) -> UInt64[np.ndarray, " runs"]:
    """A hash of each `length` words in a row."""
    found = np.zeros(len(hashes) - length + 1, np.uint64)
    for i in range(length):
        found = found * _MIX + hashes[i : i + len(found)]
    return found ^ (found >> np.uint64(32))
