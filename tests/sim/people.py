"""Honest people: they pay, open channels, promise, claim and reclaim through the real wallet and quorum.

What a person promised and holds (vouchers) survives its node's crashes, as the tables of the metering do.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from config.errors import RiosError
from ledger.core.objects import Claim, Grant, Op, Open, Reclaim, Signed, TopUp, Transfer, Voucher, sign
from ledger.core.rules import ChannelState
from p2p.core import codec
from p2p.core.identity import Identity
from p2p.face import Call, Reply

if TYPE_CHECKING:
    from tests.sim.node import Node

APPEND_S = 4.0
CERTIFY_S = 3.0


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
    grants: bool = False
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
        if self.grants and random.random() < 0.6:
            left = world.genesis.max_supply - node.ledger.book.state.supply
            # a greedy issuer: its wallet refuses what exceeds the supply
            amount = left + random.randint(1, 50) if random.random() < 0.2 else min(left, random.randint(50, 400))
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

    def _op(self, amount: int) -> Transfer | Open | TopUp:
        node, world, random = self.node, self.node.world, self.node.random
        own = [key for key, c in self._own_channels() if c.expiry_ms > node.now_ms()]
        kind = random.random()
        if kind < 0.15 and own:
            return TopUp(random.choice(own), amount)
        if kind < 0.65 and amount >= world.genesis.min_lock:
            signer = world.anybody(random)
            payout = signer if random.random() < 0.8 else world.anybody(random)
            life_ms = int(random.uniform(*world.plan.channel_s) * 1000)
            return Open(signer, payout, amount, node.now_ms() + life_ms)
        return Transfer(world.anybody(random), amount)

    def _own_channels(self) -> list[tuple[bytes, ChannelState]]:
        state, me = self.node.ledger.book.state, self.identity.public_key
        return sorted((k, c) for k, c in state.channels.items() if c.payer == me and c.closed_at is None)

    async def _promise(self, node: "Node") -> None:
        """Vouchers on open channels, freezes and reclaims on expired ones."""
        random, world = node.random, node.world
        while True:
            await trio.sleep(random.uniform(0.5, 1.5))
            for key, channel in self._own_channels():
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
