"""The libp2p host, tamed: identity, listening, dialling, DHT, gossip, streams.

Owns: which parts of py-libp2p run and how, and that nothing they raise or a peer sends ends the process.
Does not own: what travels over the streams, which peers we want.

Invariants:
1. Only Noise is offered; nothing travels in plain text. Only TCP, only yamux.
2. A handler's exception ends its stream, never the host.
3. DHT values are accepted only under ``/rios/<namespace>/`` with a registered rule, at most
   :data:`~p2p.rules.RECORD_BYTES_MAX` long and :data:`RECORDS_MAX` of them. The oldest make room.
4. Third-party exceptions leave this file as RiosErrors.
"""

import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee, IRawConnection
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import THandler, TProtocol
from libp2p.io.abc import ReadWriteCloser
from libp2p.kad_dht import value_store as value_store_module
from libp2p.kad_dht.common import PROTOCOL_ID as KAD_PROTOCOL
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.records.utils import InvalidRecordType
from libp2p.records.validator import NamespacedValidator
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_ID
from libp2p.tools.anyio_service import background_trio_service
from libp2p.transport.tcp.tcp import TCP, TCPListener
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from config.errors import ConfigError, LocalError, RemoteError, RequestError
from config.vocabulary import PeerId
from p2p import kademlia
from p2p.addressbook import AddressBook
from p2p.core.doors import Limits
from p2p.core.identity import Identity
from p2p.core.reach import CIRCUIT
from p2p.doors import Doors
from p2p.face import RecordRule
from p2p.front import Front
from p2p.guards import Guards
from p2p.noise import Noise
from p2p.rules import Rules
from p2p.secure import Connection, Muxer
from p2p.streams import Channel

log = logging.getLogger(__name__)

RPC_PROTOCOL = TProtocol("/rios/rpc/1.0.0")
BULK_PROTOCOL = TProtocol("/rios/rpc-bulk/1.0.0")
"""The same frames on a stream of their own, for the calls that nobody waits for impatiently."""
GOSSIP_PROTOCOL = TProtocol("/meshsub/1.1.0")
RECORDS_MAX = 1024
RECORD_SECONDS = 15.0
GOSSIP_HEARTBEAT_SECONDS = 3
LOOKUPS_MAX = 64
"""DHT streams served at a time, of all peers; ``guards`` has a smaller number for each."""
NAMESPACE = "rios"

# the library's own bound is 50,000 values
value_store_module.MAX_VALUE_STORE_SIZE = RECORDS_MAX  # type: ignore[attr-defined]

Accept = Callable[[Channel, bool], Awaitable[None]]
"""Takes an inbound RPC stream; whether it is a bulk one."""
Received = Callable[[PeerId, bytes], Awaitable[None]]
Found = Callable[[PeerId], bool]


class _Tcp(TCP):
    """TCP behind the front door, that remembers what it dialled: a dial that is cancelled half-way would leave its
    socket open."""

    def __init__(self, door: Front) -> None:
        super().__init__()
        self._door = door
        self._dialled: WeakSet[trio.socket.SocketType] = WeakSet()

    async def _dial_resolved(self, *arguments: Any, **more: Any) -> IRawConnection:  # noqa: ANN401 - passed on
        connection: Any = await super()._dial_resolved(*arguments, **more)
        self._dialled.add(connection.stream.stream.socket)
        raw: IRawConnection = connection
        return raw

    def create_listener(self, handler_function: THandler) -> TCPListener:
        """A listener whose sockets go through the front door first."""

        async def receive(accepted: ReadWriteCloser) -> None:
            tcp: Any = accepted
            await self._door.receive(tcp.stream.socket, partial(handler_function, accepted))

        return super().create_listener(receive)

    def close_all(self) -> None:
        """Close whatever is still open."""
        for dialled in list(self._dialled):
            dialled.close()


