"""The log-probabilities of given tokens, with gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from nanoflax import nn, train
from nanoflax.nn import Array, LanguageModel
from nanoflax.train import Batch


def log_probabilities(
    model: LanguageModel,
    params: dict,
    batch: Batch,
    rng: Array | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Any:
    """log p(target | tokens before it) of a decoder in nats, float32 [B, T], at every position.

    batch: targets [B, T] int32, first [B] int32 (the token before targets); as in `train.causal_lm` also segments and
    start; support [B, T, V/8] uint8, the bits of the ids that the sampler could draw: p is normalised over these ids.
    The stored ids decide, not the filters again: a rounding at their border could exclude a token that was drawn.
    Positions of padding have values too; a caller multiplies by weights. rng: a PRNG key turns dropout on.
    temperature: logits are divided by it. entropy: return also the entropy of each distribution in nats [B, T],
    without a gradient.
    """
    targets, segments = batch["targets"], batch.get("segments")
    inputs = nn.shift_right(targets, batch["first"], segments, batch.get("start"))
    named: dict = {"method": "hidden"} | train.hidden_options(model, batch, rng)
    hidden, _ = model.apply({"params": params}, inputs, segments, **named)

    def of_targets(logits, targets, support=None):
        logits = logits / temperature
        if support is not None:
            logits = jnp.where(jnp.unpackbits(support, axis=-1, count=logits.shape[-1]), logits, -jnp.inf)
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - total
        return (chosen, _entropy(logits, total)) if entropy else chosen

    arrays = [batch[name] for name in ("targets", "support") if name in batch]
    return train.map_logits(model, params, hidden, of_targets, *arrays)


def _entropy(logits: Float[Array, "*B V"], total: Float[Array, "*B"]) -> Float[Array, "*B"]:
    logits, total = map(jax.lax.stop_gradient, (logits, total))
    p = jnp.exp(logits - total[..., None])
    return total - jnp.sum(jnp.where(p > 0, p * logits, 0), axis=-1)
