"""What RPC needs of the doors: somebody who counts what a peer does. Without doors nothing is limited."""

from typing import Protocol

from config.vocabulary import PeerId


class Meter(Protocol):
    """Counts what a peer does (``p2p/counting.PeerMeter``)."""

    def start_call(self) -> str:
        """One more call in flight; the limit that is in its way, if any."""

    def end_call(self) -> None:
        """A call is done."""

    def over(self, limit: str, times: int = 1) -> bool:
        """A call was refused here, for a limit of this name, and counts as ``times``; whether that makes a flood."""

    def spend(self, calls: int, size: int, now: float) -> float:
        """Calls and bytes came in: for how many seconds no more should."""


class _Free:
    """No limits."""

    def start_call(self) -> str:
        return ""

    def end_call(self) -> None:
        return

    def over(self, limit: str, times: int = 1) -> bool:
        return False

    def spend(self, calls: int, size: int, now: float) -> float:
        return 0.0


def free(_peer_id: PeerId) -> Meter:
    return _Free()
