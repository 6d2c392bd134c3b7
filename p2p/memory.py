"""The network's face in memory: several nodes in one process, seeded, for tests of the packages above.

Owns: :class:`MemoryHub` (the "wire": who is up, delay, loss, partitions) and :class:`MemoryNetwork` (one node's
:class:`p2p.face.Network`). Headers go through msgpack and buffers are copied, so what works here works on the wire.

Invariants:
1. Same seed and same calls, same delays and losses.
2. A killed node answers nothing: calls in flight to it end with ``unavailable`` at once.
3. A stalled node (SIGSTOP, a cable that hangs) takes no call and sends no answer until it wakes; nobody is told.
4. Adverts spread instantly between nodes that can reach each other.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from hashlib import sha256
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import msgspec
import trio

from config.errors import IntegrityError, RemoteError, RequestError
from config.vocabulary import PeerId
from p2p import trace
from p2p.core.advert import LIFE_MS_MAX, Advert
from p2p.core.headers import pack, unpack
from p2p.core.identity import Identity
from p2p.face import (
    BlobSource,
    Buffer,
    Call,
    ContentFile,
    GossipHandler,
    Handler,
    Header,
    Items,
    Pending,
    Quick,
    RecordRule,
    Reply,
    StreamHandler,
)
from p2p.own import answer, call_of, stream
from p2p.services import Service, Services

log = logging.getLogger(__name__)

PAYLOAD_BYTES_MAX = 64 << 10
_EPOCH_MS = 1_700_000_000_000


class MemoryHub:
    """The wire between nodes. Change ``delay_s`` and ``loss`` at any time; both are drawn from the seed."""

    def __init__(self, seed: int = 0, *, delay_s: tuple[float, float] = (0.0, 0.0), loss: float = 0.0) -> None:
        self.random = Random(seed)
        self.delay_s = delay_s
        self.loss = loss
        self.nodes: dict[PeerId, MemoryNetwork] = {}
        self.down: set[PeerId] = set()
        self.cut: set[frozenset[PeerId]] = set()
        self.slow: dict[PeerId, float] = {}
        """Peers that answer after so many times what their handlers and the way take."""
        self._stalled: dict[PeerId, trio.Event] = {}
        self.records: dict[tuple[str, str], bytes] = {}
        self.seq = _EPOCH_MS

    def add(self, identity: Identity | None = None, **advert: Any) -> "MemoryNetwork":  # noqa: ANN401 - advert fields
        """A new node; keywords set fields of its first advert. Without ``identity`` a seeded one is made."""
        identity = identity or Identity.from_seed(self.random.randbytes(32))
        node = MemoryNetwork(self, identity, advert)
        self.nodes[node.peer_id] = node
        self.down.discard(node.peer_id)
        self.changed()
        return node

    def kill(self, peer_id: PeerId) -> None:
        """Stop a node as ``kill -9`` would: it is unreachable and gone from the others' views."""
        self.down.add(peer_id)
        self.nodes[peer_id].break_calls()
        self.changed()

    def revive(self, peer_id: PeerId) -> None:
        """Bring a killed node back as it was."""
        self.down.discard(peer_id)
        self.changed()

    def stall(self, peer_id: PeerId) -> None:
        """Stop a node without telling anybody: it is there, and does not answer."""
        self._stalled.setdefault(peer_id, trio.Event())

    def wake(self, peer_id: PeerId) -> None:
        """A stalled node goes on where it was."""
        if peer_id in self._stalled:
            self._stalled.pop(peer_id).set()

    async def awake(self, peer_id: PeerId) -> None:
        """Wait while a node is stalled."""
        while peer_id in self._stalled:
            await self._stalled[peer_id].wait()

    def partition(self, a: PeerId, b: PeerId, *, heal: bool = False) -> None:
        """Cut (or heal) the way between two nodes."""
        (self.cut.discard if heal else self.cut.add)(frozenset((a, b)))
        self.changed()

    def reachable(self, a: PeerId, b: PeerId) -> bool:
        """Whether a message from ``a`` can reach ``b`` now."""
        return a == b or (b in self.nodes and not {a, b} & self.down and frozenset((a, b)) not in self.cut)

    def changed(self) -> None:
        """Wake everybody who waits for a change of the view."""
        for node in self.nodes.values():
            node.directory.wake()

    async def travel(self) -> bool:
        """One message's way: waits the delay; False if it is lost."""
        low, high = self.delay_s
        lost = self.loss > 0 and self.random.random() < self.loss
        if high > 0:
            await trio.sleep(self.random.uniform(low, high))
        return not lost


