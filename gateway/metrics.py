"""The gateway's own metrics. Owns their names and labels; every label has few values, whatever clients send."""

from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

ROUTES = (
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/openapi.json",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/v1/billing/balance",
    "/v1/billing/usage",
    "/v1/ledger/balance",
)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and histograms in the caller's registry, taken out of it again at the end of the block."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
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
        self.tokens = Counter("rios_gateway_tokens", "Tokens of settled requests.", ("kind",), registry=registry)
        self.running = Gauge("rios_gateway_running_requests", "Requests being answered.", registry=registry)
        self._collectors = (self.requests, self.seconds, self.first_token_seconds, self.tokens, self.running)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for collector in self._collectors:
            self.registry.unregister(collector)

    def observe_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request under its route."""
        route = path
        if path not in ROUTES:
            route = "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def observe_tokens(self, prompt: int, completion: int) -> None:
        """Count the tokens of a settled request."""
        self.tokens.labels("prompt").inc(prompt)
        self.tokens.labels("completion").inc(completion)
