"""One link per peer: dialled when needed, watched, dialled again when it breaks.

A link is a direct lane or, where that cannot be had, a libp2p stream; both carry the same calls. libp2p's connection
is made beside a lane too: DHT and gossip live there.

Invariants:
1. At most one dial per peer is under way; a caller that gives up does not end it for the others.
2. A direct link is preferred to a relayed one, a lane to a stream. Of two links of one kind that both sides dialled at
   once, both ends prefer the one that the smaller peer id opened. Others are closed by their opener once nothing is in
   flight on them.
3. Where a lane could not be dialled, or died young, it is left alone for :data:`LANE_RETRY_S`, longer each time; then
   it is tried again in the background, and calls move to it.
4. A peer that answers no ping for :data:`PING_TIMEOUT_S` is reported as down and its links are closed. A peer whose
   link broke is dialled again, and reported as down if that does not succeed within about 3 s.
"""

import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId
from p2p.carrier import Carrier
from p2p.core.backoff import Backoff
from p2p.core.doors import Refusal
from p2p.deadlines import Deadlines
from p2p.dial import Dial
from p2p.doors import Doors
from p2p.guarded import Nursery
from p2p.host import Host
from p2p.lane import Lane
from p2p.lanechannel import CLOSED_HERE
from p2p.lanes import Lanes
from p2p.pool import Pool
from p2p.rpc import Connection, Context
from p2p.services import Service
from p2p.streams import Channel

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 10.0
DIRECT_S = 2 * DIAL_TIMEOUT_S
"""For the connection and a stream on it."""
LANE_DIAL_S = 5.0
DETOUR_S = 20.0
LANE_RETRY_S = (15.0, 600.0)
LANE_YOUNG_S = 2.0
TICK_S = 2.0
PING_TIMEOUT_S = 3.0
REDIAL_S = (0.05, 0.7, 1.8)
LINKS_PER_PEER_MAX = 4
DIRECT = PeerId("")
DIRECT_RETRY_S = (1.0, 240.0)
"""Between attempts to replace a relayed link by a direct one."""
SHUTTING_DOWN = "shutting down"

Way = Callable[[PeerId], Awaitable[None]]
"""A way to a link with a peer. Raises RiosError."""


async def _no_way(peer_id: PeerId) -> None:
    raise RemoteError("unavailable", f"no relay leads to {peer_id}", peer_id=peer_id)


