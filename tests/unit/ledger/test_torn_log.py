"""A write-ahead log that was cut off: what is left is a whole beginning; forgotten promises are noticed (rule 9)."""

import shutil

import pytest

from ledger.core.objects import Grant, Transfer
from ledger.core.state import State
from ledger.lineage import FOUND, Lineage
from ledger.mark import INTACT, RESTORED, Mark
from ledger.records import Own
from ledger.salvage import salvage
from ledger.store import Store
from ledger.verify import verify_file
from tests.unit.ledger.ledger_kit import Maker

WITNESS, GROUP = b"w" * 32, 10


@pytest.fixture
def live(tmp_path):
    """The files of a node that dies: a promise after every group of final objects, at last an entry of its own."""
    maker = Maker(4)
    maker.entry(0, *(Grant(p.public_key, 10**6) for p in maker.people))
    for n in range(GROUP * 8 - 1):
        maker.entry(n % 4, Transfer(maker.people[(n + 1) % 4].public_key, 1 + n))
    folder = tmp_path / "live"
    folder.mkdir()
    store, mark = Store(folder / "l.db", maker.genesis.net), Mark(folder / "l.db")
    lineage = Lineage(store, mark, [WITNESS])
    for first in range(0, len(maker.finals), GROUP):
        promise = lineage.promise()
        store.commit([*maker.finals[first : first + GROUP], promise])
        lineage.promised(promise)
    own = maker.finals[-1].item
    store.commit([Own(own.object.seq, own.signed)])
    lineage.signed(own.object.seq)
    shutil.copytree(folder, tmp_path / "dead")
    store.close()
    mark.close()
    return maker, tmp_path / "dead" / "l.db"


def cut(path, keep):
    log = path.with_name(f"{path.name}-wal")
    size = log.stat().st_size
    with log.open("r+b") as file:
        file.truncate(int(size * keep) if keep < 1 else size - 1)


def prefix_of(maker, count):
    state = State(maker.genesis)
    for final in maker.finals[:count]:
        state.add(final.item)
    return state


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.77, 0.9, 1])
def test_what_is_left_is_a_whole_beginning_and_nothing_forgotten_is_promised_again(live, keep):
    maker, path = live
    cut(path, keep)
    store, mark = Store(path, maker.genesis.net), Mark(path)
    left = len(list(store.items()))
    assert left % GROUP == 0, "whole transactions only"
    assert (left == len(maker.finals)) == (keep == 1), "at 1 only the last commit, the wallet's, is torn"
    lineage = Lineage(store, mark, [WITNESS])
    assert lineage.verdict == RESTORED, "what was lost was a promise, or an entry of the wallet"
    assert lineage.has_forgotten(WITNESS), "silent for its epoch"
    assert lineage.wallet_unsure == FOUND, "asks before it signs"
    mark.close()
    store.close()
    report = verify_file(path, maker.genesis)
    assert report.verified
    assert report.digest == prefix_of(maker, left).digest().hex()


def test_a_log_that_is_whole_is_no_restoration(live):
    maker, path = live
    store, mark = Store(path, maker.genesis.net), Mark(path)
    assert len(list(store.items())) == len(maker.finals)
    assert Lineage(store, mark, [WITNESS]).verdict == INTACT
    mark.close()
    store.close()


def test_a_log_that_is_gone_leaves_a_node_without_history_that_knows_it_had_one(live):
    maker, path = live
    path.with_name("l.db-wal").unlink()
    path.with_name("l.db-shm").unlink(missing_ok=True)
    store, mark = Store(path, maker.genesis.net), Mark(path)
    assert Lineage(store, mark, [WITNESS]).verdict == RESTORED
    mark.close()
    store.close()


@pytest.mark.parametrize("keep", [0.4, 0.8])
def test_repair_saves_what_a_cut_log_still_says_and_touches_nothing(live, keep):
    maker, path = live
    cut(path, keep)
    before = path.read_bytes()
    found = salvage(path, path.with_name("new.db"), maker.genesis)
    assert path.read_bytes() == before
    assert (found.refused, found.unreadable) == (0, [])
    report = verify_file(path.with_name("new.db"), maker.genesis)
    assert report.verified
    assert report.digest == prefix_of(maker, found.entries).digest().hex()
    store, mark = Store(path.with_name("new.db"), maker.genesis.net), Mark(path)
    assert Lineage(store, mark, [WITNESS]).verdict == RESTORED, "what the log lost is still lost"
    mark.close()
    store.close()
