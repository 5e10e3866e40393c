"""Group relative policy optimization: rewards to advantages, and the objective of drawn completions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nanoflax.alignment.log_probabilities import log_probabilities
from nanoflax.nn import Array, LanguageModel
from nanoflax.train import Batch, Sums

EPSILON = 1e-4  # added to a standard deviation of rewards


def advantages(
    rewards: Float[np.ndarray, " B"], group: int, scale: str = "group"
) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " groups"]]:
    """(the advantages float32, the standard deviation of each group): the reward of a completion minus the mean reward
    of its group (Shao et al. 2024, section 4.1.2). Completions of a prompt are neighbours.

    A NaN reward is unknown: it gives the advantage 0 and does not count in the mean. scale: "group" divides by the
    standard deviation of the group, "batch" by that of all rewards (n - 1 in the denominator, plus 1e-4); "none"
    (Liu et al. 2025) does not divide. In a group of equal rewards all advantages are exactly 0.
    """
    grouped = np.asarray(rewards, np.float64).reshape(-1, group)
    known = ~np.isnan(grouped)
    count = np.maximum(known.sum(1, keepdims=True), 1)
    filled = np.where(known, grouped, 0)
    centred = np.where(known, grouped - filled.sum(1, keepdims=True) / count, 0)
    low, high = (f(np.where(known, grouped, other), 1) for f, other in ((np.min, np.inf), (np.max, -np.inf)))
    centred[low >= high] = 0  # a mean is rounded
    std = np.sqrt((centred**2).sum(1) / np.maximum(count[:, 0] - 1, 1))
    if scale == "group":
        centred = centred / (std[:, None] + EPSILON)
    elif scale == "batch":
        values = grouped[known]
        centred = centred / ((values.std(ddof=1) if values.size > 1 else 0.0) + EPSILON)
    return centred.reshape(-1).astype(np.float32), std


def row_scales(lengths: Float[np.ndarray, " B"], normalization: str, max_new_tokens: int) -> Float[np.ndarray, " B"]:
    """A factor for the tokens of each row, float32, so that their sum divided by the number of tokens is

    grpo: the mean over rows of the means over their tokens (Shao et al. 2024, equation 3);
    dr_grpo: the sum over tokens divided by B * max_new_tokens, a constant, so that a wrong answer is not cheaper for
    being long (Liu et al. 2025);
    dapo: the mean over all tokens of the batch (Yu et al. 2025, equation 8).

    lengths: the numbers of trained tokens. A row without any counts in B.
    """
    B, total = len(lengths), lengths.sum()
    if normalization == "grpo":
        return (total / (B * np.maximum(lengths, 1))).astype(np.float32)
    return np.full(B, total / (B * max_new_tokens) if normalization == "dr_grpo" else 1.0, np.float32)


def policy_gradient(
    model: LanguageModel,
    params: dict,
    batch: Batch,
    rng: Array | None = None,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    **_: Any,
) -> Sums:
    """The clipped objective of completions that an earlier state of the model has drawn.

    For each token -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta KL (Shao et al. 2024, equation 3, with the
    two bounds of Yu et al. 2025). r is p / p_old; p_old is the probability by which the sampler drew the token, so a
    difference between sampler and trainer is corrected like any other change of the policy. KL is the estimate
    p_ref / p - log(p_ref / p) - 1 of the divergence from the reference (Schulman 2020, k3).
    Dropout is off, whatever rng: r compares the same function at two times.

    batch: first, targets, weights, old and support of `training_rows`; advantages [B]; scale [B], see `row_scales`;
    and reference [B, T], log-probabilities, if beta is positive. Logged, as means over tokens: ratio, clipped (the
    share whose gradient is cut off), entropy in nats, mismatch (|log r|, at the first update the difference between
    sampler and trainer) and kl.
    """
    weights, A = batch["weights"], batch["advantages"][:, None]
    logp, entropy = log_probabilities(model, params, batch, None, temperature, entropy=True)
    used = weights > 0
    change = jnp.where(used, logp - batch["old"], 0)
    ratio = jnp.exp(change)
    bounded = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * A, bounded * A)
    clipped = jnp.where(A < 0, ratio < 1 - clip_low, (ratio > 1 + clip_high) & (A > 0))
    logged = {"ratio": ratio, "clipped": clipped, "entropy": entropy, "mismatch": jnp.abs(change)}
    objective = loss
    if "reference" in batch:
        back = jnp.where(used, batch["reference"] - logp, 0)
        logged["kl"] = jnp.exp(back) - back - 1
        objective = loss + beta * logged["kl"]
    scaled = weights * batch["scale"][:, None]
    return Sums(
        jnp.sum(scaled * objective),
        jnp.sum(scaled * loss),
        jnp.sum(weights),
        {name: jnp.sum(weights * jax.lax.stop_gradient(x)) for name, x in logged.items()},
    )
