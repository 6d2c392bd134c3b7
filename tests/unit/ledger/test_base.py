"""A file that starts from a checkpoint opens again, whatever claims of channels closed below it still stand in it."""

import sqlite3

import msgspec
import pytest
import trio
import trio.testing

from config.errors import LocalError
from ledger import pruning
from ledger.book import Book
from ledger.core import checkpoint
from ledger.core.checkpoint import Proof
from ledger.core.errors import RuleError
from ledger.core.objects import Entry, Grant, Issuer, Item, Reclaim, Transfer, id_of
from ledger.core.sync import Digests
from ledger.reading import state_of
from ledger.salvage import salvage
from ledger.shelf import Rows
from ledger.store import Store
from ledger.verify import verify_file
from ledger.writer import Writer
from tests.unit.ledger.ledger_kit import START_MS, Maker


def proof_of(made: Maker) -> tuple[Proof, list[bytes]]:
    """A checkpoint of now, and its pages as they travel."""
    pages = list(checkpoint.pages(made.state))
    summary = checkpoint.summarise(pages, made.state.committees, made.state.supply, made.state.applied)
    return Proof(summary, (made.witnesses[0].attest(summary),)), [msgspec.msgpack.encode(page) for page in pages]


def change_issuer(made: Maker) -> Item:
    root, op = made.people[0].public_key, Issuer(made.people[2].public_key)
    known = made.state.account(root)
    made.witnesses[0].listed.add(id_of(Entry(made.genesis.net, root, known.seq + 1, known.head, (op,))))
    return made.entry(0, op)


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
        self.proof, self.pages = proof_of(self)


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


async def test_what_a_full_disk_keeps_of_it_goes_later(made, tmp_path, monkeypatch):
    book = opened(made, tmp_path / "l.db")
    digests, commit, full = Digests(book.state), book.writer.commit, True
    book.replaced.append(digests.rebuild)
    await book.learn([made.old_claim.certificate])

    async def refused(records):
        if full and any(isinstance(record, Rows) and "claims" in record.sql for record in records):
            raise LocalError("disk_full", "no room")
        await commit(records)

    monkeypatch.setattr(book.writer, "commit", refused)
    await book.start_from([], made.proof, made.pages)
    assert digests.buckets() == Digests(made.state).buckets(), "the state is another one, so everybody is told"
    await book.retry()
    assert book.store.count("claims") == 1
    full = False
    await book.retry()
    assert book.store.count("claims") == 0
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


# a book that has something already


class Gone(Maker):
    """A checkpoint; of what lies below it the book misses something, and it has something above it."""

    def __init__(self) -> None:
        super().__init__(min_lock=10, min_claim_step=1)
        me, other = (person.public_key for person in self.people[1:3])
        self.entry(0, Grant(me, 100), Grant(other, 100))
        self.channel = self.open(2, 1, 50, START_MS)
        self.open_one = self.open(2, 1, 20, START_MS)
        self.claim(self.open_one, 5)
        self.entry(1, Transfer(other, 5))
        self.known = list(self.certificates)
        freeze = self.witnesses[0].freeze(self.channel, START_MS + 1).signed
        self.entry(2, Reclaim(self.channel, 0, (freeze,)))
        self.proof, self.pages = proof_of(self)
        below = len(self.certificates)
        self.entry(1, Transfer(other, 7))
        self.claim(self.open_one, 9)
        self.above = self.certificates[below:]


async def test_what_is_known_above_a_checkpoint_stays_known(tmp_path):
    made, path = Gone(), tmp_path / "l.db"
    book = opened(made, path)
    await book.learn([*made.known, *made.above])
    held = book.state.channels[made.channel]
    await book.start_from([], made.proof, made.pages)
    assert book.state.digest() == made.state.digest()
    book.state.check_invariants()
    assert held.closed_at is not None, "whoever holds the channel finds it closed"
    book.store.close()
    book = opened(made, path)
    assert book.state.digest() == made.state.digest()
    book.store.close()
    report = verify_file(path, made.genesis)
    assert report.verified, report.problems


@pytest.mark.parametrize("first", ["the checkpoint", "what comes"])
async def test_what_comes_while_the_state_is_replaced_is_not_lost(tmp_path, monkeypatch, first):
    made = Gone()
    book = opened(made, tmp_path / "l.db")
    await book.learn(made.known)
    commit = book.writer.commit

    async def slow(records):
        await trio.sleep(0.01 if any(isinstance(record, Rows) for record in records) else 0.05)
        await commit(records)

    monkeypatch.setattr(book.writer, "commit", slow)
    async with trio.open_nursery() as nursery:
        if first == "the checkpoint":
            nursery.start_soon(book.start_from, [], made.proof, made.pages)
            await trio.testing.wait_all_tasks_blocked()
        for certificate in made.above:
            nursery.start_soon(book.learn, [certificate])
        await trio.testing.wait_all_tasks_blocked()
        if first != "the checkpoint":
            nursery.start_soon(book.start_from, [], made.proof, made.pages)
    assert book.state.digest() == made.state.digest()
    book.store.close()


async def test_who_listens_hears_of_changes_that_lie_below(tmp_path):
    made = Gone()
    changed = change_issuer(made)
    proof, pages = proof_of(made)
    book, told = opened(made, tmp_path / "l.db"), []
    await book.learn(made.known)
    book.listeners.append(lambda item, _: told.append(item.id))
    await book.start_from([made.certificates[-1]], proof, pages)
    assert told == [changed.id]
    assert book.state.digest() == made.state.digest()
    book.store.close()


async def test_a_checkpoint_that_lies_below_what_was_pruned_is_refused(tmp_path):
    made, path = Gone(), tmp_path / "l.db"
    book = opened(made, path)
    await book.learn([*made.certificates])
    newer, pages = proof_of(made)
    await book.start_from([], newer, pages)
    with pytest.raises(RuleError, match="only the result"):
        await book.start_from([], made.proof, made.pages)
    assert book.store.shelf.base() == newer
    assert book.state.digest() == made.state.digest()
    await book.learn(())
    book.store.close()


async def test_a_checkpoint_older_than_a_change_of_the_issuer_is_refused(tmp_path):
    made = Gone()
    change_issuer(made)
    book = opened(made, tmp_path / "l.db")
    await book.learn([*made.certificates])
    with pytest.raises(RuleError, match="only the result"):
        await book.start_from([], made.proof, made.pages)
    assert book.state.digest() == made.state.digest()
    book.store.close()
