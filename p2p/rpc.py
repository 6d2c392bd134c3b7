"""Calls over one carrier: ours wait for their answers, the peer's run in pool tasks.

Owns: deadlines, cancellation, the limits of what one peer may have in flight. The protocol itself is ``core/frames``.

Invariants:
1. Every call ends: with an answer, an error, its deadline, or ``unavailable`` when the carrier is lost.
2. A handler that raises fails its call only. It runs under the call's deadline and is cancelled with the call.
3. A peer has at most ``calls_max`` calls in flight here (more are told busy); while its calls hold more than
   :data:`HELD_BYTES_MAX` its window is not opened further.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import trio

from config.errors import BusyError, IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from p2p.carrier import Carrier
from p2p.core import failures, frames
from p2p.face import Buffer, Call, Handler, Header, Reply
from p2p.pool import Pool

log = logging.getLogger(__name__)

HELD_BYTES_MAX = 128 << 20


class _Waiter:
    """A call of ours on its way."""

    __slots__ = ("event", "outcome")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.outcome: Reply | RiosError | None = None


class Connection:
    """RPC with one peer over one carrier."""

    def __init__(
        self,
        carrier: Carrier,
        handlers: Mapping[str, Handler],
        pool: Pool,
        *,
        frame_bytes_max: int,
        calls_max: int,
        lost: Callable[["Connection"], None],
    ) -> None:
        self.peer_id = PeerId(carrier.peer_id)
        self.carrier = carrier
        self.heard_at = trio.current_time()
        self.round_trip_s = 0.0
        self.leaving = False
        self.farewell = ""
        self.ended = trio.Event()
        self._handlers = handlers
        self._pool = pool
        self._calls_max = calls_max
        self._lost = lost
        self._machine = frames.Machine(frame_bytes_max=frame_bytes_max)
        self._waiters: dict[int, _Waiter] = {}
        self._running: dict[int, trio.CancelScope] = {}
        self._pings: dict[int, trio.Event] = {}
        self._ping_number = 0
        self._held = 0
        self._owed = 0
        carrier.open(self._received, self._on_lost)

    @property
    def alive(self) -> bool:
        """Whether calls can be made."""
        return not self.ended.is_set()

    @property
    def in_flight(self) -> int:
        """Calls in both directions that are not answered yet."""
        return self._machine.open_made + self._machine.open_taken

    # -- our calls

    async def call(self, method: str, header: Header, buffers: Sequence[Buffer], deadline: float) -> Reply:
        """See :meth:`p2p.face.Network.call`; ``deadline`` is a trio time."""
        left_ms = int((deadline - trio.current_time()) * 1000)
        if left_ms <= 0:
            raise self._late(method)
        if not self.alive:
            raise self._broken()
        if self.carrier.congested:
            with trio.CancelScope(deadline=deadline) as scope:
                await self.carrier.drain()
            if scope.cancelled_caught:
                raise self._late(method)
        waiter = _Waiter()
        call_id, chunks = self._machine.request(method, header, buffers, min(left_ms, frames.DEADLINE_MS_MAX))
        self._waiters[call_id] = waiter
        try:
            with trio.CancelScope(deadline=deadline):
                self.carrier.send(chunks)
                await waiter.event.wait()
        finally:
            if self._waiters.pop(call_id, None) is not None and waiter.outcome is None:
                self._send(self._machine.cancel(call_id))
        outcome = waiter.outcome
        if outcome is None:
            raise self._late(method)
        if isinstance(outcome, RiosError):
            raise outcome
        return outcome

    def _late(self, method: str) -> RemoteError:
        return RemoteError("deadline", f"{method} at {self.peer_id} missed its deadline", peer_id=self.peer_id)

    def _broken(self) -> RemoteError:
        return RemoteError("unavailable", f"the link to {self.peer_id} broke", peer_id=self.peer_id)

    async def ping(self, timeout_s: float) -> bool:
        """Whether the peer answers in time; measures the round trip."""
        self._ping_number = self._ping_number % (1 << 31) + 1
        number, event = self._ping_number, trio.Event()
        self._pings[number] = event
        started = trio.current_time()
        self._send(self._machine.ping(number))
        with trio.move_on_after(timeout_s):
            await event.wait()
        self._pings.pop(number, None)
        if event.is_set() and self.alive:
            self.round_trip_s = trio.current_time() - started
            return True
        return False

    def say_goodbye(self, reason: str) -> None:
        """No more calls will come from here."""
        if not self.leaving:
            self.leaving = True
            self._send(self._machine.goodbye(reason))

    # -- what arrives

    def _received(self, data: memoryview) -> None:
        self.heard_at = trio.current_time()
        try:
            events = self._machine.feed(data)
            for event in events:
                _ACTIONS[type(event)](self, event)
        except IntegrityError as error:
            log.warning("peer %s broke the RPC protocol: %s", self.peer_id, error)
            self._pool.submit(self.carrier.close)
            return
        if self._held < HELD_BYTES_MAX:
            self.carrier.consumed(len(data))
        else:
            self._owed += len(data)

    def _on_response(self, event: frames.Response) -> None:
        self._settle(event.call_id, Reply(event.header, event.buffers))

    def _on_failed(self, event: frames.Failed) -> None:
        self._settle(event.call_id, failures.from_header(event.header, self.peer_id))

    def _on_stream(self, event: frames.Item | frames.End) -> None:
        raise IntegrityError("protocol", "RPC: a streamed answer to a unary call")

    def _settle(self, call_id: int, outcome: Reply | RiosError) -> None:
        waiter = self._waiters.pop(call_id, None)
        if waiter is not None:
            waiter.outcome = outcome
            waiter.event.set()

    def _on_ping(self, event: frames.Ping) -> None:
        self._send(self._machine.pong(event.number))

    def _on_pong(self, event: frames.Pong) -> None:
        waiting = self._pings.get(event.number)
        if waiting is not None:
            waiting.set()

    def _on_goodbye(self, event: frames.Goodbye) -> None:
        self.leaving = True
        self.farewell = event.reason

    def _on_cancelled(self, event: frames.Cancelled) -> None:
        scope = self._running.get(event.call_id)
        if scope is not None:
            scope.cancel()

    def _on_granted(self, event: frames.Granted) -> None:
        """Nothing is streamed from here."""

    def _on_request(self, request: frames.Request) -> None:
        handler = self._handlers.get(request.method)
        if handler is None:
            error: RiosError = RemoteError("not_found", f"{request.method[:80]!r} is not served here")
            self._send(self._machine.fail(request.call_id, failures.to_header(error)))
        elif self._machine.open_taken > self._calls_max:
            busy = BusyError(f"more than {self._calls_max} calls in flight", retry_after_ms=50)
            self._send(self._machine.fail(request.call_id, failures.to_header(busy)))
        else:
            self._held += request.size_bytes
            self._pool.submit(partial(self._serve, handler, request))

    async def _serve(self, handler: Handler, request: frames.Request) -> None:
        call_id = request.call_id
        deadline = trio.current_time() + request.deadline_ms / 1000
        call = Call(self.peer_id, request.method, request.header, request.buffers, deadline)
        chunks: list[Buffer] | None = None
        try:
            if self._machine.credit(call_id) is None:
                return  # cancelled before it began
            with trio.CancelScope(deadline=deadline) as scope:
                self._running[call_id] = scope
                if self.carrier.congested:
                    await self.carrier.drain()
                chunks = await self._answer(handler, call, call_id)
            if chunks is None:
                late = RemoteError("deadline", f"{request.method} was not done by its deadline")
                chunks = self._machine.fail(call_id, failures.to_header(late))
            self._send(chunks)
        finally:
            self._running.pop(call_id, None)
            self._held -= request.size_bytes
            if self._owed and self._held < HELD_BYTES_MAX:
                owed, self._owed = self._owed, 0
                self.carrier.consumed(owed)

    async def _answer(self, handler: Handler, call: Call, call_id: int) -> list[Buffer]:
        try:
            reply = await handler(call)
            return self._machine.respond(call_id, reply.header, reply.buffers)
        except RiosError as error:
            return self._machine.fail(call_id, failures.to_header(error))
        except Exception:
            log.exception("the handler of %s failed", call.method)
            return self._machine.fail(call_id, failures.internal())

    # -- the end

    def _send(self, chunks: list[Buffer]) -> None:
        if chunks:
            self.carrier.send(chunks)

    def _on_lost(self) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        for call_id in list(self._waiters):
            self._settle(call_id, self._broken())
        for scope in self._running.values():
            scope.cancel()
        for event in self._pings.values():
            event.set()
        self._lost(self)

    def statistics(self) -> dict[str, Any]:
        """Numbers for people."""
        return {
            "in_flight": self.in_flight,
            "round_trip_ms": round(self.round_trip_s * 1000, 3),
            "outbound": self.carrier.outbound,
        }


_ACTIONS: dict[type[Any], Callable[[Connection, Any], None]] = {
    frames.Response: Connection._on_response,
    frames.Failed: Connection._on_failed,
    frames.Request: Connection._on_request,
    frames.Item: Connection._on_stream,
    frames.End: Connection._on_stream,
    frames.Ping: Connection._on_ping,
    frames.Pong: Connection._on_pong,
    frames.Goodbye: Connection._on_goodbye,
    frames.Cancelled: Connection._on_cancelled,
    frames.Granted: Connection._on_granted,
}
