"""What can be read of a damaged file is saved; what only this node knew is not made up."""

import sqlite3
from contextlib import closing

import pytest

from config.errors import ConfigError, IntegrityError
from ledger.core.objects import Entry, Freeze, Frontier, Grant, Handover, Seat, Shown, Transfer, sign
from ledger.core.witness import VOTING
from ledger.lineage import Lineage
from ledger.mark import RESTORED, Mark
from ledger.records import (
    ChannelRow,
    Frozen,
    Handed,
    Kept,
    Listed,
    Meta,
    Own,
    Proof,
    Seated,
    Standing,
    Voted,
)
from ledger.salvage import own_damage, salvage
from ledger.store import Store
from ledger.verify import verify_file
from node.repair import _what_is_wrong
from p2p.core import codec
from tests.unit.ledger.ledger_kit import Maker
from tests.unit.ledger.test_network import CREDIT, swarm, until, work

PAGE = 8192
SIGNED = ("wallet", "votes", "freezes", "handovers", "seats")
"""Tables with a body and the signature of who is named in it."""


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
    assert len(store.wallet()) == 1
    mark = Mark(tmp_path / "new.db")
    assert Lineage(store, mark, []).verdict == RESTORED, "also where no mark is left"
    mark.close()
    store.close()


def everything_own(maker):
    """A record of each kind that only a node itself has; person 1 owns the file, pays person 2 and is paid by it."""
    net, me = maker.genesis.net, maker.people[1]
    channels = maker.open(1, 2, 10**7), maker.open(2, 1, 10**7)
    for channel in channels:
        maker.claim(channel, 10**5)
    rows = []
    for side, channel, peer in (("buy", channels[0], maker.people[2]), ("sell", channels[1], maker.people[2])):
        voucher, signature = maker.voucher(channel, 10**6)
        rows.append(
            ChannelRow(
                side=side, channel=channel, peer_id=peer.peer_id, voucher=codec.encode(voucher), signature=signature,
                receipt_n=1, receipt_cumulative=1, calls=1, kflop=1, kv_units=0, microcredits=1, nano=0, stopped="",
            )
        )  # fmt: skip
    a, b = (sign(me, Entry(net, me.public_key, 9, bytes(32), (Transfer(me.public_key, n),))) for n in (1, 2))
    handover = Handover(net, 0, me.public_key, Frontier((), ()), (), (), ())
    return [
        *own(maker),
        Voted(maker.finals[-1].item),
        Frozen(channels[0], sign(me, Freeze(net, 0, me.public_key, channels[0], 0, None, None))),
        *rows,
        Proof(me.public_key, 9, a, b),
        Standing(0, me.public_key, VOTING, False),
        Handed(0, me.public_key, sign(me, handover)),
        Kept(Shown(*maker.voucher(channels[0], 10**6))),
        Seated(0, me.public_key, sign(me, Seat(net, 0, me.public_key, me.public_key))),
        Listed(b"i" * 32),
        Meta("witness_chain", bytes(40)),
        Meta("forgotten", b"\x90"),
        Meta("wallet_unsure", b""),
    ]


def flip(path, table, column, where):
    with closing(sqlite3.connect(path)) as connection, connection:
        row, value = connection.execute(f"SELECT rowid, {column} FROM {table} LIMIT 1").fetchone()
        damaged = bytearray(value)
        damaged[where] ^= 0x40
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (bytes(damaged), row))


@pytest.mark.parametrize("where", [1, -1])
@pytest.mark.parametrize(
    ("table", "column"),
    [
        *((table, column) for table in SIGNED for column in ("body", "signature")),
        *(("channels", "voucher"), ("channels", "signature"), ("claim_votes", "body")),
        *(("proofs", "body_a"), ("proofs", "signature_b"), ("votes", "object_id")),
    ],
)
def test_one_bit_in_a_row_that_only_this_node_knows_is_a_loss(tmp_path, table, column, where):
    path, made = tmp_path / "l.db", Maker(3)
    made.entry(0, *(Grant(p.public_key, 10**9) for p in made.people))
    write(path, made, *everything_own(made))
    assert own_damage(path, made.genesis) == []
    flip(path, table, column, where)
    assert own_damage(path, made.genesis) == [table]
    found = salvage(path, tmp_path / "new.db", made.genesis)
    assert found.unreadable == [table]
    assert not found.own_is_whole
    assert own_damage(tmp_path / "new.db", made.genesis) == [], "what is not whole is not taken along"
    store, mark = Store(tmp_path / "new.db", made.genesis.net), Mark(tmp_path / "new.db")
    assert Lineage(store, mark, []).verdict == RESTORED
    mark.close()
    store.close()


@pytest.mark.parametrize(
    ("node", "table", "column"), [(0, "votes", "body"), (1, "wallet", "body"), (2, "channels", "voucher")]
)
async def test_a_node_with_a_flipped_bit_starts_again_after_its_repair(tmp_path, node, table, column):
    async with swarm(tmp_path, nodes=3) as s:
        await s.ledgers[0].grant(s.ids[1].public_key, 100 * CREDIT)
        await s.converged()
        await work(s.ledgers[1], s.ledgers[2], 50, 40_000_000)
        await until(lambda: s.ledgers[2].book.store.channels("sell"))
        await s.stop(node)
        path, saved = tmp_path / f"{node}.db", tmp_path / "new.db"
        assert _what_is_wrong(path, s.genesis) == ""
        flip(path, table, column, 1)
        with pytest.raises(IntegrityError):
            await s.start(node)
        s.hub.kill(s.ids[node].peer_id)
        assert table in _what_is_wrong(path, s.genesis)
        salvage(path, saved, s.genesis)
        path.with_name(f"{path.name}-wal").unlink(missing_ok=True)
        saved.rename(path)
        again = await s.start(node)
        assert again.is_restored
        assert node or again.statistics()["witness"]["restored"]


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
