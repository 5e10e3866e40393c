"""Training after pretraining: log-probabilities of targets, completions that a model draws, and objectives on them."""

from nanoflax.alignment.log_probabilities import log_probabilities
from nanoflax.alignment.rollouts import Completions, sample_completions, training_rows

__all__ = ["Completions", "log_probabilities", "sample_completions", "training_rows"]