class MemoryDirectory:
    """:class:`p2p.face.Directory` over the hub."""

    def __init__(self, hub: MemoryHub, peer_id: PeerId, fields: Mapping[str, Any]) -> None:
        self._hub = hub
        self._rules: dict[str, RecordRule] = {}
        self._peer_id = peer_id
        self._changed = trio.Event()
        self._own = Advert(peer_id=peer_id, seq=0, expires_ms=0)
        self._own = self._renewed(msgspec.structs.replace(self._own, **fields))

    def _renewed(self, advert: Advert) -> Advert:
        self._hub.seq += 1
        seq = self._hub.seq
        return msgspec.structs.replace(advert, peer_id=self._peer_id, seq=seq, expires_ms=seq + LIFE_MS_MAX)

    def own(self) -> Advert:
        """This node's own advert."""
        return self._own

    def adverts(self) -> Mapping[PeerId, Advert]:
        """Adverts of every node that can be reached, the own one included."""
        nodes = self._hub.nodes.items()
        view = {peer: node.directory.own() for peer, node in nodes if self._hub.reachable(self._peer_id, peer)}
        return MappingProxyType(view)

    def update(self, change: Callable[[Advert], Advert]) -> None:
        """Change the own advert; everybody sees it at once."""
        self._own = self._renewed(change(self._own))
        self._hub.changed()

    def wake(self) -> None:
        """The view changed."""
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def wait_change(self) -> None:
        """Return after the next change of the view."""
        await self._changed.wait()

    def providers(self, model_id: str, index: int) -> Sequence[PeerId]:
        """Who serves a shard."""
        offers = ((peer, advert.offer(model_id)) for peer, advert in self.adverts().items())
        return tuple(peer for peer, offer in offers if offer is not None and offer.holds(index))

    async def find_providers(self, model_id: str, index: int | None = None) -> Sequence[PeerId]:
        """Nothing to look up: every advert is in the view already."""
        await trio.lowlevel.checkpoint()
        if index is not None:
            return self.providers(model_id, index)
        return tuple(peer for peer, advert in self.adverts().items() if advert.offer(model_id) is not None)

    def distance_ms(self, peer_id: PeerId) -> float | None:
        """Two mean delays."""
        return sum(self._hub.delay_s) * 1000 if peer_id != self._peer_id else 0.0

    def accept_records(self, namespace: str, rule: RecordRule) -> None:
        """Check what this node puts."""
        self._rules[namespace] = rule

    async def put_record(self, namespace: str, key: str, value: bytes) -> None:
        """Store a record for everybody. Raises what the namespace's rule raises."""
        await trio.lowlevel.checkpoint()
        if namespace in self._rules:
            self._rules[namespace].check(key, value)
        self._hub.records[namespace, key] = bytes(value)

    async def get_record(self, namespace: str, key: str) -> bytes | None:
        """Read a record."""
        await trio.lowlevel.checkpoint()
        return self._hub.records.get((namespace, key))


