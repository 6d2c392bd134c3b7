"""Calls that the real metering counts and pays, as dmoe makes them: receipts, vouchers, top-ups, claims.

A call is a message of the simulation that may be lost on its way there or back, and so may both counts. Invariants of
LEDGER.md, "Metering": M1 a voucher that left never falls again and stays within the lock; M2 payments between honest
sides never end; M3 an honest worker is paid what it earned once everything is quiet.
"""

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from config.errors import RiosError
from p2p.face import Call, Reply

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

SETTINGS: dict[str, Any] = {"channel_lock": 40, "prepay": 6, "credit": 6, "claim_seconds": 5}
"""There is little money in a simulated network."""
CALLS_MAX = 20
DEADLINE_MS = 1000


@dataclass(frozen=True)
class Quote:
    """A microcredit for 1,000 kFLOP."""

    number: int = 1
    microcredits_per_tflop: int = 1_000_000
    microcredits_per_kv_unit: int = 0


QUOTE = Quote()


def settings(world: "World") -> dict[str, Any]:
    """What a node of this seed is set to: half of the payers let their vouchers lag behind."""
    return {**SETTINGS, "lag_calls": world.seed % 16 // 8 * 100} if world.plan.metering else {}


@dataclass
class Pair:
    """Somebody who has work done, and who does it. A network delivers a call once: what came twice is dropped here."""

    payer: "Node"
    worker: "Node"
    random: Random
    calls: int = 0
    seen: set[int] = field(default_factory=set)

    def attach(self) -> None:
        """Live on both nodes."""
        self.payer.tasks.append(self._run)
        self.worker.on_start.append(lambda node: node.network.serve(self._method, self._serve))

    @property
    def _method(self) -> str:
        return f"sim.work.{self.payer.name}"

    # paying

    async def _run(self, node: "Node") -> None:
        while True:
            await trio.sleep(self.random.uniform(0.5, 2.0))
            if node.world.busy:
                try:
                    await self._burst(node)
                except RiosError as error:
                    node.world.log("work", node.name, error.code, error.message[:60])

    async def _burst(self, node: "Node") -> None:
        """Some calls; the first that fails is the last."""
        buyer, them = node.ledger.buyer, self.worker.peer_id
        for _ in range(self.random.randint(2, CALLS_MAX)):
            channel = buyer.channel(them) or await buyer.open_channel(them)
            kflop, leaf = self.random.randint(100, 900), self.random.randbytes(32)
            self.calls += 1
            ask = {"channel": channel, "kflop": kflop, "leaf": leaf, "number": self.calls}
            try:
                await node.network.call(them, self._method, ask, deadline_ms=DEADLINE_MS)
            except RiosError as error:
                if error.code != "payment_required":
                    buyer.lost(them, channel, QUOTE, kflop)
                    raise
                await buyer.open_channel(them)  # shows a voucher of what was counted here
            else:
                buyer.used(them, channel, QUOTE, kflop, leaf)

    # working

    async def _serve(self, call: Call) -> Reply:
        seller, channel = self.worker.ledger.seller, call.header["channel"]
        if call.header["number"] in self.seen:
            raise RiosError("conflict", "a network delivers a call once")
        self.seen.add(call.header["number"])
        await seller.credited(channel, 0.3)
        seller.admit(call.peer_id, channel, QUOTE)
        seller.served(call.peer_id, channel, QUOTE, call.header["kflop"], call.header["leaf"])
        return Reply({})

    # judging

    def trouble(self) -> tuple[str, str] | None:
        """What is wrong between the two, if neither has forgotten anything."""
        if {self.payer.name, self.worker.name} & self.payer.world.faults.restored_nodes:
            return None
        bought, sold = self.payer.ledger.buyer._by_id, self.worker.ledger.seller._channels
        for key, channel in bought.items():
            other = sold.get(key)
            stopped = channel.stopped or (other.stopped if other is not None else "")
            if stopped and stopped != "no voucher yet":
                return "M2", f"{self.payer.name} and {self.worker.name} stopped: {stopped}"
            if other is not None and other.promised > channel.promised:
                return "M1", f"{self.worker.name} holds more than {self.payer.name} promised"
            if other is not None and other.promised < min(other.earned, other.lock):
                return "M3", f"{self.worker.name} earned {other.earned} and was promised {other.promised}"
        return None


def pairs(world: "World") -> list[Pair]:
    """Everybody in a ring of three honest people."""
    nodes = [person.node for person in world.people[:3]] if world.plan.metering else []
    found = [
        Pair(a, b, Random(f"{world.seed}/{a.name} pays {b.name}"))
        for a, b in zip(nodes, nodes[1:] + nodes[:1], strict=True)
        if a is not b
    ]
    for pair in found:
        pair.attach()
    return found
