"""What is applied is on the disk, sooner or later: a full disk or a wrong certificate among good ones loses nothing."""

from contextlib import suppress

import msgspec
import pytest

from config.errors import LocalError
from ledger.book import Book
from ledger.core.errors import RuleError
from ledger.core.objects import Signed, Transfer, parse
from ledger.core.state import State
from ledger.store import Store
from ledger.verify import verify_file
from ledger.writer import Writer
from tests.unit.ledger.committee_kit import OTHER, PAYER, Net


@pytest.fixture
def net() -> Net:
    made = Net()
    made.fund()
    return made


@pytest.fixture
def book(net, tmp_path):
    store = Store(tmp_path / "l.db", net.genesis.net)
    yield Book(net.genesis, store, Writer(store, in_thread=False), lambda: 0)
    store.close()


async def test_what_a_full_disk_refused_is_written_with_what_comes_next(net, book):
    net.settle(net.entry(PAYER, Transfer(OTHER.public_key, 5)))
    heard = []
    book.listeners.append(lambda item, certificate: heard.append(item.id))
    commit = book.store.commit

    def full(records):
        raise LocalError("disk_full", "no room")

    book.store.commit = full
    with pytest.raises(LocalError):
        await book.learn(net.final[:2])
    assert heard == []
    await book.retry()
    assert heard == [], "still full"
    book.store.commit = commit
    await book.retry()
    assert len(heard) == 2, "without anything new"
    await book.learn(net.final)
    ids = [parse(certificate.object).id for certificate in net.final]
    assert heard == ids
    assert [item.id for item in book.store.items()] == ids


async def test_a_fork_among_good_certificates_does_not_keep_them_off_the_disk(net, book, monkeypatch):
    good = net.final[:1]

    def forked(self, item):
        if item.id == parse(net.final[1].object).id:
            raise RuleError("fork", "two final entries in one slot")
        return add(self, item)

    add = State.add
    monkeypatch.setattr(State, "add", forked)
    with pytest.raises(RuleError, match="fork"):
        await book.learn([*good, net.final[1]])
    await book.learn([])
    assert [item.id for item in book.store.items()] == [parse(good[0].object).id]


async def test_a_claim_that_came_before_its_channel_with_another_signature_is_replaced(net, tmp_path):
    """Seed 7064: nobody can check it before its channel is known, and what stands on the disk is loaded again."""
    (channel,) = net.observer.state.channels
    net.settle(net.claim(channel, 20))
    good = net.final[-1]
    junk = msgspec.structs.replace(good, object=Signed(good.object.body, bytes(64)))
    path = tmp_path / "early.db"
    for first in ([junk], net.final[:-1], [good]):
        store = Store(path, net.genesis.net)
        book = Book(net.genesis, store, Writer(store, in_thread=False), lambda: 0)
        assert not book.state.broken
        await book.learn(first)
        assert not book.state.broken, "nobody lied that has a vote"
        with suppress(RuleError):
            await book.learn([junk])
        store.close()
    assert book.state.channels[channel].paid == 20
    report = verify_file(path, net.genesis)
    assert report.verified, report.problems
    assert report.claims == 1
