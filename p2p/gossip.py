"""Gossip topics: small signed messages to everybody who listens, best effort.

Invariants: a message over :data:`PAYLOAD_BYTES_MAX` is refused here, because libp2p would drop it in silence; a handler
that raises loses its message only; a node does not receive its own messages.
"""

import logging

from config.errors import RequestError
from config.vocabulary import PeerId
from p2p.face import GossipHandler
from p2p.guarded import Nursery
from p2p.host import Host

log = logging.getLogger(__name__)

PAYLOAD_BYTES_MAX = 64 << 10


class Gossip:
    """Topics over one host."""

    def __init__(self, host: Host, nursery: Nursery) -> None:
        self._host = host
        self._nursery = nursery
        self._handlers: dict[str, list[GossipHandler]] = {}
        self.sent = 0
        self.received = 0

    def subscribe(self, topic: str, handler: GossipHandler) -> None:
        """Receive a topic's messages."""
        first = topic not in self._handlers
        self._handlers.setdefault(topic, []).append(handler)
        if first:
            self._nursery.start_soon(self._run, topic)

    async def publish(self, topic: str, payload: bytes) -> None:
        """Send a message. Raises RequestError ``too_large``, RemoteError ``unavailable``."""
        if len(payload) > PAYLOAD_BYTES_MAX:
            hint = "gossip a digest and let peers fetch the rest"
            raise RequestError("too_large", f"a gossip message of {len(payload)} bytes exceeds the 64 KiB limit", hint)
        self.sent += 1
        await self._host.publish(topic, payload)

    async def _run(self, topic: str) -> None:
        async def received(sender: PeerId, payload: bytes) -> None:
            if len(payload) > PAYLOAD_BYTES_MAX:
                return
            self.received += 1
            for handler in self._handlers[topic]:
                try:
                    await handler(sender, payload)
                except Exception:
                    log.exception("the gossip handler of %s failed", topic)

        await self._host.run_subscription(topic, received)
