"""A file that starts from a checkpoint opens again, whatever claims of channels closed below it still stand in it."""

import sqlite3

import msgspec
import pytest

from config.errors import LocalError
from ledger import pruning
from ledger.book import Book
from ledger.core import checkpoint
from ledger.core.checkpoint import Proof
from ledger.core.objects import Grant, Reclaim
from ledger.reading import state_of
from ledger.salvage import salvage
from ledger.store import Store
from ledger.verify import verify_file
from ledger.writer import Writer
from tests.unit.ledger.ledger_kit import START_MS, Maker


class Closed(Maker):
    """A network in which a channel was claimed on, then closed, and a checkpoint of that."""

    def __init__(self) -> None:
        super().__init__(min_lock=10, min_claim_step=1)
        self.entry(0, Grant(self.people[1].public_key, 100))
        self.channel = self.open(1, 2, 50, START_MS)
        self.claim(self.channel, 20)
        self.old_claim = self.finals[-1]
        freeze = self.witnesses[0].freeze(self.channel, START_MS + 1).signed
        self.entry(1, Reclaim(self.channel, 20, (freeze,)))
        pages = list(checkpoint.pages(self.state))
        summary = checkpoint.summarise(pages, self.state.committees, self.state.supply, self.state.applied)
        self.proof = Proof(summary, (self.witnesses[0].attest(summary),))
        self.pages = [msgspec.msgpack.encode(page) for page in pages]


@pytest.fixture
def made() -> Closed:
    return Closed()


def opened(made: Maker, path) -> Book:
    store = Store(path, made.genesis.net)
    return Book(made.genesis, store, Writer(store, in_thread=False), lambda: START_MS)


async def test_an_old_claim_that_came_before_the_checkpoint_does_not_stay(made, tmp_path):
    path = tmp_path / "l.db"
    book = opened(made, path)
    assert await book.learn([made.old_claim.certificate]), "its channel may come"
    await book.start_from([], made.proof, made.pages)
    assert book.state.digest() == made.state.digest()
    assert book.store.count("claims") == 0
    book.store.close()
    book = opened(made, path)
    assert book.state.digest() == made.state.digest()
    book.store.close()


def test_a_file_in_which_such_a_claim_stands_is_whole(made, tmp_path):
    path, saved = tmp_path / "l.db", tmp_path / "saved.db"
    store = Store(path, made.genesis.net)
    rows = store.shelf.keep(made.proof, made.pages)
    store.commit([made.old_claim, *rows, store.shelf.start_from(made.proof.summary.state_root)])
    assert state_of(store, made.genesis).digest() == made.state.digest()
    store.close()
    report = verify_file(path, made.genesis)
    assert (report.verified, report.claims) == (True, 1), report.problems
    salvage(path, saved, made.genesis)
    for each in (path, saved):
        book = opened(made, each)
        assert book.state.digest() == made.state.digest()
        book.store.close()


async def test_the_base_and_what_lies_below_it_change_together(made, tmp_path, monkeypatch):
    path = tmp_path / "l.db"
    book = opened(made, path)
    await book.learn(made.certificates)
    store = book.store
    store.commit(store.shelf.keep(made.proof, made.pages))
    rows = [store.count(table) for table in ("entries", "claims")]

    def full(writer: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    frontier = {key: account.seq for key, account in made.state.accounts.items()}
    base = store.shelf.start_from(made.proof.summary.state_root)
    monkeypatch.setattr(pruning, "_headers", full)
    with pytest.raises(LocalError):
        store.prune(base, [], frontier.items(), [])
    assert store.shelf.base() is None
    assert [store.count(table) for table in ("entries", "claims")] == rows
    monkeypatch.undo()
    store.prune(base, [], frontier.items(), [])
    assert store.shelf.base() == made.proof
    assert [store.count(table) for table in ("entries", "claims")] == [0, 0]
    store.close()
    book = opened(made, path)
    assert book.state.digest() == made.state.digest()
    book.store.close()
