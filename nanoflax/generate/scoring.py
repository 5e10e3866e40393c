"""Log-probabilities of given texts, and a ranking of several continuations of a prompt.

totals = log_likelihoods(model, params, prompts, continuations)     # lists of ids
position = rank(totals, answer)
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanoflax import parallel
from nanoflax.errors import UserError, listed
from nanoflax.generate.sampling import Prompts
from nanoflax.kernels import chunks_of, most_probable
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
    report: Callable[[int, int, int], None] = lambda *_: None,
) -> list[Scored]:
    """log p(token | prompt and the tokens before it) of each token of a continuation, and of the `alternatives` most
    probable tokens in its place.

    Pairs that differ only in the last token of the continuation (the answers A, B, C, D) share one row of a batch. Rows
    are padded to powers of two, so that few shapes are compiled, and the head computes only the positions of the
    continuations. names: of the pairs, for errors; default pair 0, pair 1, ... report(pairs, tokens, all tokens) is
    called after each batch, with what was computed so far. Returns a `Scored` for each pair.
    Raises: UserError naming every pair that is empty on a side or longer than the model's context.
    """
    c = model.config
    if c.head != "lm":
        raise UserError(
            f"model.architecture={c.architecture!r} with model.head={c.head!r} computes no "
            "likelihood of a text; use a decoder or an encoder-decoder"
        )
    rows, problems = {}, []  # (source, inputs, number of scored positions) -> pairs that share them
    for i, (prompt, new) in enumerate(zip(prompts, continuations, strict=True)):
        name, known = names[i] if names else f"pair {i}", tuple(new[:-1])
        row = (tuple(prompt), (c.start_id, *known)) if c.reads_source else ((), (*prompt, *known))
        if not (len(prompt) and len(new)):
            problems.append(f"{name} has an empty prompt or continuation")
        elif max(map(len, row)) > c.max_length:
            problems.append(f"{name}: {len(prompt)} and {len(new)} tokens, but the model's context is {c.context}")
        rows.setdefault((*row, len(new)), []).append(i)
    if problems:
        raise UserError(listed(problems))
    groups, found, computed = defaultdict(list), {}, 0  # (T, S, C) -> rows; C: columns for the scored positions
    for source, inputs, n in rows:
        T, S = (min(bucket(len(ids)), c.padding_limit(len(ids))) if ids else 0 for ids in (inputs, source))
        C = min(T, 4 ** max(2, math.ceil(math.log(n, 4))))  # n rounded up to a power of four, at least 16
        groups[T, S, C].append((source, inputs, n))
    size = lambda members: min(batch_size, bucket(len(members), 1))  # of a batch: a smaller group has smaller ones
    work = sum((T + S) * size(of) * -(-len(of) // size(of)) for (T, S, _), of in groups.items())
    run = parallel.with_mesh(parallel.mesh_of(params), _scores)
    for (T, S, C), members in sorted(groups.items(), reverse=True):  # the longest first: a lack of memory shows at once
        for at in range(0, len(members), size(members)):
            part = members[at : at + size(members)]
            targets = [list(continuations[rows[row][0]][:-1]) for row in part]
            batch = _batch(part, targets, T, S, C, size(members))
            *scores, last = map(np.asarray, run(model, params, batch, alternatives))
            for b, row in enumerate(part):
                for i in rows[row]:
                    logp, *best = (x[b : b + 1, C - row[2] :].copy() for x in scores)
                    logp[0, -1] = last[b, continuations[i][-1]]
                    found[i] = scored([list(continuations[i])], logp, *best)[0]
            computed += size(members) * (T + S)
            report(len(found), computed, work)
    return [found[i] for i in range(len(found))]


def rank(scores: Sequence[float], answer: int) -> int:
    """The rank, from 1, of the candidate `answer` by its score. Of equal scores the first comes first.
    The mean of 1 / rank is the mean reciprocal rank."""
    return 1 + np.argsort(-np.asarray(scores), kind="stable").tolist().index(answer)


def _batch(part, targets, T, S, C, size):
    """inputs [B, T], padded on the right; at [B, C], the positions that predict the continuation, the last one in the
    last column; targets [B, C], without the last token; with a source also source, source_mask [B, S]."""
    shapes = {"inputs": (size, T), "at": (size, C), "targets": (size, C)} | ({"source": (size, S)} if S else {})
    arrays: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
    if S:
        lengths = [len(source) for source, _, _ in part] + [1] * (size - len(part))
        arrays["source_mask"] = np.arange(S) < np.array(lengths)[:, None]
    for b, (source, inputs, n) in enumerate(part):
        arrays["inputs"][b, : len(inputs)] = inputs
        arrays["at"][b] = np.maximum(np.arange(len(inputs) - C, len(inputs)), 0)
        arrays["targets"][b, C - n : C - 1] = targets[b]
        if S:
            arrays["source"][b, : len(source)] = source
    return arrays


@partial(jax.jit, static_argnums=(0, 3))
def _scores(model, params, batch, n):
    """The results of `most_probable` for the targets [B, C], and all log-probabilities of the last position [B, V]."""
    source = {name: batch[name] for name in ("source", "source_mask") if name in batch}
    hidden, _ = model.apply({"params": params}, batch["inputs"], **source, method="hidden")
    hidden = jnp.take_along_axis(hidden, batch["at"][..., None], 1)
    B, C, _ = hidden.shape
    head = partial(model.apply, {"params": params}, method="head")
    pieces = chunks_of(B, C, model.config.vocab_size, least=64)  # to limit the memory of logits
    cut = lambda x: x.reshape(B, pieces, C // pieces, *x.shape[2:]).swapaxes(0, 1)
    found = jax.lax.map(lambda x: most_probable(head(x[0]), x[1], n), (cut(hidden), cut(batch["targets"])))
    whole = (x.swapaxes(0, 1).reshape(B, C, *x.shape[3:]) for x in found)
    return *whole, jax.nn.log_softmax(head(hidden[:, -1:])[:, 0].astype(jnp.float32))
