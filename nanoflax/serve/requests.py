"""What goes into the engine, and what comes out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from nanoflax import tokenizers
from nanoflax.config import ModelConfig
from nanoflax.errors import UserError


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
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0  # as in `generate.Filters`
    frequency_penalty: float = 0
    seed: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    log_probabilities: int | None = None  # how many alternatives of each token are reported; None: nothing
    prompt_log_probabilities: bool = False  # also of the prompt's tokens, before the first new token
    constraint: Constraint | None = None  # used by this request alone
    # With max_new_tokens=0: report the weights with which the next token attends to those of the prompt, summed over
    # the layers with attention and their heads with these factors.
    attention: Float[np.ndarray, "L H"] | None = None
    target: Sequence[int] = ()  # for a model with a source and with `attention`: the tokens before the next one


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a reply, or of its prompt."""

    id: int
    log_probability: float | None = None  # in nats; None for the first token of a prompt
    alternatives: Mapping[int, float] = dataclasses.field(default_factory=dict)  # the most probable, best first
    of_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attention to each token of a prompt. The sum is 1, or less with attention sinks and trained prefixes."""

    weights: Float[np.ndarray, " N"]


@dataclasses.dataclass(frozen=True)
class Finish:
    """The end of a reply. reason: stop (an id that ends a text), length, cancelled, refused (its constraint cannot be
    followed) or error."""

    reason: str
    message: str = ""  # of refused and error


@dataclasses.dataclass
class Ticket:
    """A request in the engine. `receive` is called in the engine's thread with each Token or the Attention, last with
    the Finish."""

    request: Request
    receive: Callable[[Any], None]
    cancelled: bool = False
    number: int = 0  # in the order in which the engine received them

    def cancel(self) -> None:
        """Free the slot at the next step. The Finish follows."""
        self.cancelled = True


def check(r: Request, config: ModelConfig, context: int, vocab_size: int, alternatives: int) -> None:
    """context: most tokens of a text; alternatives: most that can be reported. Raises: UserError for a request that
    cannot be served."""
    new, problems = r.max_new_tokens if r.attention is None else len(r.target) + 1, []
    if new == 0 and r.prompt_log_probabilities:  # without its last token, the prompt has room for one
        tokenizers.check_prompts(config, [[*r.prompt][:-1] or r.prompt], 1)
    else:
        tokenizers.check_prompts(config, [r.prompt], new)
    if (max(len(r.prompt), new) if config.reads_source else len(r.prompt) + new) > context:
        text = f"a prompt of {len(r.prompt)} tokens with max_new_tokens={new} exceeds the engine's context of"
        problems.append(f"{text} {context}; shorten the prompt or lower max_new_tokens")
    if wrong := [i for i in (*r.prompt, *r.target) if not 0 <= i < vocab_size]:
        problems.append(f"prompt has token id {wrong[0]}, outside the vocabulary of {vocab_size}")
    if not -(2**63) <= r.seed < 2**63:
        problems.append(f"seed={r.seed} must be a 64-bit integer")
    if r.log_probabilities is not None and not 0 <= r.log_probabilities <= alternatives:
        problems.append(f"log_probabilities={r.log_probabilities} must be from 0 to {alternatives}")
    if r.prompt_log_probabilities and config.reads_source:
        problems.append("prompt_log_probabilities: the source of this model has no log-probabilities")
    if not np.isfinite([r.presence_penalty, r.frequency_penalty]).all():
        problems.append("presence_penalty and frequency_penalty must be finite")
    bad = [i for i, x in r.logit_bias.items() if not 0 <= i < vocab_size or not np.isfinite(x)]
    if bad:
        text = f"logit_bias has id {bad[0]}; ids must be below {vocab_size}, and their numbers finite"
        problems.append(text)
    if problems:
        raise UserError("; ".join(problems))


def token_of(token: int, found: Any, alternatives: int | None, of_prompt: bool = False) -> Token:
    """A Token. found: its row of `most_probable`, or nothing."""
    if not found:
        return Token(token, of_prompt=of_prompt)
    logp, ids, best = found
    pairs = zip(ids[:alternatives].tolist(), best[:alternatives].tolist(), strict=True)
    return Token(token, float(logp), dict(pairs), of_prompt)
