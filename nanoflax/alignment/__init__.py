"""Training after pretraining: log-probabilities of targets, and the objectives that use them."""

from nanoflax.alignment.log_probabilities import log_probabilities

__all__ = ["log_probabilities"]
