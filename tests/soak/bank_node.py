"""A node of the bank test in a process of its own: the network and a ledger, told what to do line by line.

Not a test. One argument, a JSON object: ``folder``, ``p2p`` and ``ledger`` settings, ``clock`` (see :class:`Clock`),
``broken`` (a part of the product that is broken on purpose, :data:`BROKEN`). One JSON command a line on standard
input, each served in a task of its own, answers on standard output as they come, by ``id``. Ends when its standard
input closes.

Everything that is final here went through the product: wallet, quorum, metering, witness, replication. Nothing here
decides anything about credits.
"""

import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from config.errors import RemoteError, RiosError
from config.settings import LedgerSettings, P2pSettings
from ledger import records, store
from ledger.core import genesis as genesis_file
from ledger.core.objects import Entry, Grant, Item, Op, Open, TopUp, Transfer, channel_id
from ledger.ledger import Ledger, open_ledger
from p2p import keyfile
from p2p.core.identity import Identity, peer_id_of, public_key_of
from p2p.face import Call, Reply
from p2p.network import PeerNetwork, open_network

KFLOP_PER_CALL = 1_000_000
CALL_DEADLINE_MS = 5_000
BROKEN = {"votes": "Voted", "freezes": "Frozen", "wallet": "Own"}
"""What a broken build forgets to write: the record's name in ``ledger.records``."""


@dataclass(frozen=True)
class Quote:
    """What a call costs: 1000 microcredits."""

    number: int = 1
    microcredits_per_tflop: int = 1_000_000
    microcredits_per_kv_unit: int = 0


QUOTE = Quote()


@dataclass(frozen=True)
class Clock:
    """The ledger's clock: ``speed`` times as fast as the machine's since ``start_s`` (Unix time), off by ``skew_ms``.

    Channels live for hours; a test has minutes.
    """

    start_s: float
    speed: int
    skew_ms: int

    def now_ms(self) -> int:
        """Milliseconds, as the ledger counts them."""
        return int(self.start_s * 1000 + (time.time() - self.start_s) * 1000 * self.speed) + self.skew_ms


class Served:
    """The worker of this node: answers ``bank.work`` for whoever pays."""

    def __init__(self, network: PeerNetwork, ledger: Ledger) -> None:
        self._ledger = ledger
        self._number = 0
        network.serve("bank.work", self.work)

    async def work(self, call: Call) -> Reply:
        """One call, as a worker does it: admit, do, count."""
        channel = call.header["channel"]
        self._ledger.seller.admit(call.peer_id, channel, QUOTE)
        self._number += 1
        leaf = sha256(channel + os.getpid().to_bytes(8, "big") + self._number.to_bytes(8, "big")).digest()
        self._ledger.seller.served(call.peer_id, channel, QUOTE, KFLOP_PER_CALL, leaf)
        return Reply({"leaf": leaf})


