"""News beside the ledger that prove themselves: where witnesses sit, who signed two entries for one slot.

Owns the table of seats in memory, seats and proofs on disk, their gossip (topic ``ledger.<net>.notes``) and their
anti-entropy (``ledger.notes``). Nothing here decides about money: a seat only says whom to ask, a proof only that its
account gets no new service. Which proofs are kept is said by ``offenders``.

Invariants: everything is verified before it is kept or passed on; tables are bounded (a seat for every witness known).
"""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256

import msgspec
import trio

from config.errors import IntegrityError, LocalError, RiosError
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core import equivocation
from ledger.core.errors import RuleError
from ledger.core.objects import SMALL_BYTES_MAX, Equivocation, Seat, Signed, open_signed
from ledger.offenders import PROOFS_MAX, Offenders
from ledger.promises import Seated
from ledger.records import Proof
from ledger.shelf import Rows
from p2p.core import codec
from p2p.core.identity import peer_id_of
from p2p.face import Call, Network, Reply

ANSWER_NOTES_MAX = 256
ANSWER_BYTES_MAX = 1 << 20
NOTE_BYTES_MAX = equivocation.PROOF_BYTES_MAX
GOSSIP_BYTES_MAX = 60 << 10
DEADLINE_MS = 10_000
SEAT, PROOF = 1, 2

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(tuple[int, bytes]).decode


