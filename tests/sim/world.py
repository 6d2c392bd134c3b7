"""One seed's network: who is in it, how a run goes, and what everybody in it may know.

The whole run is one ``trio.run`` under a mock clock with trio's scheduling made deterministic (``seed``), so that it
replays exactly: :attr:`World.hash` covers every event in order.
"""

import zlib
from pathlib import Path
from random import Random

import trio

from config.errors import ConfigError, RiosError
from ledger.core.genesis import Genesis
from ledger.core.objects import Freeze, Grant, Item, Signed, Vote, sign
from p2p.core import codec
from p2p.core.identity import Identity
from tests.sim.checker import Checker
from tests.sim.crooks import STYLES as CROOKS
from tests.sim.crooks import Crook
from tests.sim.ending import EPOCH_MS, settle
from tests.sim.faults import Faults
from tests.sim.liars import Liar
from tests.sim.metering import pairs
from tests.sim.model import Model
from tests.sim.node import Node
from tests.sim.people import Person
from tests.sim.plan import Plan, plan_of
from tests.sim.root import Root
from tests.sim.signing import identity


class World:
    """A simulation of one seed."""

    def __init__(
        self, seed: int, *, plan: Plan | None = None, folder: Path | None = None, verbose: bool = False
    ) -> None:
        self.seed = seed
        self.plan = plan or plan_of(seed)
        self.folder = folder if self.plan.real else None
        self.random = Random(f"world/{seed}")
        self.verbose = verbose
        self.lines: list[str] = []
        self.hash = 0
        self.events = 0
        self.chaos = False
        self.busy = False
        self.began_s = 0.0
        """When the faults began (virtual s)."""
        self.faults = Faults(self)
        self.nursery: trio.Nursery = None  # type: ignore[assignment] # made by run
        self._make()

    # making

    def key(self, name: str) -> Identity:
        """Somebody's identity."""
        return identity(f"{self.seed}/{name}", real=self.plan.real)

    def _genesis(self, n: int) -> Genesis:
        return Genesis(
            issuer=self.key("c0").public_key,
            root=self.key("root").public_key,
            witnesses=tuple(self.key(f"w{i}").public_key for i in range(n)),
            f=self.plan.f,
            max_supply=2000 + 2000 * (self.seed % 2),
            min_lock=10,
            min_claim_step=2,
        )

    def _founders(self) -> int:
        """How many witnesses: founders who miscount are told so, else the network has one too many."""
        n = 3 * self.plan.f + 1
        try:
            self._genesis(n + 1)
        except ConfigError:
            return n
        return n + 1

    def _may_sit(self, name: str) -> bool:
        return name != "crook" and (self.plan.changes > 0 or name[0] == "w")

    def _make(self) -> None:
        plan = self.plan
        n = self._founders()
        names = [f"w{i}" for i in range(n)] + [f"c{i}" for i in range(plan.clients)] + ["crook"]
        keys = {name: self.key(name) for name in names}
        self.issuer = keys["c0"]
        self.genesis = self._genesis(n)
        self.checker = Checker(self.genesis)
        self.nodes = [Node(self, name, keys[name], witness=self._may_sit(name)) for name in names]
        self.founders = self.nodes[:n]
        self.by_peer = {node.peer_id: node for node in self.nodes}
        self.by_key = {node.identity.public_key: node for node in self.nodes}
        self.liars = [Liar(node, plan.style) for node in self.random.sample(self.founders, plan.liars)]
        self.checker.liars = {liar.node.identity.public_key for liar in self.liars}
        self.people = [Person(node) for node in self.nodes if not node.liar and node.name != "crook"]
        for person in self.people:
            person.attach()
        self.pairs = pairs(self)
        crook = self.nodes[-1]
        crook.crooked = True
        self.crooks = [Crook(crook, style, self.key(style), self.key(f"{style}'s worker")) for style in CROOKS]
        for one in self.crooks:
            one.attach()
        self.root = Root(self, self.by_key[self.issuer.public_key], self.key("root"))
        self.root.attach()

    # facts for everybody

    @property
    def model(self) -> Model:
        """What is final."""
        return self.checker.model

    @property
    def epoch(self) -> int:
        """The newest committee's number."""
        return len(self.model.epochs) - 1

    def now_ms(self) -> int:
        """Real time, as no node knows it."""
        return EPOCH_MS + int(trio.current_time() * 1000)

    def witnesses(self) -> list[Node]:
        """The nodes of this committee and the one before, which may not know yet that it is over."""
        return list(dict.fromkeys(node for seats in self.root.members[-2:] for node in seats.values()))

    def anybody(self, random: Random) -> bytes:
        """Somebody's account."""
        crooks = [crook.payer.public_key for crook in self.crooks]
        return random.choice([*(node.identity.public_key for node in self.nodes[:-1]), random.choice(crooks)])

    def epoch_key(self, node: Node, epoch: int) -> Identity:
        """The key a node made for an epoch."""
        return self.key(f"{node.name}/{epoch}")

    def epoch_identities(self, node: Node) -> list[Identity]:
        """All of them."""
        return [self.epoch_key(node, epoch) for epoch in range(1, self.plan.changes + 1)]

    def witness_key(self, node: Node, epoch: int) -> Identity:
        """The key a node votes with in an epoch (its identity if it has no seat)."""
        seats = self.root.members[epoch] if epoch < len(self.root.members) else {}
        if epoch and seats.get(self.epoch_key(node, epoch).public_key) is node:
            return self.epoch_key(node, epoch)
        return node.identity

    def stranger(self, n: int) -> Identity:
        """A key that means nothing."""
        return self.key(f"stranger{n}")

    def overheard(self, item: Item) -> list[Vote]:
        """Votes of honest witnesses for an object that a liar got hold of."""
        for crook in self.crooks:
            if (item.signed.body, self.epoch) in crook.collectors:
                return list(crook.collectors[item.signed.body, self.epoch]._votes.values())
        return []

    def lie(self, channel: bytes) -> Signed | None:
        """A lying witness's freeze."""
        return self.liars[0].freeze(channel) if self.liars else None

    def false_freeze(self, somebody: Identity, channel: bytes) -> Signed:
        """A freeze by somebody who is no witness."""
        return sign(somebody, Freeze(self.genesis.net, self.epoch, somebody.public_key, channel, 0, None, None))

    @staticmethod
    def freeze_total(signed: Signed) -> int:
        """X of a freeze."""
        return codec.decode(Freeze, signed.body, bytes_max=4096).total

    def honest(self) -> list[Node]:
        """Nodes that run the real thing only."""
        return [node for node in self.nodes if not node.liar]

    # the log

    def log(self, kind: str, *what: object) -> None:
        """Note an event."""
        self.events += 1
        line = f"{trio.current_time():9.3f} {kind} {' '.join(map(str, what))}"
        self.hash = zlib.crc32(line.encode(), self.hash)
        if self.verbose:
            self.lines.append(line)

    # the run

    async def main(self) -> None:
        """Everything."""
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            for node in self.nodes:
                nursery.start_soon(node.live)
            await self._fund()
            self.chaos = self.busy = True
            self.began_s = trio.current_time()
            weather = trio.CancelScope()
            nursery.start_soon(self.faults.run, weather)
            await trio.sleep(self.plan.chaos_s)
            self.log("heal")
            self.chaos = False
            weather.cancel()
            await trio.sleep(3.0)
            self.busy = False
            await settle(self)
            nursery.cancel_scope.cancel()

    async def _fund(self) -> None:
        """In peace: the first grants, so that there is money to fight over, and a word of everybody's wallet."""
        node = self.by_key[self.issuer.public_key]
        accounts = [other.identity.public_key for other in self.nodes[:-1]]
        accounts += [crook.payer.public_key for crook in self.crooks]
        ops = [Grant(account, self.genesis.max_supply // (len(accounts) + 3)) for account in accounts]
        while self.model.supply == 0:
            await trio.sleep(0.5)
            try:
                await node.ledger.wallet.append(ops, timeout_s=3.0)
            except RiosError as error:
                self.log("fund", error.code, error.message[:80])
        await trio.sleep(1.0)