class _Watcher(INotifee):
    """Tells when connections come and go."""

    def __init__(self, changed: Callable[[PeerId, bool], None]) -> None:
        self._changed = changed

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """A connection is up."""
        self._changed(PeerId(str(conn.muxed_conn.peer_id)), True)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """A connection is gone."""
        self._changed(PeerId(str(conn.muxed_conn.peer_id)), False)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """Not watched."""

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """Not watched."""

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Not watched."""

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None:
        """Not watched."""


class Host:
    """A running libp2p host."""

    def __init__(
        self, identity: Identity, host: IHost, noise: Noise, dht: KadDHT, pubsub: Pubsub, rules: Rules, guards: Guards
    ) -> None:
        self.identity = identity
        self._host = host
        self._swarm: Any = host.get_network()
        store: Any = host.get_peerstore()
        self._book = AddressBook(store, connected=lambda peer: peer in self._swarm.connections)
        self._noise = noise
        self._dht = dht
        self._pubsub = pubsub
        self._rules = rules
        self._guards = guards
        self._spawn = noise.spawn

    @property
    def addresses(self) -> tuple[str, ...]:
        """The real addresses this host listens on, without ``/p2p/...``."""
        return tuple(str(a) for listener in self._swarm.listeners.values() for a in listener.get_addrs())

    def connected(self) -> tuple[PeerId, ...]:
        """Peers with a connection."""
        return tuple(PeerId(str(peer)) for peer in self._host.get_connected_peers())

    def watch(self, changed: Callable[[PeerId, bool], None]) -> None:
        """Call ``changed(peer, up)`` when a connection comes or goes."""
        self._swarm.register_notifee(_Watcher(changed))

    # -- dialling and streams

    def learn(self, peer_id: PeerId, addresses: Sequence[str]) -> None:
        """Remember where a peer can be dialled (no address: nowhere). Addresses that are none are skipped."""
        usable = [a for text in addresses if (a := parse_address(text)) is not None]
        if usable or not addresses:
            self._book.learn(_id(peer_id), usable)

    def known_addresses(self, peer_id: PeerId) -> tuple[str, ...]:
        """Where a peer can be dialled, as far as is known."""
        return tuple(str(address) for address in self._book.addresses(_id(peer_id)))

    async def connect(self, peer_id: PeerId) -> None:
        """Have a connection to a peer. Raises RemoteError ``unavailable``."""
        peer = _id(peer_id)
        self._swarm.unblock_peer(peer)
        try:
            await self._swarm.dial_peer(peer)
        except Exception as error:
            reason = self._noise.why_refused(peer_id, error) or _short(error)
            raise RemoteError("unavailable", f"{peer_id} cannot be reached: {reason}", peer_id=peer_id) from error

    async def open_channel(self, peer_id: PeerId, *, bulk: bool = False) -> Channel:
        """A new RPC stream to a connected peer. Raises RemoteError ``unavailable``."""
        try:
            return Channel(await self._host.new_stream(_id(peer_id), [BULK_PROTOCOL if bulk else RPC_PROTOCOL]))
        except Exception as error:
            message = f"cannot open an RPC stream to {peer_id}: {_short(error)}"
            raise RemoteError("unavailable", message, peer_id=peer_id) from error

    def accept_channels(self, accept: Accept) -> None:
        """Serve RPC streams; ``accept`` returns when the channel is done."""

        for protocol, bulk in ((RPC_PROTOCOL, False), (BULK_PROTOCOL, True)):

            async def handle(stream: INetStream, bulk: bool = bulk) -> None:
                await accept(Channel(stream), bulk)

            self._host.set_stream_handler(protocol, self._guards.wrap(str(protocol), handle))

    async def disconnect(self, peer_id: PeerId) -> None:
        """Close every connection to a peer."""
        try:
            await self._host.disconnect(_id(peer_id))
        except Exception as error:
            log.debug("closing connections to %s: %s", peer_id, _short(error), exc_info=True)

    # -- DHT

    def accept_records(self, namespace: str, rule: RecordRule) -> None:
        """Take part in storing ``/rios/<namespace>/...`` under this rule."""
        self._rules.rules[namespace] = rule

    async def join(self, peer_id: PeerId) -> None:
        """Use a connected peer for DHT look-ups."""
        await self._dht.add_peer(_id(peer_id), skip_server_mode_check=True)

    def serve_dht(self, serve: bool) -> None:
        """Whether others may ask this node: one that nobody can dial is a client only, and says so in identify.

        The library's own switch also empties the routing table, and drops our guard around its handler."""
        if serve == (self._dht.mode is DHTMode.SERVER):
            return
        self._dht.mode = DHTMode.SERVER if serve else DHTMode.CLIENT
        if serve:
            self._host.set_stream_handler(KAD_PROTOCOL, self._guards.wrap(str(KAD_PROTOCOL), self._dht.handle_stream))
        else:
            self._host.remove_stream_handler(KAD_PROTOCOL)

    def keep_out(self, kept_out: Callable[[PeerId], bool]) -> None:
        """Peers that are never taken into the routing table: the library takes whoever asks it something."""
        kademlia.keep_out(self._dht, kept_out)

    def leave(self, peer_id: PeerId) -> None:
        """Do not ask this peer any more: dead peers make look-ups slow."""
        self._dht.routing_table.remove_peer(_id(peer_id))

    async def put_record(self, namespace: str, name: str, value: bytes) -> None:
        """Store a record in the DHT. Raises RequestError if its rule refuses it."""
        try:
            await self._dht.put_value(f"/{NAMESPACE}/{namespace}/{name}", value)
        except InvalidRecordType as error:
            raise RequestError("invalid_request", f"DHT record {namespace}/{name[:100]}: {error}") from error
        except ValueError as error:
            raise RequestError("conflict", f"DHT record {namespace}/{name[:100]}: {error}") from error
        except Exception as error:
            raise RemoteError("unavailable", f"DHT record {namespace}/{name[:100]}: {_short(error)}") from error

    async def get_record(self, namespace: str, name: str) -> bytes | None:
        """The best valid value the DHT has."""
        query = partial(self._dht.get_value, f"/{NAMESPACE}/{namespace}/{name}")
        return await kademlia.detached(self._spawn, query, seconds=RECORD_SECONDS)

    async def provide(self, key: bytes) -> None:
        """Say in the DHT that this node has something of ``key`` (a multihash). Raises RemoteError ``unavailable``."""
        try:
            told = await self._dht.provider_store.provide(key)
        except Exception as error:
            raise RemoteError("unavailable", f"DHT provider record {key.hex()}: {_short(error)}") from error
        if not told:
            raise RemoteError("unavailable", f"DHT provider record {key.hex()}: nobody took it")

    def withdraw(self, key: bytes) -> None:
        """Say so no more; what others keep expires."""
        self._dht.provider_store.providing_keys.discard(key)
        self._dht.provider_store.providers.get(key, {}).pop(self.identity.peer_id, None)

    async def find_providers(self, key: bytes, found: Found) -> None:
        """Look up who said so, on disjoint paths; ``found`` gets each peer once (its addresses are remembered) and says
        whether it is enough. Returns when it is, or when there is nobody left to ask."""
        await kademlia.find_providers(self._dht, self._spawn, key, found)

    # -- gossip

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send to everybody who subscribed, as well as gossip can."""
        try:
            await self._pubsub.publish(topic, payload)
        except Exception as error:
            raise RemoteError("unavailable", f"gossip on {topic}: {_short(error)}") from error

    async def run_subscription(self, topic: str, received: Received) -> None:
        """Pass a topic's messages of others on, with the peer whose signature each carries; never returns."""
        subscription = await self._pubsub.subscribe(topic)
        own = self.identity.peer_id
        while True:
            message = await subscription.get()
            sender = PeerId(str(ID(message.from_id)))
            if sender != own:
                await received(sender, bytes(message.data))

    def statistics(self) -> dict[str, int]:
        """Counts of this layer."""
        return {
            "connections": len(self._swarm.get_connections()),
            "dht_peers": self._dht.get_routing_table_size(),
            "dht_records": self._dht.get_value_store_size(),
        }


