"""The node's own chain: one writer.

Invariants: an entry is durable before it is first sent; until it is final the same bytes are sent again, also after a
restart, and nothing else is signed for its slot, nor for one that is filled by a final entry which waits here. A wallet
that may have lost an entry asks first (``recovering``). What is spent is in the own state already (final credits), so
no honest witness can refuse an entry for ever; what a witness could not even read is refused before it is kept.
"""

from collections.abc import Sequence

import trio

from config.errors import IntegrityError, RemoteError, RequestError, RiosError
from ledger.book import Book
from ledger.core.errors import RuleError
from ledger.core.objects import Certificate, Entry, Item, Op, Open, Signed, TopUp, Transfer, parse, sign
from ledger.core.rules import check_entry, check_grants_now
from ledger.lineage import Lineage
from ledger.quorum import Quorum
from ledger.records import Own
from ledger.recovering import Recovering
from p2p.core.identity import Identity

RESEND_S = 5.0


class Wallet:
    """Appends entries to the chain of ``identity``."""

    def __init__(
        self, identity: Identity, book: Book, quorum: Quorum, lineage: Lineage, recovering: Recovering
    ) -> None:
        self._identity = identity
        self._lineage = lineage
        self._recovering = recovering
        self._book = book
        self._quorum = quorum
        self._lock = trio.Lock()
        self._pending: Signed | None = None
        self._last: Certificate | None = None
        self._later: list[Signed] = []
        """What was signed after :attr:`_pending`: its certificate was lost (a full disk) and must be had first."""
        for signed in book.store.wallet():
            entry = parse(signed).object
            assert isinstance(entry, Entry)
            if entry.seq > self._applied():
                self._later.append(signed)
        self._advance()

    def _advance(self) -> None:
        """Go on with the next unfinished entry."""
        self._pending = self._later.pop(0) if self._later else None

    def _applied(self) -> int:
        known = self._book.state.accounts.get(self._identity.public_key)
        return known.seq if known else 0

    @property
    def account(self) -> bytes:
        """The own account."""
        return self._identity.public_key

    @property
    def balance(self) -> int:
        """Free microcredits, less what an entry under way spends."""
        balance = self._book.state.balance(self.account)
        left = [] if self._pending is None else [self._pending, *self._later]
        entries = [entry for signed in left if isinstance(entry := parse(signed).object, Entry)]
        return balance - sum(op.amount for e in entries for op in e.ops if isinstance(op, Transfer | Open | TopUp))

    @property
    def pending(self) -> bool:
        """Whether an entry waits for its certificate."""
        return self._pending is not None

    async def append(self, ops: Sequence[Op], *, timeout_s: float = 10.0) -> Item:
        """Add one entry and wait until it is final.

        Raises RequestError when a rule forbids it (``payment_required`` for too little money; nothing was signed
        then), RemoteError ``unavailable`` when no quorum answers: the entry is kept and sent again.
        """
        async with self._lock:
            self._drop_overtaken()
            while self._pending is not None:
                await self._finish(timeout_s)
            self._next(ops)  # what is wrong in any case is said before anybody is asked
            while self._recovering.due:
                self._pending = await self._recovering.next_entry(timeout_s)
                if self._pending is not None:
                    await self._finish(timeout_s)
            self._check_slot()
            entry = self._next(ops)
            signed = sign(self._identity, entry)
            _check_form(signed)
            await self._book.writer.commit([Own(entry.seq, signed)])
            self._pending = signed  # first: a mark that cannot be written must not free the slot for another entry
            self._lineage.signed(entry.seq)
            await self._finish(timeout_s)
            return parse(signed)

    def _drop_overtaken(self) -> None:
        """An entry whose place is filled is not sent any more: it is final, or another one is."""
        while self._pending is not None:
            entry = parse(self._pending).object
            if not isinstance(entry, Entry) or entry.seq > self._applied():
                return
            self._advance()

    def preview(self, ops: Sequence[Op]) -> Entry:
        """The entry that :meth:`append` would sign for ``ops`` now: its id is what operators list beforehand.

        Raises RequestError when a rule forbids it, RemoteError ``unavailable`` where :meth:`append` would wait.
        """
        if self._pending is not None:
            raise RequestError("conflict", "an entry of this account is still under way", "wait until it is final")
        self._check_slot()
        return self._next(ops)

    def _check_slot(self) -> None:
        """Refuse a slot that is filled by an entry which cannot be applied yet."""
        if self._book.state.waiting_entries.get(self.account):
            raise RemoteError(
                "unavailable",
                "an entry of this account is final and waits for what it builds on",
                "try again once this node has caught up with its peers",
            )

    def _next(self, ops: Sequence[Op]) -> Entry:
        state = self._book.state
        known = state.account(self.account)
        entry = Entry(state.genesis.net, self.account, known.seq + 1, known.head, tuple(ops))
        try:
            check_entry(state.committees, state.accounts, state.channels, state.supply, entry)
            check_grants_now(state.committees, entry)
        except RuleError as error:
            codes = {"funds": "payment_required", "issuer": "forbidden", "root": "forbidden"}
            hint = "ask the network's issuer for a grant, or somebody for a transfer" if error.rule == "funds" else ""
            raise RequestError(codes.get(error.rule, "invalid_request"), error.message, hint) from error
        return entry

    async def _finish(self, timeout_s: float) -> None:
        assert self._pending is not None
        before = (self._last,) if self._last is not None else ()
        self._last = await self._quorum.certify(self._pending, before=before, timeout_s=timeout_s)
        self._advance()

    async def run(self) -> None:
        """Send an entry that was left over again and again until it is final."""
        while True:
            if self._pending is not None and not self._lock.locked():
                try:
                    async with self._lock:
                        self._drop_overtaken()
                        if self._pending is not None:
                            await self._finish(RESEND_S)
                except RiosError:
                    await trio.sleep(RESEND_S)  # no quorum now: the same bytes go out again
            await trio.sleep(1.0)


def _check_form(signed: Signed) -> None:
    """Refuse, before it is signed for good, what no witness could read: it would block the chain for ever."""
    try:
        parse(signed)
    except IntegrityError as error:
        raise RequestError("invalid_request", f"this entry cannot be written: {error.message}") from error
