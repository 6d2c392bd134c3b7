"""One simulated node: the real ``ledger.ledger.Ledger`` on a simulated disk and wire, which dies and starts again."""

from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from config.errors import LocalError
from config.settings import LedgerSettings
from ledger.core.objects import SMALL_BYTES_MAX, Freeze, Signed, Vote, parse
from ledger.keys import EpochKeys
from ledger.ledger import Ledger
from ledger.promises import Listed
from ledger.records import Final, Record
from ledger.voting import read_signed
from p2p.core import codec
from p2p.core.identity import Identity
from p2p.face import Call, Reply
from tests.sim.disk import Crash, Disk
from tests.sim.metering import settings
from tests.sim.network import Box, SimNetwork, handle

if TYPE_CHECKING:
    from tests.sim.world import World

SYNC_SECONDS = 3

Task = Callable[["Node"], Awaitable[None]]


class SimKeys(EpochKeys):
    """The keys a node may vote with. An erased one is gone for good, whatever the disk says."""

    def __init__(self, identity: Identity, keys: list[Identity]) -> None:
        super().__init__(identity)
        self._keys = {key.public_key: key for key in keys}
        self._erased: set[bytes] = set()

    def epoch_keys(self) -> set[bytes]:
        """Those that are not erased."""
        return {*self._keys}

    def find(self, key: bytes) -> Identity | None:
        """The private key."""
        return self._identity if key == self._identity.public_key else self._keys.get(key)

    def erase(self, key: bytes) -> None:
        """Forget a key."""
        self._keys.pop(key, None)


