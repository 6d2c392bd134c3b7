"""Nodes that come and go are told of, those that were there are not."""

from dataclasses import dataclass

import trio

from gateway.watch import Watch


@dataclass
class FakeWorker:
    peer_id: str
    name: str
    health: str = "healthy"


class FakeSwarm:
    def __init__(self, *workers: FakeWorker) -> None:
        self.known = list(workers)

    def workers(self) -> list[FakeWorker]:
        return self.known


class Heard(list):
    def publish(self, kind: str, owner: str | None, data: dict) -> None:
        assert owner is None
        self.append((kind, data["id"]))


async def test_joining_leaving_and_coming_back(autojump_clock) -> None:
    swarm, heard = FakeSwarm(FakeWorker("a", "a"), FakeWorker("b", "b")), Heard()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Watch(swarm, heard).run)  # type: ignore[arg-type]
        await trio.sleep(5)
        assert heard == []
        swarm.known[1].health = "gone"
        swarm.known.append(FakeWorker("c", "c"))
        await trio.sleep(5)
        assert heard == [("worker.joined", "c"), ("worker.left", "b")]
        swarm.known[1].health = "healthy"
        await trio.sleep(5)
        assert heard[2:] == [("worker.joined", "b")]
        nursery.cancel_scope.cancel()
