"""What can be read of a damaged file is saved; what only this node knew is not made up."""

import sqlite3
from contextlib import closing

import pytest

from config.errors import ConfigError, IntegrityError
from ledger.core.objects import Entry, Grant, Transfer, sign
from ledger.records import Meta, Own, Voted
from ledger.salvage import salvage
from ledger.store import Store
from ledger.verify import verify_file
from tests.unit.ledger.ledger_kit import Maker

PAGE = 8192


@pytest.fixture
def made():
    maker = Maker(6)
    maker.entry(0, *(Grant(p.public_key, 10**9) for p in maker.people))
    channel = maker.open(1, 2, 10**7)
    for n in range(300):
        maker.entry(n % 6, Transfer(maker.people[(n * 5 + 1) % 6].public_key, 1 + n))
    maker.claim(channel, 10**6)
    return maker


def own(maker):
    me = maker.people[1]
    entry = Entry(maker.genesis.net, me.public_key, 1, bytes(32), (Transfer(me.public_key, 1),))
    votes = [Voted(final.item) for final in maker.finals[:50]]
    return [Own(1, sign(me, entry)), *votes, Meta("mark", b"m" * 16), Meta("promises", b"\0" * 7 + b"\5")]


def write(path, maker, *extra):
    store = Store(path, maker.genesis.net)
    store.commit([*maker.finals, *extra])
    store.close()


def test_a_whole_file_is_saved_whole(made, tmp_path):
    write(tmp_path / "l.db", made, *own(made))
    found = salvage(tmp_path / "l.db", tmp_path / "new.db", made.genesis)
    assert (found.entries, found.claims, found.refused, found.unreadable) == (302, 1, 0, [])
    assert found.own_is_whole
    report = verify_file(tmp_path / "new.db", made.genesis)
    assert report.verified
    assert report.digest == made.state.digest().hex()
    store = Store(tmp_path / "new.db", made.genesis.net)
    assert store.meta("mark") == b"m" * 16
    assert len(store.voted()) == 50
    assert len(store.wallet()) == 1
    # numbers of accounts and headers go on where they were
    maker = made
    known = len(maker.finals)
    maker.entry(2, Transfer(b"n" * 32, 5))
    store.commit(maker.finals[known:])
    store.close()
    assert verify_file(tmp_path / "new.db", made.genesis).verified


def spoil(path, table):
    """Overwrite every leaf page of a table but the first and the last few."""
    with closing(sqlite3.connect(path)) as connection:
        pages = [
            row[0]
            for row in connection.execute(
                "SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf' ORDER BY path", (table,)
            )
        ]
    data = bytearray(path.read_bytes())
    hit = pages[2:-2] if len(pages) > 5 else pages
    for page in hit:
        data[(page - 1) * PAGE : page * PAGE] = b"\xa5" * PAGE
    path.write_bytes(bytes(data))
    return len(pages), len(hit)


def has_dbstat():
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute("SELECT * FROM dbstat").fetchall()
        except sqlite3.OperationalError:
            return False
    return True


needs_dbstat = pytest.mark.skipif(not has_dbstat(), reason="this SQLite has no dbstat to find a table's pages with")


@needs_dbstat
def test_damaged_pages_of_entries_cost_only_these(made, tmp_path):
    path = tmp_path / "l.db"
    write(path, made, *own(made))
    pages, hit = spoil(path, "entries")
    assert pages > 5
    with pytest.raises(IntegrityError):
        verify_file(path, made.genesis)
    found = salvage(path, tmp_path / "new.db", made.genesis)
    assert found.unreadable == ["entries"]
    assert 0 < found.entries <= 302 * (pages - hit) // pages + 20
    assert found.own_is_whole
    report = verify_file(tmp_path / "new.db", made.genesis)
    assert report.problems == ()
    store = Store(tmp_path / "new.db", made.genesis.net)
    store.commit(made.finals)  # the rest comes from peers
    store.close()
    report = verify_file(tmp_path / "new.db", made.genesis)
    assert report.verified
    assert report.digest == made.state.digest().hex()


@needs_dbstat
def test_lost_votes_leave_a_file_without_history(made, tmp_path):
    path = tmp_path / "l.db"
    write(path, made, *own(made))
    spoil(path, "votes")
    found = salvage(path, tmp_path / "new.db", made.genesis)
    assert not found.own_is_whole
    assert "votes" in found.unreadable
    store = Store(tmp_path / "new.db", made.genesis.net)
    assert store.meta("mark") is None, "the mark outside then says: restored"
    assert len(store.wallet()) == 1
    store.close()


def test_forged_rows_are_left_out(made, tmp_path):
    path = tmp_path / "l.db"
    write(path, made)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE entries SET signature = zeroblob(64) WHERE id = 7")
        connection.execute("UPDATE entries SET proof = x'ff' WHERE id = 9")
        connection.execute("UPDATE headers SET signature = zeroblob(64) WHERE id = 12")
    found = salvage(path, tmp_path / "new.db", made.genesis)
    assert found.refused == 3
    assert verify_file(tmp_path / "new.db", made.genesis).problems == ()


def test_nothing_is_saved_from_nothing_and_other_versions_are_refused(made, tmp_path):
    (tmp_path / "l.db").write_bytes(b"\xa5" * PAGE * 4)
    found = salvage(tmp_path / "l.db", tmp_path / "new.db", made.genesis)
    assert found.entries == 0
    assert not found.own_is_whole
    write(tmp_path / "old.db", made)
    with closing(sqlite3.connect(tmp_path / "old.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="schema version 99"):
        salvage(tmp_path / "old.db", tmp_path / "newer.db", made.genesis)
