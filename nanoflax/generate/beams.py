"""Beam search: the whole search is one compiled loop over a model's decode interface."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanoflax import parallel
from nanoflax.errors import UserError
from nanoflax.generate.sampling import check_prompts, compiled, cut, decoding_params, only_below, pad_left, untied


class Beams(NamedTuple):
    """The state between two tokens: W beams of each of B prompts, and room for N new tokens.

    A score of -inf is that of a beam or hypothesis that is not there.
    """

    step: jax.Array  # int32, how many new tokens the beams have
    cache: Any  # of B W rows
    token: jax.Array  # [B W] int32, not yet in the cache
    tokens: jax.Array  # [B, W, N] int32
    scores: jax.Array  # [B, W] float32, sums of log-probabilities, best first
    best: jax.Array  # [B, W, N] int32, the finished hypotheses
    best_scores: jax.Array  # [B, W] float32, with the length penalty, best first
    open: jax.Array  # [B] bool: the search goes on


def advance(model, params, s, penalty, early_stopping, eos_id=None, vocab_size=None):
    """Give each beam one more token, and move those that end to the hypotheses. Returns Beams.

    The search of Transformers' `generate`: of the 2 W best continuations those that do not end are
    the next W beams, and those that end become hypotheses if they are among the first W.
    """
    B, W, N = s.tokens.shape
    logits, cache = model.decode(params, s.token[:, None], s.cache)
    logits = only_below(vocab_size, logits[:, -1])
    V = logits.shape[-1]
    total = s.scores[:, :, None] + jax.nn.log_softmax(logits).reshape(B, W, V)
    scores, flat = jax.lax.top_k(total.reshape(B, W * V), min(2 * W, W * V))
    parent, token = flat // V, (flat % V).astype(jnp.int32)
    tokens = _take(s.tokens, parent).at[:, :, s.step].set(token)
    step = s.step + 1
    ended = jnp.broadcast_to(step == N, token.shape)
    if eos_id is not None:
        ended |= token == eos_id

    # A closed search takes no hypothesis any more.
    finishes = ended & (jnp.arange(token.shape[1]) < W) & s.open[:, None]
    finished = jnp.where(finishes, scores / step.astype(jnp.float32) ** penalty, -jnp.inf)
    best_scores, chosen = jax.lax.top_k(jnp.concatenate([s.best_scores, finished], 1), W)
    best = _take(jnp.concatenate([s.best, tokens], 1), chosen)

    scores, chosen = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), W)
    parent, tokens = jnp.take_along_axis(parent, chosen, 1), _take(tokens, chosen)
    rows = (jnp.arange(B)[:, None] * W + parent).reshape(-1)
    # What a step hands on untouched (a source's keys) is the same in all beams of a prompt.
    cache = jax.tree.map(lambda new, old: new if new is old or new.ndim == 0 else new[rows], cache, s.cache)

    # Could the best beam still beat the worst hypothesis?
    length = jnp.where((early_stopping == "never") & (penalty > 0), N, step).astype(jnp.float32)
    worst = best_scores[:, -1]
    goes_on = s.open & (scores[:, 0] / length**penalty > worst)
    if early_stopping is True:
        goes_on &= worst == -jnp.inf  # not W hypotheses yet
    return Beams(step, cache, tokens[:, :, s.step].reshape(-1), tokens, scores, best, best_scores, goes_on)


def _search(model, params, tokens, lengths, penalty, beams, steps, early_stopping, eos_id, vocab_size):
    rows = len(tokens) * beams
    model, params = untied(model, rows), decoding_params(model, params, rows)
    token, cache = model.prefill(params, tokens, lengths, steps)
    repeat = lambda x: jnp.repeat(x, beams, axis=0) if x.ndim else x  # scalars are of all rows
    B, W, N = len(token), beams, steps
    scores = jnp.full((B, W), -jnp.inf)  # one beam at first, or all would be the same
    none = jnp.full((B, W, N), 0 if eos_id is None else eos_id, jnp.int32)
    state = Beams(
        jnp.int32(0),
        jax.tree.map(repeat, cache),
        repeat(token),
        none,
        scores.at[:, 0].set(0),
        none,
        scores,
        jnp.ones(B, bool),
    )
    state = jax.lax.while_loop(
        lambda s: (s.step < N) & s.open.any(),
        lambda s: advance(model, params, s, penalty, early_stopping, eos_id, vocab_size),
        state,
    )
    return state.best, state.best_scores


def beam_search(
    model,
    params,
    prompts,
    beams=4,
    max_new_tokens=64,
    length_penalty=1.0,
    eos_id=None,
    early_stopping=False,
    n_best=None,
    vocab_size=None,
):
    """The most probable continuation of each prompt that a beam search finds.

    prompts: a list of lists of token ids, of any lengths; for an encoder-decoder, the sources. A
    hypothesis scores its summed log-probability over length ** length_penalty, where length counts
    its new tokens and its eos_id. It ends with eos_id or at max_new_tokens. early_stopping: True
    ends a search with `beams` hypotheses; False, when the best beam at its present length could
    not beat the worst of them; "never", when it could not at any length. vocab_size: ids from
    there on are never chosen. All as in Transformers' `generate`.
    Compiled once for a bucket of prompt lengths, batch size, beams and max_new_tokens.
    Returns a list of lists: the new tokens of each prompt, cut before eos_id. With n_best=n, a list
    for each prompt of its n best (tokens, score) pairs, best first; fewer where there are fewer.
    Raises: UserError for what `sample` refuses, and naming every argument out of its range.
    """
    found = [
        f"{name}={value!r} must be {right}"
        for name, value, good, right in [
            ("beams", beams, beams >= 1, "at least 1"),
            ("length_penalty", length_penalty, math.isfinite(length_penalty), "finite"),
            ("early_stopping", early_stopping, early_stopping in (True, False, "never"), "True, False or 'never'"),
            ("n_best", n_best, n_best is None or 1 <= n_best <= beams, f"from 1 to beams={beams}"),
            ("vocab_size", vocab_size, vocab_size is None or vocab_size >= 1, "at least 1"),
        ]
        if not good
    ]
    if found:
        raise UserError("; ".join(found))
    check_prompts(model.config, prompts, max_new_tokens)
    tokens, lengths = pad_left(prompts)
    early_stopping = early_stopping if early_stopping == "never" else bool(early_stopping)
    best, scores = map(
        parallel.fetch,
        compiled(_search, mesh=parallel.mesh_of(params))(
            model,
            params,
            tokens,
            lengths,
            jnp.float32(length_penalty),
            beams,
            max_new_tokens,
            early_stopping,
            eos_id,
            vocab_size,
        ),
    )
    pairs = [
        [(cut(row.tolist(), eos_id), float(score)) for row, score in zip(*prompt, strict=True) if score != -np.inf]
        for prompt in zip(best, scores, strict=True)
    ]
    return [prompt[0][0] for prompt in pairs] if n_best is None else [p[:n_best] for p in pairs]


def _take(x, chosen):
    """x: [B, W, N] and chosen: [B, C] to [B, C, N], the chosen of each row."""
    return jnp.take_along_axis(x, chosen[..., None], axis=1)
