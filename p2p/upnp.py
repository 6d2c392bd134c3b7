"""Asks the router for a way in: a UPnP port mapping (miniupnpc), made, renewed and taken back.

Owns: the mapping. Does not own: whether it helps (``reach`` has peers try it).

Every call runs in a thread of its own that is left behind at its deadline: a router may take any time to answer.
"""

import logging
from typing import Any

import miniupnpc
import trio

log = logging.getLogger(__name__)

DISCOVER_MS = 1500
DEADLINE_S = 8.0
TAKE_BACK_S = 0.4
DESCRIPTION = "RiOS"
PORTS_TRIED = 4


class Mapping:
    """One TCP port of this machine, mapped by the router."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._router: Any = None
        self.port = 0
        """The router's port, 0 without a mapping."""
        self.host = ""
        """What the router calls its own address."""
        self.why_not = "not tried yet"

    async def make(self) -> bool:
        """Make the mapping or renew it; whether there is one. Never raises: most routers cannot."""
        with trio.move_on_after(DEADLINE_S) as scope:
            try:
                found = await trio.to_thread.run_sync(self._make, abandon_on_cancel=True)
            except Exception as error:  # noqa: BLE001 - the library raises bare Exceptions
                self._lost(f"the router refuses: {error}")
            else:
                self._router, self.host, self.port = found
        if scope.cancelled_caught:
            self._lost(f"the router did not answer within {DEADLINE_S:.0f} s")
        if self.port:
            self.why_not = ""
        else:
            log.debug("UPnP: %s", self.why_not)
        return bool(self.port)

    def _lost(self, why: str) -> None:
        """There is no mapping, and the router is looked for anew: it may have restarted, or be another one."""
        self._router, self.port, self.why_not = None, 0, why

    def _make(self) -> tuple[Any, str, int]:
        router = self._router
        if router is None:
            router = miniupnpc.UPnP()
            router.discoverdelay = DISCOVER_MS
            if not router.discover():
                raise OSError("no router with UPnP answers")
            router.selectigd()
        host = str(router.externalipaddress() or "")
        wanted = [self.port] if self.port else [self._port + step for step in range(PORTS_TRIED)]
        refusal: Exception = OSError("no port tried")
        for port in wanted:
            try:
                if router.addportmapping(port, "TCP", router.lanaddr, self._port, DESCRIPTION, ""):
                    return router, host, port
            except Exception as error:  # noqa: BLE001 - e.g. ConflictInMappingEntry: the next port may be free
                refusal = error
        raise refusal

    async def take_back(self) -> None:
        """Remove the mapping, if the router answers in time."""
        if not self.port:
            return
        port, self.port = self.port, 0
        with trio.move_on_after(TAKE_BACK_S, shield=True):
            try:
                await trio.to_thread.run_sync(self._router.deleteportmapping, port, "TCP", abandon_on_cancel=True)
            except Exception as error:  # noqa: BLE001 - the router forgets it by itself
                log.debug("UPnP: taking the mapping back: %s", error)
