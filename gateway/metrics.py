"""The gateway's own metrics. Owns their names and labels; every label has few values, whatever clients send."""

import time
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TEXT_SECONDS = 1.0
"""So old may be what :meth:`Metrics.text` gives: making it takes longer than most requests, and anybody may ask."""


class Metrics:
    """Counters and histograms in the caller's registry, taken out of it again at the end of the block."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._text, self._text_ends = b"", 0.0
        self.tokens = Counter("rios_gateway_tokens", "Tokens of settled requests.", ("kind",), registry=registry)
        self._prompt, self._completion = self.tokens.labels("prompt"), self.tokens.labels("completion")
        self._counted: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self.requests = Counter("rios_gateway_requests", "Answered requests.", ("route", "status"), registry=registry)
        self.seconds = Histogram(
            "rios_gateway_request_seconds",
            "Time from a request's head to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "rios_gateway_first_token_seconds",
            "Time from admission to the first token of an answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.running = Gauge("rios_gateway_running_requests", "Requests being answered.", registry=registry)
        self.waiting = Gauge("rios_gateway_waiting_requests", "Requests waiting for their turn.", registry=registry)
        self.sign_ins = Counter(
            "rios_gateway_sign_ins", "Attempts to sign in or go on.", ("method", "result"), registry=registry
        )
        self.refused = Counter(
            "rios_gateway_refused_connections",
            "Connections that were refused or ended for what they cost, and sources not listened to for a while.",
            ("reason",),
            registry=registry,
        )
        self._collectors = (
            self.requests,
            self.seconds,
            self.first_token_seconds,
            self.tokens,
            self.running,
            self.waiting,
            self.sign_ins,
            self.refused,
        )

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for collector in self._collectors:
            self.registry.unregister(collector)

    def text(self) -> bytes:
        """All of the registry in Prometheus' format."""
        now = time.monotonic()
        if now >= self._text_ends:
            self._text, self._text_ends = generate_latest(self.registry), now + TEXT_SECONDS
        return self._text

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request under its route's path, as the endpoint writes it."""
        counted = self._counted.get((route, status))
        if counted is None:  # finding a child by its labels costs more than counting it
            counted = self.requests.labels(route, str(status)), self.seconds.labels(route)
            self._counted[route, status] = counted
        counted[0].inc()
        counted[1].observe(seconds)

    def observe_refused(self, reason: str) -> None:
        """Count a connection: ``rate``, ``arriving``, ``share`` or ``full`` (refused), ``ousted`` (made room for
        another), ``slow`` (read too slowly while others waited), or a source that is ``shunned`` for a while."""
        self.refused.labels(reason).inc()

    def observe_tokens(self, prompt: int, completion: int) -> None:
        """Count the tokens of a settled request."""
        self._prompt.inc(prompt)
        self._completion.inc(completion)

    def completion_tokens(self) -> float:
        """Tokens of all answers settled since the start."""
        return next(sample.value for metric in self._completion.collect() for sample in metric.samples)
