"""Training objectives: functions of a model, its parameters and a batch.

Every objective returns `Sums`; the train step divides them by their weight. rng: a PRNG key turns dropout on.
options: as in `_token_sums`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from nanoflax import nn, parallel
from nanoflax.nn import Array, LanguageModel, head_kernel

Batch = dict[str, Array]


class Sums(NamedTuple):
    """float32 sums over a batch, whose quotients by `weight` are means."""

    objective: Float[Array, ""]  # what is minimised
    loss: Float[Array, ""]  # what is reported: the cross entropy in nats, without smoothing and other terms
    weight: Float[Array, ""]  # of tokens or rows
    logged: dict[str, Any] = {}  # noqa: RUF012  # {name: sum, or [sum, its own weight]} of more metrics


def with_router(objective: Callable[..., Sums]) -> Callable[..., Sums]:
    """An objective whose result also has the losses and metrics of the routers of a model with experts.

    They are those of all calls of model.apply in the objective, so no objective has to know of them.
    """

    def with_terms(model, params, batch, rng=None, **options):
        moe, collected = model.config.moe, []
        if not moe.experts:
            return objective(model, params, batch, rng, **options)

        def apply(*args, **named):
            out, found = model.apply(*args, **named, mutable=["router"])
            collected.append(found)
            return out

        recorder = model.clone()
        object.__setattr__(recorder, "apply", apply)  # Linen's modules are frozen
        sums = objective(recorder, params, batch, rng, **options)
        if not jax.tree.leaves(collected):  # no layer has experts
            return sums
        loss, metrics = nn.router_terms(moe, collected)
        logged = sums.logged | {name: sums.weight * x for name, x in metrics.items()}
        return sums._replace(objective=sums.objective + sums.weight * loss, logged=logged)

    return with_terms


def causal_lm(model: LanguageModel, params: dict, batch: Batch, rng: Array | None = None, **options: Any) -> Sums:
    """Next-token prediction.

    batch: targets [B, T] int32, first [B] int32 (the token before targets), weights [B, T] float32
    (0 for padding); if packed documents are isolated, segments [B, T] int32 and start [B] int32, the
    token before each document, or [B, T] int32, which holds this token at the first position of a document.
    options: also sources, the names of a mixture, whose losses are logged by the batch's source_number [B] int32.
    """
    targets, segments = batch["targets"], batch.get("segments")
    inputs = nn.shift_right(targets, batch["first"], segments, batch.get("start"))
    hidden, _ = model.apply({"params": params}, inputs, segments, method="hidden", **hidden_options(model, batch, rng))
    return _token_sums(model, params, hidden, targets, batch["weights"], batch.get("source_number"), **options)


def seq2seq(model: LanguageModel, params: dict, batch: Batch, rng: Array | None = None, **options: Any) -> Sums:
    """Prediction of a target from its source, with teacher forcing.

    batch: source [B, S] int32, source_mask [B, S] bool, targets [B, T] int32, weights [B, T].
    """
    return _token_sums(model, params, _states(model, params, batch, rng), batch["targets"], batch["weights"], **options)


def masked_lm(model: LanguageModel, params: dict, batch: Batch, rng: Array | None = None, **options: Any) -> Sums:
    """Prediction of masked tokens by an encoder (Devlin et al. 2019).

    batch: tokens [B, T] int32, padding_mask [B, T] bool, targets [B, T] int32, weights [B, T]
    float32, 1 at the tokens to predict.
    """
    return _token_sums(model, params, _states(model, params, batch, rng), batch["targets"], batch["weights"], **options)


def guesses(model: LanguageModel, params: dict, batch: Batch, vocab_size: int | None = None) -> Int[Array, "B T"]:
    """The most probable token, below vocab_size, for each target of a batch of masked_lm or seq2seq (which
    reads the true previous targets)."""
    most_probable = lambda logits: logits[..., :vocab_size].argmax(-1)
    return map_logits(model, params, _states(model, params, batch), most_probable)


def map_logits(
    model: LanguageModel, params: dict, hidden: Float[Array, "B T D"], function: Callable, *arrays: Array
) -> Any:
    """function(logits, *arrays) without holding all logits at once, also in the backward pass.

    hidden: the states that `head` reads. arrays: [B, T, ...]. function gets pieces of T, logits [B, t, V] float32 and
    [B, t, ...], and returns an array or a tree of arrays [B, t, ...]. Returns the same with the whole T.
    """
    B, T, _ = hidden.shape
    t = parallel.batch_splits(B, T)[1]  # a piece has an equal part of T from every device
    chunks = math.gcd(nn.chunks_of(B, T, model.config.vocab_size), T // t)

    @jax.checkpoint  # the backward pass computes the logits of a piece again
    def piece(xs):
        hidden, *rest = (x.reshape(B, -1, *x.shape[3:]) for x in xs)
        return function(model.apply({"params": params}, hidden, method="head"), *rest)

    def split(x):
        return jnp.moveaxis(x.reshape(B, t, chunks, -1, *x.shape[2:]), 2, 0)

    def joined(x):
        return jnp.moveaxis(x.reshape(chunks, B, t, -1, *x.shape[3:]), 0, 2).reshape(B, T, *x.shape[3:])

    return jax.tree.map(joined, jax.lax.map(piece, jax.tree.map(split, (hidden, *arrays))))


def classify(
    model: LanguageModel, params: dict, batch: Batch, rng: Array | None = None, label_smoothing: float = 0.0, **_: Any
) -> Sums:
    """Prediction of each text's label, or of several labels independently.

    batch: tokens [B, T] int32, padding_mask [B, T] bool, label [B] int32 (or [B, labels] float32,
    0 or 1), weights [B] float32.
    """
    logits = _encoded(model, params, batch, rng)
    if batch["label"].ndim == 2:
        nll = optax.sigmoid_binary_cross_entropy(logits, batch["label"]).mean(-1)
        return _sums(nll, nll, batch["weights"])
    return _sums(*nn.token_losses(logits, batch["label"], 0.0, label_smoothing), batch["weights"])


def tag(
    model: LanguageModel, params: dict, batch: Batch, rng: Array | None = None, label_smoothing: float = 0.0, **_: Any
) -> Sums:
    """Prediction of each word's tag, at the word's first token.

    batch: tokens [B, T] int32, padding_mask [B, T] bool, tags [B, T] int32, weights [B, T] float32,
    0 for padding and for every token of a word except the first.
    """
    logits = _encoded(model, params, batch, rng)
    return _sums(*nn.token_losses(logits, batch["tags"], 0.0, label_smoothing), batch["weights"])


def dropout(rng: Array | None) -> dict[str, Any]:
    """The arguments of a model's apply for dropout with this PRNG key; None: without."""
    return {"deterministic": rng is None, "rngs": None if rng is None else {"dropout": rng}}


