"""What a batch is asked to teach: (model, params, batch) to sums that the train step divides."""

from nanoflax import losses
from nanoflax.models import head_kernel


def causal_lm(model, params, batch, rng=None, chunks=0, z_loss=0.0, label_smoothing=0.0):
    """Next-token prediction.

    batch: targets [B, T] int32, first [B] int32 (the token before them), weights [B, T] float32
    (0 for padding), and where packed documents are isolated segments [B, T] int32 and start [B]
    int32, the token that each begins from. rng: a PRNG key turns dropout on.
    Returns float32 sums: (objective, cross entropy in nats, weight).
    """
    targets, weights, segments = batch["targets"], batch["weights"], batch.get("segments")
    inputs = losses.shift_right(targets, batch["first"], segments, batch.get("start"))
    hidden, _ = model.apply({"params": params}, inputs, segments, deterministic=rng is None,
                            rngs=None if rng is None else {"dropout": rng}, method="hidden")
    c = model.config
    objective, nll = losses.chunked_cross_entropy(
        hidden, head_kernel(c, params), targets, weights, params.get("logit_bias"),
        chunks or losses.chunks_of(*targets.shape, c.vocab_size), z_loss, label_smoothing,
        c.logit_softcap)
    return objective, nll, weights.sum()
