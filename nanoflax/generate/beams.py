"""Beam search: one compiled loop that calls `model.decode` for each new token."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from nanoflax import parallel
from nanoflax.errors import UserError
from nanoflax.generate.processors import Filters, Written, make_filters, mask, only_below, process
from nanoflax.generate.sampling import Prompts, compiled, decoding_model, decoding_params, first_written
from nanoflax.nn import Array, LanguageModel
from nanoflax.tokenizers import cut, request_of


class Beams(NamedTuple):
    """The state between two tokens: W beams of each of B prompts, and room for N new tokens.

    A missing beam or hypothesis has the score -inf.
    """

    step: Int[Array, ""]  # the number of new tokens of each beam
    cache: dict  # of B W rows
    token: Int[Array, " BW"]  # not yet in the cache
    tokens: Int[Array, "B W N"]
    scores: Float[Array, "B W"]  # sums of log-probabilities, best first
    best: Int[Array, "B W N"]  # the finished hypotheses
    best_scores: Float[Array, "B W"]  # with the length penalty, best first
    is_open: Bool[Array, " B"]  # the search of the prompt continues


def advance(
    model: LanguageModel,
    params: dict,
    s: Beams,
    prompt: Written,
    penalty: Float[Array, ""],
    filters: Filters,
    early_stopping: bool | str,
    eos_ids: tuple[int, ...] = (),
    vocab_size: int | None = None,
) -> Beams:
    """Extend each beam by one token, and move the beams that end to the hypotheses.

    As in Transformers' `generate`: of the best continuations, W for each end and W more, the first W that do not end
    become the beams, and those that end become hypotheses if they are among the first W. prompt: with N = limit. Of the
    filters only the penalties hold.
    """
    (B, W, N), rules = s.tokens.shape, model.config.generation
    logits, cache = model.decode(params, s.token[:, None], s.cache)
    logp = jax.nn.log_softmax(only_below(vocab_size, logits[:, -1]))
    new = jnp.where(jnp.arange(N) < s.step, s.tokens.reshape(B * W, N), -1)
    history = jax.lax.dynamic_update_slice_in_dim(prompt.history, new, prompt.end, 1)
    written = prompt._replace(history=history, end=prompt.end + s.step, step=s.step)
    logp = only_below(vocab_size, process(logp, rules, eos_ids, filters, written))
    logp = jax.nn.log_softmax(logp) if rules.renormalize_logits else logp
    V = logp.shape[-1]
    total = s.scores[:, :, None] + logp.reshape(B, W, V)
    scores, flat = jax.lax.top_k(total.reshape(B, W * V), min(max(2, 1 + len(eos_ids)) * W, W * V))
    parent, token = flat // V, (flat % V).astype(jnp.int32)
    tokens = _take(s.tokens, parent).at[:, :, s.step].set(token)
    step = s.step + 1
    ended = (step == N) | jnp.array(mask(eos_ids, V))[token]

    # A closed search takes no more hypotheses.
    finishes = ended & (jnp.arange(token.shape[1]) < W) & s.is_open[:, None]
    finished = jnp.where(finishes, scores / step.astype(jnp.float32) ** penalty, -jnp.inf)
    best_scores, chosen = jax.lax.top_k(jnp.concatenate([s.best_scores, finished], 1), W)
    best = _take(jnp.concatenate([s.best, tokens], 1), chosen)

    scores, chosen = jax.lax.top_k(jnp.where(ended, -jnp.inf, scores), W)
    parent, tokens = jnp.take_along_axis(parent, chosen, 1), _take(tokens, chosen)
    rows = (jnp.arange(B)[:, None] * W + parent).reshape(-1)
    # An entry that the step returns unchanged (a source's keys) is the same for all beams of a prompt.
    cache = jax.tree.map(lambda new, old: new if new is old or new.ndim == 0 else new[rows], cache, s.cache)

    # The search continues if the best beam can still get a better score than the worst hypothesis.
    length = jnp.where((early_stopping == "never") & (penalty > 0), N, step).astype(jnp.float32)
    worst = best_scores[:, -1]
    is_open = s.is_open & (scores[:, 0] / length**penalty > worst)
    if early_stopping is True:
        is_open &= worst == -jnp.inf  # there are fewer than W hypotheses
    return Beams(step, cache, tokens[:, :, s.step].reshape(-1), tokens, scores, best, best_scores, is_open)


def _search(model, params, tokens, lengths, penalty, filters, beams, steps, early_stopping, eos_ids, vocab_size):
    rows = len(tokens) * beams
    model, params = decoding_model(model, rows), decoding_params(model, params, rows)
    token, cache = model.prefill(params, tokens, lengths, steps)
    repeat = lambda x: jnp.repeat(x, beams, axis=0) if x.ndim else x  # a scalar belongs to all rows
    B, W, N = len(token), beams, steps
    scores = jnp.full((B, W), -jnp.inf)  # one beam at first: the others would equal it
    none = jnp.full((B, W, N), eos_ids[0] if eos_ids else 0, jnp.int32)
    cache, prompt = jax.tree.map(repeat, (cache, first_written(model.config, tokens, lengths, token, N, N)))
    first = scores.at[:, 0].set(0)
    state = Beams(jnp.int32(0), cache, repeat(token), none, first, none, scores, jnp.ones(B, bool))
    state = jax.lax.while_loop(
        lambda s: (s.step < N) & s.is_open.any(),
        lambda s: advance(model, params, s, prompt, penalty, filters, early_stopping, eos_ids, vocab_size),
        state,
    )
    return state.best, state.best_scores


def beam_search(
    model: LanguageModel,
    params: dict,
    prompts: Prompts,
    beams: int = 4,
    max_new_tokens: int = 64,
    length_penalty: float | None = None,
    eos_id: int | Sequence[int] | np.ndarray | None = None,
    early_stopping: bool | str | None = None,
    n_best: int | None = None,
    vocab_size: int | None = None,
    repetition_penalty: float | None = None,
) -> list[Any]:
    """The most probable continuation of each prompt that a beam search finds.

    The score of a hypothesis is its log-probability divided by length ** length_penalty, where length
    counts its new tokens and its eos_id. It ends with an eos_id or at max_new_tokens. A search ends, as in
    Transformers' `generate`, by early_stopping: True: with `beams` hypotheses; False: if also the best
    beam, at its present length, has no better score than the worst hypothesis; "never": if it cannot get
    a better score at any length. vocab_size: only smaller ids are chosen.
    None takes the value of model.config.generation, else length_penalty 1, early_stopping False and no
    repetition_penalty; the other rules there hold as in `sample`.
    Compiled once for a bucket of prompt lengths, a batch size, beams and max_new_tokens.
    Returns the new tokens of each prompt, cut before eos_id. With n_best=n, for each prompt a list of
    at most n (tokens, score) pairs, best first.
    Raises: UserError as `sample` does, and naming every argument out of its range.
    """
    given = dict(length_penalty=length_penalty, early_stopping=early_stopping, repetition_penalty=repetition_penalty)
    g = dataclasses.replace(model.config.generation, **{name: x for name, x in given.items() if x is not None})
    length_penalty = 1.0 if g.length_penalty is None else g.length_penalty
    early_stopping = g.early_stopping or False
    problems = [
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
    if problems:
        raise UserError("; ".join(problems))
    tokens, lengths, ends = request_of(model.config, prompts, max_new_tokens, eos_id, vocab_size)
    early_stopping = early_stopping if early_stopping == "never" else bool(early_stopping)
    penalties = jnp.float32(length_penalty), make_filters(defaults=g)
    search, options = compiled(_search, mesh=parallel.mesh_of(params)), (beams, max_new_tokens, early_stopping, *ends)
    best, scores = map(parallel.fetch, search(model, params, tokens, lengths, *penalties, *options))
    pairs = [
        [(cut(row.tolist(), ends[0]), float(s)) for row, s in zip(rows, of_rows, strict=True) if s != -np.inf]
        for rows, of_rows in zip(best, scores, strict=True)
    ]
    return [prompt[0][0] for prompt in pairs] if n_best is None else [p[:n_best] for p in pairs]


def _take(x, chosen):
    """x [B, W, N] and indices chosen [B, C] to [B, C, N]."""
    return jnp.take_along_axis(x, chosen[..., None], axis=1)
