"""One link per peer: dialled when needed, watched, dialled again when it breaks.

Invariants:
1. At most one dial per peer is under way; a caller that gives up does not end it for the others.
2. Of two links that both sides dialled at once, both ends prefer the one that the smaller peer id opened; the other is
   closed by its opener once nothing is in flight on it.
3. A peer that answers no ping for :data:`PING_TIMEOUT_S` is reported as down and its links are closed. A peer whose
   link broke is dialled again, and reported as down if that does not succeed within about 3 s.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId
from p2p.face import Handler
from p2p.host import Host
from p2p.pool import Pool
from p2p.rpc import Connection
from p2p.streams import Channel

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 10.0
TICK_S = 2.0
PING_TIMEOUT_S = 3.0
REDIAL_S = (0.05, 0.7, 1.8)
SHUTTING_DOWN = "shutting down"


class _Dial:
    """A dial under way."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: RiosError | None = None


class Links:
    """Every link of this node."""

    def __init__(
        self,
        host: Host,
        handlers: Mapping[str, Handler],
        nursery: trio.Nursery,
        *,
        frame_bytes_max: int,
        calls_max: int,
        peers_max: int,
        up: Callable[[PeerId], None],
        down: Callable[[PeerId], None],
    ) -> None:
        self._host = host
        self._handlers = handlers
        self._nursery = nursery
        self._pool = Pool(nursery)
        self._frame_bytes_max = frame_bytes_max
        self._calls_max = calls_max
        self._peers_max = peers_max
        self._up = up
        self._down = down
        self._links: dict[PeerId, list[Connection]] = {}
        self._best: dict[PeerId, Connection] = {}
        self._dials: dict[PeerId, _Dial] = {}
        self._reviving: set[PeerId] = set()
        self.closing = False
        host.accept_channels(self._accept)

    @property
    def full(self) -> bool:
        """Whether there are as many peers as allowed."""
        return len(self._best) >= self._peers_max

    def peers(self) -> Sequence[PeerId]:
        """Peers with a live link."""
        return tuple(self._best)

    def ready(self, peer_id: PeerId) -> Connection | None:
        """The link to a peer if there is one now."""
        return self._best.get(peer_id)

    async def get(self, peer_id: PeerId) -> Connection:
        """The link to a peer, dialled if needed. Raises RemoteError ``unavailable``."""
        link = self._best.get(peer_id)
        if link is not None:
            return link
        if self.closing:
            raise RemoteError("unavailable", "this node is shutting down")
        dial = self._dials.get(peer_id)
        if dial is None:
            dial = self._dials[peer_id] = _Dial()
            self._nursery.start_soon(self._dial, peer_id, dial)
        await dial.done.wait()
        link = self._best.get(peer_id)
        if link is None:
            reason = dial.error.message if dial.error else "the link broke at once"
            raise RemoteError("unavailable", f"{peer_id} cannot be reached: {reason}", peer_id=peer_id)
        return link

    async def _dial(self, peer_id: PeerId, dial: _Dial) -> None:
        try:
            with trio.fail_after(DIAL_TIMEOUT_S):
                await self._host.connect(peer_id)
                if peer_id not in self._best:
                    self._add(await self._host.open_channel(peer_id))
        except RiosError as error:
            dial.error = error
        except trio.TooSlowError:
            dial.error = RemoteError("unavailable", f"no connection within {DIAL_TIMEOUT_S:.0f} s", peer_id=peer_id)
        finally:
            del self._dials[peer_id]
            dial.done.set()

    async def _accept(self, channel: Channel) -> None:
        peer_id = PeerId(channel.peer_id)
        if self.closing or (self.full and peer_id not in self._best) or len(self._links.get(peer_id, ())) >= 4:
            await channel.close()
            return
        await self._add(channel).ended.wait()

    def _add(self, channel: Channel) -> Connection:
        link = Connection(
            channel,
            self._handlers,
            self._pool,
            frame_bytes_max=self._frame_bytes_max,
            calls_max=self._calls_max,
            lost=self._on_lost,
        )
        if link.alive:
            self._links.setdefault(link.peer_id, []).append(link)
            self._choose(link.peer_id)
        return link

    def _choose(self, peer_id: PeerId) -> None:
        """Pick the link that calls take; tell the layers above when the first came or the last went."""
        links = self._links.get(peer_id, [])
        usable = [link for link in links if not link.leaving] or links
        if not usable:
            self._links.pop(peer_id, None)
            self._best.pop(peer_id, None)
            return
        # the smaller peer id's own link first; min() keeps the oldest of equals
        we_are_smaller = self._host.identity.peer_id < peer_id
        known = peer_id in self._best
        self._best[peer_id] = min(usable, key=lambda link: link.carrier.outbound != we_are_smaller)
        if not known:
            self._up(peer_id)

    def _on_lost(self, link: Connection) -> None:
        links = self._links.get(link.peer_id, [])
        if link in links:
            links.remove(link)
            self._choose(link.peer_id)
            if link.peer_id in self._best or self.closing:
                return
            if link.farewell == SHUTTING_DOWN:
                self._down(link.peer_id)
            elif link.peer_id not in self._reviving:
                self._reviving.add(link.peer_id)
                self._nursery.start_soon(self._revive, link.peer_id)

    async def _revive(self, peer_id: PeerId) -> None:
        try:
            for wait_s in REDIAL_S:
                await trio.sleep(wait_s * random.uniform(0.8, 1.2))
                try:
                    with trio.move_on_after(2):
                        await self.get(peer_id)
                        return
                except RiosError as error:
                    log.debug("dialling %s again: %s", peer_id, error)
        finally:
            self._reviving.discard(peer_id)
        if peer_id not in self._best:
            log.info("peer %s is gone", peer_id)
            self._down(peer_id)

    async def run(self) -> None:
        """Ping silent links and fold double ones, forever."""
        while True:
            # many links are looked at less often, so that an idle node stays idle
            tick_s = TICK_S * (1 + len(self._best) / 32)
            await trio.sleep(tick_s * random.uniform(0.9, 1.1))
            now = trio.current_time()
            for peer_id, links in list(self._links.items()):
                for link in list(links):
                    if now - link.heard_at >= tick_s:
                        self._pool.submit(partial(self._probe, link))
                    if link is not self._best.get(peer_id) and link.carrier.outbound:
                        link.say_goodbye("another link is used")
                        if link.in_flight == 0:
                            self._pool.submit(link.carrier.close)

    async def _probe(self, link: Connection) -> None:
        if not await link.ping(PING_TIMEOUT_S) and link.alive:
            log.info("peer %s does not answer", link.peer_id)
            self._down(link.peer_id)
            await self.drop(link.peer_id)

    async def drop(self, peer_id: PeerId) -> None:
        """Close everything to a peer."""
        for link in list(self._links.get(peer_id, ())):
            await link.carrier.close()
        await self._host.disconnect(peer_id)

    async def close(self) -> None:
        """Say goodbye to everybody."""
        self.closing = True
        for links in list(self._links.values()):
            for link in list(links):
                link.say_goodbye(SHUTTING_DOWN)
        await trio.lowlevel.checkpoint()

    def statistics(self) -> dict[str, object]:
        """Numbers per peer."""
        return {peer_id: link.statistics() for peer_id, link in self._best.items()}