class Node:
    """Does what it is told."""

    def __init__(self, network: PeerNetwork, p2p: P2pSettings, ledger: Ledger, clock: Clock) -> None:
        self.network = network
        self.p2p = p2p
        self.ledger = ledger
        self.clock = clock
        Served(network, ledger)

    async def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer to one command."""
        return await getattr(self, f"do_{command['op']}")(command)

    # clients

    async def do_entry(self, command: dict[str, Any]) -> dict[str, Any]:
        """Append one entry of these ops to the own chain."""
        ops = [self._op(*op) for op in command["ops"]]
        return _entry(await self.ledger.wallet.append(ops))

    def _op(self, kind: str, *fields: Any) -> Op:
        if kind == "open":
            signer, amount, life_ms = fields
            return Open(bytes.fromhex(signer), bytes.fromhex(signer), amount, self.clock.now_ms() + life_ms)
        kinds = {"grant": Grant, "transfer": Transfer, "topup": TopUp}
        return kinds[kind](bytes.fromhex(fields[0]), fields[1])

    async def do_work(self, command: dict[str, Any]) -> dict[str, Any]:
        """Pay a worker for some calls by vouchers; the channel is opened and topped up as needed."""
        worker, buyer = peer_id_of(bytes.fromhex(command["worker"])), self.ledger.buyer
        done = 0
        for _ in range(command["calls"]):
            channel = buyer.channel(worker) or await buyer.open_channel(worker)
            try:
                reply = await self._call(worker, channel)
            except RemoteError as error:
                if error.code != "payment_required":
                    raise
                channel = await buyer.open_channel(worker)  # shows the worker what was counted here
                reply = await self._call(worker, channel)
            buyer.used(worker, channel, QUOTE, KFLOP_PER_CALL, reply.header["leaf"])
            done += 1
        return {"calls": done}

    async def _call(self, worker: Any, channel: bytes) -> Reply:
        return await self.network.call(worker, "bank.work", {"channel": channel}, deadline_ms=CALL_DEADLINE_MS)

    async def do_settle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Claim what is promised on every channel; what each of them is paid by then."""
        claims = {}
        for line in self.ledger.seller.channels():
            key = bytes.fromhex(line["channel"])
            if await self.ledger.seller.settle(key):
                claims[key.hex()] = self.ledger.book.state.channels[key].paid
        return {"claims": claims}

    async def do_reclaim(self, command: dict[str, Any]) -> dict[str, Any]:
        """Take back what is left in expired channels."""
        return {"returned": await self.ledger.buyer.reclaim_expired()}

    # everybody

    async def do_read(self, command: dict[str, Any]) -> dict[str, Any]:
        """The state of this very moment, in full."""
        state = self.ledger.book.state
        accounts = {key.hex(): [a.seq, a.head.hex(), a.balance] for key, a in state.accounts.items()}
        channels = {
            key.hex(): [c.payer.hex(), c.signer.hex(), c.lock, c.paid, c.expiry_ms, c.closed_at]
            for key, c in state.channels.items()
            if c.closed_at is None
        }
        return {
            "accounts": accounts,
            "channels": channels,
            "closed": len(state.channels) - len(channels),
            "supply": state.supply,
            "entries": state.applied,
            "digest": state.digest().hex(),
            "broken": list(state.broken.values()),
            "waiting": state.waiting(),
            "pending": self.ledger.wallet.pending,
            "peers": len(self.network.peers()),
        }

    # the thief's: what anybody can send

    async def do_ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send one message to a peer; the bytes of its answer."""
        header = {name: bytes.fromhex(value) for name, value in command["header"].items()}
        buffers = [bytes.fromhex(value) for value in command.get("buffers", ())]
        peer = peer_id_of(bytes.fromhex(command["peer"]))
        async with self._network_of(command.get("seed", "")) as network:
            reply = await network.call(peer, command["method"], header, buffers, deadline_ms=CALL_DEADLINE_MS)
        return {name: value.hex() for name, value in reply.header.items() if isinstance(value, bytes)}

    @asynccontextmanager
    async def _network_of(self, seed: str) -> AsyncIterator[PeerNetwork]:
        """The own one, or for a moment that of somebody else on this host."""
        if not seed:
            yield self.network
            return
        elsewhere = replace(self.p2p, listen=(f"{self.p2p.listen[0].rsplit('/', 1)[0]}/0",))
        identity = Identity.from_seed(bytes.fromhex(seed))
        with TemporaryDirectory() as folder:
            async with open_network(identity, elsewhere, data_dir=Path(folder), version="bank") as network:
                yield network

    async def do_now(self, command: dict[str, Any]) -> dict[str, Any]:
        """The ledger's clock."""
        return {"now_ms": self.clock.now_ms()}


def _entry(item: Item) -> dict[str, Any]:
    entry = item.object
    assert isinstance(entry, Entry)
    opened = [channel_id(item.id, i).hex() for i, op in enumerate(entry.ops) if isinstance(op, Open)]
    return {"account": entry.account.hex(), "seq": entry.seq, "entry": item.id.hex(), "opened": opened}


def break_on_purpose(what: str) -> None:
    """Make this process a build that forgets to write one kind of record. The test must notice."""
    real, kind = store.Store.commit, getattr(records, BROKEN[what])

    def commit(self: store.Store, records: Sequence[records.Record]) -> None:
        real(self, [record for record in records if type(record) is not kind])

    store.Store.commit = commit  # type: ignore[method-assign]


async def serve(node: Node, nursery: trio.Nursery) -> None:
    """Commands until standard input closes."""

    async def answer(command: dict[str, Any]) -> None:
        try:
            told = {"ok": await node.do(command)}
        except RiosError as error:
            told = {"error": [error.code, error.message]}
        print(json.dumps({"id": command["id"], **told}), flush=True)

    line = b""
    async for part in trio.lowlevel.FdStream(os.dup(0)):
        *lines, line = (line + part).split(b"\n")
        for text in lines:
            nursery.start_soon(answer, json.loads(text))


async def main() -> None:
    """See the module."""
    logging.basicConfig(level=os.environ.get("BANK_LOG", "WARNING"))
    given = json.loads(sys.argv[1])
    if given["broken"]:
        break_on_purpose(given["broken"])
    folder, clock = Path(given["folder"]), Clock(**given["clock"])
    p2p = P2pSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given["p2p"].items()})
    identity = keyfile.load(folder / "key")
    genesis = genesis_file.from_json((folder.parent / "genesis.json").read_text())
    settings = LedgerSettings(**given["ledger"])
    async with open_network(identity, p2p, data_dir=folder, version="bank") as network, trio.open_nursery() as nursery:
        ledger = await open_ledger(
            network, identity, genesis, folder / "ledger.db", settings, nursery=nursery, now_ms=clock.now_ms
        )
        assert public_key_of(network.peer_id) == ledger.account
        print(json.dumps({"up": network.peer_id}), flush=True)
        await serve(Node(network, p2p, ledger, clock), nursery)
        await ledger.aclose()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
