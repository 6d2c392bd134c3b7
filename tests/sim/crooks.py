"""Payers and workers that cheat, together and with the lying witnesses.

A crook owns two keys: it pays itself as a worker. It asks witnesses directly, keeps every vote it gets, and shows the
certificates it can make to whom it likes, when it likes. An ``equivocator`` signs several entries for one slot and so
wedges itself sooner or later; a ``gambler`` keeps its chain whole and plays claims, freezes and reclaims against each
other; a ``fouler`` tries what every single rule forbids.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from config.errors import RiosError
from ledger.core import certificate as certificates
from ledger.core.certificate import Collector
from ledger.core.objects import (
    Certificate,
    Claim,
    Entry,
    Freeze,
    Grant,
    Op,
    Open,
    Reclaim,
    Signed,
    TopUp,
    Transfer,
    Vote,
    Votes,
    Voucher,
    sign,
)
from ledger.core.rules import ChannelState
from p2p.core import codec
from p2p.core.identity import Identity

if TYPE_CHECKING:
    from tests.sim.node import Node

TRICKS_MAX = 40
STYLES = ("equivocator", "gambler", "fouler")


@dataclass
class Crook:
    """Pays, works and lies on one node."""

    node: "Node"
    style: str
    payer: Identity
    worker: Identity
    collectors: dict[tuple[bytes, int], Collector] = field(default_factory=dict)
    """Votes of one epoch for one object, by (body, epoch)."""
    hidden: list[Certificate] = field(default_factory=list)
    freezes: dict[bytes, dict[tuple[int, bytes], Signed]] = field(default_factory=dict)
    """By channel, then by (epoch, witness)."""

    def attach(self) -> None:
        """Live on the node."""
        self.node.tasks += [self._pay, self._work, self._show]

    # what is signed

    def _entry(self, *ops: Op, seq: int = 0, prev: bytes | None = None, net: bytes = b"") -> Signed:
        state = self.node.ledger.book.state
        known = state.account(self.payer.public_key)
        head = known.head if prev is None else prev
        return sign(
            self.payer,
            Entry(net or state.genesis.net, self.payer.public_key, seq or known.seq + 1, head, ops),
        )

    def _channels(self) -> list[tuple[bytes, ChannelState]]:
        state = self.node.ledger.book.state
        return sorted((k, c) for k, c in state.channels.items() if c.payer == self.payer.public_key)

    def _entries(self) -> list[Signed]:
        """One honest entry, two for one slot, or one that breaks a rule."""
        random, world, node = self.node.random, self.node.world, self.node
        balance = node.ledger.book.state.balance(self.payer.public_key)
        opens = [(k, c) for k, c in self._channels() if c.closed_at is None]
        due = [(k, c) for k, c in opens if len(self._known(k)) >= world.model.epochs[-1].quorum]
        expiry = node.now_ms() + int(random.uniform(0.3, 4) * 1000)
        key, lock = self.worker.public_key, max(world.genesis.min_lock, balance // 4)
        kind = random.random()
        if self.style == "equivocator" and kind < 0.7:
            to = [Transfer(world.anybody(random), max(1, balance)) for _ in range(random.choice((2, 2, 3)))]
            return [self._entry(op) for op in to]
        if self.style == "fouler" and due and kind < 0.7:
            return [self._foul_reclaim(*random.choice(due))]
        if self.style == "fouler" and kind < (0.6 if opens else 0.4):
            return [self._foul(balance, lock, expiry, opens)]
        if due and random.random() < 0.5:
            return [self._good_reclaim(random.choice(due)[0])]
        if opens and kind > 0.8:
            return [self._entry(TopUp(random.choice(opens)[0], max(1, balance // 4)))]
        if self.style == "gambler" and random.random() < 0.4:
            key = random.choice(world.people).identity.public_key  # it will not be paid if it is not careful
        return [self._entry(*(Open(key, key, lock, expiry) for _ in range(random.choice((1, 1, 2)))))]

    def _foul(self, balance: int, lock: int, expiry: int, opens: list[tuple[bytes, ChannelState]]) -> Signed:
        random, world, me = self.node.random, self.node.world, self.payer.public_key
        key = self.worker.public_key
        state = self.node.ledger.book.state
        foreign = [k for k, c in sorted(state.channels.items()) if c.payer != me]
        pay = Transfer(key, 1)
        seq = state.account(me).seq
        choices: list[Signed] = [
            self._entry(Transfer(key, balance + 1)),
            self._entry(Transfer(me, balance), Transfer(key, balance), Transfer(key, balance)),
            self._entry(*(Transfer(key, balance // 2 + 1) for _ in range(3))),
            self._entry(Open(key, key, balance, expiry), Transfer(key, balance)),
            self._entry(Grant(me, 50), Transfer(key, 50)),
            self._entry(Open(key, key, world.genesis.min_lock - 1, expiry)),
            self._entry(Open(bytes(32), key, lock, expiry)),
            self._entry(Open(b"\1" + bytes(31), key, lock, expiry)),
            self._entry(pay, seq=seq + 2),
            self._entry(pay, prev=bytes(32) if seq else b"\1" * 32),
            self._entry(pay, net=b"other network 16"),
            self._entry(Transfer(key, 0)),
            Signed(self._entry(pay).body, bytes(64)),
            self._for_somebody(),
        ]
        if foreign:
            choices.append(self._entry(TopUp(random.choice(foreign), 1)))
            choices.append(self._reclaim(random.choice(foreign), 0, ()))
        if opens:
            choices.append(self._reclaim(random.choice(opens)[0], 0, ()))
            choices.append(self._entry(Open(key, key, lock, expiry), TopUp(opens[0][0], balance)))
        return random.choice(choices)

    def _for_somebody(self) -> Signed:
        """A transfer in the name of somebody who did not sign it."""
        world, state = self.node.world, self.node.ledger.book.state
        victim = world.anybody(self.node.random)
        known = state.account(victim)
        ops = (Transfer(self.payer.public_key, max(1, known.balance)),)
        return sign(self.payer, Entry(state.genesis.net, victim, known.seq + 1, known.head, ops))

    def _reclaim(self, key: bytes, total: int, freezes: tuple[Signed, ...]) -> Signed:
        """A reclaim backed by whatever lies around: the liars' freezes, several times."""
        lies = [self.node.world.lie(key) for _ in range(3)]
        return self._entry(Reclaim(key, total, freezes or tuple(lie for lie in lies if lie) or (self._own(key),)))

    def _own(self, key: bytes) -> Signed:
        """A freeze signed with the own key, which is no witness's."""
        liar = self.node.world.false_freeze(self.payer, key)
        return liar

    def _known(self, key: bytes) -> tuple[Signed, ...]:
        """The freezes of one epoch that are at hand: of the one with most of them."""
        found = self.freezes.get(key, {})
        epochs = [epoch for epoch, _ in found]
        best = max(epochs, key=epochs.count, default=0)
        return tuple(signed for (epoch, _), signed in found.items() if epoch == best)

    def _good_reclaim(self, key: bytes) -> Signed:
        known = self._known(key)
        return self._entry(Reclaim(key, max(map(self.node.world.freeze_total, known), default=0), known))

    def _foul_reclaim(self, key: bytes, channel: ChannelState) -> Signed:
        known = self._known(key)
        total = max(map(self.node.world.freeze_total, known), default=0)
        good = Reclaim(key, total, known)
        others = [tuple(f.values()) for k, f in sorted(self.freezes.items()) if k != key and f]
        fouls = [
            (good, good),
            (good, good),
            (Reclaim(key, channel.paid, known),),
            (Reclaim(key, 0, known),),
            (good, TopUp(key, 1)),
            (Reclaim(key, total, known[:1] * 7),),
            (Reclaim(key, total, known[:-1] or known),),
            (Reclaim(key, channel.lock, known),),
            (Reclaim(key, channel.lock + 1, known),),
            (good,) * 9,
            (Reclaim(key, total, tuple(self.freezes[key].values())),),
            *((Reclaim(key, channel.paid, other),) for other in others[:1]),
        ]
        return self._entry(*self.node.random.choice(fouls))

    # asking

    async def _ask(self, signed: Signed, node: "Node", witness: "Node") -> None:
        """Get a vote, by whatever it takes."""
        try:
            header: dict[str, Any] = {"object": codec.encode(signed)}
            reply = await node.network.call(witness.peer_id, "ledger.submit", header, deadline_ms=1000)
            self._keep(signed, reply.header)
        except RiosError:
            return

    def _keep(self, signed: Signed, header: Any) -> None:
        vote = header.get("vote")
        if not isinstance(vote, bytes):
            return
        found = codec.decode(Vote, vote, bytes_max=8192)
        epoch = codec.decode(Votes, found.header, bytes_max=4096).epoch
        key = (signed.body, epoch)
        collector = self.collectors.get(key)
        if collector is None:
            if len(self.collectors) >= TRICKS_MAX:
                self.collectors.pop(next(iter(self.collectors)))
            collector = self.collectors[key] = Collector(self.node.ledger.book.verifier, signed, epoch)
        collector.add(found)
        if not collector.missing:
            self.hidden.append(collector.certificate())
            del self.collectors[key]

    async def spread(self, node: "Node", signed: list[Signed]) -> None:
        """Every witness is asked for one or several of them, in any order."""
        random = node.random
        async with trio.open_nursery() as nursery:
            for witness in node.world.witnesses():
                mine = random.sample(signed, random.randint(1, len(signed)))
                for one in mine:
                    nursery.start_soon(self._ask, one, node, witness)

    async def _pay(self, node: "Node") -> None:
        random = node.random
        again: list[Signed] = []
        while True:
            await trio.sleep(
                random.expovariate(1 / (node.world.plan.pause_s * (0.4 if self.style == "fouler" else 0.8)))
            )
            if not node.world.busy:
                continue
            if not again or random.random() < 0.5:
                again = self._entries()
            node.nursery.start_soon(self.spread, node, again)

    async def _work(self, node: "Node") -> None:
        """Claims of every kind, and freezes asked for as early as possible."""
        random = node.random
        while True:
            await trio.sleep(random.uniform(0.8, 2.0))
            for key, channel in self._channels():
                if channel.closed_at is not None and random.random() < 0.7:
                    continue
                if channel.signer in node.world.by_key:
                    await self._promise(node, key, channel)
                elif random.random() < 0.6:
                    node.nursery.start_soon(self.spread, node, [self._claim(key, channel)])
                late = node.now_ms() > channel.expiry_ms - 1000
                if channel.closed_at is None and (late or random.random() < 0.2):
                    for witness in node.world.witnesses():
                        node.nursery.start_soon(self._ask_freeze, node, witness, key)
                    if late and random.random() < 0.6:
                        node.nursery.start_soon(self.spread, node, [self._claim(key, channel)])

    async def _promise(self, node: "Node", key: bytes, channel: ChannelState) -> None:
        """A good voucher for an honest worker: whoever promised must pay, freeze or not."""
        voucher = Voucher(node.world.genesis.net, key, 0, node.random.randint(1, channel.lock), bytes(32))
        header: dict[str, Any] = {"voucher": codec.encode(sign(self.payer, voucher))}
        try:
            worker = node.world.by_key[channel.signer]
            await node.network.call(worker.peer_id, "sim.voucher", header, deadline_ms=500)
        except RiosError:
            return

    def _claim(self, key: bytes, channel: ChannelState) -> Signed:
        random, world = self.node.random, self.node.world
        total = channel.lock + 1 if random.random() < 0.1 else random.randint(1, channel.lock)
        net = b"other network 16" if random.random() < 0.05 else world.genesis.net
        voucher = Voucher(net, key, 0, total, bytes(32))
        signature = sign(self.payer, voucher).signature
        where = (channel.payer, channel.seq, channel.op_index)
        foul = random.random()
        if foul < 0.05:
            signature = sign(self.worker, voucher).signature
        if foul > 0.95:
            where = (channel.payer, channel.seq, (channel.op_index + 1) % 4)
        signer = self.payer if 0.05 < foul < 0.1 else self.worker
        return sign(signer, Claim(*where, voucher, signature))

    async def _ask_freeze(self, node: "Node", witness: "Node", key: bytes) -> None:
        header: dict[str, Any] = {"channel": key}
        try:
            me = self.payer.peer_id
            reply = await node.network.call(witness.peer_id, "ledger.freeze", header, deadline_ms=1000, sender=me)
            signed = codec.decode(Signed, reply.header["freeze"], bytes_max=8192)
        except (RiosError, KeyError):
            return
        body = codec.decode(Freeze, signed.body, bytes_max=4096)
        self.freezes.setdefault(key, {})[body.epoch, body.witness] = signed

    async def _show(self, node: "Node") -> None:
        """Certificates that were kept back come out one by one, to one node at a time; all of them in the end."""
        random = node.random
        while True:
            await trio.sleep(random.uniform(0.2, 1.0))
            if self.style == "equivocator" and node.world.busy and random.random() < 0.85:
                continue  # a certificate that nobody knows may be worth a second one in the next epoch
            shown = self.hidden if not node.world.busy or random.random() < 0.3 else self.hidden[:1]
            for certificate in list(shown):
                target = random.choice(node.world.nodes) if node.world.busy and random.random() < 0.5 else node
                data = [certificates.encode(certificate)]
                try:
                    header = {"net": node.world.genesis.net}
                    await node.network.call(target.peer_id, "ledger.push", header, data, deadline_ms=500)
                    self.hidden.remove(certificate)
                except RiosError as error:
                    if "not signed by" in error.message:  # it put votes for one signature under another: worth nothing
                        self.hidden.remove(certificate)
