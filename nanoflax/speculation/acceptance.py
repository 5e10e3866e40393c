"""Which of the guessed tokens the text keeps."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from nanoflax.kernels import Array, argmax, categorical


def accept(
    logits: Float[Array, "n V"],
    guesses: Int[Array, " k"],
    guess_logits: Float[Array, "k V"] | None,
    rng: jax.Array | None,
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(how many of k guesses are kept, the token after them), so that the text is the model's (Leviathan, Kalman and
    Matias 2023, algorithm 1 and appendix A.1).

    logits: the model's after rules and filters, of the n = k + 1 tokens that follow each prefix of the guesses.
    guess_logits: those that the guesses were drawn from; None for guesses that are certain. rng: None is greedy: a
    guess is kept if it is the most probable token.
    """
    k = len(guesses)
    if rng is None:
        best = argmax(logits)
        kept = _leading(best[:k] == guesses)
        return kept, best[kept]
    p = jax.nn.softmax(logits)
    certain = jax.nn.one_hot(guesses, p.shape[-1], dtype=p.dtype)
    q = certain if guess_logits is None else jax.nn.softmax(guess_logits)
    for_guesses, for_token = jax.random.split(rng)
    at = jnp.arange(k), guesses
    # A guess is kept with probability min(1, p / q).
    kept = _leading(jax.random.uniform(for_guesses, (k,)) * q[at] < p[:k][at])
    # In place of the first that is not kept, a token is drawn from max(p - q, 0); after all of them, from p.
    rest = jnp.maximum(p - jnp.pad(q, [(0, 1), (0, 0)]), 0)[kept]
    rest = jnp.where(rest.sum() > 0, rest, p[kept])  # p = q but for rounding
    return kept, categorical(for_token, jnp.log(rest))


def _leading(kept):
    """How many are True before the first False."""
    return jnp.cumprod(kept.astype(jnp.int32)).sum()
