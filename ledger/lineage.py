"""Whether this database is the newest of its node, and what must not be promised if it is not (rule 9).

Owns the comparison of the database with the mark outside it at every start, and what follows from a restoration, kept
in the database for good: the witness keys that may have forgotten promises, and that the wallet must ask before it
signs. A database without a history asks as well, unless nobody ever saw the account.
"""

from collections.abc import Iterable

import msgspec

from ledger.mark import INTACT, NEW, RESTORED, Mark
from ledger.records import Meta
from ledger.store import Store

_LINEAGE, _PROMISES, _FORGOTTEN, _UNSURE = "mark", "promises", "forgotten", "wallet_unsure"
FRESH, FOUND = b"fresh", b"restored"
UNSEEN = b""
"""Among keys: there may be others, whoever opens the database does not see them."""

_pack = msgspec.msgpack.Encoder().encode
_keys = msgspec.msgpack.Decoder(list[bytes]).decode


class Lineage:
    """The history of one database; ``keys`` are those that this node may have voted with so far, :data:`UNSEEN` among
    them if these may not be all.

    A key that may have forgotten something is silent in every epoch: an old copy does not know in which it sat. Keys
    that nobody saw when the loss was noticed are silent as well: the first start that sees them writes them down.
    """

    def __init__(self, store: Store, mark: Mark, keys: Iterable[bytes]) -> None:
        self._store = store
        self._mark = mark
        self._seen = frozenset(keys)
        kept = store.meta(_PROMISES)
        self._promises = int.from_bytes(kept, "big") if kept is not None else 0
        self._forgotten = set(_keys(store.meta(_FORGOTTEN) or _pack([])))
        self._unsure = store.meta(_UNSURE) or b""
        lineage, entries = store.meta(_LINEAGE), store.last_own()
        self.verdict = mark.open(lineage, self._promises, entries)
        records: list[Meta] = []
        if self.verdict == RESTORED:
            self._unsure = FOUND
        elif self.verdict == NEW and not entries:
            self._unsure = FRESH
        if self.verdict == RESTORED or UNSEEN in self._forgotten - self._seen:
            self._forgotten = (self._forgotten - {UNSEEN}) | self._seen
            records.append(Meta(_FORGOTTEN, _pack(sorted(self._forgotten))))
        mark.follow()  # first: a database that has a lineage has a mark, whenever the process dies
        if self.verdict != INTACT:
            records += [Meta(_LINEAGE, mark.lineage), Meta(_UNSURE, self._unsure)]
        if records:
            store.commit(records)
        if self.verdict != INTACT:
            mark.settle(self._promises, entries)

    # the witness

    def has_forgotten(self, key: bytes) -> bool:
        """Whether a witness may have given promises that this database does not know."""
        return key in self._forgotten or (UNSEEN in self._forgotten and key not in self._seen)

    def trust(self, key: bytes) -> Meta:
        """What to commit to take a witness for complete again; then :meth:`trusted`."""
        return Meta(_FORGOTTEN, _pack(sorted(self._forgotten - {key})))

    def trusted(self, key: bytes) -> None:
        """What :meth:`trust` gave is durable."""
        self._forgotten.discard(key)

    def promise(self) -> Meta:
        """What to commit with every batch, every freeze and every handover; then :meth:`promised`."""
        self._promises += 1
        return Meta(_PROMISES, self._promises.to_bytes(8, "big"))

    def promised(self, kept: Meta) -> None:
        """``kept``, which :meth:`promise` gave, is durable. Others may have been given since that are not yet: a mark
        that counts them makes an honest witness look restored after a crash."""
        self._mark.promised(int.from_bytes(kept.value, "big"))

    # the wallet

    @property
    def wallet_unsure(self) -> bytes:
        """Empty: the own chain is as it was left. :data:`FRESH`: no history; :data:`FOUND`: an older copy."""
        return FOUND if self._unsure.startswith(FOUND) else self._unsure

    @property
    def unsure_since(self) -> int | None:
        """The first epoch in which enough witnesses were asked since (``Recovery.began``)."""
        epoch = self._unsure.removeprefix(FOUND) if self._unsure.startswith(FOUND) else b""
        return int.from_bytes(epoch, "big") if epoch else None

    def unsure(self, why: bytes, since: int | None = None) -> Meta:
        """What to commit to change it; then :meth:`became`."""
        return Meta(_UNSURE, why + (since.to_bytes(4, "big") if why == FOUND and since is not None else b""))

    def became(self, kept: Meta) -> None:
        """What :meth:`unsure` gave is durable. Not before: a wallet that is sure only in memory signs, and its next
        start finds entries of a key that was never used."""
        self._unsure = kept.value

    def signed(self, seq: int) -> None:
        """The own entry ``seq`` is durable."""
        self._mark.signed(seq)

    def close(self) -> None:
        """Close the mark."""
        self._mark.close()
