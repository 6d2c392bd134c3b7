"""One seed: a network of nodes, faults, healing, and what must be true in the end.

The whole run is one ``trio.run`` under a mock clock with trio's scheduling made deterministic, so that a seed replays
exactly: :attr:`World.hash` covers every event in order.
"""

import traceback
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import trio
from trio.testing import MockClock

import ledger.ledger as module
from config.errors import ConfigError, RiosError
from ledger.core.genesis import Genesis
from ledger.core.objects import Freeze, Grant, Item, Signed, Vote, sign
from ledger.core.state import State
from ledger.lineage import FOUND
from p2p.core import codec
from p2p.core.identity import Identity
from tests.sim.checker import Checker
from tests.sim.crooks import STYLES as CROOKS
from tests.sim.crooks import Crook
from tests.sim.disk import SimMark
from tests.sim.liars import STYLES, Liar
from tests.sim.model import Model, Violation
from tests.sim.node import Node, facts
from tests.sim.people import Person
from tests.sim.root import Root
from tests.sim.signing import identity, signer

EPOCH_MS = 1_800_000_000_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a seed is made of. Times are virtual seconds."""

    f: int = 1
    liars: int = 1
    style: str = "mixed"
    clients: int = 2
    changes: int = 2
    restores: int = 0
    chaos_s: float = 16.0
    pause_s: float = 2.0
    channel_s: tuple[float, float] = (1.5, 9.0)
    loss: float = 0.1
    duplicate: float = 0.1
    delay_s: tuple[float, float] = (0.002, 0.25)
    partitions: float = 0.6
    crash_every_s: float = 4.0
    commit_crash: float = 0.01
    skew_ms: int = 1500
    grace_ms: int = 1000
    margin_ms: int = 500
    calm_s: float = 90.0
    real: bool = False


def plan_of(seed: int) -> Plan:
    """The plan of a seed: most have f = 1 with one liar; some none, some f = 2, some f = 0."""
    random = Random(f"plan/{seed}")
    f = random.choice((1, 1, 1, 1, 1, 1, 1, 1, 2, 0))
    changes = random.choice((0, 1, 2, 2, 2))
    liars = f if random.random() < 0.75 else random.randint(0, f)
    return Plan(
        f=f,
        liars=liars,
        changes=changes,
        restores=f - liars if changes else 0,
        style=random.choice((*STYLES, "mixed", "yes")),
        loss=random.choice((0.0, 0.05, 0.1, 0.2)),
        duplicate=random.choice((0.0, 0.1, 0.3)),
        partitions=random.choice((0.0, 0.4, 0.7)),
        crash_every_s=random.choice((3.0, 6.0, 12.0)),
        commit_crash=random.choice((0.0, 0.005, 0.02)),
        skew_ms=random.choice((0, 500, 3000)),
        real=seed % 50 == 49,
    )


class World:
    """A simulation of one seed."""

    def __init__(self, seed: int, *, plan: Plan | None = None, folder: Path | None = None, verbose: bool = False) -> None:
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
        self.blocked: set[tuple[str, str]] = set()
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
        self.liars = [
            Liar(node, plan.style) for node in self.random.sample(self.founders, plan.liars)
        ]
        self.restored_nodes: set[str] = set()
        self.checker.liars = {liar.node.identity.public_key for liar in self.liars}
        self.people = [
            Person(node, grants=node.identity is self.issuer)
            for node in self.nodes
            if not node.liar and node.name != "crook"
        ]
        for person in self.people:
            person.attach()
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
        return sign(
            somebody, Freeze(self.genesis.net, self.epoch, somebody.public_key, channel, 0, None, None)
        )

    @staticmethod
    def freeze_total(signed: Signed) -> int:
        """X of a freeze."""
        return codec.decode(Freeze, signed.body, bytes_max=4096).total

    # the log

    def log(self, kind: str, *what: object) -> None:
        """Note an event."""
        self.events += 1
        line = f"{trio.current_time():9.3f} {kind} {' '.join(map(str, what))}"
        self.hash = zlib.crc32(line.encode(), self.hash)
        if self.verbose:
            self.lines.append(line)

    # the wire

    def way(self, source: Node, target: Node, what: str) -> float | None:
        """How long a message takes (s), or None: it is lost."""
        if source is target:
            return 0.0
        random, plan = self.random, self.plan
        lost = self.chaos and ((source.name, target.name) in self.blocked or random.random() < plan.loss)
        delay = plan.delay_s[0] + random.random() ** 2 * (plan.delay_s[1] if self.chaos else 0.01)
        self.log("lost" if lost else "send", source.name, target.name, what)
        return None if lost else delay

    def twice(self) -> bool:
        """Whether a request arrives twice."""
        return self.chaos and self.random.random() < self.plan.duplicate

    # faults

    async def _partition(self) -> None:
        random = self.random
        while True:
            await trio.sleep(random.uniform(0.5, 2.5))
            self.blocked = set()
            if random.random() >= self.plan.partitions:
                continue
            one_way = random.random() < 0.4
            side = {node.name: random.randrange(2) for node in self.nodes}
            for a in side:
                for b in side:
                    if side[a] < side[b] or (side[a] > side[b] and not one_way):
                        self.blocked.add((a, b))
            self.log("partition", "one-way" if one_way else "both ways", *(n for n in side if side[n]))

    async def _crash(self) -> None:
        random = self.random
        while True:
            await trio.sleep(random.expovariate(1 / self.plan.crash_every_s))
            node = random.choice(self.nodes)
            if node.up:
                self.log("crash", node.name)
                node.crash()

    async def _restore(self) -> None:
        """Somebody's database is put back to an older copy. What is beside it (keys, the mark) stays."""
        random = self.random
        node = random.choice([person.node for person in self.people])
        latest = self.root.due_s(self.plan.changes - 1)  # a restored wallet may have to wait for a change
        taken, put_back = sorted(random.uniform(1, latest) for _ in range(2))
        await trio.sleep(taken)
        node.image, released = node.disk.backup(), dict(self.checker.released)
        self.log("backup", node.name)
        await trio.sleep(put_back - taken)
        node.backup_due, node.given = True, released
        node.crash()

    def restored(self, node: Node) -> None:
        """The node is about to start with the older copy."""
        node.disk.restore(node.image)
        self.restored_nodes.add(node.name)
        lost = []
        for (key, epoch), count in self.checker.released.items():
            seats = self.root.members[epoch] if epoch < len(self.root.members) else {}
            if seats.get(key) is node and count > node.given.get((key, epoch), 0):
                self.checker.restored.add((key, epoch))
                lost.append(epoch)
        self.log("restored", node.name, *lost)

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
            faults = trio.CancelScope()
            nursery.start_soon(self._faults, faults)
            await trio.sleep(self.plan.chaos_s)
            self.log("heal")
            self.chaos = False
            self.blocked = set()
            faults.cancel()
            await trio.sleep(3.0)
            self.busy = False
            await self._calm()
            nursery.cancel_scope.cancel()

    async def _faults(self, scope: trio.CancelScope) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._partition)
                for _ in range(self.plan.restores):
                    nursery.start_soon(self._restore)
                nursery.start_soon(self._crash)

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

    # the end

    def honest(self) -> list[Node]:
        """Nodes that run the real thing only."""
        return [node for node in self.nodes if not node.liar]

    async def _calm(self) -> None:
        """Wait until nothing is left to do; :class:`Violation` I5 or I6 if that never comes."""
        end = trio.current_time() + self.plan.calm_s
        while (why := self._unsettled()) and trio.current_time() < end:
            await trio.sleep(1.0)
        if why:
            raise Violation(*why)
        self._check_end()

    def _unsettled(self) -> tuple[str, str] | None:
        """What is not as it must be in the end."""
        for node in self.honest():
            if not node.up:
                return "I6", f"{node.name} is down"
        for person in self.people:
            if self._excused(person.node):
                continue
            if person.node.ledger.wallet.pending:
                return "I6", f"{person.node.name} waits for its entry: {facts(person.node)}"
            me, state = person.identity.public_key, person.node.ledger.book.state
            for key, channel in sorted(state.channels.items()):
                if channel.payer == me and channel.closed_at is None:
                    return "I6", f"{person.node.name} cannot reclaim channel {key.hex()[:8]}"
        if not self.root.done:
            return "I6", f"epoch {self.epoch} of {self.plan.changes}"
        if any(crook.hidden for crook in self.crooks):
            return "I5", "certificates are still hidden"
        if len({node.ledger.book.state.digest() for node in self.honest()}) > 1:
            return "I5", f"digests differ: {[facts(node) for node in self.honest()]}"
        return None

    def _excused(self, node: Node) -> bool:
        """A wallet from a backup may wait for the next committee if some witness of this one is silent (rule 9)."""
        silent = any(w.liar or w.name in self.restored_nodes for w in self.root.members[-1].values())
        return silent and node.ledger._lineage.wallet_unsure == FOUND and node.name in self.restored_nodes

    def _check_end(self) -> None:
        """Books, stores and the model agree."""
        for node in self.honest():
            state = node.ledger.book.state
            state.check_invariants()
            if state.waiting() or state.broken:
                raise Violation("I5", f"objects wait or are broken: {facts(node)}")
            items = list(node.ledger.book.store.items())
            self.random.shuffle(items)
            again = State(self.genesis)
            for item in items:
                again.add(item)
            if again.digest() != state.digest():
                raise Violation("I5", f"what {node.name} stored gives another digest in another order")
        self._check_workers()

    def _check_workers(self) -> None:
        """Nobody loses a voucher that it could have claimed in quiet times."""
        for person in self.people:
            for key, held in person.held.items():
                channel = person.node.ledger.book.state.channels[key]
                healed = EPOCH_MS + int((self.began_s + self.plan.chaos_s) * 1000)
                quiet = channel.expiry_ms - self.plan.skew_ms - 6000 > max(healed, held.at_ms)
                if quiet and channel.paid < held.voucher.cumulative - self.genesis.min_claim_step:
                    raise Violation(
                        "I6", f"{person.node.name} got {channel.paid} of {held.voucher.cumulative} on {key.hex()[:8]}"
                    )


