"""The ledger's file: durable, all or nothing, and clear about what is wrong with it."""

import sqlite3
from pathlib import Path

import pytest
import trio
from sqlite_utils import Database

from config.errors import ConfigError, IntegrityError, LocalError
from ledger.core import certificate as certificates
from ledger.core.certificate import Collector, Verifier
from ledger.core.genesis import Genesis
from ledger.core.objects import Entry, Grant, Signed, parse, sign
from ledger.core.state import State
from ledger.core.witness import Witness
from ledger.lineage import Lineage
from ledger.mark import NEW, Mark
from ledger.records import ChannelRow, Final, Frozen, Meta, Voted
from ledger.schema import MIGRATIONS
from ledger.store import Store
from ledger.verify import verify_file
from ledger.writer import Writer
from p2p.core.identity import Identity

ISSUER = Identity.from_seed(b"i" * 32)
GENESIS = Genesis(issuer=ISSUER.public_key, root=ISSUER.public_key, witnesses=(ISSUER.public_key,))


def finals(count: int) -> list[Final]:
    state, out = State(GENESIS), []
    witness, verifier = Witness(ISSUER, state), Verifier(GENESIS)
    for n in range(count):
        account = state.account(ISSUER.public_key)
        to = Identity.from_seed(n.to_bytes(32, "big")).public_key
        entry = Entry(GENESIS.net, ISSUER.public_key, account.seq + 1, account.head, (Grant(to, 5),))
        collector = Collector(verifier, sign(ISSUER, entry))
        witness.consider_entry(collector.item)
        collector.add(witness.seal().votes[0])
        state.add(collector.item)
        out.append(Final(collector.item, collector.certificate(), 7))
    return out


def test_what_is_committed_comes_back(tmp_path):
    made = finals(20)
    store = Store(tmp_path / "l.db", GENESIS.net)
    store.commit(made[:10])
    store.commit([*made[10:], *made[:3], Voted(made[0].item)])
    store.close()
    again = Store(tmp_path / "l.db", GENESIS.net)
    assert [(item, certificate) for item, certificate, _ in again.finals()] == [(m.item, m.certificate) for m in made]
    assert again.entry_certificate(ISSUER.public_key, 4) == made[3].certificate
    assert again.entry_certificate(ISSUER.public_key, 99) is None
    assert list(again.voted()) == [made[0].item]
    again.close()
    report = verify_file(tmp_path / "l.db", GENESIS)
    assert report.verified
    assert (report.entries, report.certificates, report.supply) == (20, 20, 100)
    assert sum(report.balances.values()) == 100


def test_newest_voucher_of_a_channel_survives(tmp_path):
    store = Store(tmp_path / "l.db", GENESIS.net)
    rows = [
        ChannelRow(
            side="sell",
            channel=b"c" * 32,
            peer_id="p",
            voucher=b"v%d" % n,
            signature=bytes(64),
            receipt_n=n,
            receipt_cumulative=2**62,
            calls=n,
            kflop=2**60,
            kv_units=0,
            microcredits=1,
            nano=2,
            stopped="",
        )
        for n in range(3)
    ]
    store.commit(rows)
    assert store.channels("sell") == rows[2:]
    assert store.channels("buy") == []
    store.close()


def test_full_disk_says_so_and_loses_nothing_that_was_acknowledged(tmp_path):
    made = finals(200)
    store = Store(tmp_path / "l.db", GENESIS.net)
    store.commit(made[:2])
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LocalError) as caught:
        store.commit(made[2:])
    assert caught.value.code == "disk_full"
    assert str(tmp_path / "l.db") in caught.value.message
    assert len(list(store.items())) == 2
    store._writer.execute("PRAGMA max_page_count = 100000")
    store.commit(made[2:])
    assert len(list(store.finals())) == 200
    store.close()


def test_a_transaction_that_fails_anywhere_leaves_nothing_behind(tmp_path):
    made = finals(6)
    store = Store(tmp_path / "l.db", GENESIS.net)
    for table in ("accounts", "headers", "entries", "votes", "meta"):
        trigger = f"CREATE TRIGGER stop BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'stop'); END"
        store._writer.execute(trigger)
        with pytest.raises(LocalError, match="stop"):
            store.commit([*made, Voted(made[0].item), Meta("x", b"y")])
        store._writer.execute("DROP TRIGGER stop")
        assert list(store.items()) == []
    store.commit([*made, Voted(made[0].item), Meta("x", b"y")])
    assert [certificate for _, certificate, _ in store.finals()] == [m.certificate for m in made]
    store.close()


