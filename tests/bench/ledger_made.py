"""A generated ledger on disk, by the real core: grants, then transfers between random accounts, in batches of votes."""

import random
from pathlib import Path

from ledger.core.certificate import Certificate
from ledger.core.genesis import Genesis
from ledger.core.objects import Entry, Grant, Op, Transfer, parse, sign
from ledger.core.state import State
from ledger.core.witness import Witness
from ledger.records import Final
from ledger.store import Store
from p2p.core.identity import Identity

GRANT = 10**6
COMMIT = 1000
_OPS = 64


class Made:
    """A network of one witness whose ledger grows."""

    def __init__(self, accounts: int) -> None:
        self.issuer = Identity.from_seed(b"i" * 32)
        self.witness_key = Identity.from_seed(b"w" * 32)
        keys = (self.witness_key.public_key,)
        self.genesis = Genesis(issuer=self.issuer.public_key, root=self.issuer.public_key, witnesses=keys)
        self.people = [Identity.from_seed(n.to_bytes(32, "big")) for n in range(1, accounts + 1)]
        self.state = State(self.genesis)
        self._witness = Witness(self.witness_key, self.state)
        self._items: list[Final] = []
        self._rng = random.Random(5)
        self.stores: list[Store] = []
        """Where it goes; nothing is synced while it is generated."""

    def _final(self, who: Identity, ops: tuple[Op, ...]) -> None:
        account = self.state.account(who.public_key)
        item = parse(sign(who, Entry(self.genesis.net, who.public_key, account.seq + 1, account.head, ops)))
        self._witness.consider_entry(item)
        self.state.add(item)
        if self._witness.pending == 256:
            self._seal()

    def _seal(self) -> None:
        batch = self._witness.seal()
        if batch is not None:
            pairs = zip(batch.items, batch.votes, strict=True)
            self._items += [Final(item, Certificate(item.signed, 0, (vote,)), 1) for item, vote in pairs]
        if len(self._items) >= COMMIT:
            self._write()

    def _write(self) -> None:
        for store in self.stores:
            assert store._writer is not None
            store._writer.execute("PRAGMA synchronous = OFF")
            store.commit(self._items)
        self._items = []

    def _flush(self) -> None:
        self._seal()
        self._write()

    def found(self) -> int:
        """Grants for everybody; how many entries."""
        for start in range(0, len(self.people), _OPS):
            part = self.people[start : start + _OPS]
            self._final(self.issuer, tuple(Grant(p.public_key, GRANT) for p in part))
        self._flush()
        return self.state.applied

    def grow(self, entries: int) -> None:
        """So many transfers more, by random accounts."""
        for _ in range(entries):
            who, to = self._rng.choice(self.people), self._rng.choice(self.people)
            self._final(who, (Transfer(to.public_key, 1 + self._rng.randrange(5)),))
        self._flush()


def size_bytes(path: Path) -> int:
    """A database with its write-ahead log."""
    return sum(file.stat().st_size for file in (path, path.with_name(path.name + "-wal")) if file.exists())
