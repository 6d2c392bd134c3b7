"""The RPC protocol as a state machine: bytes in, events out; calls in, byte chunks out. No I/O.

A frame is a 20-byte head (body length u32, kind u8, method length u8, buffer count u16, call id u32, number u32, header
length u32; big-endian), then the buffer sizes (u32 each), the method, the msgpack header, the raw buffers.

Owns: the encoding, which frame is allowed when, streamed items' credit. Does not own: deadlines, who runs what.

Invariants:
1. A body longer than ``frame_bytes_max`` is refused before a byte of it is stored; memory for one that is announced
   grows with what has come of it, from :data:`BODY_BYTES_FIRST` on.
2. Hostile bytes only ever raise :class:`IntegrityError` (``protocol``, ``too_large``); then the machine is dead.
3. Each side numbers its own calls, strictly increasing. Answers to a call that is not open any more are ignored (they
   crossed our cancel); answers to one never made break the protocol.
4. At most :data:`STREAM_CREDIT` items of a call are unacknowledged.
"""

from collections.abc import Mapping, Sequence
from struct import Struct, pack
from typing import Any

import msgspec

from config.errors import IntegrityError, RequestError
from p2p.core import headers

REQUEST, RESPONSE, ITEM, END, ERROR, CANCEL, PING, PONG, CREDIT, GOODBYE = range(1, 11)

HEAD = Struct("!IBBHIII")
HEAD_BYTES = HEAD.size
_HEAD_AND_SIZE = Struct("!IBBHIIII")
BODY_BYTES_FIRST = 1 << 20
BUFFERS_MAX = 256
METHOD_BYTES_MAX = 255
CALL_ID_MAX = (1 << 32) - 1
DEADLINE_MS_MAX = 24 * 3600 * 1000
STREAM_CREDIT = 16
HEADER_TIMES = 64
"""A byte of a header may become an object of so many: an empty map in a list."""

Buffer = bytes | bytearray | memoryview
Chunks = list[Buffer]
_EMPTY: dict[str, Any] = {}
_EMPTY_PACKED = headers.pack({})


class Request(msgspec.Struct, frozen=True):
    """The peer calls us. ``size_bytes`` is what the whole body may hold in memory, its header decoded."""

    call_id: int
    method: str
    deadline_ms: int
    header: dict[str, Any]
    buffers: tuple[memoryview, ...]
    size_bytes: int


class Response(msgspec.Struct, frozen=True):
    """The one answer to a call of ours."""

    call_id: int
    header: dict[str, Any]
    buffers: tuple[memoryview, ...]


class Item(msgspec.Struct, frozen=True):
    """One item of a streamed answer; grant credit once it is consumed."""

    call_id: int
    header: dict[str, Any]
    buffers: tuple[memoryview, ...]


class End(msgspec.Struct, frozen=True):
    """A streamed answer is complete."""

    call_id: int
    header: dict[str, Any]


class Failed(msgspec.Struct, frozen=True):
    """A call of ours failed; the header is one of :mod:`p2p.core.failures`."""

    call_id: int
    header: dict[str, Any]


class Cancelled(msgspec.Struct, frozen=True):
    """The peer does not want this answer any more."""

    call_id: int


class Granted(msgspec.Struct, frozen=True):
    """More items of this call may be sent."""

    call_id: int


class Ping(msgspec.Struct, frozen=True):
    """Answer with :meth:`Machine.pong`."""

    number: int


class Pong(msgspec.Struct, frozen=True):
    """The answer to a ping of ours."""

    number: int


class Goodbye(msgspec.Struct, frozen=True):
    """The peer will make no more calls here and says why."""

    reason: str


Event = Request | Response | Item | End | Failed | Cancelled | Granted | Ping | Pong | Goodbye

# kind -> (may carry a method, may carry buffers, may carry a header)
_SHAPES: Mapping[int, tuple[bool, bool, bool]] = {
    REQUEST: (True, True, True),
    RESPONSE: (False, True, True),
    ITEM: (False, True, True),
    END: (False, False, True),
    ERROR: (False, False, True),
    CANCEL: (False, False, False),
    PING: (False, False, False),
    PONG: (False, False, False),
    CREDIT: (False, False, False),
    GOODBYE: (False, False, True),
}


def _broken(message: str) -> IntegrityError:
    return IntegrityError("protocol", f"RPC: {message}")


