"""Objectives on pairs of answers: direct preference optimisation and its kin, and reward models."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from nanoflax import train
from nanoflax.alignment.log_probabilities import log_probabilities
from nanoflax.config import PREFERENCE_LOSSES
from nanoflax.nn import Array, LanguageModel
from nanoflax.train import Batch, Sums

Pairs = Float[Array, "B 2"]  # a number for the chosen and for the rejected answer


def preference(
    model: LanguageModel,
    params: dict,
    batch: Batch,
    rng: Array | None = None,
    *,
    loss: str = "dpo",
    beta: float | None = None,
    label_noise: float = 0.0,
    margin: float | None = None,
    nll_weight: float | None = None,
    **_: Any,
) -> Sums:
    """The preference for the chosen answers, learned without a reward model. See config.Prefer for the options, and
    config.PREFERENCE_LOSSES for the papers. The cross entropy of nll_weight is that of the answer, as in the paper of
    ORPO; trl's ORPO takes it over the prompt too.

    batch: first [B] int32, the token before both texts; chosen, rejected [B, T] int32; chosen_weights,
    rejected_weights [B, T] float32, 1 at the answer; weights [B] float32; and for a loss with a reference
    reference_chosen, reference_rejected [B] float32, the log-probabilities of the answers in nats.
    Logged: the share of pairs whose chosen answer has the larger reward, the rewards of both, their difference, and the
    log-probabilities of both.
    """
    kind = PREFERENCE_LOSSES[loss]
    beta = kind.beta if beta is None else beta
    margin = kind.margin if margin is None else margin
    nll_weight = kind.nll_weight if nll_weight is None else nll_weight
    log_p, counts = answer_log_probabilities(model, params, batch, rng)
    losses = _pair_losses(loss, log_p, _reference(batch, kind), counts, beta, label_noise, margin)
    losses -= nll_weight * log_p[:, 0] / counts[:, 0]
    logged = _rewards_logged(_implicit_rewards(batch, kind, log_p, counts, beta))
    logged |= {"log_probability_chosen": log_p[:, 0], "log_probability_rejected": log_p[:, 1]}
    return _sums(losses, batch["weights"], logged)


def bradley_terry(
    model: LanguageModel, params: dict, batch: Batch, rng: Array | None = None, *, center: float = 0.0, **_: Any
) -> Sums:
    """The scores of a reward model: -log sigmoid(score of the chosen text - score of the rejected one - margin)
    (Ouyang et al. 2022, equation 1; the margin as in Touvron et al. 2023, equation 2), plus
    `center` * (sum of both scores)^2 (Eisenstein et al. 2023, equation 2).

    batch: chosen, rejected [B, T] int32, whole texts; chosen_mask, rejected_mask [B, T] bool; margin, weights [B]
    float32. Logged: as for `preference`.
    """
    scores = pair_scores(model, params, batch, rng)
    losses = jax.nn.softplus(scores[:, 1] - scores[:, 0] + batch["margin"]) + center * scores.sum(1) ** 2
    return _sums(losses, batch["weights"], _rewards_logged(scores))


def answer_log_probabilities(
    model: LanguageModel, params: dict, batch: Batch, rng: Array | None = None
) -> tuple[Pairs, Pairs]:
    """(log-probabilities in nats of the answers of a batch of `preference`, their numbers of tokens, at least 1)."""
    targets, weights = _both(batch, ""), _both(batch, "_weights")
    rows = {"targets": targets, "first": jnp.repeat(batch["first"], 2), "weights": weights}
    log_p = (log_probabilities(model, params, rows, rng) * weights).sum(-1)
    return log_p.reshape(-1, 2), jnp.maximum(weights.sum(-1), 1).reshape(-1, 2)


def answer_rewards(
    model: LanguageModel, params: dict, batch: Batch, loss: str = "dpo", beta: float | None = None
) -> Pairs:
    """The rewards of the answers of a batch of `preference` that the policy implies."""
    kind = PREFERENCE_LOSSES[loss]
    log_p, counts = answer_log_probabilities(model, params, batch)
    return _implicit_rewards(batch, kind, log_p, counts, kind.beta if beta is None else beta)


def pair_scores(model: LanguageModel, params: dict, batch: Batch, rng: Array | None = None) -> Pairs:
    """The scores of the texts of a batch of `bradley_terry`."""
    scores: Any = model.apply({"params": params}, _both(batch, ""), _both(batch, "_mask"), **train.dropout(rng))
    return scores.reshape(-1, 2)


def _both(batch, suffix):
    """[B, T] of chosen and of rejected texts -> [2 B, T]. The two of a pair are neighbours, so that they stay on one
    device."""
    both = jnp.stack([batch[f"chosen{suffix}"], batch[f"rejected{suffix}"]], axis=1)
    return both.reshape(-1, both.shape[-1])


def _reference(batch, kind):
    if not kind.reference:
        return 0.0
    return jnp.stack([batch["reference_chosen"], batch["reference_rejected"]], axis=1)


def _implicit_rewards(batch, kind, log_p, counts, beta):
    """As trl logs them: beta times the log-ratio to the reference, or the mean log-probability of a token."""
    return beta * (log_p - _reference(batch, kind) if kind.reference else log_p / counts)


def _pair_losses(loss, log_p, reference, counts, beta, label_noise, margin):
    ratios = log_p - reference
    means = ratios / counts
    if loss == "ipo":
        return (means[:, 0] - means[:, 1] - 1 / (2 * beta)) ** 2
    if loss == "orpo":
        means = jnp.minimum(means, -1e-6)  # the odds of a probability of 1 are infinite
        log_odds = means - jnp.log(-jnp.expm1(means))
        return beta * jax.nn.softplus(log_odds[:, 1] - log_odds[:, 0])
    rewards = beta * (means if loss in ("dpo_norm", "simpo") else ratios)
    difference = rewards[:, 0] - rewards[:, 1] - margin
    right, wrong = jax.nn.softplus(-difference), jax.nn.softplus(difference)
    if loss == "robust":
        return ((1 - label_noise) * right - label_noise * wrong) / (1 - 2 * label_noise)
    return (1 - label_noise) * right + label_noise * wrong


def _rewards_logged(rewards):
    chosen, rejected = rewards[:, 0], rewards[:, 1]
    return {
        "preference_accuracy": (chosen > rejected).astype(jnp.float32),
        "reward_margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }


def _sums(losses, weights, logged):
    total = lambda x: jnp.sum(x * weights)
    return Sums(total(losses), total(losses), jnp.sum(weights), {name: total(x) for name, x in logged.items()})
