"""Witnesses that lie: silent, voting for everything, forging, freezing at nothing; and what they make possible.

A liar signs with its own key only. It runs an honest copy of the ledger to know what there is to lie about.
"""

from typing import TYPE_CHECKING, Any

import trio

from config.errors import RiosError
from ledger.core import certificate as certificates
from ledger.core import merkle
from ledger.core.objects import (
    Certificate,
    Entry,
    Freeze,
    Frontier,
    Handover,
    Held,
    Item,
    Seat,
    Shown,
    Signed,
    Transfer,
    Vote,
    Votes,
    Voucher,
    parse,
    sign,
)
from ledger.voting import read_signed
from p2p.core import codec
from p2p.face import Call, Reply

if TYPE_CHECKING:
    from tests.sim.node import Node

STYLES = ("silent", "yes", "forger", "mixed")


class Liar:
    """The lying witness of one node."""

    def __init__(self, node: "Node", style: str) -> None:
        self.node = node
        self.style = style
        self.batch_no = 0
        self.seen: list[Item] = []
        node.liar = True
        node.on_start.append(self._install)
        node.tasks.append(self._push)

    def _install(self, node: "Node") -> None:
        node.network.serve("ledger.submit", self._submit)
        node.network.serve("ledger.freeze", self._freeze)
        node.network.serve("ledger.handover", self._handover)
        node.network.serve("ledger.batches", self._nothing)
        node.network.serve("ledger.next", self._next)

    def _mood(self) -> str:
        return self.node.random.choice(STYLES[:3]) if self.style == "mixed" else self.style

    # requests

    async def _submit(self, call: Call) -> Reply:
        item = parse(read_signed(call.header.get("object")))
        if len(self.seen) < 64:
            self.seen.append(item)
        mood = self._mood()
        if mood == "silent":
            await trio.sleep_forever()
        vote = self.forged_vote(item) if mood == "forger" else self.vote(item, epoch=self.node.world.epoch)
        return Reply({"vote": codec.encode(vote)})

    async def _freeze(self, call: Call) -> Reply:
        mood = self._mood()
        if mood == "silent":
            await trio.sleep_forever()
        return Reply({"freeze": codec.encode(self.freeze(call.header["channel"], forge=mood == "forger"))})

    async def _nothing(self, call: Call) -> Reply:
        return Reply({})

    async def _next(self, call: Call) -> Reply:
        """To a wallet that asks what it signed: nothing, or something it never did."""
        if self._mood() == "silent":
            await trio.sleep_forever()
        known = self.node.ledger.book.state.accounts.get(call.header["account"])
        answer: dict[str, Any] = {"epoch": self.node.world.epoch, "head": known.seq if known is not None else 0}
        if self.seen and self.node.random.random() < 0.5:
            answer["entry"] = codec.encode(self.node.random.choice(self.seen).signed)
        return Reply(answer)

    async def _handover(self, call: Call) -> Reply:
        """Another one for everybody who asks."""
        epoch, key = call.header["epoch"], call.header["witness"]
        own = self.node.world.witness_key(self.node, epoch)
        if key != own.public_key or self._mood() == "silent":
            raise RiosError("not_found", "no such handover")
        signed = self.handover(epoch)
        return Reply({"bytes": len(signed.body), "signature": signed.signature}, [signed.body])

    # lies

    def handover(self, epoch: int) -> Signed:
        """Locks nobody signed, locks that somebody signed twice, freezes that never were, a frontier out of reach."""
        world, random, state = self.node.world, self.node.random, self.node.ledger.book.state
        key = world.witness_key(self.node, epoch)
        accounts = tuple((k, a.seq) for k, a in sorted(state.accounts.items()) if a.seq)
        if random.random() < 0.2:
            accounts = tuple((k, seq + 1000) for k, seq in accounts)
        elif random.random() < 0.3:
            accounts = ()
        locks, held = [], []
        if random.random() < 0.8:
            locks = [self._made_up(account, seq) for account, seq in accounts][:40]
            locks += [item.signed for item in self.seen if isinstance(item.object, Entry)]
        if random.random() < 0.8:
            held = [Held(k, 0, None) for k, c in sorted(state.channels.items()) if c.closed_at is None]
        if held and random.random() < 0.3:
            voucher = Voucher(world.genesis.net, held[0].channel, 0, 7, bytes(32))
            held[0] = Held(held[0].channel, 7, Shown(voucher, sign(key, voucher).signature))
        body = Handover(world.genesis.net, epoch, key.public_key, Frontier(accounts, ()), tuple(locks), (), tuple(held))
        return sign(key, body)

    def _made_up(self, account: bytes, seq: int) -> Signed:
        """An entry in somebody's name, for the slot that is free."""
        world = self.node.world
        head = self.node.ledger.book.state.account(account).head
        entry = Entry(world.genesis.net, account, seq + 1, head, (Transfer(self.node.identity.public_key, 1),))
        return sign(self.node.identity, entry)

    def vote(self, item: Item, *, epoch: int, net: bytes | None = None) -> Vote:
        """A vote of its own batch: another batch for every object, also for two objects of one slot."""
        self.batch_no += 1
        levels = merkle.build([item.id])
        key = self.node.world.witness_key(self.node, epoch)
        header = Votes(
            net or self.node.world.genesis.net, epoch, key.public_key, self.batch_no, bytes(32), levels[-1][0]
        )
        signed = sign(key, header)
        return Vote(signed.body, signed.signature, 0, ())

    def forged_vote(self, item: Item) -> Vote:
        """A vote that proves nothing: somebody else's name, another object's path, a wrong index, a wrong signature."""
        world, random = self.node.world, self.node.random
        good = self.vote(item, epoch=world.epoch)
        other = self.vote(self.seen[0], epoch=world.epoch) if self.seen else good
        victim = random.choice(world.model.epochs[world.epoch].keys)
        header = codec.decode(Votes, good.header, bytes_max=4096)
        stolen = codec.encode(Votes(header.net, header.epoch, victim, header.batch_no, header.prev, header.root))
        return random.choice(
            (
                Vote(stolen, good.signature, 0, ()),
                Vote(stolen, bytes(64), 0, ()),
                Vote(other.header, other.signature, 0, ()),
                Vote(good.header, good.signature, 1, ()),
                Vote(good.header, good.signature, 0, (bytes(32),)),
                self.vote(item, epoch=world.epoch + 1),
                self.vote(item, epoch=world.epoch, net=bytes(16)),
            )
        )

    def freeze(self, channel: bytes, *, forge: bool = False) -> Signed:
        """A freeze at nothing; forged: at an amount that the payer never promised."""
        world = self.node.world
        key, voucher, signature = world.witness_key(self.node, world.epoch), None, None
        if forge:
            voucher = Voucher(world.genesis.net, channel, 0, self.node.random.randint(1, 50), bytes(32))
            signature = sign(key, voucher).signature
        total = voucher.cumulative if voucher else 0
        return sign(key, Freeze(world.genesis.net, world.epoch, key.public_key, channel, total, voucher, signature))

    # certificates that are none

    async def _push(self, node: "Node") -> None:
        """Now and then, send somebody certificates that are none."""
        while True:
            await trio.sleep(node.random.uniform(1.0, 3.0))
            await self._be_found(node)
            if self.style == "silent" or not self.seen:
                continue
            fakes = [self.fake(node.random.choice(self.seen)) for _ in range(2)]
            target = node.random.choice(node.world.nodes)
            header = {"net": node.world.genesis.net}
            try:
                data = [certificates.encode(fake) for fake in fakes]
                await node.network.call(target.peer_id, "ledger.push", header, data, deadline_ms=500)
            except RiosError:
                continue

    async def _be_found(self, node: "Node") -> None:
        """Say where the key of this epoch is, as honest witnesses do."""
        epoch, key = node.world.epoch, node.world.witness_key(node, node.world.epoch)
        if key is not node.identity and node.ledger.book.state.committees.epoch == epoch:
            body = Seat(node.world.genesis.net, epoch, key.public_key, node.identity.public_key)
            await node.ledger.notes.add_seat(sign(key, body), announce=True)

    def fake(self, item: Item) -> Certificate:
        """A certificate that lacks a quorum, however it looks."""
        world, random = self.node.world, self.node.random
        quorum = world.model.epochs[world.epoch].quorum
        own = [self.vote(item, epoch=world.epoch) for _ in range(quorum)]
        strangers = [self._stranger(item, n) for n in range(quorum)]
        stale = [self.vote(item, epoch=world.epoch + 1) for _ in range(quorum)]
        kind = random.randrange(5)
        if kind == 0:
            return Certificate(item.signed, world.epoch, tuple(own))
        if kind == 1:
            return Certificate(item.signed, world.epoch, (own[0], *strangers[1:]))
        if kind == 2:
            return Certificate(item.signed, world.epoch, tuple(self.forged_vote(item) for _ in range(quorum)))
        if kind == 3:
            return Certificate(item.signed, world.epoch + 1, tuple(stale))
        return Certificate(item.signed, world.epoch, (*own[:1], *world.overheard(item)[: quorum - 2]))

    def _stranger(self, item: Item, n: int) -> Vote:
        """A vote with a key that is in no committee."""
        world = self.node.world
        key = world.stranger(n)
        header = Votes(world.genesis.net, world.epoch, key.public_key, 0, bytes(32), merkle.root_of([item.id]))
        signed = sign(key, header)
        return Vote(signed.body, signed.signature, 0, ())
