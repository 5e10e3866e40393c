"""Log-probabilities of given texts, and a ranking of several continuations of a prompt.

totals = log_likelihoods(model, params, prompts, continuations)     # lists of ids
position = rank(totals, answer)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanoflax.errors import UserError, listed
from nanoflax.generate.sampling import Prompts
from nanoflax.kernels import most_probable
from nanoflax.nn import LanguageModel
from nanoflax.tokenizers import Scored, bucket, scored


def log_likelihoods(
    model: LanguageModel, params: dict, prompts: Prompts, continuations: Prompts, **options: Any
) -> np.ndarray:
    """log p(continuation | prompt), summed over its tokens, in nats: float64 [pairs], of float32 precision.

    options: batch_size and names of `score`. Raises: UserError as `score` does.
    """
    scores = score(model, params, prompts, continuations, **options)
    return np.array([sum(s.log_probabilities) for s in scores], float)


def score(
    model: LanguageModel,
    params: dict,
    prompts: Prompts,
    continuations: Prompts,
    alternatives: int = 0,
    batch_size: int = 16,
    names: Sequence[str] | None = None,
) -> list[Scored]:
    """log p(token | prompt and the tokens before it) of each token of a continuation, and of the `alternatives` most
    probable tokens in its place.

    Pairs are padded to powers of two; each of these lengths is compiled once. names: of the pairs, for
    errors; default pair 0, pair 1, ... Returns a `Scored` for each pair.
    Raises: UserError naming every pair that is empty on a side or longer than the model's context.
    """
    c, decoder = model.config, not model.config.reads_source
    if c.head != "lm":
        raise UserError(
            f"model.architecture={c.architecture!r} with model.head={c.head!r} computes no "
            "likelihood of a text; use a decoder or an encoder-decoder"
        )
    names = names or [f"pair {i}" for i in range(len(prompts))]
    problems = [
        f"{name}: {len(p)} and {len(t)} tokens, but the model's context is {c.context}"
        for name, p, t in zip(names, prompts, continuations, strict=True)
        if (len(p) + len(t) - 1 if decoder else max(len(p), len(t))) > c.max_length
    ]
    problems += [
        f"{name} has an empty prompt or continuation"
        for name, *pair in zip(names, prompts, continuations, strict=True)
        if not all(map(len, pair))
    ]
    if problems:
        raise UserError(listed(problems))
    pairs = list(zip(prompts, continuations, strict=True))

    def lengths(i):
        """The padded lengths of a pair: of both together without the last token, or of source and target."""
        sizes = [sum(map(len, pairs[i])) - 1] if decoder else [len(ids) for ids in pairs[i]]
        return [min(bucket(n), c.max_length) for n in sizes]

    groups, found = {}, {}
    for i in range(len(pairs)):
        groups.setdefault(tuple(lengths(i)), []).append(i)
    for sizes, members in groups.items():
        for at in range(0, len(members), batch_size):
            part = members[at : at + batch_size]
            part += part[-1:] * (batch_size - len(part))  # so that the last batch needs no compilation
            batch = _batch([pairs[i] for i in part], sizes, None if decoder else c.start_id)
            scores = map(np.asarray, _scores(model, params, batch, alternatives))
            found |= zip(part, scored([list(pairs[i][1]) for i in part], *scores), strict=True)
    return [found[i] for i in range(len(pairs))]


def rank(scores: Sequence[float], answer: int) -> int:
    """The rank, from 1, of the candidate `answer` by its score. Of equal scores the first comes first.
    The mean of 1 / rank is the mean reciprocal rank."""
    return 1 + np.argsort(-np.asarray(scores), kind="stable").tolist().index(answer)


def _batch(pairs, sizes, start_id):
    """inputs, targets [B, T], the position of the first target [B], and with a source also source, source_mask [B, S];
    padded on the right."""
    *source, T = sizes
    arrays = {"inputs": np.zeros((len(pairs), T), np.int32), "first": np.zeros(len(pairs), np.int32)}
    arrays |= {"targets": arrays["inputs"].copy()}
    for S in source:
        arrays |= {"source": np.zeros((len(pairs), S), np.int32), "source_mask": np.zeros((len(pairs), S), bool)}
    for row, (prompt, new) in enumerate(pairs):
        ids = [start_id, *new] if source else [*prompt, *new]
        n = len(ids) - 1
        arrays["inputs"][row, :n], arrays["targets"][row, : len(new)] = ids[:-1], new
        arrays["first"][row] = n - len(new)
        if source:
            arrays["source"][row, : len(prompt)] = prompt
            arrays["source_mask"][row, : len(prompt)] = True
    return arrays


@partial(jax.jit, static_argnums=(0, 3))
def _scores(model, params, batch, n):
    """The results of `most_probable` for the targets [B, T] from `first` on."""
    source = {name: batch[name] for name in ("source", "source_mask") if name in batch}
    hidden, _ = model.apply({"params": params}, batch["inputs"], **source, method="hidden")
    B, T, D = hidden.shape
    at = jnp.minimum(batch["first"][:, None] + jnp.arange(T), T - 1)
    states = jnp.take_along_axis(hidden, at[..., None], 1).reshape(B * T, D)

    def position(x):
        state, target = x
        logits = model.apply({"params": params}, state[None, None], method="head")
        return most_probable(logits[0, 0], target, max(n, 1))  # jax.lax.map returns no empty arrays

    every = states, batch["targets"].reshape(-1)
    found = jax.lax.map(position, every, batch_size=64)  # to limit the memory of logits
    logp, ids, best = (x.reshape(B, T, *x.shape[1:]) for x in found)
    return logp, ids[..., :n], best[..., :n]
