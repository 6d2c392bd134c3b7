"""A visit to one peer: dial, prove identities to each other, leave. For ``rios doctor``, which has no running network.

Fails as: RemoteError ``unavailable`` that says what went wrong (no answer, another peer, another swarm key).
"""

import time
from collections.abc import Sequence

import trio

from config.errors import RemoteError
from config.vocabulary import PeerId
from p2p.core.identity import Identity
from p2p.host import open_host

PROBE_SECONDS = 5.0


async def shake_hands(
    identity: Identity, peer_id: PeerId, addresses: Sequence[str], swarm_key: bytes | None = None
) -> float:
    """Seconds until the peer at one of ``addresses`` had proved that it is ``peer_id``."""
    spent, failure = 0.0, RemoteError("unavailable", f"no handshake with {peer_id}", peer_id=peer_id)
    done = False
    here = ("/ip4/127.0.0.1/tcp/0",)
    async with trio.open_nursery() as nursery:
        async with open_host(identity, listen=here, peers_max=1, nursery=nursery, swarm_key=swarm_key) as host:
            host.learn(peer_id, addresses)
            began = time.monotonic()
            with trio.move_on_after(PROBE_SECONDS) as limit:
                try:
                    await host.connect(peer_id)
                    spent, done = time.monotonic() - began, True
                except RemoteError as error:
                    failure = error
            if limit.cancelled_caught:
                failure.message = f"{peer_id} did not finish the handshake within {PROBE_SECONDS:.0f} s"
            await host.disconnect(peer_id)
        nursery.cancel_scope.cancel()
    if not done:
        raise failure  # outside of the nursery, which would wrap it
    return spent
