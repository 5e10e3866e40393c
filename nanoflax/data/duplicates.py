"""Steps that compare the documents of a corpus: exact duplicates, near-duplicates."""

import hashlib
from collections.abc import Iterable, Iterator

from nanoflax.data.quality import Quality

EXACT = "exact duplicates of earlier documents, left out"


def left_out(quality: Quality, parts: Iterable[Iterator[str]]) -> tuple[dict[int, str], ...]:
    """For each part, {number of a document: why it is left out}. parts: the documents of each part, in order."""
    seen: set[bytes] = set()
    found = []
    for texts in parts:
        found.append(reasons := {})
        for i, text in enumerate(texts):
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in seen:
                reasons[i] = EXACT
            seen.add(digest)
    return tuple(found)
