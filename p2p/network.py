"""The package's face over libp2p: starts every part and joins them.

Owns: the life cycle and the wiring. Does not own: any protocol.

Invariants:
1. When :func:`open_network` yields, the node listens and its addresses are known; peers come in the background.
2. Leaving it ends everything in under 2 s, also when peers do not answer.
"""

import logging
import resource
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from config import seeds
from config.errors import ConfigError, LocalError, RemoteError, RiosError
from config.settings import P2pSettings
from config.vocabulary import PeerId
from p2p import clock, mdns, trace
from p2p.allow import AllowList
from p2p.blobs import PeerBlobs
from p2p.core.advert import Advert
from p2p.core.doors import Limits
from p2p.core.identity import Identity
from p2p.core.reach import CIRCUIT
from p2p.directory import BEAT_TOPIC, TOPIC, PeerDirectory
from p2p.doors import Doors
from p2p.face import Buffer, GossipHandler, Handler, Header, Items, Pending, Quick, Reply, StreamHandler
from p2p.front import Front
from p2p.gossip import Gossip
from p2p.guarded import Guarded
from p2p.handshake import Keys
from p2p.host import Host, open_host, parse_address
from p2p.lanes import PROTOCOL, Lanes
from p2p.links import Links
from p2p.locating import Locator
from p2p.mesh import Mesh, by_peer
from p2p.names import Names
from p2p.networks import filled_in
from p2p.own import own_call, own_stream
from p2p.pace import Paces, pace_of
from p2p.peerbook import Peerbook
from p2p.reachability import Reachability
from p2p.rpc import Connection
from p2p.services import Service, Services
from p2p.waiting import NotSentError

log = logging.getLogger(__name__)

REGION_MAX = 256
FILES_KEPT = 256
"""Open files left for models, the ledger, the gateway's users and handshakes under way."""


