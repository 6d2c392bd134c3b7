"""Calls over one carrier: ours wait for their answers, the peer's run in the reader or in pool tasks.

Owns: deadlines, cancellation, the limits of what one peer may have in flight. The protocol itself is ``core/frames``,
streamed answers are in ``p2p/streaming``.

Invariants:
1. Every call ends: with an answer, an error, its deadline, or ``unavailable`` when the carrier is lost. A call that was
   not sent says so (:class:`NotSentError`), so that it may go another way.
2. A handler that raises fails its call only. It runs under the call's deadline and is cancelled with the call.
3. A peer has at most ``calls_max`` calls in flight here, and its address and subnet what the doors allow (more are told
   busy); while its calls hold more than :data:`p2p.holding.HELD_BYTES_MAX`, or come faster than the doors allow, its
   window is not opened further. What its frames in part hold is limited by :mod:`p2p.holding`.
4. A peer that breaks the protocol loses the carrier, and is blamed; nobody else notices.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from config.errors import BusyError, IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from p2p import holding, trace
from p2p.carrier import Carrier
from p2p.core import failures, frames
from p2p.deadlines import Alarm, Deadlines
from p2p.face import Buffer, Call, Handler, Header, Reply, StreamHandler
from p2p.holding import Held, Part
from p2p.meter import Meter, free
from p2p.pool import Pool
from p2p.services import Service
from p2p.streaming import Incoming, Outgoing
from p2p.waiting import NotSentError, Waiter

log = logging.getLogger(__name__)

COUNTED_CALLS, COUNTED_BYTES = 32, 256 << 10
"""After how many the doors are told: asking them each time would show in small calls."""
UNKNOWN_TIMES = 5
"""A call of an unknown method counts as so many refused ones: an honest peer makes none, or one of a newer version."""


def _nobody(_peer_id: PeerId, _fault: str) -> None:
    return


@dataclass(slots=True, kw_only=True)
class Context:
    """What the connections of a node share."""

    services: Mapping[str, Service]
    pool: Pool
    deadlines: Deadlines
    frame_bytes_max: int
    calls_max: int
    blame: Callable[[PeerId, str], None] = field(default=_nobody)
    meter: Callable[[PeerId], Meter] = field(default=free)
    held: Held = field(default_factory=Held)


class _Flood(Exception):
    """A peer goes on calling although it is refused."""


class Connection:
    """RPC with one peer over one carrier."""

    def __init__(self, carrier: Carrier, context: Context, lost: Callable[["Connection"], None]) -> None:
        self.peer_id = PeerId(carrier.peer_id)
        self.carrier = carrier
        self._now = trio.lowlevel.current_clock().current_time  # trio.current_time() takes three calls to get there
        self.heard_at = self._now()
        self.round_trip_s = 0.0
        self.bulk: Connection | None = None
        """The connection for bulk calls beside this one, if there is one yet."""
        self.relay = PeerId("")
        """The peer that passes this connection on, empty for a direct one; ``far_host`` is where it sees the peer."""
        self.far_host = ""
        self.leaving = self._said_goodbye = False
        self.farewell = ""
        self.calls_made = self.calls_served = 0
        self.ended = trio.Event()
        self._context = context
        self._lost = lost
        self._machine = frames.Machine(frame_bytes_max=context.frame_bytes_max)
        self._waiters: dict[int, Waiter] = {}
        self._incoming: dict[int, Incoming] = {}
        self._outgoing: dict[int, Outgoing] = {}
        self._running: dict[int, trio.CancelScope] = {}
        self._pings: dict[int, trio.Event] = {}
        self._ping_number = 0
        self._behind = 0
        self._held = 0
        self._owed = 0
        self._meter = context.meter(self.peer_id)
        self._uncounted = self._uncounted_calls = 0
        self._paused = self._broken_off = False
        self._part = Part(context.held, self.peer_id, self._machine, self._give_up_part)
        carrier.open(self._received, self._on_lost)

    @property
    def alive(self) -> bool:
        """Whether calls can be made."""
        return not self.ended.is_set()

    @property
    def takes_calls(self) -> bool:
        """Whether a call can be begun here: alive, and no goodbye said."""
        return not self._said_goodbye and not self.ended.is_set()

    @property
    def in_flight(self) -> int:
        """Calls in both directions that are not answered yet."""
        return self._machine.open_made + self._machine.open_taken

    # -- our calls

    async def call(self, method: str, header: Header, buffers: Sequence[Buffer], deadline: float) -> Reply:
        """See :meth:`p2p.face.Network.call`; ``deadline`` is a trio time."""
        if self.carrier.congested:
            await self._make_room(method, deadline)
        return await self.begin(method, header, buffers, deadline).wait()

    def begin(self, method: str, header: Header, buffers: Sequence[Buffer], deadline: float) -> Waiter:
        """Send a call; nobody waits for it yet. Not when the carrier is congested."""
        call_id, chunks = self._begin(method, header, buffers, deadline)
        waiter = self._waiters[call_id] = Waiter(self, call_id, method)
        self.carrier.send(chunks)
        if waiter.outcome is None:
            self._context.deadlines.add(deadline, waiter)
        return waiter

    def stream(self, method: str, header: Header, buffers: Sequence[Buffer], deadline: float) -> Incoming:
        """Begin a streaming call; leave it with :meth:`p2p.streaming.Incoming.close`."""
        call_id, chunks = self._begin(method, header, buffers, deadline)
        items = self._incoming[call_id] = Incoming(self, call_id, method, deadline)
        self.carrier.send(chunks)
        return items

    def _begin(
        self, method: str, header: Header, buffers: Sequence[Buffer], deadline: float
    ) -> tuple[int, frames.Chunks]:
        left_ms = int((deadline - self._now()) * 1000)
        if left_ms <= 0:
            raise self.late(method)
        if not self.takes_calls:
            raise NotSentError("unavailable", f"the link to {self.peer_id} is closed", peer_id=self.peer_id)
        self.calls_made += 1
        return self._machine.request(method, header, buffers, min(left_ms, frames.DEADLINE_MS_MAX))

    async def _make_room(self, method: str, deadline: float) -> None:
        with trio.CancelScope(deadline=deadline) as scope:
            await self.carrier.drain()
        if scope.cancelled_caught:
            raise self.late(method)

    def give_up(self, call_id: int) -> None:
        """The caller wants no answer any more; the peer is told."""
        self._waiters.pop(call_id, None)
        self._incoming.pop(call_id, None)
        self._send(self._machine.cancel(call_id))

    def grant(self, call_id: int, items: int, size_bytes: int) -> None:
        """So many items of a stream to us were consumed."""
        self._send(self._machine.grant(call_id, items), urgent=True)
        self.release(size_bytes)

    def missed(self) -> None:
        """A peer did not answer in time."""
        self._context.blame(self.peer_id, "deadline")

    def late(self, method: str) -> RemoteError:
        """The error of a call that missed its deadline."""
        return RemoteError("deadline", f"{method} at {self.peer_id} missed its deadline", peer_id=self.peer_id)

    def _broken(self) -> RemoteError:
        return RemoteError("unavailable", f"the link to {self.peer_id} broke", peer_id=self.peer_id)

    async def ping(self, timeout_s: float) -> bool:
        """Whether the peer answers in time; measures the round trip."""
        self._ping_number = self._ping_number % (1 << 31) + 1
        number, event = self._ping_number, trio.Event()
        self._pings[number] = event
        started = trio.current_time()
        self._send(self._machine.ping(number), urgent=True)
        with trio.move_on_after(timeout_s):
            await event.wait()
        self._pings.pop(number, None)
        if event.is_set() and self.alive:
            self.round_trip_s = trio.current_time() - started
            return True
        return False

    def say_goodbye(self, reason: str) -> None:
        """No more calls will come from here."""
        if not self._said_goodbye:
            self._said_goodbye = self.leaving = True
            self._send(self._machine.goodbye(reason))

    # -- what arrives

    def _received(self, data: memoryview) -> None:
        if self._broken_off:
            return
        self.heard_at = self._now()
        try:
            events = self._machine.feed(data)
            if self._machine.body_bytes or self._part.size:
                self._part.follow()
            self._behind = len(events)
            for event in events:
                self._behind -= 1
                _ACTIONS[type(event)](self, event)
        except IntegrityError as error:
            log.warning("peer %s broke the RPC protocol: %s", self.peer_id, error)
            self._context.blame(self.peer_id, "protocol")
            self._break_off()
            return
        except _Flood as limit:
            log.warning("peer %s is hung up on: it goes on calling above %s", self.peer_id, limit)
            self._break_off()
            return
        size = len(data)
        self._uncounted += size
        if self._uncounted >= COUNTED_BYTES or self._uncounted_calls >= COUNTED_CALLS:
            self._count()
        if self._may_send_on():
            self.carrier.consumed(size)
        else:
            self._owed += size

    def _count(self) -> None:
        """Tell the doors what came since the last time."""
        wait_s = self._meter.spend(self._uncounted_calls, self._uncounted, self.heard_at)
        self._uncounted = self._uncounted_calls = 0
        if wait_s and not self._paused:
            self._paused = True
            self._context.deadlines.add(self.heard_at + wait_s, Alarm(self.go_on))

    def go_on(self) -> None:
        """The peer was too fast, its window stayed shut for a while: that is over."""
        self._paused = False
        self.release(0)

    def is_stuck(self, now: float) -> bool:
        """Whether a frame from the peer comes on slower than anybody's line, though the peer may send."""
        if self._owed:
            self._part.wait()
            return False
        return self._part.is_stuck(now)

    def _give_up_part(self) -> None:
        log.warning("peer %s is hung up on: its frames in part take too much memory", self.peer_id)
        self._meter.over("frames_in_part_bytes")
        self._break_off()

    def _break_off(self) -> None:
        """Hear no more of this peer."""
        self._broken_off = True
        self._part.end()
        self._context.pool.submit(self.carrier.close)

    def _may_send_on(self) -> bool:
        """Whether the peer's window is opened further."""
        most = holding.HELD_BYTES_CROWDED if self._context.held.crowded else holding.HELD_BYTES_MAX
        return self._held < most and not self._paused

    def hold(self, size_bytes: int) -> None:
        """Received bytes stay in use here."""
        self._held += size_bytes
        self._context.held.total += size_bytes

    def release(self, size_bytes: int) -> None:
        """They do not any more."""
        self._held -= size_bytes
        self._context.held.total -= size_bytes
        if self._owed and self._may_send_on():
            owed, self._owed = self._owed, 0
            self.carrier.consumed(owed)

    def _on_response(self, event: frames.Response) -> None:
        waiter = self._waiters.pop(event.call_id, None)
        if waiter is not None:
            waiter.settle(Reply(event.header, event.buffers))
            return
        items = self._incoming.pop(event.call_id, None)
        if items is not None:
            items.fail(RemoteError("protocol", f"{items.method} answers once, it does not stream"))

    def _on_failed(self, event: frames.Failed) -> None:
        error = failures.from_header(event.header, self.peer_id)
        waiter = self._waiters.pop(event.call_id, None)
        if waiter is not None:
            waiter.settle(error)
            return
        items = self._incoming.pop(event.call_id, None)
        if items is not None:
            items.fail(error)

    def _on_item(self, event: frames.Item) -> None:
        items = self._incoming.get(event.call_id)
        if items is not None:
            items.put(Reply(event.header, event.buffers))
        else:
            self._refuse_stream(event.call_id)

    def _on_end(self, event: frames.End) -> None:
        items = self._incoming.pop(event.call_id, None)
        if items is not None:
            items.finish(event.header)
        else:
            self._refuse_stream(event.call_id)

    def _refuse_stream(self, call_id: int) -> None:
        waiter = self._waiters.get(call_id)
        if waiter is not None:
            self.give_up(call_id)
            waiter.settle(RemoteError("protocol", f"{waiter.method} answers with a stream", peer_id=self.peer_id))

    def _on_ping(self, event: frames.Ping) -> None:
        self._send(self._machine.pong(event.number), urgent=True)

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
        outgoing = self._outgoing.get(event.call_id)
        if outgoing is not None:
            outgoing.granted()

    def _on_request(self, request: frames.Request) -> None:
        self._uncounted_calls += 1
        service = self._context.services.get(request.method)
        if service is None:
            self._refuse(request, RemoteError("not_found", f"{request.method[:80]!r} is not served here"))
            self._over("calls_of_unknown_methods", UNKNOWN_TIMES)
            return
        if self._machine.open_taken > self._context.calls_max:
            most = f"more than {self._context.calls_max} calls in flight (p2p.calls_per_peer_max)"
            self._refuse(request, BusyError(most, retry_after_ms=50))
            self._over("calls_per_connection")
            return
        deadline = self.heard_at + request.deadline_ms / 1000
        traced, followed = trace.off(request.header), self._behind > 0 or self.carrier.more
        call = Call(self.peer_id, request.method, request.header, request.buffers, deadline, traced, followed)
        if service.quick is not None and not self.carrier.congested:
            chunks = self._answer_quickly(service.quick, call, request.call_id)
            if chunks is not None:
                self._send(chunks)
                self.calls_served += 1
                return
        refusal = self._meter.start_call()
        if refusal:
            self._refuse(request, BusyError(refusal, retry_after_ms=50))
            return
        self.hold(request.size_bytes)
        self._context.pool.submit(partial(self._serve, service, call, request))

    def _over(self, limit: str, times: int = 1) -> None:
        if self._meter.over(limit, times):
            raise _Flood(limit)

    def _refuse(self, request: frames.Request, error: RiosError) -> None:
        self._send(self._machine.fail(request.call_id, failures.to_header(error)))

    def _answer_quickly(self, quick: Callable[[Call], Reply | None], call: Call, call_id: int) -> frames.Chunks | None:
        try:
            if call.trace:
                with trace.serving(call) as span:
                    reply = quick(call)
                    if reply is None:
                        span.drop()  # the handler makes one
            else:
                reply = quick(call)
            return None if reply is None else self._machine.respond(call_id, reply.header, reply.buffers)
        except RiosError as error:
            return self._machine.fail(call_id, failures.to_header(error))
        except Exception:
            log.exception("the quick handler of %s failed", call.method)
            return self._machine.fail(call_id, failures.internal())

    async def _serve(self, service: Service, call: Call, request: frames.Request) -> None:
        call_id = request.call_id
        chunks: frames.Chunks | None = None
        try:
            if self._machine.credit(call_id) is None or self.ended.is_set():
                return  # cancelled before it began, or nobody is there any more
            with trio.CancelScope(deadline=call.deadline) as scope:
                self._running[call_id] = scope
                if self.carrier.congested:
                    await self.carrier.drain()
                if call.trace:
                    with trace.serving(call):
                        chunks = await self._answer(service, call, call_id)
                else:
                    chunks = await self._answer(service, call, call_id)
            if chunks is None:
                late = RemoteError("deadline", f"{call.method} was not done by its deadline")
                chunks = self._machine.fail(call_id, failures.to_header(late))
            self._send(chunks)
            self.calls_served += 1
        finally:
            self._running.pop(call_id, None)
            self._meter.end_call()
            self.release(request.size_bytes)

    async def _answer(self, service: Service, call: Call, call_id: int) -> frames.Chunks:
        try:
            if service.stream is not None:
                return self._machine.end(call_id, await self._stream(service.stream, call, call_id))
            handler: Handler | None = service.handler
            assert handler is not None
            reply = await handler(call)
            return self._machine.respond(call_id, reply.header, reply.buffers)
        except RiosError as error:
            return self._machine.fail(call_id, failures.to_header(error))
        except Exception:
            log.exception("the handler of %s failed", call.method)
            return self._machine.fail(call_id, failures.internal())

    async def _stream(self, handler: StreamHandler, call: Call, call_id: int) -> Header:
        outgoing = self._outgoing[call_id] = Outgoing(self._machine, self.carrier, call_id)
        try:
            return await handler(call, outgoing.send)
        finally:
            del self._outgoing[call_id]

    # -- the end

    def _send(self, chunks: list[Buffer], urgent: bool = False) -> None:
        if chunks:
            self.carrier.send(chunks, urgent)

    def _on_lost(self) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        self._part.end()
        for call_id in list(self._waiters):
            self._waiters.pop(call_id).settle(self._broken())
        for call_id in list(self._incoming):
            self._incoming.pop(call_id).fail(self._broken())
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
            "relay": self.relay,
            "calls_made": self.calls_made,
            "calls_served": self.calls_served,
            **self.carrier.statistics(),
        }


_ACTIONS: dict[type[Any], Callable[[Connection, Any], None]] = {
    frames.Response: Connection._on_response,
    frames.Failed: Connection._on_failed,
    frames.Request: Connection._on_request,
    frames.Item: Connection._on_item,
    frames.End: Connection._on_end,
    frames.Ping: Connection._on_ping,
    frames.Pong: Connection._on_pong,
    frames.Goodbye: Connection._on_goodbye,
    frames.Cancelled: Connection._on_cancelled,
    frames.Granted: Connection._on_granted,
}
