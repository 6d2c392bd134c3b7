"""A node tells an older copy of its database from a first start, at whatever step either of them died."""

import errno
import os
from contextlib import suppress

import pytest

from config.errors import LocalError
from ledger.core.objects import Entry, Transfer, sign
from ledger.core.recovery import Recovery
from ledger.lineage import FOUND, UNSEEN, Lineage
from ledger.mark import INTACT, NEW, RESTORED, Mark
from ledger.records import Meta, Own
from ledger.store import Store
from tests.unit.ledger.committee_kit import PAYER, Net
from tests.unit.ledger.ledger_kit import identity

NET = bytes(16)
KEY, LATER, ME = b"k" * 32, b"l" * 32, b"m" * 32


class Died(Exception):
    pass


def start(tmp_path, *, dies_at="", keys=()):
    """The verdict of a start that may die before or after the database keeps its lineage."""
    store, mark = Store(tmp_path / "l.db", NET), Mark(tmp_path / "l.db")
    commit, follow, settle = store.commit, mark.follow, mark.settle

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
    elif dies_at == "settled":
        mark.settle = lambda promises, entries: (settle(promises, entries), die())
    try:
        return Lineage(store, mark, keys)
    finally:
        mark.close()
        store.close()


PLACES = ["follow", "followed", "commit", "committed", "settled"]


@pytest.mark.parametrize("place", PLACES)
def test_a_first_start_that_dies_is_no_restoration(tmp_path, place):
    with pytest.raises(Died):
        start(tmp_path, dies_at=place)
    assert start(tmp_path).verdict in (NEW, INTACT)
    assert start(tmp_path).verdict == INTACT


@pytest.mark.parametrize("place", PLACES)
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


def lived(tmp_path):
    """A node that promised five times and signed nothing; what is beside its database stays."""
    store, mark = Store(tmp_path / "l.db", NET), Mark(tmp_path / "l.db")
    lineage = Lineage(store, mark, [KEY])
    for _ in range(5):
        kept = lineage.promise()
        store.commit([kept])
        lineage.promised(kept)
    mark.close()
    store.close()


def lose(tmp_path):
    for tail in ("", "-wal", "-shm"):
        (tmp_path / f"l.db{tail}").unlink(missing_ok=True)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_a_lost_database_is_noticed_though_the_starts_that_noticed_it_die(tmp_path, place, damaged):
    lived(tmp_path)
    lose(tmp_path)
    if damaged:
        (tmp_path / "l.db.mark").write_bytes(b"\xa5" * 36)
    for _ in range(2):
        with suppress(Died):  # the second may have nothing left to write
            start(tmp_path, dies_at=place, keys=[KEY])
    again = start(tmp_path, keys=[KEY])
    assert again.has_forgotten(KEY)
    assert again.wallet_unsure == FOUND
    assert start(tmp_path, keys=[KEY]).verdict == INTACT, "once it is written down it is not found again"


@pytest.mark.parametrize("place", PLACES)
def test_a_database_from_before_there_were_marks_is_no_restoration_though_its_first_start_dies(tmp_path, place):
    store, me = Store(tmp_path / "l.db", NET), identity(1)
    entry = sign(me, Entry(NET, me.public_key, 1, bytes(32), (Transfer(me.public_key, 1),)))
    store.commit([Own(1, entry), Meta("promises", (7).to_bytes(8, "big"))])
    store.close()
    with pytest.raises(Died):
        start(tmp_path, dies_at=place)
    assert start(tmp_path).verdict in (NEW, INTACT)
    last = start(tmp_path)
    assert (last.verdict, last.wallet_unsure) == (INTACT, b"")
    lose(tmp_path)
    assert start(tmp_path).verdict == RESTORED, "the mark has its counters now"


def test_a_loss_noticed_by_who_did_not_see_the_keys_silences_all_that_are_found_later(tmp_path):
    lived(tmp_path)
    lose(tmp_path)
    blind = start(tmp_path, keys=[ME, UNSEEN])
    assert (blind.verdict, blind.has_forgotten(ME), blind.has_forgotten(KEY)) == (RESTORED, True, True)
    assert start(tmp_path, keys=[ME, UNSEEN]).has_forgotten(KEY)
    for _ in range(2):
        seeing = start(tmp_path, keys=[ME, KEY])
        assert (seeing.verdict, seeing.has_forgotten(ME), seeing.has_forgotten(KEY)) == (INTACT, True, True)
    assert not start(tmp_path, keys=[ME, KEY, LATER]).has_forgotten(LATER), "made since"


def test_an_identity_that_is_trusted_again_stays_so_where_nobody_sees_the_keys(tmp_path):
    lived(tmp_path)
    lose(tmp_path)
    start(tmp_path, keys=[ME, UNSEEN])
    store, mark = Store(tmp_path / "l.db", NET), Mark(tmp_path / "l.db")
    lineage = Lineage(store, mark, [ME, UNSEEN])
    store.commit([lineage.trust(ME)])
    lineage.trusted(ME)
    assert (lineage.has_forgotten(ME), lineage.has_forgotten(KEY)) == (False, True)
    mark.close()
    store.close()
    again = start(tmp_path, keys=[ME, UNSEEN])
    assert (again.has_forgotten(ME), again.has_forgotten(KEY)) == (False, True)


def test_a_mark_that_found_no_room_at_the_first_start_is_no_restoration(tmp_path, monkeypatch):
    def full(handle, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(LocalError):
            start(tmp_path)
    assert start(tmp_path).verdict == NEW


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
