"""Distillation: a student learns the probabilities that a teacher gives to the next token."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from nanoflax import nn, train
from nanoflax.nn import Array, LanguageModel
from nanoflax.train import Batch, Sums

TEACHER = "teacher"  # the subtree of the parameters that holds those of the teacher


def divergence_between(
    student: Float[Array, "*B V"], teacher: Float[Array, "*B V"], kind: str, beta: float = 0.5
) -> Float[Array, "*B"]:
    """The divergence in nats between the distributions of two logits, float32.

    kind: with p of the student and q of the teacher, forward_kl is KL(q || p), reverse_kl is KL(p || q), and jsd is
    beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (Agarwal et al. 2024, equation 1).
    """
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (student, teacher))
    if kind == "forward_kl":
        return _kl(q, p)
    if kind == "reverse_kl":
        return _kl(p, q)
    m = jnp.logaddexp(q + jnp.log(beta), p + jnp.log1p(-beta))
    return beta * _kl(q, m) + (1 - beta) * _kl(p, m)


def _kl(p, q):
    """KL(p || q) of log-probabilities."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def distill(
    model: LanguageModel,
    params: dict,
    batch: Batch,
    rng: Array | None = None,
    *,
    teacher: LanguageModel | None = None,
    vocab_size: int | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mix: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Sums:
    """The divergence from a teacher to the student, mixed with the cross entropy of the targets.

    The objective of a token is (1 - mix) temperature^2 divergence(student / temperature, teacher / temperature) + mix
    cross_entropy. The factor temperature^2 keeps the size of the gradient (Hinton et al. 2015, section 2). The
    teacher has no dropout and no gradient. Neither model's logits are all in memory at once.

    batch: as in `train.causal_lm`; drawn [B] float32, if it is there, is 1 for rows that the student has drawn itself:
    they have no cross entropy, whose gradient would only be noise.
    params: of the student; params["teacher"]: of the teacher. vocab_size: the divergence is between the probabilities
    of the ids below it; each table may have more rows, which are padding. teacher: None measures the student alone, by
    `train.causal_lm`. z_loss and label_smoothing change the cross entropy.
    Logged: kl, KL(teacher || student) at temperature 1; and divergence, if the objective has another one.
    """
    smoothing: Any = {"z_loss": z_loss, "label_smoothing": label_smoothing}
    if teacher is None:
        return train.causal_lm(model, params, batch, rng, **smoothing, **options)
    targets, weights, segments = batch["targets"], batch["weights"], batch.get("segments")
    inputs = nn.shift_right(targets, batch["first"], segments, batch.get("start"))
    named: dict = {"method": "hidden"} | train.hidden_options(model, batch, rng)
    hidden, _ = model.apply({"params": params}, inputs, segments, **named)
    held = {"params": params[TEACHER]}
    known = jax.lax.stop_gradient(teacher.apply(held, inputs, segments, method="hidden")[0])
    tokens = model.config.vocab_size - model.config.vocab_padding
    drawn = batch["drawn"][:, None] if "drawn" in batch else 0.0
    share = jnp.broadcast_to(mix * (1 - drawn), weights.shape)

    def losses(logits, known, targets, share):
        theirs: Any = teacher.apply(held, known, method="head")
        own, theirs = logits[..., :vocab_size], theirs[..., :vocab_size]
        objective, nll = nn.token_losses(logits[..., :tokens], targets, **smoothing)
        found = {"nll": nll, "kl": divergence_between(own, theirs, "forward_kl")}
        taught = found["kl"]
        if divergence != "forward_kl" or temperature != 1:
            taught = found["divergence"] = divergence_between(own / temperature, theirs / temperature, divergence, beta)
        return found | {"objective": (1 - share) * temperature**2 * taught + share * objective}

    found = train.map_logits(model, params, hidden, losses, known, targets, share)
    sums = {name: jnp.sum(x * weights) for name, x in found.items()}
    return Sums(sums.pop("objective"), sums.pop("nll"), jnp.sum(weights), sums)
