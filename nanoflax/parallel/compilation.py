"""The time that a thread has spent compiling, so that rates of training can leave it out."""

import collections
import threading
import time
from typing import Any

import jax.monitoring

_spans: dict[int, list[tuple[float, float]]] = {}  # thread: (start, end) of its compilations, without overlaps
_totals: dict[int, float] = collections.defaultdict(float)  # thread: the sum of its spans, in seconds


def compile_seconds() -> float:
    """Seconds that this thread has spent in tracing and compiling since the first call of this function."""
    if not _spans:
        _spans[threading.get_ident()] = []
        jax.monitoring.register_event_duration_secs_listener(_record)
    return _totals[threading.get_ident()]


def _record(event: str, duration_secs: float, **_: Any) -> None:
    if not event.startswith("/jax/core/compile/"):
        return
    thread, end = threading.get_ident(), time.monotonic()
    spans = _spans.setdefault(thread, [])
    while spans and spans[-1][0] >= end - duration_secs:  # inside this one: the trace of an inner function
        start, inner_end = spans.pop()
        _totals[thread] -= inner_end - start
    spans.append((end - duration_secs, end))
    _totals[thread] += duration_secs
