"""The root account and the operators: changes of the committee and of the issuer, agreed on beforehand."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from config.errors import RiosError
from ledger.core.objects import Committee, Entry, Issuer, Op, Signed, parse, sign
from p2p.core.identity import Identity

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World


@dataclass
class Root:
    """Root's wallet is kept by hand: what it signs is durable before anybody sees it."""

    world: "World"
    node: "Node"
    identity: Identity
    signed: list[Signed] = field(default_factory=list)
    members: list[dict[bytes, "Node"]] = field(default_factory=list)
    """Who sits in each committee, by the key it votes with."""
    steps: list[tuple[type[Op], int]] = field(default_factory=list)
    """What root's entries do, and in which epoch."""

    def attach(self) -> None:
        """Live on the node."""
        plan = self.world.plan
        for epoch in range(plan.changes + 1):
            self.steps += [(Issuer, epoch)] * (epoch == plan.issuer_epoch) + [(Committee, epoch)] * (
                epoch < plan.changes
            )
        self.members.append({node.identity.public_key: node for node in self.world.founders})
        self.node.tasks.append(self._run)
        thief = self.world.crooks[0]
        thief.node.tasks.append(self._steal)

    @property
    def done(self) -> bool:
        """Whether every change is final at the root's node."""
        return self._made() == len(self.steps)

    def _made(self) -> int:
        return self.node.ledger.book.state.account(self.identity.public_key).seq

    def due_s(self, epoch: float) -> float:
        """How long after the faults began (virtual s) the committee of an epoch is to be replaced."""
        plan = self.world.plan
        return plan.chaos_s * (epoch + 0.6) / (plan.changes + 0.6)

    async def _run(self, node: "Node") -> None:
        while True:
            await trio.sleep(0.5)
            if self.done:
                continue
            step = self._made()
            if len(self.signed) <= step:
                kind, epoch = self.steps[step]
                due_s = self.due_s(epoch - (0.5 if kind is Issuer else 0))
                if not self.world.began_s or trio.current_time() < self.world.began_s + due_s:
                    continue
                self.signed.append(self._sign(self._next_issuer() if kind is Issuer else self._committee(epoch + 1)))
            for other in self.world.honest():
                other.agree(parse(self.signed[step]).id)
            try:
                await node.ledger.buyer._quorum.certify(self.signed[step], timeout_s=3.0)
            except RiosError as error:
                self.world.log("root", error.code, error.message[:400])

    def _next_issuer(self) -> Issuer:
        people = [person.node for person in self.world.people if person.node is not self.node]
        chosen = self.world.random.choice(people)
        self.world.log("issuer", chosen.name)
        return Issuer(chosen.identity.public_key)

    def _committee(self, epoch: int) -> Committee:
        world, random = self.world, self.world.random
        pool = [node for node in world.nodes if not node.crooked and not node.liar]
        liars = [liar.node for liar in world.liars if random.random() < 0.8]
        f = world.plan.f
        chosen = liars + random.sample(pool, 3 * f + 1 - len(liars))
        random.shuffle(chosen)
        seats: dict[bytes, Node] = {}
        for node in chosen:
            key = world.epoch_key(node, epoch) if random.random() < 0.75 else node.identity
            seats[key.public_key] = node
        self.members.append(seats)
        world.checker.liars |= {key for key, node in seats.items() if node.liar}
        world.log("change", epoch, *(node.name for node in seats.values()))
        return Committee(epoch, tuple(seats), f)

    def _sign(self, op: Committee | Issuer) -> Signed:
        world, state = self.world, self.node.ledger.book.state
        known = state.account(self.identity.public_key)
        entry = Entry(state.genesis.net, self.identity.public_key, known.seq + 1, known.head, (op,))
        signed = sign(self.identity, entry)
        world.checker.listed.add(parse(signed).id)
        return signed

    async def _steal(self, node: "Node") -> None:
        """Whoever has stolen root's key names a committee or an issuer of its own: nobody has listed it."""
        world, random = self.world, node.random
        while True:
            await trio.sleep(random.uniform(2, 8))
            if not world.busy or not world.plan.changes:
                continue
            state, f = node.ledger.book.state, world.plan.f
            known = state.account(self.identity.public_key)
            keys = tuple(world.stranger(n).public_key for n in range(3 * f + 1))
            op: Committee | Issuer = Committee(state.committees.epoch + 1, keys, f)
            if world.plan.issuer_epoch >= 0 and random.random() < 0.5:
                op = Issuer(keys[0])
            entry = Entry(state.genesis.net, self.identity.public_key, known.seq + 1, known.head, (op,))
            await world.crooks[0].spread(node, [sign(self.identity, entry)])
