"""The log-probabilities of given tokens, with gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from nanoflax import nn, train
from nanoflax.nn import Array, LanguageModel
from nanoflax.train import Batch


def log_probabilities(
    model: LanguageModel, params: dict, batch: Batch, rng: Array | None = None, temperature: float = 1.0
) -> Float[Array, "B T"]:
    """log p(target | tokens before it) of a decoder in nats, float32, at every position.

    batch: targets [B, T] int32, first [B] int32 (the token before targets); as in `train.causal_lm` also segments and
    start. Positions of padding have values too; a caller multiplies by weights. rng: a PRNG key turns dropout on.
    temperature: logits are divided by it.
    """
    targets, segments = batch["targets"], batch.get("segments")
    inputs = nn.shift_right(targets, batch["first"], segments, batch.get("start"))
    hidden, _ = model.apply({"params": params}, inputs, segments, method="hidden", **train.dropout(rng))

    def of_targets(logits, targets):
        logits = logits / temperature
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    return train.map_logits(model, params, hidden, of_targets, targets)
