"""The wire between simulated nodes: loss, delay, duplication, reordering, partitions (also one-way).

Implements what the ledger uses of :class:`p2p.face.Network`. A handler runs in its node's nursery and dies with it. A
call whose request or answer is lost ends with ``unavailable``, at once or at its deadline.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId
from ledger.voting import read_signed
from p2p.core.identity import Identity
from p2p.face import Buffer, Call, GossipHandler, Handler, Header, Reply

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

DEADLINE_MS_MAX = 1500


class Box:
    """Where an answer is put."""

    __slots__ = ("done", "error", "reply")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: Reply | None = None
        self.error: RiosError | None = None


class SimNetwork:
    """One node's end of the wire."""

    def __init__(self, world: "World", node: "Node", identity: Identity) -> None:
        self._world = world
        self._node = node
        self.identity = identity
        self.peer_id = identity.peer_id
        self.handlers: dict[str, Handler] = {}
        self.topics: dict[str, GossipHandler] = {}

    def _alive(self) -> bool:
        """Whether this is the process that runs: one that died sends nothing, though its tasks end a little later."""
        return self._node.up and self._node.network is self

    # the port

    def serve(self, method: str, handler: Handler, **_: Any) -> None:
        """Answer a method."""
        self.handlers[method] = handler

    def subscribe(self, topic: str, handler: GossipHandler) -> None:
        """Listen to a topic."""
        self.topics[topic] = handler

    def peers(self) -> Sequence[PeerId]:
        """Everybody else, up or not."""
        return [node.peer_id for node in self._world.nodes if node is not self._node]

    def statistics(self) -> Any:
        """Nothing."""
        return MappingProxyType({})

    async def publish(self, topic: str, payload: bytes) -> None:
        """Tell everybody, as far as it gets."""
        if not self._alive():
            await trio.sleep_forever()
        for node in self._world.nodes:
            if node is not self._node:
                delay = self._world.faults.way(self._node, node, f"gossip {len(payload)}")
                if delay is not None:
                    self._world.nursery.start_soon(self._gossip, node, topic, payload, delay)

    async def _gossip(self, node: "Node", topic: str, payload: bytes, delay_s: float) -> None:
        await trio.sleep(delay_s)
        if node.up and topic in node.network.topics:
            node.nursery.start_soon(self._heard, node, node.network.topics[topic], payload)

    async def _heard(self, node: "Node", handler: GossipHandler, payload: bytes) -> None:
        try:
            await handler(self.peer_id, payload)
        except RiosError as error:  # as the real network does: a message that cannot be taken is dropped
            self._world.log("dropped", node.name, error.code)

    async def call(
        self,
        peer_id: PeerId,
        method: str,
        header: Header,
        buffers: Sequence[Buffer] = (),
        *,
        deadline_ms: int,
        sender: PeerId | None = None,
        **_: Any,
    ) -> Reply:
        """Ask a peer; as ``sender`` where a crook does not speak with its node's key."""
        world, target = self._world, self._world.by_peer.get(peer_id)
        if target is None:
            raise RemoteError("unavailable", f"no way to {peer_id} is known", peer_id=peer_id)
        if not self._alive():
            await trio.sleep_forever()
        deadline_s = trio.current_time() + min(deadline_ms, DEADLINE_MS_MAX) / 1000
        if method == "ledger.submit" and not self._node.crooked:
            world.checker.submitted(self.identity.public_key, read_signed(header["object"]))
        if method == "ledger.channel":
            world.checker.promised(self.identity.public_key, read_signed(header["voucher"]))
        out = world.faults.way(self._node, target, method)
        if out is None:
            raise await self._lost(target, deadline_s)
        await trio.sleep(out)
        if not target.up:
            raise RemoteError("unavailable", f"{target.name} is down", peer_id=peer_id)
        call = Call(sender or self.peer_id, method, dict(header), tuple(memoryview(bytes(b)) for b in buffers), 0.0)
        box = target.serve(call)
        if world.faults.twice():
            world.nursery.start_soon(self._again, target, call)
        # only a liar lets anybody wait; an honest node answers or dies
        with trio.move_on_at(deadline_s) if target.liar else nullcontext():
            await box.done.wait()
        if box.error is not None:
            error = box.error
            raise RemoteError(error.code, error.message, error.hint, peer_id=peer_id)
        if box.reply is None:
            raise RemoteError("unavailable", f"{target.name} did not answer {method}", peer_id=peer_id)
        back = world.faults.way(target, self._node, f"answer to {method}")
        if back is None:
            raise await self._lost(target, deadline_s)
        await trio.sleep(back)
        return box.reply

    async def _again(self, target: "Node", call: Call) -> None:
        """The same call once more, later."""
        await trio.sleep(self._world.random.uniform(0, 3))
        if target.up:
            target.serve(call)

    async def _lost(self, target: "Node", deadline_s: float) -> RemoteError:
        """Silence until the deadline, or a connection that breaks."""
        if self._world.random.random() < 0.5:
            await trio.sleep_until(deadline_s)
            return RemoteError("unavailable", f"{target.name} did not answer in time", peer_id=target.peer_id)
        await trio.sleep(0.02)
        return RemoteError("unavailable", f"the connection to {target.name} broke", peer_id=target.peer_id)


async def handle(node: "Node", handler: Handler, call: Call, box: Box) -> None:
    """Run a handler; whatever happens, whoever waits is told."""
    try:
        network = node.network
        reply = await handler(call)
        if node.up and node.network is network:
            box.reply = reply
            node.released(call, reply)
    except RiosError as error:
        box.error = error
    finally:
        box.done.set()
