"""Training after pretraining: log-probabilities of targets, completions that a model draws, and objectives on them."""

from nanoflax.alignment.log_probabilities import log_probabilities
from nanoflax.alignment.preferences import (
    answer_log_probabilities,
    answer_rewards,
    bradley_terry,
    pair_scores,
    preference,
)
from nanoflax.alignment.rollouts import Completions, sample_completions, training_rows

__all__ = [
    "Completions", "answer_log_probabilities", "answer_rewards", "bradley_terry", "log_probabilities", "pair_scores",
    "preference", "sample_completions", "training_rows"]  # fmt: skip
