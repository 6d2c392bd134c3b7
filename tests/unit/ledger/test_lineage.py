"""A node tells an older copy of its database from a first start, at whatever step either of them died."""

import os

import pytest

from ledger.core.recovery import Recovery
from ledger.lineage import FOUND, Lineage
from ledger.mark import INTACT, NEW, RESTORED, Mark
from ledger.store import Store
from tests.unit.ledger.committee_kit import PAYER, Net

NET = bytes(16)


class Died(Exception):
    pass


def start(tmp_path, *, dies_at=""):
    """The verdict of a start that may die before or after the database keeps its lineage."""
    store, mark = Store(tmp_path / "l.db", NET), Mark(tmp_path / "l.db")
    commit, follow = store.commit, mark.follow

    def die():
        raise Died

    if dies_at == "commit":
        store.commit = lambda records: die()
    elif dies_at == "committed":
        store.commit = lambda records: (commit(records), die())
    elif dies_at == "follow":
        mark.follow = die
    elif dies_at == "followed":
        mark.follow = lambda: (follow(), die())
    try:
        return Lineage(store, mark, [])
    finally:
        mark.close()
        store.close()


@pytest.mark.parametrize("place", ["follow", "followed", "commit", "committed"])
def test_a_first_start_that_dies_is_no_restoration(tmp_path, place):
    with pytest.raises(Died):
        start(tmp_path, dies_at=place)
    assert start(tmp_path).verdict in (NEW, INTACT)
    assert start(tmp_path).verdict == INTACT


@pytest.mark.parametrize("place", ["follow", "followed", "commit", "committed"])
def test_a_restoration_is_noticed_though_the_start_that_noticed_it_dies(tmp_path, place):
    store = Store(tmp_path / "l.db", NET)
    mark = Mark(tmp_path / "l.db")
    lineage = Lineage(store, mark, [])
    lineage.promised(lineage.promise())  # of which the database, an older copy, knows nothing
    mark.close()
    store.close()
    with pytest.raises(Died):
        start(tmp_path, dies_at=place)
    again = start(tmp_path)
    assert again.verdict == RESTORED or again.wallet_unsure == FOUND


def test_a_promise_that_was_not_durable_when_the_node_died_is_no_restoration(tmp_path):
    """A freeze and a batch at once: the first is on the disk, the second was still on its way."""
    store, mark = Store(tmp_path / "l.db", NET), Mark(tmp_path / "l.db")
    lineage = Lineage(store, mark, [])
    first, _ = lineage.promise(), lineage.promise()
    store.commit([first])
    lineage.promised(first)
    mark.close()
    store.close()
    assert start(tmp_path).verdict == INTACT


def test_the_mark_is_on_the_disk_before_the_database_says_that_there_is_one(tmp_path, monkeypatch):
    """Else a loss of power takes it away, and the node looks restored."""
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        "os.fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))
    )
    with pytest.raises(Died):
        start(tmp_path, dies_at="commit")
    assert synced == [str(tmp_path / "l.db.mark"), str(tmp_path)]


def test_an_empty_database_beside_a_mark_that_promised_is_a_restoration(tmp_path):
    mark = Mark(tmp_path / "l.db")
    mark.open(None, 0, 0)
    mark.signed(1)
    mark.close()
    assert start(tmp_path).verdict == RESTORED


# the wallet's question: is a change of the committee since the loss proven?


def silent(recovery: Recovery, net: Net, epoch: int, count: int) -> None:
    for key in net.keys[epoch][:count]:
        recovery.add(key.public_key, epoch, recovery.slot, None)


def test_a_copy_older_than_the_committee_does_not_make_its_change_count():
    net = Net()
    net.fund()
    recovery = Recovery(net.observer.state, PAYER.public_key)
    net.change(1)  # it may have happened before the loss: the copy just did not know
    silent(recovery, net, 1, 3)
    assert not recovery.may_sign_anew()
    silent(recovery, net, 1, 4)
    assert recovery.may_sign_anew()


def test_a_change_after_a_quorum_answered_counts_also_at_a_later_attempt():
    net = Net()
    net.fund()
    recovery = Recovery(net.observer.state, PAYER.public_key)
    silent(recovery, net, 0, 3)
    assert not recovery.may_sign_anew()
    net.change(1)
    later = Recovery(net.observer.state, PAYER.public_key, began=recovery.began)
    assert not later.may_sign_anew()
    silent(later, net, 1, 3)
    assert later.may_sign_anew()
