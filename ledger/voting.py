"""Votes and freezes on the network: answers ``ledger.submit``, ``ledger.freeze``, ``ledger.next``.

Nothing leaves before it is durable. Requests that come in while a batch is being written share the next one. Which
witness answers is said by ``seats``; one that stops takes the votes that wait with it.
"""

import trio

from config.errors import IntegrityError, RiosError
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core.errors import RuleError
from ledger.core.objects import (
    CERTIFICATE_BYTES_MAX,
    Certificate,
    Entry,
    Equivocation,
    Item,
    Signed,
    Vote,
    Voucher,
    parse,
)
from ledger.core.rules import check_voucher_signature
from ledger.core.witness import Witness
from ledger.lineage import Lineage
from ledger.notes import Notes
from ledger.promises import Kept, chain_key
from ledger.records import Frozen, Meta, Record, Voted
from ledger.seats import Seats
from p2p.core import codec
from p2p.core.identity import peer_id_of
from p2p.face import Call, Network, Reply

BEFORE_MAX = 64


class Voting:
    """Serves the votes of this node's witnesses."""

    def __init__(self, network: Network, book: Book, seats: Seats, notes: Notes, lineage: Lineage) -> None:
        self._book = book
        self._seats = seats
        self._notes = notes
        self._lineage = lineage
        self._waiting: dict[bytes, _Pending] = {}
        self._lock = trio.Lock()
        self.votes = 0
        network.serve("ledger.submit", self._submit)
        network.serve("ledger.freeze", self._freeze)
        network.serve("ledger.next", self._next)

    @property
    def witness(self) -> Witness | None:
        """The witness of the newest epoch, if this node is one."""
        return self._seats.witness

    async def _submit(self, call: Call) -> Reply:
        before = call.header.get("before", [])
        if before:
            await self._book.learn(read_certificates(before))
        item = parse(read_signed(call.header.get("object")))
        final = self._final(item)
        if final is not None:
            return Reply({"certificate": certificates.encode(final)})
        vote = await self.vote(item)
        return Reply({"vote": codec.encode(vote)})

    def _final(self, item: Item) -> Certificate | None:
        """The certificate that already fills an entry's slot."""
        body = item.object
        if isinstance(body, Entry) and body.net == self._book.genesis.net:
            known = self._book.state.accounts.get(body.account)
            if known is not None and body.seq <= known.seq:
                return self._book.store.entry_certificate(body.account, body.seq)
        return None

    async def vote(self, item: Item) -> Vote:
        """A durable vote.

        Raises :class:`RuleError` when a rule forbids it.
        """
        body, witness = item.object, self._seats.present()
        try:
            if isinstance(body, Entry):
                witness.consider_entry(item)
            else:
                witness.consider_claim(item)
        except RuleError as error:
            await self._keep_evidence(witness, item, error)
            raise
        pending = self._waiting.setdefault(item.id, _Pending())
        with trio.CancelScope(shield=True):
            async with self._lock:
                while not pending.done:
                    await self._seal(witness)
        if pending.vote is None:
            assert pending.error is not None
            raise pending.error
        return pending.vote

    async def _keep_evidence(self, witness: Witness, item: Item, error: RuleError) -> None:
        """What a refusal teaches: a second entry in a slot, a voucher that a later freeze must honour."""
        body = item.object
        if error.rule in ("equivocation", "locked") and isinstance(body, Entry):
            proof = witness.proofs.pop((body.account, body.seq), None)  # if it cannot be kept, the next refusal has it
            if proof is not None:
                await self._notes.add_proof(Equivocation(*proof), announce=True)
        await self._commit(witness)

    async def _commit(self, witness: Witness, *records: Record) -> None:
        """Write these and the vouchers that were shown; what found no room goes with the next ones."""
        shown = witness.take_shown()
        try:
            await self._book.writer.commit([*records, *map(Kept, shown)])
        except BaseException:
            witness.put_back(shown)
            raise

    async def _seal(self, witness: Witness) -> None:
        batch = witness.seal()
        if batch is None:  # the witness stopped meanwhile
            stopped = RuleError("epoch", f"epoch {witness.epoch} ended before the vote was signed", wait=True)
            for item_id in list(self._waiting):
                self._settle(item_id, None, stopped)
            return
        records: list[Record] = [Voted(item, witness.epoch) for item in batch.items]
        records.append(Meta(chain_key(witness.epoch), batch.batch_no.to_bytes(8, "big") + batch.head))
        promise = self._lineage.promise()
        records.append(promise)
        error: RiosError | None = None
        try:
            await self._book.writer.commit(records)
            self._lineage.promised(promise)
            self.votes += len(batch.items)
        except RiosError as failure:
            error = failure
        for item, vote in zip(batch.items, batch.votes, strict=True):
            self._settle(item.id, None if error else vote, error)

    def _settle(self, item_id: bytes, vote: Vote | None, error: RiosError | None) -> None:
        pending = self._waiting.pop(item_id, None)
        if pending is not None:
            pending.done, pending.error, pending.vote = True, error, vote

    async def _freeze(self, call: Call) -> Reply:
        channel = call.header.get("channel")
        if not isinstance(channel, bytes) or len(channel) != 32:
            raise RiosError("invalid_request", "'channel' must be 32 bytes")
        witness = self._seats.present()
        known = self._book.state.channels.get(channel)
        if known is not None and peer_id_of(known.payer) != call.peer_id:
            # a freeze never changes: who asks before the payer has shown its newest voucher takes it from the payee
            raise RiosError("forbidden", "only its payer has a channel frozen")
        shown = call.header.get("voucher")
        if shown is not None and known is not None:
            signed = read_signed(shown)
            voucher = codec.decode(Voucher, signed.body, bytes_max=4096)
            check_voucher_signature(known, voucher, signed.signature)
            if voucher.channel != channel or voucher.net != self._book.genesis.net or voucher.cumulative > known.lock:
                raise RuleError("voucher", "the voucher shown does not fit the channel")
            witness.record_voucher(voucher, signed.signature)
        frozen = witness.freeze(channel, self._book.now_ms())
        promise = self._lineage.promise()
        await self._commit(witness, Frozen(channel, frozen.signed, witness.epoch), promise)
        self._lineage.promised(promise)
        return Reply({"freeze": codec.encode(frozen.signed)})

    async def _next(self, call: Call) -> Reply:
        """What a restored wallet must complete (rule 9)."""
        account, seq = call.header.get("account"), call.header.get("seq")
        if not isinstance(account, bytes) or len(account) != 32 or type(seq) is not int:
            raise RiosError("invalid_request", "'account' (32 bytes) and 'seq' are needed")
        witness = self._seats.present()
        signed = witness.next_of(account, seq)
        known = self._book.state.accounts.get(account)
        answer = {"epoch": witness.epoch, "head": known.seq if known is not None else 0}
        return Reply(answer | ({"entry": codec.encode(signed)} if signed is not None else {}))


class _Pending:
    __slots__ = ("done", "error", "vote")

    def __init__(self) -> None:
        self.done = False
        self.error: RiosError | None = None
        self.vote: Vote | None = None


def read_signed(data: object) -> Signed:
    """A signed object out of a header.

    Raises :class:`IntegrityError`.
    """
    if not isinstance(data, bytes):
        raise IntegrityError("integrity", "a signed object is missing from the message")
    return codec.decode(Signed, data, bytes_max=CERTIFICATE_BYTES_MAX)


def read_certificates(parts: object) -> list[Certificate]:
    """Certificates out of a header's list.

    Raises :class:`RiosError` ``invalid_request`` or :class:`IntegrityError`.
    """
    if not isinstance(parts, list) or len(parts) > BEFORE_MAX or not all(isinstance(part, bytes) for part in parts):
        raise RiosError("invalid_request", f"a list of at most {BEFORE_MAX} certificates is needed")
    return [certificates.decode(part) for part in parts]