def flip(path: Path, needle: bytes) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(needle)
    data[at + 5] ^= 0xFF
    path.write_bytes(bytes(data))


def test_altered_bytes_are_found_and_the_file_is_named(tmp_path):
    path = tmp_path / "l.db"
    made = finals(30)
    store = Store(path, GENESIS.net)
    store.commit(made)
    store.close()
    whole = path.read_bytes()
    flip(path, made[7].item.signed.body)
    with pytest.raises(IntegrityError, match=r"l\.db is damaged") as caught:
        list(Store(path, GENESIS.net).items())
    assert "rios ledger repair" in caught.value.hint
    path.write_bytes(whole)
    flip(path, made[7].item.signed.signature)
    report = verify_file(path, GENESIS)
    assert not report.verified
    assert "signature" in report.problems[0]
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(IntegrityError, match="damaged"):
        Store(path, GENESIS.net)
    path.write_bytes(whole[:8192] + b"\xff" * 8192 + whole[16384:])
    with pytest.raises(IntegrityError, match="damaged"):
        verify_file(path, GENESIS)


def test_foreign_newer_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "l.db"
    Store(path, GENESIS.net).close()
    with pytest.raises(ConfigError, match="belongs to network"):
        Store(path, bytes(16))
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="schema version 99"):
        Store(path, GENESIS.net)
    with pytest.raises(ConfigError, match="schema version 99"):
        Store(path, GENESIS.net, read_only=True)
    with pytest.raises(LocalError, match="no ledger at"):
        Store(tmp_path / "none.db", GENESIS.net, read_only=True)


@pytest.mark.parametrize("in_thread", [True, False])
async def test_tasks_share_commits(tmp_path, in_thread):
    made = finals(60)
    store = Store(tmp_path / "l.db", GENESIS.net)
    writer = Writer(store, in_thread=in_thread)
    async with trio.open_nursery() as nursery:
        for final in made:
            nursery.start_soon(writer.commit, [final])
    assert len(list(store.items())) == 60
    assert writer.commits < 60 if in_thread else writer.commits <= 60
    store.close()


def test_stored_certificates_travel(tmp_path):
    made = finals(3)
    store = Store(tmp_path / "l.db", GENESIS.net)
    store.commit(made)
    for n, final in enumerate(made, 1):
        data = certificates.encode(store.entry_certificate(ISSUER.public_key, n))
        item = Verifier(GENESIS).open(certificates.decode(data))
        assert item == parse(final.item.signed)
    store.close()


def test_a_file_of_the_first_version_keeps_its_votes_and_freezes_as_those_of_the_first_epoch(tmp_path):
    made = finals(3)
    with sqlite3.connect(tmp_path / "l.db") as connection:
        MIGRATIONS[0](Database(connection))
        connection.execute("PRAGMA user_version = 1")
        connection.execute("INSERT INTO meta VALUES ('net', ?)", (GENESIS.net,))
        connection.execute("INSERT INTO accounts VALUES (1, ?)", (ISSUER.public_key,))
        signed = made[0].item.signed
        connection.execute("INSERT INTO votes VALUES (1, 1, ?, ?, ?)", (made[0].item.id, signed.body, signed.signature))
        connection.execute("INSERT INTO freezes VALUES (?, ?, ?)", (b"c" * 32, b"freeze", b"s" * 64))
        connection.execute("INSERT INTO meta VALUES ('witness_chain', ?)", (bytes(7) + b"\x05" + b"h" * 32,))
    connection.close()
    store = Store(tmp_path / "l.db", GENESIS.net)
    assert store.voted(0) == [made[0].item]
    assert store.voted(1) == []
    assert store.promises.freezes(0) == [Signed(b"freeze", b"s" * 64)]
    assert store.promises.chain(0) == (5, b"h" * 32)
    store.commit([*made, Voted(made[1].item, 1), Frozen(b"c" * 32, Signed(b"other", b"t" * 64), 1)])
    assert store.voted(1) == [made[1].item]
    assert store.promises.freezes(1) == [Signed(b"other", b"t" * 64)]
    lineage = Lineage(store, Mark(tmp_path / "l.db"), [])
    assert lineage.verdict == NEW
    store.close()