def hidden_options(model: LanguageModel, batch: Batch, rng: Array | None = None) -> dict[str, Any]:
    """The arguments of `hidden` that depend on a batch of targets: dropout, and in a model with experts which tokens
    their statistics count. Without segments, the inputs after the last target with a weight are padding."""
    if not model.config.moe.experts or "segments" in batch or "weights" not in batch:
        return dropout(rng)
    return dropout(rng) | {"counted": jax.lax.cummax(batch["weights"], 1, reverse=True) > 0}


def _states(model, params, batch, rng=None) -> Any:
    """The states that the head reads, of an encoder or of a model with a source."""
    if "source" not in batch:
        return model.apply({"params": params}, batch["tokens"], batch["padding_mask"], method="hidden", **dropout(rng))
    inputs = nn.shift_right(batch["targets"], model.config.start_id)
    source = batch["source"], batch["source_mask"]
    return model.apply({"params": params}, inputs, *source, method="hidden", **hidden_options(model, batch, rng))[0]


def _encoded(model, params, batch, rng) -> Any:
    return model.apply({"params": params}, batch["tokens"], batch["padding_mask"], **dropout(rng))


def _sums(objective, nll, weights):
    return Sums(jnp.sum(objective * weights), jnp.sum(nll * weights), jnp.sum(weights))


def _token_sums(
    model, params, hidden, targets, weights, source=None, chunks=0, z_loss=0.0, label_smoothing=0.0, sources=()
):
    """The Sums of `chunked_cross_entropy`. chunks: of T; 0: as `chunks_of` says. z_loss, label_smoothing: as in
    `token_losses`. sources: names; the loss of each is logged, of the rows whose number in `source` [B] is its own."""
    c, (B, T) = model.config, targets.shape
    if chunks:  # divides the context, but T of a batch of examples may be shorter
        chunks = math.gcd(chunks, T)
    chunks = chunks or nn.chunks_of(B, T, c.vocab_size)
    options = params.get("logit_bias"), chunks, z_loss, label_smoothing, c.logit_softcap, c.vocab_padding, bool(sources)
    objective, loss, *rows = nn.chunked_cross_entropy(hidden, head_kernel(c, params), targets, weights, *options)  # type: ignore
    rows.append(weights.sum(-1))
    logged = {f"loss/{name}": [jnp.sum(x, where=source == i) for x in rows] for i, name in enumerate(sources)}
    return Sums(objective, loss, jnp.sum(weights), logged)
