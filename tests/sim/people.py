"""Honest people: they pay, open channels, promise, claim and reclaim through the real wallet and quorum.

What a person promised and holds (vouchers) survives its node's crashes, as the tables of the metering do.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from config.errors import RiosError
from ledger.core.objects import Claim, Entry, Grant, Op, Open, Reclaim, Signed, TopUp, Transfer, Voucher, parse, sign
from ledger.core.rules import ChannelState
from p2p.core import codec
from p2p.core.identity import Identity
from p2p.face import Call, Reply

if TYPE_CHECKING:
    from tests.sim.node import Node

APPEND_S = 4.0
CERTIFY_S = 3.0
GRANT_MAX = 400
METERED_MS = 3_600_000
"""Channels that live longer than this are not paid by hand."""


@dataclass
class Held:
    """The newest voucher a worker holds on a channel, and when (ms, real time) it came."""

    voucher: Voucher
    signature: bytes
    at_ms: int


@dataclass
class Person:
    """The owner of a node: payer and worker."""

    node: "Node"
    promised: dict[bytes, Signed] = field(default_factory=dict)
    held: dict[bytes, Held] = field(default_factory=dict)
    entries: int = 0

    @property
    def identity(self) -> Identity:
        """Signs for this person."""
        return self.node.identity

    def attach(self) -> None:
        """Live on the node."""
        self.node.tasks += [self._pay, self._promise, self._settle]
        self.node.on_start.append(lambda node: node.network.serve("sim.voucher", self._take))

    # paying

    async def _pay(self, node: "Node") -> None:
        random, plan = node.random, node.world.plan
        while True:
            await trio.sleep(random.expovariate(1 / plan.pause_s))
            if not node.world.busy:
                continue
            ops = self._ops()
            if ops:
                try:
                    await node.ledger.wallet.append(ops, timeout_s=APPEND_S)
                    self.entries += 1
                except RiosError as error:
                    node.world.log("append", node.name, error.code)

    def _ops(self) -> list[Op]:
        """Something to do with the money that is there."""
        node, world, random = self.node, self.node.world, self.node.random
        state = node.ledger.book.state
        if state.committees.issuer == self.identity.public_key and random.random() < 0.6:
            left = world.genesis.max_supply - state.supply - self._granting()
            # who comes after another leaves room for what that one may have granted last
            room = left - GRANT_MAX * (len(state.committees.issuers) - 1)
            # a greedy issuer: its wallet refuses what exceeds the supply
            greedy = random.random() < 0.2
            amount = left + random.randint(1, 50) if greedy else min(room, random.randint(50, GRANT_MAX))
            return [Grant(world.anybody(random), amount)] if amount > 0 else []
        left = node.ledger.wallet.balance
        ops: list[Op] = []
        for _ in range(random.choice((1, 1, 1, 2, 3, 5))):
            if left < 2:
                break
            op = self._op(random.randint(1, max(1, left // 2)))
            left -= op.amount
            ops.append(op)
        return ops

    def _granting(self) -> int:
        """What a grant of one's own brings that is not final yet."""
        pending = self.node.ledger.wallet._pending
        entry = parse(pending).object if pending is not None else None
        return sum(op.amount for op in entry.ops if isinstance(op, Grant)) if isinstance(entry, Entry) else 0

    def _op(self, amount: int) -> Transfer | Open | TopUp:
        node, world, random = self.node, self.node.world, self.node.random
        own = [key for key, c in self.own_channels() if c.expiry_ms > node.now_ms()]
        kind = random.random()
        if kind < 0.15 and own:
            return TopUp(random.choice(own), amount)
        if kind < 0.65 and amount >= world.genesis.min_lock:
            signer = world.anybody(random)
            payout = signer if random.random() < 0.8 else world.anybody(random)
            life_ms = int(random.uniform(*world.plan.channel_s) * 1000)
            return Open(signer, payout, amount, node.now_ms() + life_ms)
        return Transfer(world.anybody(random), amount)

    def own_channels(self) -> list[tuple[bytes, ChannelState]]:
        """Open channels on which this person promises by hand."""
        state, me = self.node.ledger.book.state, self.identity.public_key
        late_ms = self.node.now_ms() + METERED_MS
        return sorted(
            (k, c)
            for k, c in state.channels.items()
            if c.payer == me and c.closed_at is None and c.expiry_ms < late_ms  # others are the metering's
        )

    async def _promise(self, node: "Node") -> None:
        """Vouchers on open channels, freezes and reclaims on expired ones."""
        random, world = node.random, node.world
        while True:
            await trio.sleep(random.uniform(0.5, 1.5))
            for key, channel in self.own_channels():
                if node.now_ms() > channel.expiry_ms + world.plan.grace_ms:
                    await self._reclaim(node, key, channel)
                elif world.busy and node.now_ms() < channel.expiry_ms and random.random() < 0.7:
                    await self._raise(node, key, channel)

    async def _raise(self, node: "Node", key: bytes, channel: ChannelState) -> None:
        before = self.promised.get(key)
        total = codec.decode(Voucher, before.body, bytes_max=4096).cumulative if before else 0
        total = min(channel.lock, total + node.random.randint(1, 1 + channel.lock // 3))
        voucher = Voucher(node.world.genesis.net, key, 0, total, bytes(32))
        self.promised[key] = sign(self.identity, voucher)
        worker = node.world.by_key.get(channel.signer)
        if worker is not None:
            header = {"voucher": codec.encode(self.promised[key])}
            try:
                await node.network.call(worker.peer_id, "sim.voucher", header, deadline_ms=500)
            except RiosError:
                return

    async def _reclaim(self, node: "Node", key: bytes, channel: ChannelState) -> None:
        try:
            freezes = await node.ledger.buyer._quorum.freezes(key, self.identity.public_key, self.promised.get(key))
            total = max(node.world.freeze_total(signed) for signed in freezes)
            await node.ledger.wallet.append([Reclaim(key, total, freezes)], timeout_s=APPEND_S)
            self.entries += 1
        except RiosError as error:
            node.world.log("reclaim", node.name, error.code, error.message[:60])

    # being paid

    async def _take(self, call: Call) -> Reply:
        signed = codec.decode(Signed, call.header["voucher"], bytes_max=8192)
        voucher = codec.decode(Voucher, signed.body, bytes_max=4096)
        channel = self.node.ledger.book.state.channels.get(voucher.channel)
        known = self.held.get(voucher.channel)
        in_time = channel is not None and self.node.now_ms() < channel.expiry_ms - self.node.world.plan.margin_ms
        if channel is None or not in_time or voucher.cumulative > channel.lock:
            return Reply({"taken": False})
        if known is None or voucher.cumulative > known.voucher.cumulative:
            self.held[voucher.channel] = Held(voucher, signed.signature, self.node.world.now_ms())
        return Reply({"taken": True})

    async def _settle(self, node: "Node") -> None:
        while True:
            await trio.sleep(node.random.uniform(0.7, 2.0))
            for key, held in sorted(self.held.items()):
                channel = node.ledger.book.state.channels.get(key)
                if channel is None or channel.closed_at is not None:
                    continue
                if held.voucher.cumulative < channel.paid + node.world.genesis.min_claim_step:
                    continue
                claim = Claim(channel.payer, channel.seq, channel.op_index, held.voucher, held.signature)
                try:
                    await node.ledger.buyer._quorum.certify(sign(self.identity, claim), timeout_s=CERTIFY_S)
                except RiosError as error:
                    node.world.log("claim", node.name, error.code)
