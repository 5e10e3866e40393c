"""Counts and times of the server, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server."""

    def __init__(self, slots: int) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("nanoflax_requests", "HTTP requests", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("nanoflax_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generated_tokens = Counter("nanoflax_generated_tokens", "New tokens", registry=registry)
        self.first_text = Histogram(
            "nanoflax_time_to_first_text_seconds",
            "From a request to its first text",
            registry=registry,
            buckets=_SECONDS,
        )
        self.response = Histogram(
            "nanoflax_response_seconds", "From a request to its end", ["path"], registry=registry, buckets=_SECONDS
        )
        self._running = Gauge("nanoflax_texts_running", "Texts that have a slot", registry=registry)
        self._waiting = Gauge("nanoflax_texts_waiting", "Texts that wait for a slot", registry=registry)
        Gauge("nanoflax_slots", "Texts that can be generated together", registry=registry).set(slots)

    def text(self, running: int, waiting: int) -> bytes:
        """All metrics, in the text format of Prometheus."""
        self._running.set(running)
        self._waiting.set(waiting)
        return generate_latest(self._registry)
