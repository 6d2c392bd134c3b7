"""What open pages are told: ``GET /dashboard/live``, server-sent events.

One sampler looks at the node once a second while somebody watches, and not at all otherwise. Watchers are not queued
for: each is shown the newest sample whenever it is ready for one, and only the topics that changed for it, so a slow
reader misses steps in between and never holds memory.

Invariants: at most :data:`WATCHERS_MAX` watchers, so many of one user as ``gateway/listeners.py`` says; a watcher whose
session ends, or whose user loses a permission, is shown nothing more (``gateway/standing.py``); requests of others are
shown only to who may read everybody's.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.accounts import Principal
from gateway.dashboard.session import can, current_caller
from gateway.db import stamps
from gateway.endpoint import Caller
from gateway.errors import ApiError
from gateway.listeners import Listeners
from gateway.roles import Permission
from gateway.standing import Standing

_logger = logging.getLogger("rios.gateway")

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}
SAMPLE_SECONDS = 1.0
QUIET_SECONDS = 15.0
_SHOWN: tuple[Permission, ...] = ("workers:read", "users:manage")
"""What decides about what a watcher sees."""
WATCHERS_MAX = 200


@dataclass(frozen=True, slots=True)
class Sample:
    """What is the same for everybody, as one event for each topic, made once; and the requests that run."""

    topics: Mapping[str, bytes]
    requests: tuple[Mapping[str, Any], ...]


class Live:
    """The newest sample and who waits for it. :meth:`run` must be running."""

    def __init__(self) -> None:
        self.sample = Sample({}, ())
        self.places = Listeners("pages", WATCHERS_MAX)
        self._changed = trio.Event()
        self._wanted = trio.Event()
        self._tokens_before = 0.0

    async def run(self, service: Any, site: Any) -> None:  # noqa: ANN401 - gateway.app's Service and Site
        """Sample once a second while somebody watches, until cancelled."""
        while True:
            if not self.places:
                self._wanted = trio.Event()
                await self._wanted.wait()
                self._tokens_before = _tokens(service)
            try:
                self.sample = self._look(service, site)
            except Exception:
                _logger.exception("the node could not be looked at; pages keep what they show")
            self._changed.set()
            self._changed = trio.Event()
            await trio.sleep(SAMPLE_SECONDS)

    @contextmanager
    def watching(self, who: Principal) -> Iterator[None]:
        """Count a watcher. Raises as :meth:`gateway.listeners.Listeners.require`."""
        with self.places.held(who):
            self._wanted.set()
            yield

    async def wait_change(self) -> None:
        """Until the next sample."""
        await self._changed.wait()

    def _look(self, service: Any, site: Any) -> Sample:  # noqa: ANN401 - as in run
        tokens = _tokens(service)
        speed, self._tokens_before = max(0.0, (tokens - self._tokens_before) / SAMPLE_SECONDS), tokens
        running = tuple(_request(ticket) for ticket in service.till.running())
        ready, reasons = site.health.ready()
        pulse: dict[str, Any] = {
            "tokens_per_s": round(speed, 1),
            "active": len(running),
            "ready": ready,
            "reasons": list(reasons),
        }
        topics: dict[str, bytes] = {}
        if site.ledger_view is not None:
            pulse["balance"] = site.ledger_view.balance().balance
        if site.swarm is not None:
            topics["workers"] = msgspec.json.encode(site.swarm.workers())
            topics["maps"] = msgspec.json.encode(site.swarm.maps())
            topics["deployments"] = msgspec.json.encode(site.swarm.deployments())
        topics["pulse"] = msgspec.json.encode(pulse)
        return Sample({topic: _event(topic, data) for topic, data in topics.items()}, running)


def _tokens(service: Any) -> float:  # noqa: ANN401 - gateway.openai.job.Service
    """Tokens of answers so far: what was settled and what runs."""
    settled: float = service.metrics.completion_tokens()
    running: int = sum(ticket.delivered_tokens for ticket in service.till.running())
    return settled + running


def _request(ticket: Any) -> Mapping[str, Any]:  # noqa: ANN401 - gateway.till.Ticket
    held = ticket.reservation
    seconds = max(0.001, (stamps.now_ms() - ticket.started_ms) / 1000)
    return {
        "id": held.id,
        "user_id": held.user_id,
        "model": held.model,
        "endpoint": held.endpoint,
        "prompt_tokens": held.prompt_tokens,
        "max_tokens": held.max_tokens,
        "tokens": ticket.delivered_tokens,
        "tokens_per_s": round(ticket.delivered_tokens / seconds, 1),
        "started_ms": ticket.started_ms,
    }


async def live(request: Request) -> Response:
    """The stream. 401 without a session, 429 when the user has too many, 503 when too many watch."""
    request.scope["state"]["route"] = "/dashboard/live"
    caller = await current_caller(request, "workers:read")
    if caller is None:
        raise ApiError("unauthenticated", "sign in first")
    hub: Live = request.app.state.live
    hub.places.require(caller.principal)
    return _Events(caller, hub, request.app.state.service.guard.standing)


class _Events(Response):
    """Writes what changes until the client leaves, which cancels it, or its session ends."""

    def __init__(self, caller: Caller, hub: Live, standing: Standing) -> None:
        super().__init__(headers=_STREAM_HEADERS)
        del self.headers["content-length"]
        self._caller = caller
        self._hub = hub
        self._standing = standing
        self._shown: dict[str, bytes] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._hub.watching(self._caller.principal):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b"retry: 2000\n\n", "more_body": True})
            with suppress(ApiError), self._standing.while_allowed(self._caller.principal, *_SHOWN):
                await self._tell(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell(self, send: Send) -> None:
        told = trio.current_time()
        while True:
            news = self._news()
            if not news and trio.current_time() - told >= QUIET_SECONDS:
                news = [b": still here\n\n"]  # a client that is gone is found out by writing to it
            for each in news:
                told = trio.current_time()
                await send({"type": "http.response.body", "body": each, "more_body": True})
            await self._hub.wait_change()

    def _news(self) -> list[bytes]:
        """The events of topics that this watcher has not seen as they are now."""
        sample = self._hub.sample
        if not sample.topics:
            return []
        topics = {**sample.topics, "requests": _event("requests", _visible(sample.requests, self._caller))}
        changed = {topic: event for topic, event in topics.items() if self._shown.get(topic) != event}
        self._shown.update(changed)
        return list(changed.values())


def _event(topic: str, data: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (topic.encode(), data)


def _visible(requests: tuple[Mapping[str, Any], ...], caller: Caller) -> bytes:
    everybody = can(caller, "users:manage")
    return msgspec.json.encode([each for each in requests if everybody or each["user_id"] == caller.user_id])