class PeerNetwork:
    """:class:`p2p.face.Network` over libp2p. Made by :func:`open_network`."""

    allowed: AllowList

    def __init__(
        self,
        identity: Identity,
        settings: P2pSettings,
        host: Host,
        nursery: Guarded,
        book: Peerbook,
        listed: Sequence[str],
        names: Names,
        advert: Advert,
        front: Front,
        lanes: Lanes,
    ) -> None:
        self.doors = front.doors
        self.front = front
        self.lanes = lanes
        self.identity = identity
        self._host = host
        self._nursery = nursery
        self._services = Services()
        lane = PROTOCOL if settings.lane else ""
        own = msgspec.structs.replace(advert, peer_id=identity.peer_id, lane=lane)
        self.directory = PeerDirectory(
            identity,
            host,
            self,
            own,
            advert_seconds=settings.advert_seconds,
            blame=self.doors.blame,
            banned=self.doors.banned,
        )
        self.doors.on_ban(self.directory.link_down)
        self.blobs = PeerBlobs(
            self,
            identity.peer_id,
            upload_max=settings.blob_upload_bytes_per_second_max,
            download_max=settings.blob_download_bytes_per_second_max,
            blame=self.doors.blame,
        )
        self.links = Links(
            host,
            lanes if settings.lane else None,
            self._services,
            nursery,
            frame_bytes_max=settings.frame_bytes_max,
            calls_max=settings.calls_per_peer_max,
            peers_max=settings.peers_max,
            up=self._link_up,
            down=self._link_down,
            doors=self.doors,
            takes_lanes=self._takes_lanes,
        )
        self.locator = Locator(self.links, self.directory)
        self.directory.measure = self.locator.distance_ms
        self.reachability = Reachability(
            identity.peer_id,
            settings,
            front,
            host,
            self.links,
            self.directory,
            self.call,
            nursery,
            lambda: settings.announce or filled_in(host.addresses),
        )
        for method, handler in self.reachability.handlers().items():
            self.serve(method, handler)
        self._book = book
        self._mesh = Mesh(
            host,
            self.links,
            self.directory,
            book,
            listed,
            names,
            peers_max=settings.peers_max,
            unwanted=self.doors.unwanted,
        )
        self._gossip = Gossip(host, nursery)
        self.serve("advert.exchange", self.directory.serve_exchange)
        self.serve("advert.push", self.directory.serve_push)
        self.serve("advert.beat", self.directory.serve_beat)
        self.serve("advert.find", self.directory.finder.serve)
        self.serve("blob.get", self.blobs.serve_get)
        self.serve("blob.have", self.blobs.serve_have)
        self.serve(clock.METHOD, clock.serve)

    @property
    def peer_id(self) -> PeerId:
        """This node's peer id."""
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where this node can be dialled, with its peer id; where it listens, if it cannot be dialled."""
        told = [address for address in self.directory.own().addresses if CIRCUIT not in address]
        return tuple(told or (f"{a}/p2p/{self.peer_id}" for a in self.reachability.reach.listening()))

    def standing(self) -> Mapping[str, Any]:
        """Public, relayed or private (``reach``), ``why``, what to do (``fix``), and the addresses ``advertised``."""
        return self.reachability.standing()

    def serve(self, method: str, handler: Handler, *, quick: Quick | None = None) -> None:
        """Register the handler of a method."""
        self._services.add(method, Service(handler, quick))

    def serve_stream(self, method: str, handler: StreamHandler) -> None:
        """Register the handler of a streaming method."""
        self._services.add(method, Service(stream=handler))

    async def call(
        self,
        peer_id: PeerId,
        method: str,
        header: Header,
        buffers: Sequence[Buffer] = (),
        *,
        deadline_ms: int,
        bulk: bool = False,
    ) -> Reply:
        """See :meth:`p2p.face.Network.call`."""
        deadline = trio.current_time() + deadline_ms / 1000
        if trace.current.get():
            header = trace.on(header)
        link = self.links.ready(peer_id)
        if link is None or bulk:
            if peer_id == self.peer_id:
                return await own_call(self._services, self.peer_id, method, header, buffers, deadline)
            link = await self._link(peer_id, bulk, deadline)
        try:
            return await link.call(method, header, buffers, deadline)
        except NotSentError:
            log.debug("a call of %s to %s goes another way", method, peer_id)
        link = await self._link(peer_id, bulk, deadline)
        return await link.call(method, header, buffers, deadline)

    def begin(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Pending | None:
        """See :meth:`p2p.face.Network.begin`."""
        link = self.links.ready(peer_id)
        if link is None or link.carrier.congested:
            return None
        try:
            deadline = trio.current_time() + deadline_ms / 1000
            return link.begin(method, trace.on(header) if trace.current.get() else header, buffers, deadline)
        except NotSentError:
            return None

    async def _link(self, peer_id: PeerId, bulk: bool, deadline: float) -> Connection:
        """The connection to a peer. Raises RemoteError ``deadline`` or ``unavailable``."""
        with trio.CancelScope(deadline=deadline):
            link = await self.links.get(peer_id)
            return await self.links.bulk(link) if bulk else link
        raise RemoteError("deadline", f"{peer_id} was not reached in time", peer_id=peer_id)

    @asynccontextmanager
    async def stream(
        self,
        peer_id: PeerId,
        method: str,
        header: Header,
        buffers: Sequence[Buffer] = (),
        *,
        deadline_ms: int,
        bulk: bool = False,
    ) -> AsyncIterator[Items]:
        """See :meth:`p2p.face.Network.stream`."""
        deadline = trio.current_time() + deadline_ms / 1000
        header = trace.on(header)
        if peer_id == self.peer_id:
            async with own_stream(self._services, peer_id, method, header, buffers, deadline) as own:
                yield own
            return
        link = await self._link(peer_id, bulk, deadline)
        try:
            items = link.stream(method, header, buffers, deadline)
        except NotSentError:
            link = await self._link(peer_id, bulk, deadline)
            items = link.stream(method, header, buffers, deadline)
        try:
            yield items
        finally:
            items.close()

    def _takes_lanes(self, peer_id: PeerId) -> bool | None:
        """Whether a peer's advert says so, or said when it was met; None: nobody knows."""
        known = self.directory.view.get(peer_id) or self._book.get(peer_id)
        return None if known is None else known.lane == PROTOCOL

    async def publish(self, topic: str, payload: bytes) -> None:
        """See :meth:`p2p.face.Network.publish`."""
        await self._gossip.publish(topic, payload)

    def subscribe(self, topic: str, handler: GossipHandler) -> None:
        """Receive a topic's messages of others (one's own do not come back)."""
        self._gossip.subscribe(topic, handler)

    def peers(self) -> Sequence[PeerId]:
        """Peers with a live link right now."""
        return self.links.peers()

    def is_linked(self, peer_id: PeerId) -> bool:
        """Whether a peer has a live link right now."""
        return self.links.ready(peer_id) is not None

    def statistics(self) -> Mapping[str, Any]:
        """Numbers for status and metrics."""
        return {
            "peers": len(self.links.peers()),
            "faults": self._nursery.faults,
            "directory": self.directory.statistics(),
            "links": self.links.statistics(),
            "gossip": {"sent": self._gossip.sent, "received": self._gossip.received},
            "doors": self.doors.statistics(),
            "front": self.front.statistics(),
            "blobs": self.blobs.statistics(),
            "reachability": self.reachability.statistics(),
            **self._host.statistics(),
        }

    def _link_up(self, peer_id: PeerId) -> None:
        self.directory.link_up(peer_id)
        self._mesh.link_up(peer_id)
        self.reachability.link_up(peer_id)
        self._nursery.start_soon(self._greet, peer_id)

    def _link_down(self, peer_id: PeerId) -> None:
        self.directory.link_down(peer_id)
        self.reachability.link_down(peer_id)

    async def _greet(self, peer_id: PeerId) -> None:
        await self.directory.exchange(peer_id)
        await self._host.join(peer_id)

    def found(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """Somebody says that this peer is near."""
        self._mesh.found(peer_id, addresses)

    def run(self) -> None:
        """Start the background work."""
        self._gossip.subscribe(TOPIC, self.directory.on_gossip)
        self._gossip.subscribe(BEAT_TOPIC, self.directory.on_beat)
        for task in (
            self.doors.run,
            self.links.run,
            self._mesh.run,
            self.locator.run,
            self.directory.run_upkeep,
            self.directory.run_dht,
        ):
            self._nursery.keep(task)
        self.reachability.run()
        self._nursery.keep(self.directory.run, self.publish)

    async def close(self) -> None:
        """Say goodbye and remember the peers."""
        self._mesh.remember()
        await self.links.close()
        await trio.to_thread.run_sync(self._book.save)
        await self.doors.save()


@asynccontextmanager
async def open_network(
    identity: Identity,
    settings: P2pSettings,
    *,
    data_dir: Path,
    version: str,
    advert: Advert | None = None,
    swarm_key: bytes | None = None,
) -> AsyncIterator[PeerNetwork]:
    """A running network. ``advert`` holds the first advert's other fields (hardware, region, roles, ...).
    ``swarm_key``: the private swarm's (32 bytes); strangers without it get nowhere.

    Raises ConfigError for a bad address or seed, LocalError ``port_taken`` or ``local``. What the body raises comes out
    as it is, not inside an exception group.
    """
    listed = seeds.collect(settings.seeds, settings.seeds_file, Path())
    seed_addresses = by_peer(listed)
    names = Names(settings.dns_servers)
    for text in settings.announce:
        if parse_address(text) is None:
            raise ConfigError("config", f"p2p.announce: {text!r} is not a TCP multiaddr")
    allowed = AllowList(settings.allow, (*seed_addresses, identity.peer_id))
    first = advert or Advert(peer_id=identity.peer_id, seq=0, expires_ms=0)
    first = msgspec.structs.replace(first, version=version)
    if not first.region.isprintable() or len(first.region) > REGION_MAX:
        raise ConfigError("config", f"node.region: {first.region[:80]!r} is no name", "e.g. eu-west")
    try:
        await trio.Path(data_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalError("local", f"cannot make the folder {data_dir}: {error.strerror or error}") from error
    paces = Paces(pace_of(settings.upload_bytes_per_second_max), pace_of(settings.download_bytes_per_second_max))
    doors = Doors(_limits(settings), peers_max=settings.peers_max, file=data_dir / "bans.json", paces=paces)
    for peer_id in (*seed_addresses, *settings.allow):
        doors.pin(peer_id)
    front = Front(doors)
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as outer:
            host_context = open_host(
                identity,
                listen=settings.listen,
                peers_max=settings.peers_max,
                nursery=outer,
                swarm_key=swarm_key,
                admits=allowed.admits,
                door=front,
            )
            async with host_context as host, trio.open_nursery() as nursery:
                book = Peerbook(data_dir / "peers.json")
                keys = Keys(identity, swarm_key)
                guarded = Guarded(nursery)
                lanes = Lanes(keys, front, guarded.start_soon, allowed.admits, frame_bytes_max=settings.frame_bytes_max)
                network = PeerNetwork(identity, settings, host, guarded, book, listed, names, first, front, lanes)
                network.allowed = allowed
                network.run()
                if hosts := mdns.wanted(settings.mdns, filled_in(host.addresses)):
                    near = [f"{text}/p2p/{identity.peer_id}" for text in filled_in(host.addresses)]
                    guarded.keep(mdns.Mdns(hosts, near, swarm_key, network.found).run)
                try:
                    yield network
                except Exception as error:
                    log.debug("the network's user failed", exc_info=True)
                    failure = error
                finally:
                    with trio.move_on_after(0.5, shield=True):
                        await network.close()
                    nursery.cancel_scope.cancel()
            outer.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if failure is None:
            failure = _only_error(group)
        if failure is None:
            raise
    if failure is not None:
        raise failure


def _limits(settings: P2pSettings) -> Limits:
    """What the doors allow; a process cannot have more connections than open files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Limits(
        connections_max=max(8, min(settings.connections_max, files - FILES_KEPT)),
        connections_per_address_max=settings.connections_per_address_max,
        connections_per_subnet_max=settings.connections_per_subnet_max,
        calls_max=settings.calls_per_peer_max,
        calls_per_second=settings.calls_per_second_max,
        bytes_per_second=settings.peer_bytes_per_second_max,
        loopback_exempt=not settings.loopback_limits,
    )


def _only_error(group: BaseExceptionGroup[BaseException]) -> Exception | None:
    """The RiosError inside nested groups, if that is all there is."""
    found, rest = group.split(RiosError)
    if found is None or rest is not None:
        return None
    error: BaseException = found
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, RiosError) else None
