"""What this node serves, by method: a table that connections look into."""

from dataclasses import dataclass

from p2p.face import Handler, Quick, StreamHandler


@dataclass(frozen=True, slots=True)
class Service:
    """One method: unary (``handler``, perhaps ``quick``) or streaming (``stream``)."""

    handler: Handler | None = None
    quick: Quick | None = None
    stream: StreamHandler | None = None


class Services(dict[str, Service]):
    """Methods and their services."""

    def add(self, method: str, service: Service) -> None:
        """Register a method, once."""
        assert method not in self, f"{method} is served already"
        self[method] = service