@asynccontextmanager
async def open_host(
    identity: Identity,
    *,
    listen: Sequence[str],
    peers_max: int,
    nursery: trio.Nursery,
    swarm_key: bytes | None = None,
    admits: Callable[[str], bool] = lambda peer_id: True,
    door: Front | None = None,
) -> AsyncIterator[Host]:
    """A host that listens on ``listen``, for members of the swarm with this key only (None: for everybody) whom
    ``admits`` admits. Raises ConfigError for a bad address, LocalError ``port_taken``."""
    if door is None:
        door = Front(Doors(Limits(), peers_max=peers_max))
    tame_logging()
    addresses = [_listen_address(text) for text in listen]
    for address in addresses:
        _check_port_free(address)
    pair = create_new_key_pair(identity.seed)
    noise = Noise(pair, noise_privkey=create_noise_key_pair().private_key)
    noise.spawn, noise.swarm_key, noise.admits, noise.refused = nursery.start_soon, swarm_key, admits, {}
    noise.door = door
    tcp = _Tcp(door)
    host = new_host(
        key_pair=pair,
        sec_opt={noise.protocol_id: noise},
        muxer_preference="YAMUX",
        connection_config=_limits(peers_max),
        transports=[tcp],
        disable_identify_address_discovery=True,
    )
    assert str(host.get_id()) == identity.peer_id
    swarm: Any = host.get_network()
    swarm.upgrader.muxer_multistream = Muxer({TProtocol(YAMUX_ID): Connection})
    swarm.retry_config = RetryConfig(max_retries=0)
    swarm.auto_connector.maybe_connect = _dial_nobody
    rules = Rules()
    dht = KadDHT(
        host,
        DHTMode.SERVER,
        validator=NamespacedValidator({NAMESPACE: rules}, strict_validation=True),
        validator_changed=True,
        strict_validation=True,
        max_peers_per_subnet=0 if all(_is_loopback(a) for a in addresses) else None,
    )
    kademlia.bound_providers(dht.provider_store)
    dht._inbound_limiter = trio.CapacityLimiter(LOOKUPS_MAX)
    guards = Guards(door.doors)
    router = GossipSub(
        protocols=[GOSSIP_PROTOCOL],
        degree=6,
        degree_low=4,
        degree_high=12,
        heartbeat_interval=GOSSIP_HEARTBEAT_SECONDS,
        heartbeat_initial_delay=0.5,
        max_messages_per_topic_per_second=200.0,
        eclipse_protection_enabled=False,
        adaptive_gossip_enabled=False,
    )
    pubsub = Pubsub(host, router, strict_signing=True)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(host.run(addresses))
        if len(swarm.listeners) < len(set(addresses)):
            missing = [str(a) for a in addresses if str(a) not in swarm.listeners]
            raise LocalError("local", f"cannot listen on {', '.join(missing)}", "see p2p.listen in the configuration")
        for listener in swarm.listeners.values():
            for each in listener.listeners:
                door.doors.sieve.watch(each.socket)
        nursery.start_soon(door.doors.sieve.run)
        await stack.enter_async_context(background_trio_service(dht))
        await stack.enter_async_context(background_trio_service(router))
        await stack.enter_async_context(background_trio_service(pubsub))
        await pubsub.wait_until_ready()
        for protocol, handler in list(host.get_mux().handlers.items()):
            if handler is not None and protocol is not None:
                host.set_stream_handler(protocol, guards.wrap(str(protocol), handler))
        try:
            yield Host(identity, host, noise, dht, pubsub, rules, guards)
        finally:
            with trio.move_on_after(1.0, shield=True):
                await host.close()
            tcp.close_all()


