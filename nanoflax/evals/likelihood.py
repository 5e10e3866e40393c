"""The log-likelihood of given continuations, and whether greedy decoding would write them.

Pairs that differ only in the last token of the continuation (the answers A, B, C, D) share one row of a batch.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nanoflax import nn, tokenizers
from nanoflax.errors import UserError, listed
from nanoflax.report import ProgressBar, format_count, format_duration

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, ids of its continuation


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether each of its tokens is the most probable one."""

    log_likelihood: float
    is_greedy: bool


class Progress(ProgressBar):
    """A bar over requests. The rate and the time left are measured in `work`, the number of computed tokens."""

    quiet = 5.0

    def __init__(self, what: str, total: int, work: float) -> None:
        super().__init__(total)
        self._what, self._work, self._worked = what, work, 0.0

    def add(self, requests: int, work: float) -> None:
        self._worked += work
        self.advance(self.done + requests)

    def title(self) -> str:
        return f"{self._what} {self.done}/{self.total}"

    def status(self) -> str:
        seconds = self._clock() - self._begin
        if not self._worked:
            return "compiling"
        if self.done >= self.total:
            return f"in {format_duration(seconds)}"
        left = format_duration(seconds * (self._work / self._worked - 1))
        return f"{format_count(self._worked / seconds)} tokens/s  {left} left"


def score_pairs(
    model: nn.LanguageModel, params: dict, pairs: Sequence[Pair], batch_size: int = 16, progress: bool = True
) -> list[Score]:
    """The Score of each pair. For a model that reads a source, the context is the source.

    Rows are padded to powers of two, and batches are full, so that few shapes are compiled. The output head computes
    only the positions of the continuations. progress: show a bar on stderr.
    Raises: UserError naming every pair that is empty on a side or longer than the model's context.
    """
    c = model.config
    if c.head != "lm":
        raise UserError(
            f"model.architecture={c.architecture!r} with model.head={c.head!r} computes no likelihood of a text; "
            "use a decoder or an encoder-decoder"
        )
    rows: dict[tuple, list[int]] = {}  # (source, inputs, number of scored positions) -> pairs that share them
    problems = []
    for i, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            problems.append(f"pair {i} has an empty context or continuation")
            continue
        known = tuple(continuation[:-1])
        row = (
            (tuple(context), (c.start_id, *known), len(continuation))
            if c.reads_source
            else ((), (*context, *known), len(continuation))
        )
        if max(len(row[0]), len(row[1])) > c.max_length:
            sizes = f"{len(context)} and {len(continuation)} tokens"
            problems.append(f"pair {i} has {sizes}, more than the model's context of {c.context}")
        rows.setdefault(row, []).append(i)
    if problems:
        raise UserError(listed(problems))
    batches = _batches(rows, c.max_length, batch_size)
    found: list[Any] = [None] * len(pairs)
    with _bar(len(pairs), batches, progress) as bar:
        for (S, T, C, size), part in batches:
            batch = _batch(part, S, T, C, size, pairs, rows)
            known, greedy, last = (np.asarray(x) for x in _compiled(model, params, batch))
            for row, total, is_greedy, logits in zip(part, known, greedy, last, strict=False):
                for i in rows[row]:
                    token = pairs[i][1][-1]
                    best = bool(is_greedy) and int(logits.argmax()) == token
                    found[i] = Score(float(total) + float(logits[token]), best)
            bar.add(sum(len(rows[row]) for row in part), size * (S + T))
    return found


def _batches(rows: Any, most: int, batch_size: int) -> list[tuple[tuple[int, int, int, int], list]]:
    """((S, T, C, rows of the batch), its rows), the longest first, so that a lack of memory shows at once.
    C: scored positions, a power of four."""
    groups = defaultdict(list)
    for source, inputs, scored in rows:
        S, T = (min(tokenizers.bucket(len(ids)), most) if ids else 0 for ids in (source, inputs))
        C = min(T, 4 ** max(2, math.ceil(math.log(scored, 4))))
        groups[T, S, C].append((source, inputs, scored))
    found = []
    for (T, S, C), members in sorted(groups.items(), reverse=True):
        size = min(batch_size, 1 << (len(members) - 1).bit_length())
        found += [((S, T, C, size), members[at : at + size]) for at in range(0, len(members), size)]
    return found


def _bar(total: int, batches: list, progress: bool) -> Any:
    work = sum(size * (S + T) for (S, T, _, size), _ in batches)
    return Progress("log-likelihoods", total, work) if progress else NoBar()


class NoBar:
    """Stands for a Progress that shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add(self, *_):
        pass


def _batch(part: list, S: int, T: int, C: int, size: int, pairs: Sequence[Pair], rows: Any) -> dict[str, np.ndarray]:
    """inputs [B, T], padded on the right; at [B, C], the positions that predict the continuation, the last one in the
    last column; targets, scored [B, C], without the last token; with a source also source, source_mask [B, S]."""
    arrays = {"inputs": np.zeros((size, T), np.int32), "at": np.zeros((size, C), np.int32)}
    arrays |= {"targets": np.zeros((size, C), np.int32), "scored": np.zeros((size, C), bool)}
    if S:
        arrays |= {"source": np.zeros((size, S), np.int32), "source_mask": np.zeros((size, S), bool)}
        arrays["source_mask"][:, 0] = True  # also in the rows that only fill the batch
    for b, row in enumerate(part):
        source, inputs, n = row
        arrays["inputs"][b, : len(inputs)] = inputs
        arrays["at"][b] = np.maximum(np.arange(len(inputs) - C, len(inputs)), 0)
        arrays["targets"][b, C - n : C - 1] = pairs[rows[row][0]][1][:-1]
        arrays["scored"][b, C - n : C - 1] = True
        if S:
            arrays["source"][b, : len(source)] = source
            arrays["source_mask"][b, : len(source)] = True
    return arrays


@partial(jax.jit, static_argnums=0)
def _compiled(
    model: nn.LanguageModel, params: dict, batch: dict[str, Array]
) -> tuple[Float[Array, " B"], Bool[Array, " B"], Float[Array, "B V"]]:
    """(the sum of log-probabilities without the last token, whether these tokens are all the most probable ones, the
    log-probabilities of the last token)."""
    source = {name: batch[name] for name in ("source", "source_mask") if name in batch}
    apply: Any = model.apply  # Linen's apply has no type
    hidden, _ = apply({"params": params}, batch["inputs"], **source, method="hidden")
    hidden = jnp.take_along_axis(hidden, batch["at"][..., None], axis=1)
    B, C, D = hidden.shape
    n = nn.chunks_of(B, C, model.config.vocab_size, least=64)  # to limit the memory of logits
    pieces = lambda x: x.reshape(B, n, C // n, *x.shape[2:]).swapaxes(0, 1)

    def log_probabilities(hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return jax.nn.log_softmax(apply({"params": params}, hidden, method="head"))

    def piece(xs: tuple) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        hidden, targets, scored = xs
        found = log_probabilities(hidden)
        of_targets: Float[Array, "B T"] = jnp.take_along_axis(found, targets[..., None], axis=2)[..., 0]
        best: Int[Array, "B T"] = found.argmax(-1)
        return jnp.where(scored, of_targets, 0).sum(1), ((best == targets) | ~scored).all(1)

    known, greedy = jax.lax.map(piece, (pieces(hidden), pieces(batch["targets"]), pieces(batch["scored"])))
    return known.sum(0), greedy.all(0), log_probabilities(hidden[:, -1:])[:, 0]
