"""The log-likelihood of given continuations, and whether greedy decoding would write them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from nanoflax import generate, nn, tokenizers
from nanoflax.report import ProgressBar, format_count, format_duration

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context, ids of its continuation


class Score(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether each of its tokens is the most probable one."""

    log_likelihood: float
    is_greedy: bool


class Progress(ProgressBar):
    """A bar over requests. The rate and the time left are measured in `work`, the number of computed tokens."""

    quiet = 5.0

    def __init__(self, what: str, total: int, work: float = 0) -> None:
        super().__init__(total)
        self._what, self._work, self._worked = what, work, 0.0

    def add(self, requests: int, work: float) -> None:
        self.show(int(self.done) + requests, self._worked + work, self._work)

    def show(self, done: int, worked: float, work: float) -> None:
        """Shows the requests that are done, the work for them, and the work for all."""
        self._worked, self._work = worked, work
        self.advance(done)

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
    """The Score of each pair, by generate.score. For a model that reads a source, the context is the source.

    progress: show a bar on stderr. Raises: UserError as generate.score does.
    """
    contexts, continuations = ([pair[side] for pair in pairs] for side in (0, 1))
    with Progress("log-likelihoods", len(pairs)) if progress else NoBar() as bar:
        found = generate.score(model, params, contexts, continuations, 1, batch_size, report=bar.show)
    return [Score(math.fsum(x.log_probabilities), _is_greedy(x)) for x in found]


def _is_greedy(scored: tokenizers.Scored) -> bool:
    """Whether each token is the most probable one, the only alternative."""
    return all(token in best for token, best in zip(scored.tokens, scored.alternatives, strict=True))


class NoBar:
    """Stands for a Progress that shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add(self, *_):
        pass

    show = add
