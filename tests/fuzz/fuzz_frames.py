"""Hostile frames against :class:`p2p.core.frames.Machine`, driven the way ``p2p/rpc.py`` drives it.

An episode is one connection: a machine that has calls of its own open gets frames (well formed, spoiled, made up) in
random splits until one breaks the protocol. What it says to the peer goes to a second machine that must accept it.
"""

from random import Random
from struct import pack

from config.errors import IntegrityError
from p2p.core import frames, headers
from p2p.core.frames import HEAD, Machine
from tests.fuzz.mutation import EDGES_32, LIES, number, split, spoil, text, value

FRAME_BYTES_MAX = 1 << 16
CALLS_MAX = 16
FRAMES_MAX = 60
_KINDS = tuple(range(13))


class Episode:
    """One connection between a machine under fire and an honest one on the other end."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._hostility = random.choice((0.05, 0.2, 0.7))
        self.target = Machine(frame_bytes_max=FRAME_BYTES_MAX)
        self.peer = Machine(frame_bytes_max=FRAME_BYTES_MAX)
        self._taken: list[int] = []
        self._made: list[int] = []
        self._call_id = 0
        self._sent: list[bytes] = []
        for _ in range(random.randrange(4)):
            self._made.append(self._tell(self.target.request("m", {}, (), 1000)[1]))

    def _tell(self, chunks: frames.Chunks) -> int:
        """Let the honest side hear what the target says; the id of the last call in it."""
        call_id = 0
        for event in self.peer.feed(b"".join(chunks)):
            if isinstance(event, frames.Request):
                call_id = event.call_id
        return call_id

    def run(self) -> int:
        """The number of frames it took."""
        for count in range(1, FRAMES_MAX + 1):
            try:
                for part in split(self._random, self._next()):
                    for event in self.target.feed(part):
                        self._react(event)
            except IntegrityError as error:
                self._check_dead(error)
                return count
            self._check_bounds()
        return FRAMES_MAX

    def _check_dead(self, error: IntegrityError) -> None:
        assert error.code in ("protocol", "too_large"), error.code
        try:
            self.target.feed(b"\0")
        except IntegrityError:
            return
        raise AssertionError("a machine whose protocol was broken goes on")

    def _check_bounds(self) -> None:
        body = self.target._body
        assert body is None or len(body) <= FRAME_BYTES_MAX
        assert len(self.target._head) < frames.HEAD_BYTES
        assert self.target.open_taken <= CALLS_MAX + 1
        assert len(self.target._streaming) <= self.target.open_made <= 4

    def _react(self, event: frames.Event) -> None:
        """Answer as ``rpc`` would."""
        target, random = self.target, self._random
        if isinstance(event, frames.Request):
            assert 0 < event.deadline_ms <= frames.DEADLINE_MS_MAX
            assert all(len(buffer) <= FRAME_BYTES_MAX for buffer in event.buffers)
            if target.open_taken > CALLS_MAX:
                target.fail(event.call_id, {"code": "busy"})
            else:
                self._taken.append(event.call_id)
        elif isinstance(event, frames.Ping):
            target.pong(event.number)
        if self._taken and random.random() < 0.5:
            call_id = self._taken.pop(random.randrange(len(self._taken)))
            credit = target.credit(call_id)
            if credit and random.random() < 0.3:
                target.item(call_id, {}, (b"item",))
            random.choice((target.respond, lambda c, h, _b: target.end(c, h)))(call_id, {}, ())

    # -- inputs

    def _next(self) -> bytes:
        random = self._random
        pick = random.random()
        if random.random() > self._hostility:
            data = self._valid()
        elif pick < 0.3:
            data = spoil(random, self._valid(), self._sent)
        elif pick < 0.55:
            data = self._spoilt_body()
        elif pick < 0.95:
            data = self._made_up()
        else:
            data = random.randbytes(random.randrange(1, 80))
        if len(self._sent) < 20:
            self._sent.append(data)
        return data

    def _valid(self) -> bytes:
        """A frame that is allowed now."""
        random = self._random
        kind = random.randrange(1, 11)
        header = headers.pack({text(random): value(random) for _ in range(random.randrange(3))})
        if kind == frames.REQUEST or (kind == frames.GOODBYE and random.random() < 0.9):
            self._call_id += random.choice((1, 1, 1, 2))
            buffers = [random.randbytes(random.choice((0, 1, 100, 2000))) for _ in range(random.choice((0, 0, 1, 3)))]
            sizes = pack(f"!{len(buffers)}I", *map(len, buffers))
            body = b"".join((sizes, b"run", header, *buffers))
            return HEAD.pack(len(body), frames.REQUEST, 3, len(buffers), self._call_id, 1000, len(header)) + body
        if kind in (frames.RESPONSE, frames.ITEM, frames.END, frames.ERROR) and self._made:
            call_id = random.choice(self._made)
            return HEAD.pack(len(header), kind, 0, 0, call_id, 0, len(header)) + header
        if kind in (frames.CANCEL, frames.CREDIT) and self._call_id:
            return HEAD.pack(0, kind, 0, 0, random.randrange(self._call_id) + 1, random.randrange(1, 5), 0)
        if kind == frames.GOODBYE:
            return HEAD.pack(len(header), kind, 0, 0, 0, 0, len(header)) + header
        return HEAD.pack(0, frames.PING, 0, 0, 0, random.randrange(1 << 32), 0)

    def _spoilt_body(self) -> bytes:
        """A frame whose head is right about a body that is not."""
        data = self._valid()
        body = spoil(self._random, data[frames.HEAD_BYTES :])
        length, *rest = HEAD.unpack_from(data)
        if self._random.random() < 0.3:
            rest[-1] = max(0, rest[-1] + len(body) - length)
        return HEAD.pack(len(body), *rest) + body

    def _made_up(self) -> bytes:
        """A head and a body that may or may not fit each other."""
        random = self._random
        kind = random.choice(_KINDS)
        method, has_buffers, has_header = frames._SHAPES.get(kind, (True, True, True))
        name = random.choice((b"", b"run", b"\xff\xfe", text(random).encode("utf-8", "replace")))[:255]
        header = random.choice((b"", headers.pack({"a": value(random)}), random.choice(LIES), random.randbytes(9)))
        buffers = [random.randbytes(random.choice((0, 1, 40))) for _ in range(random.choice((0, 0, 1, 2, 5)))]
        if random.random() < 0.8:
            name, buffers = (name or b"run") if method else b"", buffers if has_buffers else []
            header = (header or b"\x80") if has_header else b""
        sizes = [len(buffer) for buffer in buffers]
        if sizes and random.random() < 0.4:
            sizes[random.randrange(len(sizes))] = number(random, EDGES_32, 1 << 32)
        body = b"".join((pack(f"!{len(sizes)}I", *sizes), name, header, *buffers))
        length = len(body) if random.random() < 0.7 else number(random, EDGES_32, 1 << 32)
        count = len(sizes) if random.random() < 0.8 else number(random, EDGES_32, 1 << 16)
        header_size = len(header) if random.random() < 0.8 else number(random, EDGES_32, 1 << 32)
        call_id = random.choice((self._call_id + 1, 0, 1, number(random, EDGES_32, 1 << 32)))
        deadline = random.choice((1000, 0, 1, number(random, EDGES_32, 1 << 32)))
        self._call_id = max(self._call_id, call_id if call_id < 1 << 16 else 0)
        return HEAD.pack(length, kind, len(name), count, call_id, deadline, header_size) + body


def run(random: Random) -> int:
    """One episode."""
    return Episode(random).run()
