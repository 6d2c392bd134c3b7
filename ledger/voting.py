"""A witness on the network: answers ``ledger.submit`` with a vote and ``ledger.freeze`` with a freeze.

Nothing leaves before it is durable. Requests that come in while a batch is being written share the next one.
"""

import trio

from config.errors import IntegrityError, RiosError
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core.errors import RuleError
from ledger.core.objects import (
    CERTIFICATE_BYTES_MAX,
    Certificate,
    Claim,
    Entry,
    Item,
    Signed,
    Vote,
    Voucher,
    parse,
)
from ledger.core.rules import check_voucher_signature
from ledger.core.witness import Witness
from ledger.store import Frozen, Meta, Proof, Record, Voted
from p2p.core import codec
from p2p.face import Call, Network, Reply

BEFORE_MAX = 64
_CHAIN = "witness_chain"


class Voting:
    """Serves the votes of this node's witness."""

    def __init__(self, network: Network, book: Book) -> None:
        self._book = book
        self.witness = Witness(network.identity, book.state)
        self._waiting: dict[bytes, _Pending] = {}
        self._lock = trio.Lock()
        self.votes = 0
        self._restore()
        book.listeners.append(self._on_final)
        network.serve("ledger.submit", self._submit)
        network.serve("ledger.freeze", self._freeze)

    def _restore(self) -> None:
        store, witness = self._book.store, self.witness
        for item in store.voted():
            if isinstance(item.object, Entry):
                witness.restore_entry_vote(item)
            else:
                witness.saw_voucher(item.object.voucher, item.object.voucher_signature)
        for item in store.items():
            self._saw(item)
        for signed in store.freezes():
            witness.restore_freeze(signed)
        chain = store.meta(_CHAIN)
        if chain is not None:
            witness.restore_chain(int.from_bytes(chain[:8], "big"), chain[8:])
        witness.forget_final()

    def _saw(self, item: Item) -> None:
        if isinstance(item.object, Claim):
            self.witness.saw_voucher(item.object.voucher, item.object.voucher_signature)

    def _on_final(self, item: Item, certificate: Certificate) -> None:
        self._saw(item)
        self.witness.forget_slot(item)

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
        body = item.object
        try:
            if isinstance(body, Entry):
                self.witness.consider_entry(item)
            else:
                self.witness.consider_claim(item)
        except RuleError as error:
            if error.rule == "equivocation" and isinstance(body, Entry):
                a, b = self.witness.proofs[body.account, body.seq]
                await self._book.writer.commit([Proof(body.account, body.seq, a, b)])
            raise
        pending = self._waiting.setdefault(item.id, _Pending())
        with trio.CancelScope(shield=True):
            async with self._lock:
                while not pending.done:
                    await self._seal()
        if pending.vote is None:
            assert pending.error is not None
            raise pending.error
        return pending.vote

    async def _seal(self) -> None:
        batch = self.witness.seal()
        assert batch is not None, "somebody waits for a vote that nobody promised"
        records: list[Record] = [Voted(item) for item in batch.items]
        records.append(Meta(_CHAIN, batch.batch_no.to_bytes(8, "big") + batch.head))
        error: RiosError | None = None
        try:
            await self._book.writer.commit(records)
            self.votes += len(batch.items)
        except RiosError as failure:
            error = failure
        for item, vote in zip(batch.items, batch.votes, strict=True):
            pending = self._waiting.pop(item.id, None)
            if pending is not None:
                pending.done, pending.error, pending.vote = True, error, None if error else vote

    async def _freeze(self, call: Call) -> Reply:
        channel = call.header.get("channel")
        if not isinstance(channel, bytes) or len(channel) != 32:
            raise RiosError("invalid_request", "'channel' must be 32 bytes")
        known = self._book.state.channels.get(channel)
        shown = call.header.get("voucher")
        if shown is not None and known is not None:
            signed = read_signed(shown)
            voucher = codec.decode(Voucher, signed.body, bytes_max=4096)
            check_voucher_signature(known, voucher, signed.signature)
            if voucher.channel != channel or voucher.net != self._book.genesis.net or voucher.cumulative > known.lock:
                raise RuleError("voucher", "the voucher shown does not fit the channel")
            self.witness.saw_voucher(voucher, signed.signature)
        frozen = self.witness.freeze(channel, self._book.now_ms())
        await self._book.writer.commit([Frozen(channel, frozen.signed)])
        return Reply({"freeze": codec.encode(frozen.signed)})


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
