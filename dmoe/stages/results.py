"""Rows that come home: what the last host of a chain sends to the orchestrator.

Owns: the RPC ``stage.result``, which passes are waited for. Does not own: what the rows mean (``chain``).

Invariants:
1. A result counts only if it comes from the peer that the pass expects it from, once.
2. What nobody waits for any more is thanked for and dropped: its pass failed, or was given up.
"""

from dataclasses import dataclass, field
from typing import Any

import trio

from config.errors import RequestError, RiosError
from config.vocabulary import PeerId
from dmoe.core import stagecalls
from p2p.face import Call, Network, Reply


@dataclass(slots=True, eq=False)
class Expected:
    """A pass under way. ``happened`` is set once ``header`` and ``buffer`` are there, or ``error`` is."""

    number: int
    peer: PeerId
    happened: trio.Event = field(default_factory=trio.Event)
    header: dict[str, Any] | None = None
    buffer: memoryview | None = None
    error: RiosError | None = None

    def fail(self, error: RiosError) -> None:
        """It will not come. Does nothing if it has come."""
        if not self.happened.is_set():
            self.error = error
            self.happened.set()


class Results:
    """All passes of a node that wait for rows."""

    def __init__(self, network: Network) -> None:
        self._waiting: dict[int, Expected] = {}
        self._numbers = 0
        network.serve(stagecalls.RESULT, self._take, quick=self._quick)

    def expect(self, peer: PeerId) -> Expected:
        """A new pass whose rows will come from ``peer``."""
        number = self.number()
        expected = self._waiting[number] = Expected(number, peer)
        return expected

    def number(self) -> int:
        """A name for a pass, higher than all before."""
        self._numbers += 1
        return self._numbers

    def forget(self, expected: Expected) -> None:
        """Nobody waits for it any more."""
        self._waiting.pop(expected.number, None)

    def _quick(self, call: Call) -> Reply:
        number = call.header.get("pass")
        expected = self._waiting.get(number) if type(number) is int else None
        if expected is not None and call.peer_id == expected.peer and len(call.buffers) == 1:
            self.forget(expected)
            expected.header, expected.buffer = call.header, call.buffers[0]
            expected.happened.set()
        return Reply({})

    async def _take(self, call: Call) -> Reply:
        if len(call.buffers) != 1:
            raise RequestError("invalid_request", f"{stagecalls.RESULT}: got {len(call.buffers)} buffers, need 1")
        return self._quick(call)
