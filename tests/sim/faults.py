"""What goes wrong: messages are lost, late and doubled, nodes are cut off, die, and come back with an older disk."""

from random import Random
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World


class Faults:
    """The weather of one simulation."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self._power = Random(f"power/{world.seed}")
        self.blocked: set[tuple[str, str]] = set()
        """From whom to whom nothing gets through."""
        self.restored_nodes: set[str] = set()

    def way(self, source: "Node", target: "Node", what: str) -> float | None:
        """How long a message takes (s), or None: it is lost."""
        if source is target:
            return 0.0
        random, plan = self.world.random, self.world.plan
        lost = self.world.chaos and ((source.name, target.name) in self.blocked or random.random() < plan.loss)
        delay = plan.delay_s[0] + random.random() ** 2 * (plan.delay_s[1] if self.world.chaos else 0.01)
        self.world.log("lost" if lost else "send", source.name, target.name, what)
        return None if lost else delay

    def twice(self) -> bool:
        """Whether a request arrives twice."""
        return self.world.chaos and self.world.random.random() < self.world.plan.duplicate

    async def run(self, scope: trio.CancelScope) -> None:
        """Bad weather until ``scope`` is cancelled."""
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._partition)
                for _ in range(self.world.plan.restores):
                    nursery.start_soon(self._restore)
                nursery.start_soon(self._crash)
        self.blocked = set()

    async def _partition(self) -> None:
        random = self.world.random
        while True:
            await trio.sleep(random.uniform(0.5, 2.5))
            self.blocked = set()
            if random.random() >= self.world.plan.partitions:
                continue
            one_way = random.random() < 0.4
            side = {node.name: random.randrange(2) for node in self.world.nodes}
            for a in side:
                for b in side:
                    if side[a] < side[b] or (side[a] > side[b] and not one_way):
                        self.blocked.add((a, b))
            self.world.log("partition", "one-way" if one_way else "both ways", *(n for n in side if side[n]))

    async def _crash(self) -> None:
        random = self.world.random
        while True:
            await trio.sleep(random.expovariate(1 / self.world.plan.crash_every_s))
            node = random.choice(self.world.nodes)
            if node.up:
                self.world.log("crash", node.name)
                node.crash()
                if self._power.random() < self.world.plan.power:
                    node.disk.cut_power(self._power)

    async def _restore(self) -> None:
        """Somebody's database is put back to an older copy. What is beside it (keys, the mark) stays."""
        random = self.world.random
        node = random.choice([person.node for person in self.world.people])
        latest = self.world.root.due_s(self.world.plan.changes - 1)  # a restored wallet may have to wait for a change
        taken, put_back = sorted(random.uniform(1, latest) for _ in range(2))
        await trio.sleep(taken)
        image, released = node.disk.backup(), dict(self.world.checker.released)
        self.world.log("backup", node.name)
        await trio.sleep(put_back - taken)
        # not before: of two backups of a node each is put back with what had been given when it was made
        node.backup_due, node.image, node.given = True, image, released
        node.crash()

    def restored(self, node: "Node") -> None:
        """The node is about to start with the older copy."""
        node.disk.restore(node.image)
        self.restored_nodes.add(node.name)
        self.world.checker.from_backup.add(node.identity.public_key)
        lost = []
        for (key, epoch), count in self.world.checker.released.items():
            seats = self.world.root.members[epoch] if epoch < len(self.world.root.members) else {}
            if seats.get(key) is node and count > node.given.get((key, epoch), 0):
                self.world.checker.restored.add((key, epoch))
                lost.append(epoch)
        self.world.log("restored", node.name, *lost)
