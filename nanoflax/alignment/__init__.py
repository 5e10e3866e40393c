"""Training after pretraining: log-probabilities of targets, completions that a model draws, their rewards, and
objectives."""

from nanoflax.alignment.distillation import TEACHER, distill, divergence_between
from nanoflax.alignment.log_probabilities import log_probabilities
from nanoflax.alignment.policy import advantages, policy_gradient, row_scales
from nanoflax.alignment.preferences import (
    answer_log_probabilities,
    answer_rewards,
    bradley_terry,
    pair_scores,
    preference,
)
from nanoflax.alignment.rewards import Reward, name_of, open_reward
from nanoflax.alignment.rollouts import Completions, sample_completions, training_rows

__all__ = [
    "Completions", "Reward", "TEACHER", "advantages", "answer_log_probabilities", "answer_rewards", "bradley_terry",
    "distill", "divergence_between", "log_probabilities", "name_of", "open_reward", "pair_scores", "policy_gradient",
    "preference", "row_scales", "sample_completions", "training_rows"]  # fmt: skip
