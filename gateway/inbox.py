"""What a connection has to tell an application: body parts, and that its client left.

Stands where Hypercorn has a channel of trio's, whose every message costs a turn of the event loop at both ends, and a
request has four of them. Owns the order of messages and the bound on those that wait. Whoever wants to know at once
what comes, without a task that waits for it, finds :meth:`Inbox.watch` in the scope's extensions under :data:`WATCH`;
and under :data:`READER` the connection as a :class:`gateway.turns.Reader`.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, cast

import trio
from hypercorn.config import Config
from hypercorn.trio.task_group import TaskGroup
from hypercorn.typing import AppWrapper, ASGIReceiveEvent, ASGISendEvent, Scope

from gateway.turns import Reader

_logger = logging.getLogger("rios.gateway")

WATCH, READER = "rios.watch", "rios.reader"
_WAITING_MAX = 10

Message = dict[str, Any]


class Inbox:
    """One application's messages."""

    def __init__(self) -> None:
        self._waiting: deque[Message] = deque()
        self._changed: trio.Event | None = None
        """For those who wait for a message, or for room."""
        self._hear: Callable[[Message], None] | None = None

    async def put(self, message: Message) -> None:
        """Add one; waits while many wait. That the client left is never held up."""
        if self._hear is not None:
            self._hear(message)
            return
        while len(self._waiting) >= _WAITING_MAX and not message["type"].endswith(".disconnect"):
            await self._change()
            if self._hear is not None:
                self._hear(message)
                return
        self._waiting.append(message)
        self._tell()

    async def receive(self) -> Message:
        """The next one. After :meth:`watch`: none."""
        while not self._waiting:
            await self._change()
        message = self._waiting.popleft()
        self._tell()
        return message

    def watch(self, hear: Callable[[Message], None]) -> None:
        """Have ``hear`` called with every message that waits, or comes from now on."""
        self._hear = hear
        while self._waiting:
            hear(self._waiting.popleft())
        self._tell()

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = trio.Event()
        await self._changed.wait()

    def _tell(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None


class Tasks(TaskGroup):
    """Hypercorn's task group, whose applications have an :class:`Inbox`, and whose other tasks end with the client."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self._reader = reader
        self._others: list[trio.CancelScope] = []

    def spawn(self, func: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run what is no application: a WebSocket's pings, which sleep for long."""
        self._others.append(trio.CancelScope())
        super().spawn(_within, self._others[-1], func, *args)

    def client_left(self) -> None:
        """Only applications go on, until they have seen it."""
        for scope in self._others:
            scope.cancel()

    async def spawn_app(
        self,
        app: AppWrapper,
        config: Config,
        scope: Scope,
        send: Callable[[ASGISendEvent | None], Awaitable[None]],
    ) -> Callable[[ASGIReceiveEvent], Awaitable[None]]:
        """Run it; returns how to tell it something."""
        inbox = Inbox()
        cast("Message", scope)["extensions"].update({WATCH: inbox.watch, READER: self._reader})
        super().spawn(_run, app, scope, inbox, send)
        return cast("Callable[[ASGIReceiveEvent], Awaitable[None]]", inbox.put)


async def _within(scope: trio.CancelScope, func: Callable[..., Awaitable[None]], *args: object) -> None:
    with scope:
        await func(*args)


async def _run(
    app: AppWrapper,
    scope: Scope,
    inbox: Inbox,
    send: Callable[[ASGISendEvent | None], Awaitable[None]],
) -> None:
    try:
        receive = cast("Callable[[], Awaitable[ASGIReceiveEvent]]", inbox.receive)
        await app(scope, receive, send, trio.to_thread.run_sync, trio.from_thread.run)
    except BaseExceptionGroup as errors:
        if errors.split(trio.Cancelled)[1] is None:
            raise
        _logger.exception("an application failed")
    except Exception:
        _logger.exception("an application failed")
    finally:
        inbox.watch(_ignore)  # nobody takes what still comes, and the connection must not wait for that
        await send(None)


def _ignore(message: Message) -> None:
    return
