"""The engine: requests come at any time and share one batch of slots, which decode a token each in every step.

Between two steps a piece of one waiting prompt is read: in turn of the first one and of the shortest. The next step
starts before the tokens of the last one are read, except where a constraint must see them first. A prompt that needs a
function that is not compiled yet lets the others pass; one more of them than there are slots may wait so, and a short
one beside them.
"""

import collections
import contextlib
import dataclasses
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nanoflax import generate, tokenizers
from nanoflax.errors import UserError
from nanoflax.generate import Filters
from nanoflax.nn import LanguageModel
from nanoflax.serve import attention
from nanoflax.serve.prefixes import Prefixes
from nanoflax.serve.programs import FILTERS, PADDED, Programs, context_of
from nanoflax.serve.requests import Finish, Request, Ticket, Token, check, token_of

PREFIXES = 4  # prompts whose caches are kept


@dataclasses.dataclass
class _Reply:
    """A ticket whose prompt is read, or that has a slot."""

    ticket: Ticket
    left: int  # tokens of the prompt that are not read yet
    slot: int = -1  # none yet
    text: int = 0  # tokens before the first new one
    least: int = 0  # the smallest size of the cache, for a source
    started: int = 0  # steps with this reply that have started
    received: int = 0  # tokens that were read back
    finished: bool = False

    @property
    def limit(self) -> int:
        return max(1, self.ticket.request.max_new_tokens)


