"""Ranking of several continuations of a prompt by their log-likelihood.

totals = log_likelihoods(model, params, prompts, continuations)     # lists of ids
position = rank(totals, answer)
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from nanoflax import nn
from nanoflax.errors import UserError, listed
from nanoflax.generate.sampling import Prompts
from nanoflax.nn import LanguageModel, head_kernel
from nanoflax.tokenizers import bucket


def log_likelihoods(
    model: LanguageModel,
    params: dict,
    prompts: Prompts,
    continuations: Prompts,
    batch_size: int = 16,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """log p(continuation | prompt), summed over its tokens, in nats.

    Pairs are padded to powers of two; each of these lengths is compiled once. names: of the pairs, for
    errors; default pair 0, pair 1, ... Returns one float64 per pair, of float32 precision.
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

    groups, totals = {}, np.zeros(len(pairs))
    for i in range(len(pairs)):
        groups.setdefault(tuple(lengths(i)), []).append(i)
    for sizes, members in groups.items():
        for at in range(0, len(members), batch_size):
            part = members[at : at + batch_size]
            part += part[-1:] * (batch_size - len(part))  # so that the last batch needs no compilation
            batch = _batch([pairs[i] for i in part], sizes, None if decoder else c.start_id)
            totals[part] = _scores(model, params, batch)
    return totals


def rank(scores: Sequence[float], answer: int) -> int:
    """The rank, from 1, of the candidate `answer` by its score. Of equal scores the first comes first.
    The mean of 1 / rank is the mean reciprocal rank."""
    return 1 + np.argsort(-np.asarray(scores), kind="stable").tolist().index(answer)


def _batch(pairs, sizes, start_id):
    """inputs, targets, weights [B, T], and with a source also source, source_mask [B, S]; padded on the right."""
    *source, T = sizes
    arrays = {"inputs": np.zeros((len(pairs), T), np.int32)}
    arrays |= {"targets": arrays["inputs"].copy(), "weights": arrays["inputs"].astype(np.float32)}
    for S in source:
        arrays |= {"source": np.zeros((len(pairs), S), np.int32), "source_mask": np.zeros((len(pairs), S), bool)}
    for row, (prompt, new) in enumerate(pairs):
        ids = [start_id, *new] if source else [*prompt, *new]
        n = len(ids) - 1
        arrays["inputs"][row, :n], arrays["targets"][row, :n] = ids[:-1], ids[1:]
        arrays["weights"][row, n - len(new) : n] = 1
        if source:
            arrays["source"][row, : len(prompt)] = prompt
            arrays["source_mask"][row, : len(prompt)] = True
    return arrays


@partial(jax.jit, static_argnums=0)
def _scores(model, params, batch):
    c, T = model.config, batch["inputs"].shape[1]
    source = {name: batch[name] for name in ("source", "source_mask") if name in batch}
    hidden, _ = model.apply({"params": params}, batch["inputs"], **source, method="hidden")
    kernel, chunks = head_kernel(c, params), nn.chunks_of(1, T, c.vocab_size, least=16)
    options = chunks, 0.0, 0.0, c.logit_softcap, c.vocab_padding

    def row(xs):  # one row at a time, to limit the memory of logits
        hidden, targets, weights = (x[None] for x in xs)
        return -nn.chunked_cross_entropy(  # type: ignore  # custom_vjp hides the type
            hidden, kernel, targets, weights, params.get("logit_bias"), *options
        )[1]

    return jax.lax.map(row, (hidden, batch["targets"], batch["weights"]))
