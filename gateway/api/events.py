"""``GET /v1/events``: what happens, as it happens; as server-sent events, or over a WebSocket on the same path.

A listener sees what it may see: its own, or all (admins). It goes on behind ``Last-Event-ID`` (or ``after=``) from the
table. It ends with the key, session or access token that it was let in by (``gateway/standing.py``).
"""

import json
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import msgspec
import trio
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from config.errors import RiosError
from gateway import events
from gateway.db.stamps import now_ms
from gateway.endpoint import Caller, Endpoint, Parameter, caller, permitted
from gateway.errors import ApiError, error_headers, error_object, error_status, invalid
from gateway.events import MISSED, Bus, Event, matches
from gateway.openai.job import Service
from gateway.openai.stream import Writer
from gateway.request import identify, json_response

PATH = "/v1/events"
_PATTERNS_MAX, _PATTERN_CHARACTERS_MAX = 32, 64
_PAGE = 200
_POLICY = 1008
"""The code that RFC 6455 has for what is against the rules here."""


class EventObject(msgspec.Struct, kw_only=True):
    """What happened. Without an id: the listener missed events, see ``data``."""

    object: Literal["event"]
    id: str | None
    type: str
    created_at_ms: int
    data: dict[str, Any]


Tell = Callable[[int | None, str, str, int], Awaitable[None]]
"""``(id, kind, data as JSON, when)``; no id for what is not in the table."""


@dataclass(frozen=True, slots=True)
class _Wish:
    kinds: frozenset[str]
    after: int | None


def _wish(connection: HTTPConnection) -> _Wish:
    kinds = frozenset(filter(None, connection.query_params.get("types", "").split(",")))
    if len(kinds) > _PATTERNS_MAX or any(len(kind) > _PATTERN_CHARACTERS_MAX for kind in kinds):
        raise invalid("types", "types are kinds of events with commas between them, e.g. batch.*,key.created")
    text = connection.headers.get("last-event-id", "") or connection.query_params.get("after", "")
    if text and not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise invalid("after", "after is the id of an event: a number")
    return _Wish(kinds, int(text) if text else None)


async def _listen(service: Service, bus: Bus, who: Caller, wish: _Wish, tell: Tell) -> None:
    """Tell of everything until cancelled. What does not keep up loses the oldest, and is told so."""
    async with bus.subscribe(who.owner, wish.kinds) as subscription:
        if wish.after is not None:
            await _catch_up(service, who, wish, subscription.start, tell)
        while True:
            missed, found = await subscription.take()
            if missed:
                await tell(None, MISSED, json.dumps({"count": missed}), found[0].created_at_ms)
            for each in found:
                if wish.after is None or each.place > wish.after:
                    await tell(each.place, each.kind, each.data, each.created_at_ms)


async def _catch_up(service: Service, who: Caller, wish: _Wish, start: int, tell: Tell) -> None:
    database, place = service.till.database, wish.after or 0
    oldest, _ = await service.till.in_thread(events.bounds, database)
    if place + 1 < oldest:
        await tell(None, MISSED, json.dumps({"count": None, "before": oldest}), 0)
    while True:
        page = partial(events.since, database, place, who.owner, limit=_PAGE, before=start)
        found: list[Event] = await service.till.in_thread(page)
        for each in found:
            place = each.place
            if matches(each.kind, wish.kinds):
                await tell(each.place, each.kind, each.data, each.created_at_ms)
        if len(found) < _PAGE:
            return


@contextmanager
def _while_allowed(connection: HTTPConnection, who: Caller) -> Iterator[None]:
    """End the listening of who may not listen any more; as it has no end, also when an access token ends."""
    ends_at_ms = who.principal.token_ends_at_ms
    left = math.inf if ends_at_ms is None else (ends_at_ms - now_ms()) / 1000
    standing = connection.app.state.service.guard.standing
    with (
        suppress(ApiError),
        standing.while_allowed(who.principal, "events:read"),
        trio.move_on_after(max(0.0, left)),
    ):
        yield


async def stream(request: Request) -> Response:
    """Server-sent events."""
    return _Events(request, caller(request), _wish(request))


class _Events(Response):
    def __init__(self, request: Request, who: Caller, wish: _Wish) -> None:
        self._request, self._who, self._wish = request, who, wish
        self.status_code, self.background = 200, None
        self.raw_headers = []  # what the endpoint's wrapper adds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        with self._request.app.state.site.events.places.held(self._who.principal):
            await self._stream(send)

    async def _stream(self, send: Send) -> None:
        state = self._request.app.state
        writer = Writer(send)
        writer.headers = (*writer.headers, *self.raw_headers)

        async def tell(place: int | None, kind: str, data: str, when: int) -> None:
            name = "" if place is None else f"id: {place}\n"
            await writer.write(f"{name}event: {kind}\ndata: {_body(place, kind, data, when)}\n\n".encode())

        await writer.write(b": listening\n\n")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.keep_alive)
            with _while_allowed(self._request, self._who):
                await _listen(state.service, state.site.events, self._who, self._wish, tell)
            nursery.cancel_scope.cancel()
        await writer.end(b"")


def _body(place: int | None, kind: str, data: str, when: int) -> str:
    head = json.dumps({"object": "event", "id": None if place is None else str(place), "type": kind})
    return f'{head[:-1]}, "created_at_ms": {when}, "data": {data}}}'


async def socket(websocket: WebSocket) -> None:
    """The same over a WebSocket, one event a message. Clients only listen: a message of theirs ends it."""
    with ExitStack() as held:
        try:
            principal = await identify(websocket)
            who = Caller(principal, permitted(principal, "events:read"))
            wish = _wish(websocket)
            held.enter_context(websocket.app.state.site.events.places.held(principal))
        except RiosError as error:
            refusal = json_response(error_object(error), error_status(error), error_headers(error))
            await websocket.send_denial_response(refusal)
            return
        await _converse(websocket, who, wish)


async def _converse(websocket: WebSocket, who: Caller, wish: _Wish) -> None:
    state = websocket.app.state
    await websocket.accept()

    async def tell(place: int | None, kind: str, data: str, when: int) -> None:
        await websocket.send({"type": "websocket.send", "text": _body(place, kind, data, when)})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_it_speaks, websocket, nursery.cancel_scope)
        with _while_allowed(websocket, who):
            await _listen(state.service, state.site.events, who, wish, tell)
        nursery.cancel_scope.cancel()
    await websocket.send({"type": "websocket.close", "code": _POLICY, "reason": "listening has ended"})


async def _until_it_speaks(websocket: WebSocket, scope: trio.CancelScope) -> None:
    await websocket.receive()  # a message, or its leaving
    scope.cancel()


SOCKETS = (WebSocketRoute(PATH, socket),)

ENDPOINTS = (
    Endpoint(
        method="GET",
        path=PATH,
        handle=stream,
        needs="events:read",
        summary="What happens, as server-sent events (or over a WebSocket)",
        media=("text/event-stream",),
        event=EventObject,
        parameters=(
            Parameter(name="types", description="Only these kinds, e.g. batch.*,key.created"),
            Parameter(
                name="after",
                description="Go on behind this event; as Last-Event-ID.",
                schema={"type": "string", "pattern": "^[0-9]{1,18}$"},
            ),
        ),
    ),
)