class Notes:
    """Seats and proofs of one network."""

    def __init__(self, network: Network, book: Book, sync_seconds: float) -> None:
        self._network = network
        self._book = book
        self._sync_seconds = sync_seconds
        self._seats: dict[tuple[int, bytes], tuple[Signed, PeerId]] = {}
        self._offenders = Offenders(book)
        self._random = random.Random()
        self._send, self._outbox = trio.open_memory_channel[bytes](256)
        self.topic = f"ledger.{book.genesis.net.hex()}.notes"
        self.listeners: list[Callable[[bytes], None]] = []
        """Told the account of every new proof."""
        for signed in book.store.promises.seats():
            seat = codec.decode(Seat, signed.body, bytes_max=SMALL_BYTES_MAX)
            self._seats[seat.epoch, seat.witness] = signed, peer_id_of(seat.node)
        network.subscribe(self.topic, self._gossip)
        network.serve("ledger.notes", self._serve)

    # accessors

    def peer_of(self, epoch: int, witness: bytes) -> PeerId:
        """The node that holds a witness's key; a witness without a seat is taken to vote with its identity."""
        seat = self._seats.get((epoch, witness))
        return seat[1] if seat is not None else peer_id_of(witness)

    def witnesses(self, epoch: int) -> tuple[PeerId, ...]:
        """The nodes of a committee."""
        return tuple(self.peer_of(epoch, key) for key in self._book.state.committees.of(epoch).keys)

    @property
    def offenders(self) -> frozenset[bytes]:
        """Accounts that signed two entries for one slot."""
        return self._offenders.accounts()

    def proof_of(self, account: bytes) -> Equivocation | None:
        """The evidence against an account."""
        return self._offenders.proof_of(account)

    def is_offender(self, account: bytes) -> bool:
        """Whether an account gets no new service."""
        return account in self._offenders

    # taking in

    async def add_seat(self, signed: Signed, *, announce: bool = False) -> bool:
        """Keep a seat; whether it was new. Raises IntegrityError if it is not signed by a witness of its epoch."""
        seat = codec.decode(Seat, signed.body, bytes_max=SMALL_BYTES_MAX)
        committees = self._book.state.committees
        if seat.net != committees.net or seat.witness not in committees.of(seat.epoch).members:
            raise RuleError("seat", "a seat is not of a witness of this network")
        known = self._seats.get((seat.epoch, seat.witness))
        # a key on two nodes is against the rules; all nodes then follow the same one
        if known is not None and known[0].body >= signed.body:
            return False
        if open_signed(Seat, signed, seat.witness) is None:
            raise RuleError("signature", "a seat is not signed by its witness")
        self._seats[seat.epoch, seat.witness] = signed, peer_id_of(seat.node)
        await self._book.writer.commit([Seated(seat.epoch, seat.witness, signed)])
        if announce:
            self._announce(SEAT, codec.encode(signed))
        return True

    async def add_proof(self, proof: Equivocation, *, announce: bool = False) -> bool:
        """Keep a proof; False if its account is known to be an offender, or has nothing to pay with. Raises
        IntegrityError if it proves nothing."""
        if not self._offenders.matters(equivocation.account_of(proof)):
            return False  # before any signature: whoever has a key makes such proofs for nothing
        account, seq = equivocation.check_proof(self._book.genesis.net, proof)
        gone = self._offenders.keep(account, proof)
        if gone is None:
            return False
        await self._book.writer.commit([Proof(account, seq, proof.a, proof.b), _without(gone)])
        for listener in self.listeners:
            listener(account)
        if announce:
            self._announce(PROOF, equivocation.encode(proof))
        return True

    async def _learn(self, note: bytes) -> None:
        try:
            kind, data = _unpack(note)
        except msgspec.DecodeError as error:
            raise IntegrityError("integrity", f"malformed note: {error}") from error
        if kind == SEAT:
            await self.add_seat(codec.decode(Signed, data, bytes_max=SMALL_BYTES_MAX))
        elif kind == PROOF:
            await self.add_proof(equivocation.decode(data))

    # spreading

    def _announce(self, kind: int, data: bytes) -> None:
        note = _pack((kind, data))
        if len(note) <= GOSSIP_BYTES_MAX:
            try:
                self._send.send_nowait(note)
            except trio.WouldBlock:
                return  # the next rounds bring it

    async def _gossip(self, peer_id: PeerId, payload: bytes) -> None:
        try:
            await self._learn(payload)
        except IntegrityError:
            self._book.refused += 1

    def digest(self) -> bytes:
        """One hash over all notes."""
        total = sha256()
        for key in sorted(self._seats):
            total.update(self._seats[key][0].body)
        for account in self._offenders.that_matter():
            total.update(account)
        return total.digest()

    async def _serve(self, call: Call) -> Reply:
        if call.header.get("net") != self._book.genesis.net:
            raise RiosError("conflict", "this node belongs to another ledger network", "compare the genesis files")
        if call.header.get("digest") == self.digest():
            return Reply({"more": False})
        first = call.header.get("first", 0)
        if type(first) is not int or first < 0:
            raise RiosError("invalid_request", "'first' must be a number")
        keys: list[tuple[int, bytes] | bytes] = [*sorted(self._seats), *self._offenders.that_matter()]
        part: list[bytes] = []
        size = 0
        for key in keys[first : first + ANSWER_NOTES_MAX]:
            note = self._note(key)
            size += len(note)
            if part and size > ANSWER_BYTES_MAX:
                break
            part.append(note)
        return Reply({"more": first + len(part) < len(keys)}, part)

    def _note(self, key: tuple[int, bytes] | bytes) -> bytes:
        if isinstance(key, tuple):
            return _pack((SEAT, codec.encode(self._seats[key][0])))
        proof = self._offenders.proof_of(key)
        assert proof is not None
        return _pack((PROOF, equivocation.encode(proof)))

    async def sync_with(self, peer_id: PeerId) -> None:
        """Learn what a peer has. Raises RiosError when it fails."""
        first = 0
        while first <= PROOFS_MAX * 2:
            ask = {"net": self._book.genesis.net, "digest": self.digest(), "first": first}
            reply = await self._network.call(peer_id, "ledger.notes", ask, deadline_ms=DEADLINE_MS)
            await self._take([bytes(buffer) for buffer in reply.buffers[:ANSWER_NOTES_MAX]])
            first += len(reply.buffers)
            if not reply.buffers or reply.header.get("more") is not True:
                return

    async def _take(self, notes: Sequence[bytes]) -> None:
        for note in notes:
            try:
                await self._learn(note)
            except IntegrityError:
                self._book.refused += 1

    async def run(self) -> None:
        """Gossip and anti-entropy until cancelled."""
        if self._offenders.left_over:
            with suppress(LocalError):  # a full disk: at the next start
                await self._book.writer.commit([_without(self._offenders.left_over)])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_gossip)
            nursery.start_soon(self._run_sync)

    async def _run_gossip(self) -> None:
        async for note in self._outbox:
            await self._network.publish(self.topic, note)

    async def _run_sync(self) -> None:
        while True:
            await trio.sleep(self._sync_seconds * self._random.uniform(0.5, 1.5))
            peers = list(self._network.peers())
            if peers:
                try:
                    with trio.move_on_after(DEADLINE_MS / 1000):
                        await self.sync_with(self._random.choice(peers))
                except RiosError:
                    continue  # another peer, next time


def _without(accounts: Sequence[bytes]) -> Rows:
    return Rows("DELETE FROM proofs WHERE account = ?", [(account,) for account in accounts])
