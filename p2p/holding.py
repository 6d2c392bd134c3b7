"""What the bytes of peers hold of this node's memory: calls in progress, items that wait, frames that came in part.

Owns: the count over all connections, and which frames in part have to go. Does not own: windows (``rpc``).

Invariants:
1. The frames in part of one peer hold at most :data:`PARTS_BYTES_MAX`, over all of its connections, and so do those of
   all peers while everything holds more than :data:`HELD_BYTES_TOTAL` (where frames may be large: two frames).
2. It is the oldest that goes: a frame that is sent to occupy memory grows old, an honest one is soon complete.
3. A frame comes as a whole within about :data:`FRAME_SECONDS`, a small one at :data:`STUCK_BYTES_PER_SECOND` at least.
"""

from collections import Counter
from collections.abc import Callable

from config.vocabulary import PeerId
from p2p.core.frames import Machine

HELD_BYTES_MAX = 128 << 20
HELD_BYTES_TOTAL, HELD_BYTES_CROWDED = 512 << 20, 4 << 20
"""When everything that is held exceeds the first, the calls of each connection may hold the second."""
PARTS_BYTES_MAX = 128 << 20
STUCK_SECONDS, STUCK_BYTES_PER_SECOND = 30.0, 256
FRAME_SECONDS = 300.0
"""A line of 256 KiB/s needs 64 s for a frame of 16 MiB, and perhaps it carries others beside."""


class Held:
    """The count of a node."""

    def __init__(self) -> None:
        self.total = 0
        self._parts: dict[Part, None] = {}  # the oldest first
        self._parts_bytes = 0
        self._of: Counter[PeerId] = Counter()

    @property
    def crowded(self) -> bool:
        """Whether everything together is too much."""
        return self.total > HELD_BYTES_TOTAL

    def change(self, part: "Part", size: int, *, begun: bool) -> None:
        """A frame in part takes ``size`` bytes now; ``begun``: it is another one than before."""
        grown = size - part.size
        if begun:
            self._parts.pop(part, None)
        part.size = size
        self.total += grown
        self._parts_bytes += grown
        self._of[part.peer_id] += grown
        if size:
            self._parts[part] = None
        else:
            self._parts.pop(part, None)
            if not self._of[part.peer_id]:
                del self._of[part.peer_id]
        if grown > 0:
            self._make_room(part)

    def _make_room(self, grown: "Part") -> None:
        peer_id, most = grown.peer_id, max(PARTS_BYTES_MAX, 2 * grown.frame_bytes_max)
        while self._of[peer_id] > most:
            next(part for part in self._parts if part.peer_id == peer_id).drop()
        while self.crowded and self._parts_bytes > most:
            next(iter(self._parts)).drop()


class Part:
    """The frame that came in part over one connection, if one did. ``give_up`` ends the connection."""

    __slots__ = ("_give_up", "_held", "_machine", "_mark", "_progress", "peer_id", "size")

    def __init__(self, held: Held, peer_id: PeerId, machine: Machine, give_up: Callable[[], None]) -> None:
        self.peer_id = peer_id
        self.size = 0
        self._held = held
        self._machine = machine
        self._give_up = give_up
        self._mark: object = None
        self._progress: tuple[object, int, float] | None = None

    @property
    def frame_bytes_max(self) -> int:
        """What a frame may have."""
        return self._machine.frame_bytes_max

    def follow(self) -> None:
        """Bytes came in."""
        size, mark = self._machine.body_bytes, self._machine.part_mark
        if size != self.size or mark is not self._mark:
            begun, self._mark = mark is not self._mark, mark
            self._held.change(self, size, begun=begun)

    def drop(self) -> None:
        """It has to go."""
        self.end()
        self._give_up()

    def end(self) -> None:
        """No more is heard of the peer here: what came in part is of no use."""
        self._machine.stop()
        self._mark = None
        self._held.change(self, 0, begun=False)

    def is_stuck(self, now: float) -> bool:
        """Whether a frame has begun and comes on slower than anybody's line. Asked now and then."""
        begun = self._machine.partial
        if begun is None:
            self._progress = None
            return False
        mark, filled, whole = begun
        if self._progress is None or self._progress[0] is not mark:
            self._progress = (mark, filled, now)
            return False
        _, before, since = self._progress
        if now - since < STUCK_SECONDS:
            return False
        self._progress = (mark, filled, now)
        return filled - before < max(STUCK_BYTES_PER_SECOND, whole / FRAME_SECONDS) * (now - since)

    def wait(self) -> None:
        """The peer may not send: it is not to blame for the time."""
        self._progress = None
