"""Calls of a node to itself: the handler, directly, with what the wire would have done to header, buffers and errors.

``p2p/memory.py`` runs its calls between nodes through here too.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any

import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId
from p2p import trace
from p2p.core import failures, frames, headers
from p2p.face import Buffer, Call, Header, Items, Reply
from p2p.services import Service

log = logging.getLogger(__name__)


def call_of(peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer], deadline: float) -> Call:
    """The call as its server sees it."""
    fresh = headers.unpack(headers.pack(header))
    views = tuple(memoryview(buffer).cast("B") for buffer in buffers)
    return Call(peer_id, method, fresh, views, deadline, trace.off(fresh))


async def own_call(
    services: Mapping[str, Service],
    peer_id: PeerId,
    method: str,
    header: Header,
    buffers: Sequence[Buffer],
    deadline: float,
) -> Reply:
    """Call oneself. Raises as :meth:`p2p.face.Network.call`."""
    await trio.lowlevel.checkpoint()
    call = call_of(peer_id, method, header, buffers, deadline)
    with trio.CancelScope(deadline=deadline):
        return await answer(services, call, peer_id)
    raise RemoteError("deadline", f"{method} missed its deadline", peer_id=peer_id)


async def answer(services: Mapping[str, Service], call: Call, server: PeerId) -> Reply:
    """What a unary method of ``server`` answers; errors as its caller would see them."""
    service = services.get(call.method)
    if service is None:
        raise RemoteError("not_found", f"{call.method!r} is not served here", peer_id=server)
    handler = service.handler
    if handler is None:
        raise RemoteError("protocol", f"{call.method} answers with a stream", peer_id=server)
    with _errors(call, server):
        reply = service.quick(call) if service.quick is not None else None
        if reply is None:
            with _tracing(call):
                reply = await handler(call)
        return reply


def _tracing(call: Call) -> AbstractContextManager[object]:
    return trace.serving(call) if call.trace else nullcontext()


class _errors(AbstractContextManager[None]):
    """A handler's errors as they reach the caller."""

    def __init__(self, call: Call, server: PeerId) -> None:
        self._call = call
        self._server = server

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:  # noqa: ANN401 - the protocol's
        if isinstance(error, RiosError):
            raise failures.from_header(failures.to_header(error), self._server) from error
        if isinstance(error, Exception):
            log.error("the handler of %s failed", self._call.method, exc_info=error)
            raise failures.from_header(failures.internal(), self._server) from error


class _Items:
    """Items that a handler in this process sends."""

    def __init__(self, received: trio.MemoryReceiveChannel[Reply], method: str, deadline: float, peer: PeerId) -> None:
        self._received = received
        self._method = method
        self._deadline = deadline
        self._peer_id = peer
        self.end: Header | None = None
        self.error: RiosError | None = None

    def __aiter__(self) -> "_Items":
        return self

    async def __anext__(self) -> Reply:
        with trio.CancelScope(deadline=self._deadline):
            try:
                return await self._received.receive()
            except trio.EndOfChannel:
                if self.error is not None:
                    raise self.error from None
                raise StopAsyncIteration from None
        raise RemoteError("deadline", f"{self._method} missed its deadline", peer_id=self._peer_id)


@asynccontextmanager
async def own_stream(
    services: Mapping[str, Service],
    peer_id: PeerId,
    method: str,
    header: Header,
    buffers: Sequence[Buffer],
    deadline: float,
) -> AsyncIterator[Items]:
    """Call a streaming method of one's own."""
    call = call_of(peer_id, method, header, buffers, deadline)
    async with stream(services, call, peer_id) as items:
        yield items


@asynccontextmanager
async def stream(
    services: Mapping[str, Service],
    call: Call,
    server: PeerId,
    travel: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint,
    while_up: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> AsyncIterator[Items]:
    """The items of a streaming method of ``server``. Each takes ``travel`` to arrive; the handler runs in ``while_up``,
    which may end it."""
    sender, receiver = trio.open_memory_channel[Reply](frames.STREAM_CREDIT)
    items = _Items(receiver, call.method, call.deadline, server)

    async def send(reply: Reply) -> None:
        await travel()
        copies = [memoryview(bytes(buffer)) for buffer in reply.buffers]
        await sender.send(Reply(headers.unpack(headers.pack(reply.header)), copies))

    async def run() -> None:
        try:
            service = services.get(call.method)
            if service is None or service.stream is None:
                code = "not_found" if service is None else "protocol"
                raise RemoteError(code, f"{call.method} is not served here as a stream", peer_id=server)
            with while_up(), _errors(call, server), _tracing(call):
                items.end = await service.stream(call, send)
            if items.end is None:
                raise RemoteError("unavailable", f"the link to {server} broke", peer_id=server)
        except RiosError as error:
            items.error = error
        finally:
            sender.close()

    failure: Exception | None = None
    with receiver:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            try:
                yield items
            except Exception as error:
                log.debug("the reader of a stream failed", exc_info=True)
                failure = error  # leaves as it is, not in a group
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