class Machine:
    """One side of one connection."""

    def __init__(self, *, frame_bytes_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._last_made = 0
        self._last_taken = 0
        self._made: dict[int, int] = {}  # own open call -> items that may still arrive
        self._streaming: set[int] = set()  # own open calls of which an item came
        self._taken: dict[int, int] = {}  # the peer's open call -> items that may still be sent
        self._head = bytearray()
        self._body: bytearray | None = None
        self.body_bytes = 0
        """What the body of the frame that has come in part takes; 0 between frames."""
        self._filled = 0
        self._fields: tuple[int, ...] = ()
        self._dead = False
        self._left = False

    # -- sending

    def request(
        self, method: str, header: Mapping[str, Any], buffers: Sequence[Buffer], deadline_ms: int
    ) -> tuple[int, Chunks]:
        """A new call: its id and its bytes. Raises RequestError if it cannot travel."""
        name = method.encode()
        if not 0 < len(name) <= METHOD_BYTES_MAX:
            raise RequestError("invalid_request", f"a method name has 1 to {METHOD_BYTES_MAX} bytes: {method[:80]!r}")
        assert 0 < deadline_ms <= DEADLINE_MS_MAX
        assert self._last_made < CALL_ID_MAX, "a connection is replaced long before its call ids run out"
        chunks = self._frame(REQUEST, self._last_made + 1, deadline_ms, header, buffers, name)
        self._last_made += 1
        self._made[self._last_made] = STREAM_CREDIT
        return self._last_made, chunks

    def cancel(self, call_id: int) -> Chunks:
        """Give a call of ours up."""
        if self._made.pop(call_id, None) is None:
            return []
        self._streaming.discard(call_id)
        return [HEAD.pack(0, CANCEL, 0, 0, call_id, 0, 0)]

    def grant(self, call_id: int, items: int = 1) -> Chunks:
        """Let the peer send more items of our call."""
        if call_id not in self._made:
            return []
        self._made[call_id] += items
        return [HEAD.pack(0, CREDIT, 0, 0, call_id, items, 0)]

    def respond(self, call_id: int, header: Mapping[str, Any], buffers: Sequence[Buffer]) -> Chunks:
        """The answer to the peer's call; nothing if it was cancelled. Raises RequestError if it cannot travel."""
        if call_id not in self._taken:
            return []
        chunks = self._frame(RESPONSE, call_id, 0, header, buffers)
        del self._taken[call_id]
        return chunks

    def item(self, call_id: int, header: Mapping[str, Any], buffers: Sequence[Buffer]) -> Chunks:
        """One streamed item; the caller of this has checked :meth:`credit`."""
        if call_id not in self._taken:
            return []
        assert self._taken[call_id] > 0, "no credit"
        chunks = self._frame(ITEM, call_id, 0, header, buffers)
        self._taken[call_id] -= 1
        return chunks

    def end(self, call_id: int, header: Mapping[str, Any]) -> Chunks:
        """The end of a streamed answer."""
        if self._taken.pop(call_id, None) is None:
            return []
        return self._frame(END, call_id, 0, header, ())

    def fail(self, call_id: int, header: Mapping[str, Any]) -> Chunks:
        """The peer's call failed."""
        if self._taken.pop(call_id, None) is None:
            return []
        return self._frame(ERROR, call_id, 0, header, ())

    def ping(self, number: int) -> Chunks:
        """Ask for a sign of life."""
        return [HEAD.pack(0, PING, 0, 0, 0, number, 0)]

    def pong(self, number: int) -> Chunks:
        """Give one."""
        return [HEAD.pack(0, PONG, 0, 0, 0, number, 0)]

    def goodbye(self, reason: str) -> Chunks:
        """Say that no more calls will come from here."""
        return self._frame(GOODBYE, 0, 0, {"reason": reason[:200]}, ())

    def credit(self, call_id: int) -> int | None:
        """Items that may be sent now for the peer's call; None if it is not open."""
        return self._taken.get(call_id)

    @property
    def open_made(self) -> int:
        """Own calls without an answer yet."""
        return len(self._made)

    @property
    def open_taken(self) -> int:
        """The peer's calls that wait for an answer from here."""
        return len(self._taken)

    @property
    def partial(self) -> tuple[object, int, int] | None:
        """What marks the frame that has come in part, how many bytes of its body (or head) have, and of how many; None
        between frames."""
        if self._body is not None:
            return self._fields, self._filled, self._fields[0]
        return (self._head, len(self._head), HEAD_BYTES) if self._head else None

    @property
    def part_mark(self) -> object:
        """What tells the body that has come in part from others; None between bodies."""
        return self._fields if self._body is not None else None

    def _frame(
        self,
        kind: int,
        call_id: int,
        number: int,
        header: Mapping[str, Any],
        buffers: Sequence[Buffer],
        name: bytes = b"",
    ) -> Chunks:
        packed = headers.pack(header) if header else _EMPTY_PACKED
        if not buffers:
            length = len(name) + len(packed)
            if length > self.frame_bytes_max:
                raise _too_large(length, self.frame_bytes_max)
            return [HEAD.pack(length, kind, len(name), 0, call_id, number, len(packed)) + name + packed]
        if len(buffers) == 1:  # most calls
            only = buffers[0] if type(buffers[0]) is bytes else memoryview(buffers[0]).cast("B")
            length = 4 + len(name) + len(packed) + len(only)
            if length > self.frame_bytes_max:
                raise _too_large(length, self.frame_bytes_max)
            head = _HEAD_AND_SIZE.pack(length, kind, len(name), 1, call_id, number, len(packed), len(only))
            return [head + name + packed, only]
        if len(buffers) > BUFFERS_MAX:
            raise RequestError("too_large", f"{len(buffers)} buffers in a frame, at most {BUFFERS_MAX} are allowed")
        views: Chunks = [b if type(b) is bytes else memoryview(b).cast("B") for b in buffers]
        sizes = [len(view) for view in views]
        length = 4 * len(sizes) + len(name) + len(packed) + sum(sizes)
        if length > self.frame_bytes_max:
            raise _too_large(length, self.frame_bytes_max)
        head = HEAD.pack(length, kind, len(name), len(sizes), call_id, number, len(packed))
        return [b"".join((head, pack(f"!{len(sizes)}I", *sizes), name, packed)), *views]

    # -- receiving

    def feed(self, data: bytes | memoryview) -> list[Event]:
        """The events in the next bytes of the stream, however they were split.

        Buffers of events refer to ``data`` where a frame lay in it as a whole. Raises IntegrityError for bytes that
        break the protocol; the connection is of no use after that.
        """
        if self._dead:
            raise _broken("bytes after the protocol was broken")
        try:
            return self._feed(memoryview(data))
        except IntegrityError:
            self.stop()
            raise

    def stop(self) -> None:
        """Take no more bytes, and forget what has come in part."""
        self._dead = True
        self._body = None
        self.body_bytes = 0

    def _feed(self, view: memoryview) -> list[Event]:
        events: list[Event] = []
        at, size = 0, len(view)
        while at < size:
            if self._body is not None:
                at = self._fill(view, at, events)
                continue
            if self._head or size - at < HEAD_BYTES:
                part = view[at : at + HEAD_BYTES - len(self._head)]
                self._head += part
                at += len(part)
                if len(self._head) < HEAD_BYTES:
                    break
                fields = HEAD.unpack(self._head)
                self._head.clear()
            else:
                fields = HEAD.unpack_from(view, at)
                at += HEAD_BYTES
            self._check(fields)
            length = fields[0]
            if size - at >= length:
                self._take(fields, view[at : at + length], events)
                at += length
            else:
                self._fields, self._body, self._filled = fields, bytearray(min(length, BODY_BYTES_FIRST)), 0
                self.body_bytes = len(self._body)
        return events

    def _fill(self, view: memoryview, at: int, events: list[Event]) -> int:
        body = self._body
        assert body is not None
        if self._filled == len(body):
            body += bytes(min(len(body), self._fields[0] - len(body)))
            self.body_bytes = len(body)
        count = min(len(body) - self._filled, len(view) - at)
        body[self._filled : self._filled + count] = view[at : at + count]
        self._filled += count
        if self._filled == self._fields[0]:
            self._body = None
            self.body_bytes = 0
            self._take(self._fields, memoryview(body), events)
        return at + count

    def _check(self, fields: tuple[int, ...]) -> None:
        """Everything a head can tell, before anything is stored."""
        length, kind, name_size, count, call_id, _number, header_size = fields
        shape = _SHAPES.get(kind)
        if shape is None:
            raise _broken(f"unknown frame kind {kind}")
        if length > self.frame_bytes_max:
            raise IntegrityError("too_large", f"RPC: a frame of {length} bytes, at most {self.frame_bytes_max} allowed")
        method, buffers, header = shape
        if bool(name_size) != method or (count and not buffers) or bool(header_size) != header:
            raise _broken(f"frame of kind {kind} has parts it must not have, or lacks some")
        if count > BUFFERS_MAX or header_size > headers.HEADER_BYTES_MAX:
            raise IntegrityError("too_large", f"RPC: {count} buffers and a header of {header_size} bytes")
        fixed = 4 * count + name_size + header_size
        if length < fixed or (not count and length != fixed):
            raise _broken("the parts of a frame do not fill it")
        if kind == REQUEST:
            if call_id <= self._last_taken or self._left:
                raise _broken("a call id came twice, or a call came after the goodbye")
        elif kind in (RESPONSE, ITEM, END, ERROR):
            if not 0 < call_id <= self._last_made:
                raise _broken(f"an answer to call {call_id}, which was never made")
        elif kind in (CANCEL, CREDIT) and not 0 < call_id <= self._last_taken:
            raise _broken(f"news of call {call_id}, which never came")

    def _take(self, fields: tuple[int, ...], body: memoryview, events: list[Event]) -> None:
        """One complete frame."""
        length, kind, name_size, count, call_id, number, header_size = fields
        at = 4 * count
        buffers: tuple[memoryview, ...] = ()
        if count:
            buffers = _split(body, count, at + name_size + header_size)
        name = _text(body[at : at + name_size]) if name_size else ""
        at += name_size
        header = headers.unpack(body[at : at + header_size]) if header_size else _EMPTY
        if kind == REQUEST:
            if not 0 < number <= DEADLINE_MS_MAX:
                raise _broken(f"a deadline of {number} ms")
            self._last_taken = call_id
            self._taken[call_id] = STREAM_CREDIT
            size = length + HEADER_TIMES * header_size
            events.append(Request(call_id, name, number, header, buffers, size))
        elif kind in (RESPONSE, ITEM, END, ERROR):
            self._take_answer(kind, call_id, header, buffers, events)
        elif kind == CANCEL:
            if self._taken.pop(call_id, None) is not None:
                events.append(Cancelled(call_id))
        elif kind == CREDIT:
            self._take_credit(call_id, number, events)
        elif kind == PING:
            events.append(Ping(number))
        elif kind == PONG:
            events.append(Pong(number))
        else:
            reason = header.get("reason")
            self._left = True
            events.append(Goodbye(reason[:200] if isinstance(reason, str) else ""))

    def _take_answer(
        self, kind: int, call_id: int, header: dict[str, Any], buffers: tuple[memoryview, ...], events: list[Event]
    ) -> None:
        left = self._made.get(call_id)
        if left is None:
            return
        if kind == ITEM:
            if left == 0:
                raise _broken(f"more items of call {call_id} than it has credit for")
            self._made[call_id] = left - 1
            self._streaming.add(call_id)
            events.append(Item(call_id, header, buffers))
            return
        if kind == RESPONSE and call_id in self._streaming:
            raise _broken(f"call {call_id} is answered by a stream and by a response")
        del self._made[call_id]
        self._streaming.discard(call_id)
        if kind == RESPONSE:
            events.append(Response(call_id, header, buffers))
        elif kind == END:
            events.append(End(call_id, header))
        else:
            events.append(Failed(call_id, header))

    def _take_credit(self, call_id: int, items: int, events: list[Event]) -> None:
        credit = self._taken.get(call_id)
        if credit is None:
            return
        if items == 0 or credit + items > 1 << 20:
            raise _broken(f"credit of {items} items for call {call_id}")
        self._taken[call_id] = credit + items
        events.append(Granted(call_id))


def _split(body: memoryview, count: int, at: int) -> tuple[memoryview, ...]:
    """The buffers of a body that begin at ``at``."""
    if count == 1:
        size = int.from_bytes(body[:4], "big")
        if at + size != len(body):
            raise _broken("the buffers of a frame do not fill it")
        return (body[at:],)
    sizes = Struct(f"!{count}I").unpack_from(body)
    if at + sum(sizes) != len(body):
        raise _broken("the buffers of a frame do not fill it")
    buffers = []
    for size in sizes:
        buffers.append(body[at : at + size])
        at += size
    return tuple(buffers)


def _text(name: memoryview) -> str:
    try:
        return str(name, "utf-8")
    except UnicodeDecodeError:
        raise _broken("a method name is not UTF-8") from None


def _too_large(length: int, limit: int) -> RequestError:
    return RequestError("too_large", f"a frame of {length} bytes exceeds the limit of {limit}", "send it in parts")