class MemoryBlobs:
    """:class:`p2p.face.Blobs` that reads straight from the providers' sources."""

    def __init__(self, hub: MemoryHub, peer_id: PeerId) -> None:
        self._hub = hub
        self._peer_id = peer_id
        self.sources: list[BlobSource] = []

    def offer(self, source: BlobSource) -> None:
        """Serve what ``source`` holds."""
        self.sources.append(source)

    async def fetch(
        self,
        file: ContentFile,
        target: Path,
        providers: Callable[[], Sequence[PeerId]],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Copy the file chunk by chunk from the first provider that has each."""
        parts = []
        for digest in file.chunks:
            chunk = await self._chunk(digest, providers())
            parts.append(chunk)
            progress(len(chunk))
        data = b"".join(parts)
        if sha256(data).hexdigest() != file.sha256:
            raise IntegrityError("integrity", f"{target}: the chunks do not make the file {file.sha256}")
        await trio.to_thread.run_sync(target.write_bytes, data)

    async def _chunk(self, digest: bytes, peers: Sequence[PeerId]) -> bytes:
        for peer in peers:
            await self._hub.travel()
            if not self._hub.reachable(self._peer_id, peer):
                continue
            for source in self._hub.nodes[peer].blobs.sources:
                chunk = await trio.to_thread.run_sync(source.read_chunk, digest)
                if chunk is not None and sha256(chunk).digest() == digest:
                    return chunk
        raise RemoteError("unavailable", f"no peer has the chunk {digest.hex()}", "wait for a provider to come back")


class MemoryNetwork:
    """:class:`p2p.face.Network` over the hub."""

    def __init__(self, hub: MemoryHub, identity: Identity, advert: Mapping[str, Any]) -> None:
        self.identity = identity
        self.directory = MemoryDirectory(hub, identity.peer_id, advert)
        self.blobs = MemoryBlobs(hub, identity.peer_id)
        self._hub = hub
        self._services = Services()
        self._topics: dict[str, list[GossipHandler]] = {}
        self._serving: set[trio.CancelScope] = set()

    @property
    def peer_id(self) -> PeerId:
        """This node's peer id."""
        return self.identity.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """No addresses in memory."""
        return ()

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
        await trio.lowlevel.checkpoint()
        hub, deadline = self._hub, trio.current_time() + deadline_ms / 1000
        call = call_of(self.peer_id, method, trace.on(header), _copies(buffers), deadline)
        with trio.CancelScope(deadline=deadline):
            await hub.awake(self.peer_id)
            delivered = peer_id == self.peer_id or await hub.travel()
            self._check_way(peer_id)
            if delivered:
                reply = await hub.nodes[peer_id].answer(call)
                if peer_id == self.peer_id or await hub.travel():
                    self._check_way(peer_id)
                    return reply
            await trio.sleep_forever()
        raise RemoteError("deadline", f"{method} at {peer_id} took longer than {deadline_ms} ms", peer_id=peer_id)

    def begin(
        self, peer_id: PeerId, method: str, header: Header, buffers: Sequence[Buffer] = (), *, deadline_ms: int
    ) -> Pending | None:
        """See :meth:`p2p.face.Network.begin`: here every call waits for its way."""
        return None

    def _check_way(self, peer_id: PeerId) -> None:
        if not self._hub.reachable(self.peer_id, peer_id):
            raise RemoteError("unavailable", f"{peer_id} cannot be reached", peer_id=peer_id)

    async def answer(self, call: Call) -> Reply:
        """Run the handler for a call that arrived here."""
        with self._while_up() as scope:
            await self._hub.awake(self.peer_id)
            started = trio.current_time()
            reply = await answer(self._services, call, self.peer_id)
            if self.peer_id in self._hub.slow:
                usual_s = trio.current_time() - started + sum(self._hub.delay_s)
                await trio.sleep((self._hub.slow[self.peer_id] - 1.0) * usual_s)
            await self._hub.awake(self.peer_id)
            return Reply(unpack(pack(reply.header)), _copies(reply.buffers))
        assert scope.cancelled_caught
        raise self._broke()

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
        """See :meth:`p2p.face.Network.stream`. A loss delays an item, it never drops one: streams are ordered."""
        await trio.lowlevel.checkpoint()
        deadline = trio.current_time() + deadline_ms / 1000
        call = call_of(self.peer_id, method, trace.on(header), _copies(buffers), deadline)
        self._check_way(peer_id)
        node = self._hub.nodes[peer_id]
        async with stream(node._services, call, peer_id, self._hub.travel, node._while_up) as items:
            yield items

    @contextmanager
    def _while_up(self) -> Iterator[trio.CancelScope]:
        """A handler's scope; it is cancelled when this node is killed."""
        with trio.CancelScope() as scope:
            self._serving.add(scope)
            try:
                yield scope
            finally:
                self._serving.discard(scope)

    def _broke(self) -> RemoteError:
        return RemoteError("unavailable", f"the link to {self.peer_id} broke", peer_id=self.peer_id)

    def break_calls(self) -> None:
        """End every call that runs here; its callers see a broken link."""
        for scope in self._serving:
            scope.cancel()

    async def publish(self, topic: str, payload: bytes) -> None:
        """Deliver to every other reachable subscriber, each in its own task."""
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise RequestError("too_large", f"a gossip message of {len(payload)} bytes exceeds the 64 KiB limit")
        await trio.lowlevel.checkpoint()
        for peer, node in list(self._hub.nodes.items()):
            if peer == self.peer_id or not self._hub.reachable(self.peer_id, peer):
                continue
            for handler in node._topics.get(topic, ()):
                trio.lowlevel.spawn_system_task(self._deliver, handler, topic, bytes(payload))

    async def _deliver(self, handler: GossipHandler, topic: str, payload: bytes) -> None:
        if await self._hub.travel():
            try:
                await handler(self.peer_id, payload)
            except Exception:
                log.exception("gossip handler of %s failed", topic)

    def subscribe(self, topic: str, handler: GossipHandler) -> None:
        """Receive a topic's messages of others (one's own do not come back)."""
        self._topics.setdefault(topic, []).append(handler)

    def peers(self) -> Sequence[PeerId]:
        """Every other node that can be reached."""
        return [p for p in self._hub.nodes if p != self.peer_id and self._hub.reachable(self.peer_id, p)]

    def statistics(self) -> Mapping[str, Any]:
        """Few numbers: there is not much to see in memory."""
        return {"carrier": "memory", "peers": len(self.peers()), "serving": len(self._serving)}


def _copies(buffers: Sequence[Buffer]) -> tuple[memoryview, ...]:
    return tuple(memoryview(bytes(buffer)) for buffer in buffers)
