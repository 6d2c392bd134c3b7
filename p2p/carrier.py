"""What a carrier of RPC frames must do: ``streams.Channel`` (libp2p) and ``lane.LaneChannel`` (straight on TCP) are."""

from collections.abc import Callable
from typing import Any, Protocol

Buffer = bytes | bytearray | memoryview


class Carrier(Protocol):
    """An ordered, authenticated, two-way byte stream to one peer, without a task of its own."""

    closed: bool

    @property
    def kind(self) -> str:
        """``lane`` or ``stream``."""

    @property
    def peer_id(self) -> str:
        """The proven peer at the other end."""

    @property
    def host(self) -> str:
        """The IP address that the connection leads to (a relay's, if it is relayed); empty if it is gone."""

    @property
    def outbound(self) -> bool:
        """Whether this side opened it."""

    @property
    def congested(self) -> bool:
        """Whether much waits to be sent: :meth:`drain` before sending more."""

    @property
    def more(self) -> bool:
        """Whether more has been received than what is being delivered right now (False where nobody can tell)."""

    def open(self, receive: Callable[[memoryview], None], lost: Callable[[], None]) -> None:
        """Start delivery. Both callbacks run in the reader: they must not block or raise."""

    def send(self, chunks: list[Buffer], urgent: bool = False) -> None:
        """Send now or queue, whole and in order: one frame. Does nothing once closed.

        An ``urgent`` frame (small, its order does not matter) goes before frames that wait.
        """

    async def drain(self) -> None:
        """Return when there is room (or the carrier is closed)."""

    def consumed(self, count: int) -> None:
        """That many received bytes need no room any more."""

    async def close(self) -> None:
        """Close it; ``lost`` is called if it was not yet."""

    def statistics(self) -> dict[str, Any]:
        """Kind, cipher, bytes in and out."""
