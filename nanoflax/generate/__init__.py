"""Generation of text by a compiled scan, beam search, and log-likelihoods of given texts."""

from nanoflax.generate.beams import beam_search
from nanoflax.generate.sampling import sample, stream
from nanoflax.generate.scoring import log_likelihoods, rank

__all__ = [
    "beam_search", "log_likelihoods", "rank", "sample", "stream"]  # fmt: skip
