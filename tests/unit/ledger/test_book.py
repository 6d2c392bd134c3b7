"""What is applied is on the disk, sooner or later: a full disk or a wrong certificate among good ones loses nothing."""

import pytest

from config.errors import LocalError
from ledger.book import Book
from ledger.core.errors import RuleError
from ledger.core.objects import Transfer, parse
from ledger.core.state import State
from ledger.store import Store, Writer
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
    book.store.commit = commit
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
