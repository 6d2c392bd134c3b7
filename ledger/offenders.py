"""The accounts that signed two entries for one slot, with the proofs.

Owns the table of proofs in memory (``notes`` checks, writes and spreads them) and its bounds. All that a proof does is
to deny its account new service, so only those of accounts with something to pay with matter: keys cost nothing, money
does. Whatever else is offered is not kept. Nothing is lost by that: when such an account gets money, whoever kept the
proof (the witness that saw the two entries, at least) offers it again with the next round of notes.

Invariants: one proof per account, at most :data:`PROOFS_MAX` and :data:`PROOFS_BYTES_MAX`. When there is no room, those
go that have the least money for their bytes: to push out the proof of an account takes more money than it has.
"""

from collections.abc import Iterator

from ledger.book import Book
from ledger.core.objects import AMOUNT_MAX, Certificate, Entry, Equivocation, Item, Open, channel_id

PROOFS_MAX = 10_000
PROOFS_BYTES_MAX = 16 << 20


class Offenders:
    """The proofs that are kept."""

    def __init__(self, book: Book) -> None:
        self._state = book.state
        self._proofs: dict[bytes, Equivocation] = {}
        self._bytes = 0
        self._opened: dict[bytes, set[bytes]] = {}
        """Payer -> its channels, as far as they are not known to be closed."""
        self._find_channels()
        self.left_over = self._load({account: proof for account, _, proof in book.store.promises.proofs()})
        """Accounts whose proofs on the disk are over the bounds."""
        book.listeners.append(self._on_final)
        book.replaced.append(self._find_channels)

    def __contains__(self, account: object) -> bool:
        return account in self._proofs

    def accounts(self) -> frozenset[bytes]:
        """All of them."""
        return frozenset(self._proofs)

    def proof_of(self, account: bytes) -> Equivocation | None:
        """The evidence against an account."""
        return self._proofs.get(account)

    def that_matter(self) -> list[bytes]:
        """Those that others want to know of as well, in order: where the states agree, these do."""
        return [account for account in sorted(self._proofs) if self.matters(account)]

    # what an account has

    def _find_channels(self) -> None:
        self._opened = {}
        for key, channel in self._state.channels.items():
            if channel.closed_at is None:
                self._opened.setdefault(channel.payer, set()).add(key)
        for waiting in self._state.waiting_entries.values():
            for item in waiting.values():
                self._note_channels(item)

    def _on_final(self, item: Item, _certificate: Certificate) -> None:
        self._note_channels(item)

    def _note_channels(self, item: Item) -> None:
        if isinstance(item.object, Entry):
            for index, op in enumerate(item.object.ops):
                if isinstance(op, Open):
                    self._opened.setdefault(item.object.account, set()).add(channel_id(item.id, index))

    def _locks(self, account: bytes) -> Iterator[int]:
        keys = self._opened.get(account, set())
        for key in tuple(keys):
            channel = self._state.channels.get(key)
            if channel is not None and channel.closed_at is not None:
                keys.discard(key)
            elif channel is not None:
                yield channel.lock

    def matters(self, account: bytes) -> bool:
        """Whether an account has money, or pays in an open channel; root and issuers need none."""
        return self._decides(account) or self._state.balance(account) > 0 or any(self._locks(account))

    def _decides(self, account: bytes) -> bool:
        return account == self._state.genesis.root or account in self._state.committees.issuers

    def _worth(self, account: bytes, proof: Equivocation) -> float:
        stake = AMOUNT_MAX if self._decides(account) else self._state.balance(account) + sum(self._locks(account))
        return stake / _size(proof)

    # keeping

    def keep(self, account: bytes, proof: Equivocation) -> list[bytes] | None:
        """Keep a proof that was checked: the accounts whose proofs went for it, or None if it is kept already, does not
        matter, or finds no room."""
        if account in self._proofs or not self.matters(account):
            return None
        gone = self._room_for(proof, self._worth(account, proof))
        if gone is not None:
            for other in gone:
                self._bytes -= _size(self._proofs.pop(other))
            self._add(account, proof)
        return gone

    def _room_for(self, proof: Equivocation, worth: float) -> list[bytes] | None:
        count, size = len(self._proofs) + 1, self._bytes + _size(proof)
        gone: list[bytes] = []
        if count <= PROOFS_MAX and size <= PROOFS_BYTES_MAX:
            return gone
        for other_worth, other in sorted((self._worth(other, kept), other) for other, kept in self._proofs.items()):
            if other_worth >= worth:
                return None
            gone.append(other)
            count, size = count - 1, size - _size(self._proofs[other])
            if count <= PROOFS_MAX and size <= PROOFS_BYTES_MAX:
                return gone
        return None

    def _add(self, account: bytes, proof: Equivocation) -> None:
        self._proofs[account] = proof
        self._bytes += _size(proof)

    def _load(self, proofs: dict[bytes, Equivocation]) -> list[bytes]:
        over = []
        for account in sorted(proofs, key=lambda account: self._worth(account, proofs[account]), reverse=True):
            proof = proofs[account]
            if len(self._proofs) < PROOFS_MAX and self._bytes + _size(proof) <= PROOFS_BYTES_MAX:
                self._add(account, proof)
            else:
                over.append(account)
        return over


def _size(proof: Equivocation) -> int:
    return len(proof.a.body) + len(proof.b.body)
