"""What goes into the engine, and what comes out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np


class Constraint(Protocol):
    """What a text must match, in its present state."""

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: packed uint32 bits, as in `generate.Filters.allowed`."""
        ...

    def accept(self, token: int) -> Any:
        """Add a token."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to generate. None takes the value of the model's generation settings."""

    prompt: Sequence[int]  # token ids; for a model with a source, the source
    max_new_tokens: int = 64  # 0: only the prompt's log-probabilities
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    log_probabilities: int | None = None  # how many alternatives of each token are reported; None: nothing
    prompt_log_probabilities: bool = False  # also of the prompt's tokens, before the first new token
    constraint: Constraint | None = None  # used by this request alone


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a reply, or of its prompt."""

    id: int
    log_probability: float | None = None  # in nats; None for the first token of a prompt
    alternatives: Mapping[int, float] = dataclasses.field(default_factory=dict)  # the most probable, best first
    of_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Finish:
    """The end of a reply. reason: stop (an id that ends a text), length, cancelled, refused (its constraint cannot be
    followed) or error."""

    reason: str
    message: str = ""  # of refused and error


@dataclasses.dataclass
class Ticket:
    """A request in the engine. `receive` is called in the engine's thread with each Token, last with the Finish."""

    request: Request
    receive: Callable[[Token | Finish], None]
    cancelled: bool = False

    def cancel(self) -> None:
        """Free the slot at the next step. The Finish follows."""
        self.cancelled = True
