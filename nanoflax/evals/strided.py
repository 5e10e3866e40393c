"""The perplexity of texts that are longer than a model's context, by windows that overlap."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import jax.tree_util

from nanoflax import runs
from nanoflax.errors import UserError
from nanoflax.evals.likelihood import score_pairs


def windows(ids: Sequence[int], first: int, context: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs (tokens before, tokens to predict) that together predict each of `ids` once.

    The first window predicts `context` tokens after the token `first`; each other window predicts the next `stride`
    tokens, after as many tokens as fit: at least context - stride + 1. (A stride of `context` gives the rolling windows
    of lm-eval.)
    """
    all_ids, begin = [first, *ids], 1
    while begin < len(all_ids):
        end = min(len(all_ids), begin + (context if begin == 1 else stride))
        yield all_ids[max(0, end - context - 1) : begin], all_ids[begin:end]
        begin = end


def strided_perplexity(
    run: Any, name: str, stride: int, split: str = "all", fields: str | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """loss (nats per token), perplexity and bits per byte of the documents of a source of text, as JSON values.

    Each document is a text of its own, and its end-of-sequence token is predicted, as in training; see `windows`. The
    smaller the stride, the more context each token has, and the longer it takes: context / stride times the work of
    windows that do not overlap. name: the source, as for Run.evaluate; empty: the run's own validation data.
    Raises: UserError for a stride out of range, a source that cannot be read, or a model that is not a decoder.
    """
    c = run.config
    if run.task is not None or c.model.head != "lm" or c.model.reads_source:
        raise UserError(f"--stride: {run.source} is not a language model of text: only a decoder has such a perplexity")
    context = c.model.context
    if not 1 <= stride <= context:
        raise UserError(f"--stride={stride} must be from 1 to the model's context, {context}")
    if not name and not (run.workdir and c.data.train):
        raise UserError(f"{run.source} has no validation data of its own; give --data")
    stores = runs.open_text(run, name, split, fields)
    framing, sums = run.tokenizer.framing, {}
    between = framing.document(())[-1:] if framing.first_id != framing.eos_id else []
    params = jax.tree_util.tree_map(jnp.asarray, run.params)
    for key, store in stores.items():
        pairs = []
        for begin, end in itertools.pairwise(store.begin(range(store.n_documents + 1)).tolist()):
            pairs += windows(store.read(begin, end - len(between)).tolist(), framing.first_id, context, stride)
        if not pairs:
            raise UserError(f"--data={name} holds no text")
        nats = -math.fsum(found.log_likelihood for found in score_pairs(run.model, params, pairs, batch_size))
        sums[key] = nats, sum(len(predicted) for _, predicted in pairs)
    return {"stride": stride} | runs.text_metrics(run, name, stores, sums)
