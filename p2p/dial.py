"""A dial under way, for everybody who waits for it."""

from collections.abc import Awaitable, Callable

import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId


class Dial:
    """``done`` is set when it is over; ``error`` is what was wrong with its last attempt."""

    __slots__ = ("done", "error", "peer_id")

    def __init__(self, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self.done = trio.Event()
        self.error: RiosError | None = None

    async def attempt(self, what: str, seconds: float, way: Callable[[], Awaitable[None]]) -> None:
        """Go one way for so many seconds; does not raise RiosError."""
        self.error = None
        try:
            with trio.fail_after(seconds):
                await way()
        except RiosError as error:
            self.error = error
        except trio.TooSlowError:
            self.error = RemoteError("unavailable", f"no {what} within {seconds:.0f} s", peer_id=self.peer_id)