class Node:
    """A peer. ``tasks`` are its people; a liar replaces handlers of its network once it is up."""

    def __init__(self, world: "World", name: str, identity: Identity, *, witness: bool) -> None:
        self.world = world
        self.name = name
        self.identity = identity
        self.peer_id = identity.peer_id
        self.witness = witness
        self.liar = False
        self.crooked = False
        self.random = Random(f"{world.seed}/{name}")
        self.disk = Disk(world.genesis.net, world.folder, name)
        self.disk.fault = self._fault
        self.disk.wrote = self._wrote
        self.skew_ms = self.random.randint(-world.plan.skew_ms, world.plan.skew_ms)
        self.tasks: list[Task] = []
        self.on_start: list[Callable[[Node], None]] = []
        self.up = False
        self.backup_due = False
        """Whether the next start finds an older copy of the database."""
        self.image = b""
        self.given: dict[tuple[bytes, int], int] = {}
        self.keys = SimKeys(identity, world.epoch_identities(self))
        self.starts = 0
        self.ledger: Ledger = None  # type: ignore[assignment] # made by every start
        self.network = SimNetwork(world, self, identity)
        self.nursery: trio.Nursery = None  # type: ignore[assignment]

    # life

    def now_ms(self) -> int:
        """The node's own clock."""
        return self.world.now_ms() + self.skew_ms

    def _start(self) -> None:
        self.starts += 1
        self.network = SimNetwork(self.world, self, self.identity)
        self.ledger = Ledger(
            self.network,  # type: ignore[arg-type] # the part of the port that the ledger uses
            self.identity,
            self.world.genesis,
            self.name,
            LedgerSettings(witness=self.witness and not self.liar, sync_seconds=SYNC_SECONDS, **settings(self.world)),
            payout=None,
            in_thread=False,
            now_ms=self.now_ms,
            epoch_keys=self.keys,
        )
        seats = self.ledger.seats
        offers = self.ledger.checkpoints._offers
        for part in (self.ledger.replicator, self.ledger.notes, seats, seats._collecting, offers):
            part._random = Random(f"{self.world.seed}/{self.name}/{self.starts}")
        for change in self.on_start:
            change(self)

    async def live(self) -> None:
        """Run, die, stay down for a while, run again."""
        while True:
            try:
                async with trio.open_nursery() as nursery:
                    self.nursery = nursery
                    self._start()
                    self.up = True
                    self.world.log("up", self.name)
                    nursery.start_soon(self.ledger._run)
                    for task in self.tasks:
                        nursery.start_soon(task, self)
                    await trio.sleep_forever()
            except* Crash:
                pass
            except* LocalError as errors:  # the daemon ends with an error and is started again
                self.world.log("ended", self.name, len(errors.exceptions))
            self.up = False
            self.world.log("down", self.name)
            await trio.sleep(self.random.uniform(0.05, 2.5) if self.world.chaos else 0.05)
            if self.backup_due:
                self.backup_due = False
                self.world.faults.restored(self)

    def crash(self) -> None:
        """Die at whatever point every task has reached."""
        if self.up:
            self.up = False
            self.disk.current = None
            self.nursery.cancel_scope.cancel()

    # requests

    def agree(self, change: bytes) -> None:
        """The operator lists a change of the committee."""
        if self.up and change not in self.ledger.book.store.promises.listed():
            self.nursery.start_soon(self._agree, change)

    async def _agree(self, change: bytes) -> None:
        try:
            await self.ledger.book.writer.commit([Listed(change)])
        except LocalError:
            return  # the operator tries again
        for witness in self.ledger.seats._seats.values():
            witness.listed.add(change)

    def serve(self, call: Call) -> Box:
        """Answer a call in this process; if it dies, so does the answer."""
        box = Box()
        handler = self.network.handlers.get(call.method)
        if handler is None:
            box.done.set()
        else:
            self.nursery.start_soon(handle, self, handler, call, box)
        return box

    def released(self, call: Call, reply: Reply) -> None:
        """An answer leaves: from here on everybody may know it."""
        if self.liar:
            return
        vote, freeze = reply.header.get("vote"), reply.header.get("freeze")
        checker = self.world.checker
        if isinstance(vote, bytes):
            item = parse(read_signed(call.header["object"]))
            self.world.log("vote", self.name, item.id.hex()[:8])
            checker.vote(item, codec.decode(Vote, vote, bytes_max=SMALL_BYTES_MAX * 2))
        elif isinstance(freeze, bytes):
            signed = codec.decode(Signed, freeze, bytes_max=SMALL_BYTES_MAX * 2)
            body = codec.decode(Freeze, signed.body, bytes_max=SMALL_BYTES_MAX)
            self.world.log("freeze", self.name, body.channel.hex()[:8], body.total)
            checker.freeze(signed, self.now_ms())
        elif call.method == "ledger.receipt":
            checker.promised(self.identity.public_key, read_signed(reply.header["voucher"]))
        elif call.method == "ledger.handover" and reply.buffers:
            signed = Signed(bytes(reply.buffers[0]), reply.header["signature"])
            checker.handover(signed)

    # the disk

    def _fault(self, records: Sequence[Record]) -> tuple[str, int] | None:
        plan = self.world.plan
        if not self.world.chaos or self.random.random() >= plan.commit_crash:
            return None
        place = self.random.choice(("before", "middle", "after", "after", "full", "full"))
        self.world.log("disk" if place == "full" else "crash", self.name, place)
        self.up = place == "full"
        return place, self.random.randrange(4)

    def _wrote(self, records: Sequence[Record]) -> None:
        for record in records:
            if isinstance(record, Final):
                self.world.log("final", self.name, record.item.id.hex()[:8])
                self.world.checker.accepted(record.item, record.certificate)
        if self.up and not self.liar:
            self.ledger.book.state.check_invariants()

    def __repr__(self) -> str:
        return self.name


def facts(node: Node) -> dict[str, Any]:
    """What is worth knowing of a node when something is wrong."""
    state = node.ledger.book.state
    return {
        "node": node.name,
        "up": node.up,
        "pending": node.ledger.wallet.pending,
        "waiting": state.waiting(),
        "broken": list(state.broken.values()),
        "digest": state.digest().hex()[:12],
        "applied": state.applied,
    }
