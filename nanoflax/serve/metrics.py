"""Counts and times of the server, for Prometheus."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from nanoflax.serve.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server. engine: None for a model that generates no text."""

    def __init__(self, engine: Engine | None) -> None:
        self._registry = registry = CollectorRegistry()
        of: Any = dict(namespace="nanoflax", registry=registry)
        self.requests = Counter("requests", "HTTP requests.", ["path", "status"], **of)
        self.embedded_tokens = Counter("embedded_tokens", "Tokens of embedded texts.", **of)
        times: Any = of | dict(unit="seconds", buckets=_SECONDS)
        self.first_text = Histogram("time_to_first_text", "From a request to its first text.", **times)
        self.response = Histogram("response", "From a request to its end.", ["path"], **times)
        if engine is not None:
            registry.register(_OfEngine(engine))

    def text(self) -> bytes:
        """All metrics, in the text format of Prometheus."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        e = self._engine
        yield GaugeMetricFamily("nanoflax_slots", "Texts that can be generated together.", e.slots)
        yield GaugeMetricFamily("nanoflax_slots_in_use", "Texts that are generated now.", e.active)
        yield GaugeMetricFamily("nanoflax_queue", "Texts that wait for a slot.", e.queued)
        for name, count in e.counts.items():  # steps, tokens, prompt_tokens, reused_tokens, ...
            yield CounterMetricFamily(f"nanoflax_engine_{name}", f"Counted by the engine: {name}.", count)
