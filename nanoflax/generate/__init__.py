"""Generation of text by a compiled scan, beam search, and log-likelihoods of given texts."""

from nanoflax.generate.beams import beam_search
from nanoflax.generate.processors import make_filters
from nanoflax.generate.sampling import sample, sample_in_chunks, stream
from nanoflax.generate.scoring import log_likelihoods, rank, score

__all__ = [
    "beam_search", "log_likelihoods", "make_filters", "rank", "sample", "sample_in_chunks", "score",
    "stream"]  # fmt: skip
