"""The texts of one HTTP request, piece by piece: tokens of the engine decoded, and cut at stop strings."""

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from nanoflax import tokenizers
from nanoflax.serve.engine import Engine
from nanoflax.serve.errors import ApiError
from nanoflax.serve.requests import Attention, Finish, Request, Ticket, Token


@dataclasses.dataclass(frozen=True)
class PlacedToken:
    """A token, and the offset of its first character in the text of the choice."""

    token: Token
    offset: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a choice's text, with the tokens that belong to it. finish_reason: of the last piece."""

    text: str
    tokens: list[PlacedToken]
    finish_reason: str | None = None


class Choice:
    """The text of one request to the engine.

    stops: the text ends before any of them. before: the ids that the new ones follow. echo: the text of the prompt if
    it is a part of the text, else None. rule: the field of the HTTP request with the rule that the text must follow.
    with_calls: the finish_reason of a text with calls of tools; empty: calls are text.
    """

    def __init__(
        self,
        tokenizer: Any,
        request: Request,
        stops: Sequence[str],
        before: Sequence[int],
        echo: str | None,
        rule: str = "",
        with_ids: bool = False,
        with_calls: str = "",
    ) -> None:
        self.request, self.echo, self.rule, self.with_ids = request, echo, rule, with_ids
        self.with_calls = with_calls
        self.ticket: Ticket | None = None
        self.submitted, self.new_tokens, self.finish_reason = time.monotonic(), 0, None
        self._decoder = tokenizers.StreamingDecoder(tokenizer, before, stops)
        # Offsets: the same text without stop strings.
        self._plain = tokenizers.StreamingDecoder(tokenizer, before)
        self._of_prompt = tokenizers.StreamingDecoder(tokenizer)
        self._offset, self._prompt_offset, self._length = len(echo or ""), 0, len(echo or "")
        self._pending: list[PlacedToken] = []
        self._echoed = echo is None

    def add(self, event: Token | Finish) -> Piece | None:
        """The next piece, if the event completes one. Raises: ApiError for a Finish that is no end of a text."""
        if self.finish_reason:
            return None
        if isinstance(event, Finish):
            if event.reason == "refused":
                raise ApiError(400, f"{self.rule}: {event.message}", self.rule)
            if event.reason in ("error", "cancelled"):
                raise _error_of(event)
            text = self._decoder.finish()  # it may complete a stop string
            return self._piece(text, "stop" if self._decoder.stopped else event.reason)
        if self.request.log_probabilities is not None or self.with_ids:
            self._pending.append(self._placed(event))
        if event.of_prompt:
            return None
        self.new_tokens += 1
        text = self._decoder.add([event.id])
        if self._decoder.stopped:
            if self.ticket is not None:
                self.ticket.cancel()
            return self._piece(text, "stop")
        return self._piece(text) if text else None

    def _piece(self, text: str, finish_reason: str | None = None) -> Piece:
        self.finish_reason, self._length = finish_reason, self._length + len(text)
        tokens, self._pending = self._pending, []
        if self._decoder.stopped:
            tokens = [token for token in tokens if token.offset < self._length]
        if not self._echoed:
            text, self._echoed = (self.echo or "") + text, True
        return Piece(text, tokens, finish_reason)

    def _placed(self, token: Token) -> PlacedToken:
        if token.of_prompt:
            offset = self._prompt_offset
            self._prompt_offset += len(self._of_prompt.add([token.id]))
        else:
            offset = self._offset
            self._offset += len(self._plain.add([token.id]))
        return PlacedToken(token, offset)


class Replies:
    """The choices of one HTTP request, generated together. Iterate over it once: (index of the choice, Piece)."""

    def __init__(self, choices: Sequence[Choice], finished: Callable[[Choice], None]) -> None:
        self.choices, self._finished, self.started = choices, finished, False
        self._events: asyncio.Queue[tuple[int, Token | Finish]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def submit(self, engine: Engine) -> None:
        """Raises: UserError for a bad request; then none of the choices runs."""
        try:
            for i, choice in enumerate(self.choices):
                choice.ticket = engine.submit(choice.request, functools.partial(self._receive, i))
        except BaseException:
            self.cancel()
            raise

    def _receive(self, index: int, event: Token | Finish) -> None:
        """In the thread of the engine."""
        with contextlib.suppress(RuntimeError):  # the server's loop has ended
            self._loop.call_soon_threadsafe(self._arrived, index, event)

    def _arrived(self, index: int, event: Token | Finish) -> None:
        self.started = True
        self._events.put_nowait((index, event))
        if isinstance(event, Finish):
            self._finished(self.choices[index])

    def cancel(self) -> None:
        """Free the slots of all choices at the engine's next step."""
        for choice in self.choices:
            if choice.ticket is not None:
                choice.ticket.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Raises: ApiError if the engine failed, the server stops, or a text cannot follow its rule."""
        try:
            while not all(choice.finish_reason for choice in self.choices):
                index, event = await self._events.get()
                if piece := self.choices[index].add(event):
                    yield index, piece
        finally:
            self.cancel()


async def attention_of(engine: Engine, request: Request) -> Attention:
    """The Attention of a request. Raises: ApiError if the engine failed or the server stops; UserError for a bad
    request."""
    loop, found = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def receive(event):
        with contextlib.suppress(RuntimeError):  # the server's loop has ended
            loop.call_soon_threadsafe(lambda: found.done() or found.set_result(event))

    ticket = engine.submit(request, receive)
    try:
        event: Any = await found
    finally:
        ticket.cancel()
    if isinstance(event, Attention):
        return event
    raise _error_of(event)


def _error_of(finish):
    if finish.reason == "error":
        return ApiError(500, finish.message or "the engine failed")
    return ApiError(503, "the server is stopping; send the request again later", code="stopping")