async def _dial_nobody() -> None:
    """In the place of the library's own dialling: which peers we want is decided above."""


def tame_logging() -> None:
    """py-libp2p logs whole values in hex, and every hang-up as an error."""
    for name in ("libp2p", "libp2p.kad_dht", "libp2p.pubsub", "multiaddr"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def parse_address(text: str) -> Multiaddr | None:
    """A dialable TCP address without its ``/p2p/...`` part, or None (a way through a relay begins with the relay's)."""
    if CIRCUIT in text:
        return None
    try:
        address = Multiaddr(text.partition("/p2p/")[0])
        names = [protocol.name for protocol in address.protocols()]
    except Exception as error:
        log.debug("not a multiaddr: %.200s: %s", text, _short(error), exc_info=True)
        return None
    return address if len(names) == 2 and names[1] == "tcp" else None


def _listen_address(text: str) -> Multiaddr:
    address = parse_address(text)
    if address is None:
        hint = "write it like /ip4/0.0.0.0/tcp/4701"
        raise ConfigError("config", f"p2p.listen: {text!r} is not a TCP multiaddr", hint)
    return address


def _host_port(address: Multiaddr) -> tuple[int, str, int]:
    names = [protocol.name for protocol in address.protocols()]
    family = socket.AF_INET6 if names[0].endswith("6") else socket.AF_INET
    return family, str(address.value_for_protocol(names[0])), int(address.value_for_protocol("tcp") or 0)


def _check_port_free(address: Multiaddr) -> None:
    """libp2p binds with SO_REUSEPORT, which hides that somebody else listens already: try without."""
    family, name, port = _host_port(address)
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((name, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = "stop the other process or change p2p.listen in the configuration"
            raise LocalError("port_taken", f"the address {address} is in use", hint) from error
        hint = "change p2p.listen in the configuration"
        raise LocalError("local", f"cannot listen on {address}: {error.strerror or error}", hint) from error


def _is_loopback(address: Multiaddr) -> bool:
    return _host_port(address)[1] in ("127.0.0.1", "::1", "localhost")


def _limits(peers_max: int) -> ConnectionConfig:
    # two connections per peer (simultaneous dials)
    most = 2 * peers_max + 16
    return ConnectionConfig(
        max_connections=most, high_watermark=most, low_watermark=0, min_connections=0, auto_connect_interval=3600.0
    )


def _id(peer_id: PeerId) -> ID:
    return ID.from_base58(peer_id)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


__all__ = ["Channel", "Host", "PeerInfo", "open_host", "parse_address"]