class Engine:
    """Generates replies in a thread of its own. Use it as a context manager.

    slots: replies that are generated at once. context: the most tokens of a prompt and its reply; the memory of a slot
    grows with the longest text in the slots. Functions for short texts are compiled when the context manager begins,
    others soon after it, those that a text waits for first; a request compiles nothing. Leaving the context manager
    waits for all replies; after an exception they are cancelled.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: dict,
        tokenizer: Any,
        slots: int = 8,
        context: int | None = None,
        queue_limit: int | None = None,
        prefixes: int = PREFIXES,
    ) -> None:
        for name, value, least in (("slots", slots, 1), ("prefixes", prefixes, 0)):
            if value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        self.model, self.params, self.tokenizer, self.slots = model, params, tokenizer, slots
        self.context = context_of(model.config, context)
        self.queue_limit = queue_limit
        self.counts = dict.fromkeys(("steps", "pieces", "tokens", "prompt_tokens", "reused_tokens", "requests"), 0)
        self.failure = ""  # why the engine stopped, if it did
        c = model.config
        self.eos_ids = tuple(tokenizers.stop_ids(tokenizer)) if tokenizer is not None else c.generation.eos_token_id
        self.vocab_size = c.vocab_size - c.vocab_padding if tokenizer is None else tokenizer.vocab_size
        self._prefixes_kept = prefixes
        self._queue: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # between the last request and the end
        self._closing = self._cancelling = False
        self._replies: list[_Reply | None] = [None] * slots
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._shortest = True  # whether the shortest prompt had its turn last
        self._reading: dict[int, tuple[_Reply, Iterator[bool]]] = {}  # prompts that are read, by the id of the reply
        self._pending: collections.deque = collections.deque()  # (replies, tokens, scores) of the steps that started
        self._filters: Filters | None = None  # on the device; None: they must be made again
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "Engine":
        if self.model.config.head == "lm":
            arguments = self.eos_ids, self.vocab_size, self.slots, self.context
            self._programs = Programs(self.model, self.params, *arguments)
            with contextlib.ExitStack() as stack:
                stack.callback(self._programs.compiler.close)
                self._prefixes = Prefixes(self._prefixes_kept, self._programs.exact, PADDED)
                self._state = self._programs.start()
                self._programs.filters([None] * self.slots)  # compiles the conversions of numbers, here and in `submit`
                generate.make_filters(temperature=[1])
                stack.pop_all()
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._lock:
            self._closing, self._cancelling = True, kind is not None
        self._queue.put(None)
        self._thread.join()
        if self.model.config.head == "lm":
            self._programs.compiler.close()

    @property
    def active(self) -> int:
        """How many slots have a reply."""
        return sum(reply is not None for reply in self._replies)

    @property
    def queued(self) -> int:
        """How many requests wait for a slot, besides those whose prompts are being read."""
        return len(self._waiting) + self._queue.qsize()

    def submit(self, request: Request, receive: Callable[[Any], None]) -> Ticket:
        """Add a request to the queue. receive: see Ticket.

        Raises: UserError for a bad request, before anything runs.
        """
        c, most = self.model.config, self._programs.alternatives
        check(request, c, self.context, self.vocab_size, most)
        generate.make_filters(**{name: [getattr(request, name)] for name in FILTERS}, defaults=c.generation)
        ticket = Ticket(request, receive)
        with self._lock:
            if self._closing:
                raise UserError(self.failure or "the engine is closed; it takes no request")
            if self.queue_limit is not None and self.queued >= self.queue_limit:
                raise UserError(f"{self.queued} requests wait already; send the request again later")
            self._queue.put(ticket)
        return ticket

    # In the engine's thread.

    def _run(self):
        try:
            self._serve()
        except BaseException as error:
            traceback.print_exc()
            with self._lock:
                self.failure, self._closing = f"the engine failed: {error}", True
            self._receive_tickets(wait=False)
            started = [reply for replies, *_ in self._pending for reply in replies]
            replies = [*self._replies, *(reply for reply, _ in self._reading.values()), *started]
            tickets = {id(r.ticket): r.ticket for r in replies if r and not r.finished}
            for ticket in [*tickets.values(), *self._waiting]:
                self._send(ticket, Finish("error", self.failure))

    def _serve(self):
        while True:
            work = self._pending or self._waiting or self._reading or self.active
            self._receive_tickets(wait=not work and not self._closing)
            if self._closing and not (work or self._waiting):
                return
            self._cancel()
            read, started = self._read_piece(), self._start_step()
            constrained = any(r and r.ticket.request.constraint for r in self._replies)
            if not (read or started or self._pending):
                self._programs.compiler.wait(0.02)
            while len(self._pending) > (1 if started and self.active and not constrained else 0):
                self._finish_step(*self._pending[0])  # it stays there until then, for `_run`
                self._pending.popleft()

    def _receive_tickets(self, wait):
        """Move tickets from the queue to the waiting ones; wait: for at least one."""
        while wait or not self._queue.empty():
            wait, ticket = False, self._queue.get()
            if ticket is not None:  # None: the engine closes
                self._waiting.append(ticket)
                ticket.number = self.counts["requests"] = self.counts["requests"] + 1

    def _cancel(self):
        """Drop the tickets that were cancelled."""
        kept, gone = collections.deque(), []
        for ticket in self._waiting:
            (gone if ticket.cancelled or self._cancelling else kept).append(ticket)
        self._waiting = kept
        for ticket in gone:
            self._send(ticket, Finish("cancelled"))
        for reply in (*self._replies, *(reply for reply, _ in self._reading.values())):
            if reply and (reply.ticket.cancelled or self._cancelling):
                self._finish(reply, "cancelled")

    def _finish(self, reply, reason, message=""):
        reply.finished = True
        self._free(reply)
        self._reading.pop(id(reply), None)
        self._send(reply.ticket, Finish(reason, message))

    def _free(self, reply):
        if reply.slot >= 0 and self._replies[reply.slot] is reply:
            self._replies[reply.slot] = self._filters = None

    def _send(self, ticket, event):
        try:
            ticket.receive(event)
        except Exception:  # a fault of the receiver must not stop the other replies
            traceback.print_exc()
            ticket.cancelled = True

    # Prompts.

    def _read_piece(self):
        """Read a piece of a prompt that can go on, if there is one. Returns whether there was.

        In turn this is the first prompt and the one with the fewest tokens left: a short prompt does not wait for long
        ones, which get every second piece. A prompt for the smallest cache passes those that wait for a function.
        """
        self._shortest, found, new = not self._shortest, [*self._reading.values()], None
        if self._waiting and self.active < self.slots:
            lengths = [len(ticket.request.prompt) for ticket in self._waiting]
            i = lengths.index(min(lengths)) if self._shortest else 0
            if len(found) <= self.slots + (lengths[i] < self._programs.sizes[0]):
                new = _Reply(self._waiting[i], lengths[i])
                found.append((new, self._pieces(new)))
        for reply, pieces in sorted(found, key=lambda pair: pair[0].left if self._shortest else pair[0].ticket.number):
            if reply is new:
                del self._waiting[i]
                self._reading[id(reply)] = reply, pieces
            if next(pieces, True):
                return True
        return False

    def _pieces(self, reply):
        """Reads a prompt and puts it into a slot. Yields True after each piece, and False while it must wait for a slot
        or a function."""
        p, r = self._programs, reply.ticket.request
        prompt = text = [*map(int, r.prompt)]
        self.counts["prompt_tokens"] += len(prompt)
        if p.reads_source:
            size = p.size_for(max(len(prompt), len(r.target) + 1))
            yield from self._until("read", size)
            cache, start = p.read(prompt, size)
            text = [start]
        else:
            cache = yield from self._read(reply, prompt)
        if r.max_new_tokens == 0:
            if r.attention is not None:
                self._send(reply.ticket, (yield from attention.read(p, cache, r)))
            self._finish(reply, "length")
            return
        row, source = (np.full(p.sizes[-1], -1, np.int32) for _ in range(2))
        row[: len(text)], source[: len(prompt)] = text, prompt
        reply.text, reply.least = len(text), p.size_of(cache) if p.reads_source else 0
        least = max(p.size_of(cache), reply.text)
        while None not in self._replies or not (
            p.compiler.ready(("insert", self._size(least), p.size_of(cache))) and self._fit(least)
        ):
            yield False
        numbers = len(text), r.max_new_tokens, r.seed, source if p.reads_source else None
        reply.slot = self._replies.index(None)
        self._state = p.insert(self._state, reply.slot, cache, text[-1], row, *numbers)
        self._replies[reply.slot], self._filters = reply, None
        del self._reading[id(reply)]

    def _read(self, reply, prompt):
        """Reads a prompt but its last token, in a cache that grows; yields as `_pieces`, and returns the cache."""
        p, r = self._programs, reply.ticket.request
        last, scores, cache, at, shared = len(prompt) - 1, [], None, 0, 0
        if not r.prompt_log_probabilities:
            cache, at, shared = self._prefixes.find(prompt[:last])
        if cache is None:
            size, cache = p.sizes[0], p.empty()
        else:
            old, size = p.size_of(cache), p.size_for(at)
            yield from self._until("copy", old, size)
            cache = p.copy(cache, size)
        self.counts["reused_tokens"] += at
        stops = [shared] * (p.exact and shared - at >= PADDED) + [last]  # keep the state of a shared beginning
        while at < last:
            if at == size:
                while (larger := p.larger(size, p.size_for(last))) is None:
                    yield False
                size, cache = larger, p.copy(cache, larger)
            end = next(i for i in stops if i > at)
            while (n := p.next_piece(end - at, at, size)) is None:
                yield False
            cache, found = p.piece(cache, prompt, at, n, r.prompt_log_probabilities)
            at = min(at + n, end)
            reply.left = last - at
            scores.append(found)
            self.counts["pieces"] += 1
            if at == end < last:
                yield from self._until("copy", size, size)
                self._prefixes.add(prompt[:at], p.copy(cache, size))
            if at < last:
                yield True
        self._prefixes.add(prompt[:last], cache)
        if r.prompt_log_probabilities:
            self._send_prompt(reply.ticket, prompt, scores)
        return cache

    def _until(self, *name):
        while not self._programs.compiler.ready(name):
            yield False

    def _send_prompt(self, ticket, prompt, scores):
        """Send the tokens of a prompt with their log-probabilities."""
        scores = [np.concatenate(x) for x in zip(*scores, strict=True)] if scores else [[]] * 3
        self._send(ticket, Token(prompt[0], of_prompt=True))
        for token, *found in zip(prompt[1:], *scores, strict=False):
            self._send(ticket, token_of(token, found, ticket.request.log_probabilities or 0, of_prompt=True))

    # Steps.

    def _size(self, least):
        """The smallest size of the slots, `least` or more, with room for the next token of every reply; the present one
        until the functions of a smaller one are compiled."""
        p = self._programs
        needed = max([least, 1, *(max(r.least, r.text + r.started) for r in self._replies if r)])
        now, size = p.size_of(self._state.cache, 1), p.size_for(needed)
        return now if size < now and not p.compiler.has(("resize", now, size), ("step", size)) else size

    def _fit(self, least):
        """Give the slots this size. Returns whether its functions are compiled."""
        p = self._programs
        now, size = p.size_of(self._state.cache, 1), self._size(least)
        names = [("step", size)] + [("resize", now, size)] * (size != now)
        if not p.compiler.ready(*names):
            return False
        self._state = p.resize(self._state, size)
        return True

    def _start_step(self):
        """Start a step for the replies that have slots. Returns whether this was possible."""
        if not self.active or not self._fit(0):
            return False
        allowed = self._allowed()
        if not self.active:
            return False
        if self._filters is None:
            requests = [reply and reply.ticket.request for reply in self._replies]
            self._filters, self._wanted = self._programs.filters(requests)
        replies, filters = [*self._replies], self._filters
        filters = filters if allowed is None else filters._replace(allowed=allowed)
        self._state, (tokens, scores) = self._programs.step(self._state, filters, self._wanted)
        self._pending.append((replies, tokens, scores if self._wanted.any() else None))
        self.counts["steps"] += 1
        for reply in filter(None, replies):
            reply.started += 1
            if reply.started == reply.limit:
                self._free(reply)  # a new prompt may come into the slot after this step
        return True

    def _allowed(self):
        """Packed bits [slots, W] of the tokens that may come next, or None if no reply has a constraint."""
        rows, shape = None, self._programs.all_allowed.shape
        for reply in filter(None, self._replies):
            if constraint := reply.ticket.request.constraint:
                try:
                    bits = np.asarray(constraint.allowed(), np.uint32)
                    bits = np.pad(bits, (0, shape[1] - len(bits)))
                except Exception as error:  # such as a schema that needs too much work; the other replies go on
                    self._finish(reply, "refused", str(error))
                    continue
                if not bits.any():
                    self._finish(reply, "stop")
                    continue
                rows = np.full(shape, ~np.uint32(0)) if rows is None else rows
                rows[reply.slot] = bits
        return rows

    def _finish_step(self, replies, tokens, scores):
        """Wait for a step, and send its tokens."""
        tokens = np.asarray(tokens).tolist()
        scores = None if scores is None else [np.asarray(x) for x in scores]
        for slot, (reply, token) in enumerate(zip(replies, tokens, strict=True)):
            if reply is None or reply.finished:
                continue
            r = reply.ticket.request
            if reply.ticket.cancelled:
                self._finish(reply, "cancelled")
            elif token in self.eos_ids:
                self._finish(reply, "stop")
            else:
                if r.constraint:
                    try:
                        r.constraint.accept(token)
                    except Exception as error:
                        self._finish(reply, "refused", str(error))
                        continue
                reply.received += 1
                self.counts["tokens"] += 1
                found = r.log_probabilities is not None and scores and [x[slot] for x in scores]
                self._send(reply.ticket, token_of(token, found, r.log_probabilities))
                if reply.received == reply.limit:
                    self._finish(reply, "length")
