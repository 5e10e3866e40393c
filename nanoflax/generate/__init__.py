"""Generation of text by a compiled scan, beam search, and log-likelihoods of given texts."""

from nanoflax.generate.beams import beam_search
from nanoflax.generate.processors import NO_EFFECT, Filters, Written, filtered, make_filters, next_logits, only_below

from nanoflax.generate.sampling import Generation, advance, compiled, decoding_model, decoding_params  # isort: skip
from nanoflax.generate.sampling import sample, sample_in_chunks, stream  # isort: skip
from nanoflax.generate.scoring import log_likelihoods, rank, score

__all__ = [
    "NO_EFFECT", "Filters", "Generation", "Written", "advance", "beam_search", "compiled", "decoding_model",
    "decoding_params", "filtered", "log_likelihoods", "make_filters", "next_logits", "only_below", "rank", "sample",
    "sample_in_chunks", "score", "stream"]  # fmt: skip
