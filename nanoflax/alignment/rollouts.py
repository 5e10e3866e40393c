"""Completions that a model draws, with the log-probabilities of their tokens.

They are sampled by the model that is trained: the same weights and the same code as in the loss.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from nanoflax import generate, parallel
from nanoflax.config import GenerationDefaults
from nanoflax.nn import Array, LanguageModel


class Completions(NamedTuple):
    """Drawn texts of B prompts, of at most N tokens, as numpy arrays that are equal in all processes."""

    tokens: Int[np.ndarray, "B N"]  # 0 after the end
    mask: Bool[np.ndarray, "B N"]  # True for the tokens of a completion, with the id that ends it
    log_probabilities: Float[np.ndarray, "B N"]  # in nats, of the distributions the tokens were drawn from; else 0
    ended: Bool[np.ndarray, " B"]  # False: cut at N tokens
    # For each token, which ids could be drawn, as bits of bytes (V/8); None: all. See `log_probabilities`.
    support: UInt8[np.ndarray, "B N bytes"] | None


def sample_completions(
    model: LanguageModel,
    params: dict,
    tokens: Int[np.ndarray, "B P"],
    lengths: Int[np.ndarray, " B"],
    rng: jax.Array,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    vocab_size: int | None = None,
    chunk: int = 32,
    **filters: Any,
) -> Completions:
    """Draw a completion of each prompt. Deterministic in rng, and the same for every mesh.

    tokens, lengths: prompts padded on the left (`tokenizers.pad_left`). eos_ids: ids that end a completion.
    vocab_size: ids from there on are not drawn. filters: temperature (above 0), top_k, top_p, min_p. The rules in
    model.config.generation do not hold: a repetition penalty or a least length would draw from another distribution
    than the one that is trained. Generation stops after the chunk of tokens in which the last row ends.
    Compiled once for shapes [B, P] and max_new_tokens.
    """
    c, N = model.config, max_new_tokens
    model = model.clone(config=dataclasses.replace(c, generation=GenerationDefaults()))
    made = generate.make_filters(**filters)
    filters_ids = any(f is not None for f in (made.top_k, made.outside_top_p, made.min_p))
    filters_ids |= vocab_size is not None and vocab_size < c.vocab_size - c.vocab_padding
    record = _with_support if filters_ids else _of_drawn
    pieces = []
    for done, piece in generate.sample_in_chunks(
        model, params, tokens, lengths, N, made, rng, eos_ids, vocab_size, min(chunk, N), record
    ):
        pieces.append(jax.tree.map(parallel.fetch, piece))
        parallel.reset_watchdog()
        if parallel.fetch(done).all():
            break
    drawn, (logp, *support) = jax.tree.map(lambda *x: np.concatenate(x, 1)[:, :N], *pieces)
    pad = lambda x, value: np.pad(x, [(0, 0), (0, N - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=value)
    ends = np.isin(drawn, eos_ids)
    mask = pad(np.cumsum(ends, 1) - ends == 0, False)
    keep = lambda x, value: np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), pad(x, value), x.dtype.type(value))
    kept = keep(support[0], 255) if support else None  # no set is empty, also after the end
    return Completions(keep(drawn, 0), mask, keep(logp, 0), np.asarray(ends.any(1)), kept)


def _of_drawn(_: Array, logits: Float[Array, "B V"], token: Int[Array, " B"]) -> tuple[Float[Array, " B"]]:
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return (chosen - jax.nn.logsumexp(logits, axis=-1),)


def _with_support(own: Array, logits: Float[Array, "B V"], token: Int[Array, " B"]) -> tuple[Float[Array, " B"], Array]:
    return *_of_drawn(own, logits, token), jnp.packbits(logits > -jnp.inf, axis=-1)


def training_rows(
    tokens: Int[np.ndarray, "B P"], lengths: Int[np.ndarray, " B"], completions: Completions, length: int | None = None
) -> dict[str, np.ndarray]:
    """Prompts and completions as a batch for `log_probabilities` and `train.causal_lm`, padded on the right.

    length: T; default P + N - 1. Returns first [B] int32, targets [B, T] int32, weights [B, T] float32 (1 for the
    tokens of a completion, else 0), old [B, T] float32 (their log-probabilities when they were drawn, else 0), and if
    there is one, support [B, T, V/8] uint8.
    """
    (B, P), N = tokens.shape, completions.tokens.shape[1]
    T = length or P + N - 1

    def placed(prompt, new):
        """[B, T + 1, ...]: the last `lengths` items of each prompt (or their fill value), then the new ones."""
        full = np.concatenate([prompt, new, np.repeat(new[:, -1:] * 0, max(T - N, 0) + 1, axis=1)], 1)
        at = np.arange(T + 1) + (P - lengths)[:, None]
        return np.take_along_axis(full, at.reshape(*at.shape, *[1] * (full.ndim - 2)), 1)

    c = completions
    rows = placed(tokens, np.where(c.mask, c.tokens, 0))
    blank = np.zeros((B, P), np.float32)
    batch = {
        "first": rows[:, 0],
        "targets": rows[:, 1:],
        "weights": placed(blank, c.mask.astype(np.float32))[:, 1:],
        "old": placed(blank, c.log_probabilities)[:, 1:],
    }
    if c.support is not None:
        every = np.full((B, P, c.support.shape[-1]), 255, np.uint8)
        support = placed(every, c.support)[:, 1:]
        batch["support"] = np.where(batch["weights"][..., None] > 0, support, np.uint8(255))
    return batch
