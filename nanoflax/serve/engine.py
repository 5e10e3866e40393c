"""The engine: requests come at any time and share one batch."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from nanoflax import generate, tokenizers
from nanoflax.nn import LanguageModel


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to generate. None takes the value of the model's generation settings."""

    prompt: Sequence[int]  # token ids; for a model with a source, the source
    max_new_tokens: int = 64
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    log_probabilities: int | None = None  # how many alternatives of each token are reported; None: nothing
    prompt_log_probabilities: bool = False  # also of the prompt's tokens, before the first new token
    constraint: Any = None  # what the text must match


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a reply, or of its prompt."""

    id: int
    log_probability: float | None = None  # in nats; None for the first token of a prompt
    alternatives: Mapping[int, float] = dataclasses.field(default_factory=dict)  # the most probable, best first
    of_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Finish:
    """The end of a reply. reason: stop (an id that ends a text), length, cancelled or error."""

    reason: str
    message: str = ""  # of an error


@dataclasses.dataclass
class Ticket:
    """A request in the engine. `receive` is called in the engine's thread with each Token, last with the Finish."""

    request: Request
    receive: Callable[[Token | Finish], None]
    cancelled: bool = False

    def cancel(self) -> None:
        """Free the slot at the next step. The Finish follows."""
        self.cancelled = True


class Engine:
    """Generates replies in a thread of its own. Use it as a context manager."""

    def __init__(self, model: LanguageModel, params: dict, tokenizer: Any, slots: int = 8):
        self.model, self.params, self.tokenizer, self.slots = model, params, tokenizer, slots
        self._queue: queue.Queue[Ticket | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._queue.put(None)
        self._thread.join()

    def submit(self, request: Request, receive: Callable[[Token | Finish], None]) -> Ticket:
        """Add a request to the queue.

        Raises: UserError for a bad request, before anything runs.
        """
        tokenizers.check_prompts(self.model.config, [request.prompt], request.max_new_tokens)
        ticket = Ticket(request, receive)
        self._queue.put(ticket)
        return ticket

    def _run(self):
        while ticket := self._queue.get():
            r, reason = ticket.request, "length"
            names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
            filters = {name: getattr(r, name) for name in names}
            rng, ends = jax.random.PRNGKey(r.seed), tokenizers.stop_ids(self.tokenizer)
            vocab_size = self.tokenizer.vocab_size
            for [new] in generate.stream(
                self.model, self.params, [r.prompt], r.max_new_tokens, rng, ends, vocab_size, chunk=1, **filters
            ):
                if not new or ticket.cancelled:
                    reason = "cancelled" if ticket.cancelled else "stop"
                    break
                ticket.receive(Token(new[0]))
            ticket.receive(Finish(reason))