@dataclass(frozen=True)
class Result:
    """What came of a seed."""

    seed: int
    invariant: str
    message: str
    hash: int
    events: int
    objects: int
    lines: tuple[str, ...] = ()


def run(seed: int, *, plan: Plan | None = None, folder: Path | None = None, verbose: bool = False) -> Result:
    """Simulate a seed. ``folder`` is where seeds with real files put them (None: they too stay in memory)."""
    internals = trio._core._run  # private names, guarded by test_sim
    internals._ALLOW_DETERMINISTIC_SCHEDULING = True
    internals._r.seed(seed)
    plan = plan or plan_of(seed)
    with signer(real=plan.real):
        world = World(seed, plan=plan, folder=folder, verbose=verbose)
        disks = {node.name: node.disk for node in world.nodes}
        real_store, real_mark = module.Store, module.Mark
        module.Store = lambda path, net, **_: disks[str(path)].open()  # type: ignore[assignment,misc]
        module.Mark = lambda path: SimMark(disks[str(path)])  # type: ignore[assignment,misc]
        invariant = message = ""
        try:
            trio.run(world.main, clock=MockClock(autojump_threshold=0))
        except* Violation as group:
            first = _first(group)
            invariant, message = first.invariant, str(first)
        except* Exception as group:
            first = _first(group)
            invariant, message = "error", f"{type(first).__name__}: {first}"
            if verbose:
                world.lines += traceback.format_exception(first)
        finally:
            module.Store, module.Mark = real_store, real_mark  # type: ignore[misc]
            internals._ALLOW_DETERMINISTIC_SCHEDULING = False
            for disk in disks.values():
                disk.destroy()
    return Result(seed, invariant, message, world.hash, world.events, world.model.objects, tuple(world.lines))


def _first(group: BaseExceptionGroup) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


__all__ = ["Plan", "Result", "World", "plan_of", "replace", "run"]
