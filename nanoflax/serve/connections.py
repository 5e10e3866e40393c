"""Connections of the HTTP server: how many there may be, and how long the head of a request may take."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 900  # a process usually has at most 1,024 open files
HEAD_SECONDS = 20.0  # for the request line and the headers
REFUSAL = b"HTTP/1.1 %s\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"


class Connection(H11Protocol):
    """A connection of uvicorn that is closed if there are too many, or if a client is too slow to say what it wants.

    Without these limits, a client that sends a byte now and then could hold all connections.
    """

    _timer: asyncio.TimerHandle | None = None  # runs while the head of a request is expected

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(b"503 Service Unavailable")
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._refuse, b"408 Request Timeout")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            if self.conn.our_state is not h11.DONE:  # else the request has its answer, and its body still comes
                self.transport.write(REFUSAL % status)
            self.transport.close()
