"""Tells of nodes that come and go, as this gateway's node sees them."""

from collections.abc import Mapping

import trio

from config.swarm import Worker
from gateway.events import Bus
from gateway.ports import Swarm

_LOOK_SECONDS = 2.0


class Watch:
    """Publishes ``worker.joined`` and ``worker.left``, to everybody who may hear of everything."""

    def __init__(self, swarm: Swarm, bus: Bus) -> None:
        self._swarm, self._bus = swarm, bus

    async def run(self) -> None:
        """Until cancelled. Who is there at the start did not join."""
        before = self._present()
        while True:
            await trio.sleep(_LOOK_SECONDS)
            now = self._present()
            for peer_id in now.keys() - before.keys():
                self._bus.publish("worker.joined", None, {"id": peer_id, "name": now[peer_id].name})
            for peer_id in before.keys() - now.keys():
                self._bus.publish("worker.left", None, {"id": peer_id, "name": before[peer_id].name})
            before = now

    def _present(self) -> Mapping[str, Worker]:
        return {each.peer_id: each for each in self._swarm.workers() if each.health != "gone"}
