"""What one peer does over its connections, counted by the doors (:class:`p2p.meter.Meter`)."""

from typing import TYPE_CHECKING

import trio

from config.vocabulary import PeerId
from p2p.core.doors import Entry, Refusal

if TYPE_CHECKING:
    from p2p.doors import Doors


class PeerMeter:
    """What one peer does over its connections, counted for it and for where it comes from."""

    __slots__ = ("_doors", "_entry", "_peer_id")

    def __init__(self, doors: "Doors", peer_id: PeerId, entry: Entry) -> None:
        self._doors = doors
        self._peer_id = peer_id
        self._entry = entry

    def start_call(self) -> str:
        """One more call in flight; what is wrong with that, empty if nothing. :meth:`end_call` once it is done."""
        refusal = self._doors.limiter.start_call(self._entry)
        return "" if refusal is None else self._refused(refusal)

    def end_call(self) -> None:
        """A call is done."""
        self._doors.limiter.end_call(self._entry)

    def over(self, limit: str, times: int = 1) -> bool:
        """A call was refused elsewhere, for a limit of this name; whether that makes a flood: hang up. ``times``: as
        how many refusals it counts."""
        return self._doors.refused(Refusal(limit, "calls were refused"), self._peer_id, times)

    def open_stream(self) -> str:
        """One more stream; what is wrong with that, empty if nothing. :meth:`close_stream` once it is done."""
        refusal = self._doors.limiter.open_stream(self._entry, trio.current_time())
        return "" if refusal is None else self._refused(refusal)

    def close_stream(self) -> None:
        """A stream is done."""
        self._doors.limiter.close_stream(self._entry)

    def spend(self, calls: int, size: int, now: float) -> float:
        """Calls and bytes came in: for how many seconds nothing more may be read from this peer."""
        wait_s, limit = self._doors.limiter.spend(self._entry, calls, size, now)
        if wait_s:
            self._doors.refused(Refusal(limit, f"{self._peer_id} is read more slowly"), self._peer_id)
        return wait_s

    def _refused(self, refusal: Refusal) -> str:
        self._doors.refused(refusal, self._peer_id)
        return f"{refusal.limit}: {refusal.text}"
