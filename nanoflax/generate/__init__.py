"""Generation of text by a compiled scan, beam search, and log-likelihoods of given texts."""

from nanoflax.generate.beams import beam_search
from nanoflax.generate.processors import Filters, Written, make_filters, only_below
from nanoflax.generate.sampling import (
    Generation,
    advance,
    decoding_model,
    decoding_params,
    sample,
    sample_in_chunks,
    stream,
)
from nanoflax.generate.scoring import log_likelihoods, rank, score

__all__ = [
    "Filters", "Generation", "Written", "advance", "beam_search", "decoding_model", "decoding_params",
    "log_likelihoods", "make_filters", "only_below", "rank", "sample", "sample_in_chunks", "score",
    "stream"]  # fmt: skip