class Links:
    """Every link of this node."""

    def __init__(
        self,
        host: Host,
        lanes: Lanes | None,
        services: Mapping[str, Service],
        nursery: Nursery,
        *,
        frame_bytes_max: int,
        calls_max: int,
        peers_max: int,
        up: Callable[[PeerId], None],
        down: Callable[[PeerId], None],
        doors: Doors,
        takes_lanes: Callable[[PeerId], bool | None],
    ) -> None:
        self._host = host
        self._lanes = lanes
        self._nursery = nursery
        self.pool = Pool(nursery)
        self._deadlines = Deadlines()
        self._context = Context(
            services=services,
            pool=self.pool,
            deadlines=self._deadlines,
            frame_bytes_max=frame_bytes_max,
            calls_max=calls_max,
            blame=doors.blame,
            meter=doors.meter,
        )
        self._doors = doors
        doors.on_ban(lambda peer_id: self.pool.submit(partial(self.drop, peer_id)))
        self._peers_max = peers_max
        self._up = up
        self._down = down
        self._takes_lanes = takes_lanes
        self._links: dict[PeerId, list[Connection]] = {}
        self._best: dict[PeerId, Connection] = {}
        self._dials: dict[PeerId, Dial] = {}
        self._bulk_dials: dict[PeerId, trio.Event] = {}
        self._reviving: set[PeerId] = set()
        self._no_lane = Backoff(*LANE_RETRY_S, growth=2, kept_max=4 * peers_max)
        self._relayed = Backoff(*DIRECT_RETRY_S, growth=4, kept_max=4 * peers_max)
        self._added = trio.Event()
        self.detour: Way = _no_way
        """Reaches a peer that cannot be dialled."""
        self.straighten: Way = _no_way
        """Tries to have a direct link beside a relayed one."""
        self.closing = False
        host.accept_channels(self._accept)
        if lanes is not None:
            lanes.accept(self._refusal, self._serve_lane)

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
        if self._doors.banned(peer_id):
            hint = "rios peers bans says why; rios peers unban lets it in again"
            raise RemoteError("forbidden", f"this node shut {peer_id} out", hint, peer_id=peer_id)
        dial = self._dials.get(peer_id)
        if dial is None:
            dial = self._dials[peer_id] = Dial(peer_id)
            self._nursery.start_soon(self._dial, peer_id, dial)
        await dial.done.wait()
        link = self._best.get(peer_id)
        if link is None:
            reason = dial.error.message if dial.error else "the link broke at once"
            said = f"{peer_id} cannot be reached: "  # by the dial, perhaps
            raise RemoteError("unavailable", said + reason.removeprefix(said), peer_id=peer_id)
        return link

    async def bulk(self, link: Connection) -> Connection:
        """The connection for bulk calls that belongs to a link. Raises RemoteError ``unavailable``."""
        peer_id = link.peer_id
        while link.bulk is None or not link.bulk.alive:
            dialling = self._bulk_dials.get(peer_id)
            if dialling is not None:
                await dialling.wait()
                continue
            dialling = self._bulk_dials[peer_id] = trio.Event()
            try:
                with trio.fail_after(DIAL_TIMEOUT_S):
                    self._pair(link, await self._host.open_channel(peer_id, bulk=True))
            except trio.TooSlowError:
                raise RemoteError("unavailable", f"no bulk stream to {peer_id}", peer_id=peer_id) from None
            finally:
                del self._bulk_dials[peer_id]
                dialling.set()
        return link.bulk

    # -- dialling

    async def _dial(self, peer_id: PeerId, dial: Dial) -> None:
        try:
            await dial.attempt("link", DIRECT_S, partial(self._dial_directly, peer_id))
            if peer_id not in self._best:
                detour = Dial(peer_id)
                await detour.attempt("way through a relay", DETOUR_S, partial(self.detour, peer_id))
                if dial.error is None or self._host.known_addresses(peer_id) == ():
                    dial.error = detour.error
        finally:
            del self._dials[peer_id]
            dial.done.set()

    async def _dial_directly(self, peer_id: PeerId) -> None:
        connecting = Dial(peer_id)
        self._nursery.start_soon(self._connect, peer_id, connecting)
        if await self._dial_lane(peer_id):
            return
        await connecting.done.wait()
        if connecting.error is not None:
            raise connecting.error
        if peer_id not in self._best:
            self._add(await self._host.open_channel(peer_id))

    async def _connect(self, peer_id: PeerId, dial: Dial) -> None:
        """libp2p's connection."""
        try:
            await dial.attempt("connection", DIAL_TIMEOUT_S, partial(self._host.connect, peer_id))
        finally:
            dial.done.set()

    async def _dial_lane(self, peer_id: PeerId) -> bool:
        """Whether there is a lane now."""
        if self._lanes is None or not self._lane_due(peer_id):
            return False
        try:
            with trio.fail_after(LANE_DIAL_S):
                lane = await self._lanes.dial(peer_id, self._host.known_addresses(peer_id))
        except (RiosError, trio.TooSlowError) as error:
            log.debug("no lane to %s: %s", peer_id, error)
            self._avoid_lane(peer_id)
            return False
        self._no_lane.forget(peer_id)
        self._add_lane(lane)
        self._nursery.start_soon(self._read_lane, lane)
        return True

    # -- ways that are found elsewhere (``relay``, ``punch``)

    def host_of(self, peer_id: PeerId) -> str:
        """The host at the other end of a direct link to a peer; empty if there is none."""
        return next((link.carrier.host for link in self._links.get(peer_id, ()) if not link.relay), "")

    def far_host(self, peer_id: PeerId) -> str:
        """Where the relay of the only link to a peer sees that peer come from; empty if there is a direct one."""
        link = self._best.get(peer_id)
        return link.far_host if link is not None and link.relay else ""

    def round_trip_s(self, peer_id: PeerId) -> float:
        """The last round trip to a linked peer, 0 if it was not measured yet."""
        link = self._best.get(peer_id)
        return link.round_trip_s if link is not None else 0.0

    async def wait_linked(self, peer_id: PeerId) -> None:
        """Return when there is a link to a peer."""
        while peer_id not in self._best:
            await self._added.wait()

    def may_dial(self, peer_id: PeerId) -> bool:
        """Whether one peer more may be dialled only because it leads to another."""
        return not self.full and not self._doors.unwanted(peer_id)

    async def dial_at(self, peer_id: PeerId, texts: Sequence[str], *, spare: bool = False) -> None:
        """Have a direct lane to a peer at one of these addresses; a ``spare`` one makes room for others like those who
        come by themselves. Raises RemoteError ``unavailable``."""
        if self._lanes is None or self.closing:
            raise RemoteError("unavailable", "this node makes no lanes (p2p.lane is off)", peer_id=peer_id)
        if self._doors.unwanted(peer_id):
            raise RemoteError("unavailable", f"{peer_id} is banned here, or just gave up its place", peer_id=peer_id)
        try:
            with trio.fail_after(LANE_DIAL_S):
                lane = await self._lanes.dial(peer_id, texts)
        except trio.TooSlowError:
            raise RemoteError("unavailable", f"no lane within {LANE_DIAL_S:.0f} s", peer_id=peer_id) from None
        if spare:
            self._doors.spare(peer_id)
        self._add_lane(lane)
        self._nursery.start_soon(self._read_lane, lane)

    async def adopt(
        self, socket: trio.socket.SocketType, peer_id: PeerId, relay: PeerId, far_host: str, *, initiator: bool
    ) -> None:
        """Make a link of a socket that leads to a peer (``relay``: through it). Raises RemoteError ``unavailable``."""
        if self._lanes is None or self.closing:
            socket.close()
            raise RemoteError("unavailable", "this node makes no lanes (p2p.lane is off)", peer_id=peer_id)
        try:
            host = str(socket.getpeername()[0])
            if initiator:
                lane = await self._lanes.greet(socket, peer_id, host)
            else:
                lane = await self._lanes.answer(socket, peer_id, host, self._refusal)
        except OSError as error:
            socket.close()
            raise RemoteError("unavailable", f"connection lost: {error}", peer_id=peer_id) from error
        except BaseException:
            socket.close()
            raise
        self._add_lane(lane, relay, far_host)
        self._nursery.start_soon(self._read_lane, lane, bool(relay))

    def _lane_due(self, peer_id: PeerId) -> bool:
        return self._takes_lanes(peer_id) is not False and self._no_lane.is_due(peer_id, trio.current_time())

    def _avoid_lane(self, peer_id: PeerId) -> None:
        self._no_lane.put_off(peer_id, trio.current_time(), random.uniform(0.7, 1.3))

    # -- what comes in

    def _refusal(self, peer_id: PeerId) -> str:
        """Why no more links of this peer are taken, or nothing."""
        if self.closing:
            return SHUTTING_DOWN
        if len(self._links.get(peer_id, ())) >= LINKS_PER_PEER_MAX:
            return f"more than {LINKS_PER_PEER_MAX} links of one peer"
        return ""

    async def _accept(self, channel: Channel, bulk: bool) -> None:
        peer_id = PeerId(channel.peer_id)
        main = next((link for link in self._links.get(peer_id, ()) if link.carrier.kind == channel.kind), None)
        if bulk and (main is None or (main.bulk is not None and main.bulk.alive)):
            await channel.close()
        elif bulk and main is not None:
            await self._pair(main, channel).ended.wait()
        elif self._refusal(peer_id):
            await channel.close()
        else:
            await self._add(channel).ended.wait()

    async def _serve_lane(self, lane: Lane) -> None:
        """Take an accepted lane in; returns when it is over."""
        self._add_lane(lane)
        await self._read_lane(lane)

    async def _read_lane(self, lane: Lane, relayed: bool = False) -> None:
        began = trio.current_time()
        await lane.run()
        young = trio.current_time() - began < LANE_YOUNG_S and lane.reason != CLOSED_HERE
        if lane.outbound and not relayed and young and not self.closing:
            self._avoid_lane(lane.peer_id)

    # -- the set of links

    def _add_lane(self, lane: Lane, relay: PeerId = DIRECT, far_host: str = "") -> None:
        bulk = Connection(lane.bulk, self._context, _not_watched)
        self._add(lane.main, bulk, relay, far_host)

    def _add(
        self, carrier: Carrier, bulk: Connection | None = None, relay: PeerId = DIRECT, far_host: str = ""
    ) -> Connection:
        link = Connection(carrier, self._context, self._on_lost)
        link.bulk, link.relay, link.far_host = bulk, relay, far_host
        if link.alive:
            self._links.setdefault(link.peer_id, []).append(link)
            self._choose(link.peer_id)
        return link

    def _pair(self, link: Connection, channel: Channel) -> Connection:
        link.bulk = Connection(channel, self._context, _not_watched)
        return link.bulk

    def _choose(self, peer_id: PeerId) -> None:
        """Pick the link that calls take; tell the layers above when the first came or the last went."""
        links = self._links.get(peer_id, [])
        # one that this side said goodbye on takes no calls any more, one that the peer did still does
        usable = [link for link in links if not link.leaving] or [link for link in links if link.takes_calls]
        if not usable:
            if not links:
                self._links.pop(peer_id, None)
            self._best.pop(peer_id, None)
            return
        # direct ones first, then lanes, then the smaller peer id's own; min() keeps the oldest of equals
        we_are_smaller = self._host.identity.peer_id < peer_id
        known = peer_id in self._best
        self._best[peer_id] = min(
            usable,
            key=lambda link: (link.relay != "", link.carrier.kind != "lane", link.carrier.outbound != we_are_smaller),
        )
        added, self._added = self._added, trio.Event()
        added.set()
        if not known:
            self._up(peer_id)

    def _on_lost(self, link: Connection) -> None:
        if link.bulk is not None and not self.closing:  # at the end the nursery takes no more, and all is closed anyway
            self.pool.submit(link.bulk.carrier.close)
        links = self._links.get(link.peer_id, [])
        if link in links:
            links.remove(link)
            self._choose(link.peer_id)
            if link.peer_id in self._best or self.closing:
                return
            if link.farewell == SHUTTING_DOWN or self._doors.unwanted(link.peer_id):
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

    # -- watching

    async def run(self) -> None:
        """Ping silent links, fold double ones, look for lanes, forever."""
        self._nursery.start_soon(self._deadlines.run)
        while True:
            # many links are looked at less often, so that an idle node stays idle
            tick_s = TICK_S * (1 + len(self._best) / 32)
            await trio.sleep(tick_s * random.uniform(0.9, 1.1))
            now = trio.current_time()
            for peer_id, links in list(self._links.items()):
                for link in list(links):
                    if self._is_stuck(link, now):
                        self.pool.submit(link.carrier.close)
                    elif now - link.heard_at >= tick_s:
                        self.pool.submit(partial(self._probe, link))
                    if link is not self._best.get(peer_id) and link.carrier.outbound:
                        self._fold(link)
                best = self._best.get(peer_id)  # what was done above may have ended the last one
                if best is None:
                    continue
                if best.relay:
                    self._straighten(peer_id)
                elif best.carrier.kind != "lane" and self._lanes is not None and self._lane_due(peer_id):
                    self.pool.submit(partial(self._upgrade, peer_id))

    def _straighten(self, peer_id: PeerId) -> None:
        """Try to replace a relayed link by a direct one, less and less often."""
        now = trio.current_time()
        if self._relayed.is_due(peer_id, now):
            self._relayed.put_off(peer_id, now, random.uniform(0.7, 1.3))
            self.pool.submit(partial(self._go_straight, peer_id))

    async def _go_straight(self, peer_id: PeerId) -> None:
        try:
            await self.straighten(peer_id)
        except RiosError as error:
            log.debug("the link to %s stays relayed: %s", peer_id, error)

    def _is_stuck(self, link: Connection, now: float) -> bool:
        """Whether a peer sends a frame so slowly that it can only be meant to keep us waiting."""
        stuck = link.is_stuck(now) or (link.bulk is not None and link.bulk.is_stuck(now))
        if stuck:
            self._doors.refused(Refusal("frame_seconds", "a frame comes on too slowly"), link.peer_id)
            self._doors.blame(link.peer_id, "slow")
        return stuck

    async def _upgrade(self, peer_id: PeerId) -> None:
        if await self._dial_lane(peer_id):
            log.debug("calls to %s take a lane from now on", peer_id)

    def _fold(self, link: Connection) -> None:
        """Another link is used: close this one once nobody uses it."""
        link.say_goodbye("another link is used")
        if link.in_flight == 0 and (link.bulk is None or link.bulk.in_flight == 0):
            self.pool.submit(link.carrier.close)

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
        found: dict[str, object] = {}
        for peer_id, link in self._best.items():
            bulk = link.bulk.statistics() if link.bulk is not None and link.bulk.alive else None
            found[peer_id] = {**link.statistics(), "bulk": bulk}
        return found


def _not_watched(_link: Connection) -> None:
    """A bulk connection needs nobody: the next bulk call opens another."""
