"""``rios gateway audit verify``: an honest log, a forged one, and one that was made anew behind its anchor."""

import json

import pytest
import sqlalchemy as sa
import trio

from config.settings import GatewaySettings, LedgerSettings
from gateway import audit
from gateway.accounts import open_accounts
from gateway.anchoring import EVERY_MS, Anchoring, due
from gateway.db.audit import audit_head, audit_log
from gateway.db.stamps import now_ms
from gateway.till import Till
from ledger.core.genesis import Genesis
from ledger.core.objects import Grant, Transfer
from ledger.ledger import open_ledger
from ledger.store import Store
from node.anchors import NodeAnchor, is_signed
from node.cli import main
from p2p.core.identity import Identity, peer_id_of
from p2p.memory import MemoryHub
from tests.unit.ledger.ledger_kit import Maker


class PaidLedger:
    """A fake of the running ledger: what is sent is final at once."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.genesis = maker.genesis

    def balance(self) -> int:
        return 100

    async def transfer(self, to: bytes, amount: int):
        return self.maker.entry(1, Transfer(to, amount))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RIOS_CONFIG", raising=False)
    (tmp_path / "data" / "rios").mkdir(parents=True)
    return tmp_path / "data" / "rios"


@pytest.fixture
def database(home):
    with open_accounts(GatewaySettings(), home) as accounts:
        _write(accounts.database, 3)
        yield accounts.database


def _write(database, count):
    for number in range(count):
        with database.write() as connection:
            audit.record(connection, audit.OPERATOR, "key.created", f"k{number}", detail={"name": "ü\n"})


def _verified(capsys, code=0):
    capsys.readouterr()
    assert main(["gateway", "audit", "verify", "--json"]) == code
    return json.loads(capsys.readouterr().out)


def _anchor(database, identity, ledger=None):
    async def once():
        return await Anchoring(Till(database, "here"), NodeAnchor(identity, ledger)).anchor_if_due()

    return trio.run(once)


def _rewrite(database, *, detail):
    """What somebody with the database in hands can do: drop the triggers, write a whole new chain."""
    with database.write() as connection:
        for action in ("update", "delete"):
            connection.execute(sa.text(f"DROP TRIGGER audit_log_no_{action}"))
        rows = [dict(row) for row in connection.execute(sa.select(audit_log).order_by(audit_log.c.place)).mappings()]
        before = bytes(32)
        for row in rows:
            row["detail"] = detail if row["place"] == 1 else row["detail"]
            row["hash"] = before = audit.hash_of(before, row)
            connection.execute(sa.update(audit_log).where(audit_log.c.place == row["place"]).values(**row))
        connection.execute(sa.update(audit_head).values(hash=before))


def test_an_anchor_is_due_once_a_day_and_only_if_something_was_added(database):
    identity = Identity.from_seed(b"n" * 32)
    assert _anchor(database, identity)
    assert not _anchor(database, identity)
    assert due(database, now_ms() + EVERY_MS) is None  # nothing but the anchor itself was added
    _write(database, 1)
    assert due(database, now_ms()) is None
    assert due(database, now_ms() + EVERY_MS)[0] == 5


def test_a_log_signed_by_its_node_is_verified(database, capsys):
    assert _verified(capsys) == {"rows": 3, "hash": audit.head(database)[1].hex(), "anchors": []}
    identity = Identity.from_seed(b"n" * 32)
    _anchor(database, identity)
    anchor = _verified(capsys)["anchors"][0]
    assert (anchor["row"], anchor["peer_id"], anchor["entry"], anchor["problem"]) == (3, identity.peer_id, "", "")


def test_a_chain_made_anew_is_not_the_one_that_was_anchored(database, capsys):
    _anchor(database, Identity.from_seed(b"n" * 32))
    _rewrite(database, detail='{"name":"another"}')
    audit.verify(database)  # by itself the new chain holds
    assert "another hash" in _verified(capsys, code=1)["anchors"][0]["problem"]


def test_the_hash_stands_on_the_ledger_with_a_certificate(database, home, capsys):
    maker = Maker(5, f=1)
    (home / "genesis.json").write_text(maker.genesis.to_json())
    maker.entry(0, Grant(maker.people[1].public_key, 100))
    digest = audit.head(database)[1]
    _anchor(database, maker.people[1], PaidLedger(maker))
    store = Store(home / "ledger.db", maker.genesis.net)
    store.commit(maker.finals)
    store.close()
    anchor = _verified(capsys)["anchors"][0]
    assert (anchor["problem"], anchor["hash"]) == ("", digest.hex())
    assert main(["ledger", "entry", anchor["entry"]]) == 0
    assert peer_id_of(digest) in capsys.readouterr().out


def test_an_entry_that_is_not_there_is_told(database, home, capsys):
    maker = Maker(5, f=1)
    (home / "genesis.json").write_text(maker.genesis.to_json())
    maker.entry(0, Grant(maker.people[1].public_key, 100))
    _anchor(database, maker.people[1], PaidLedger(maker))
    Store(home / "ledger.db", maker.genesis.net).close()
    assert "not found" in _verified(capsys, code=1)["anchors"][0]["problem"]


def test_a_changed_row_is_named(database, capsys):
    with database.write() as connection:
        connection.execute(sa.text("DROP TRIGGER audit_log_no_update"))
        connection.execute(sa.update(audit_log).where(audit_log.c.place == 2).values(target="k9"))
    capsys.readouterr()
    assert main(["gateway", "audit", "verify"]) == 1
    assert "row 2 of the audit log was changed" in capsys.readouterr().err


@pytest.fixture
async def ledger(tmp_path):
    """A running ledger of its own only witness, who is also the issuer."""
    me = Identity.from_seed(b"n" * 32)
    genesis = Genesis(issuer=me.public_key, root=me.public_key, witnesses=(me.public_key,), f=0)
    async with trio.open_nursery() as nursery:
        opened = await open_ledger(
            MemoryHub(1).add(me),
            me,
            genesis,
            tmp_path / "ledger.db",
            LedgerSettings(sync_seconds=1, witness=True),
            nursery=nursery,
        )
        yield opened, me
        await opened.aclose()
        nursery.cancel_scope.cancel()


async def test_a_running_ledger_takes_the_hash(ledger):
    opened, me = ledger
    digest = bytes(range(200, 232))
    anchor = NodeAnchor(me, opened)
    assert (await anchor.anchor(7, digest))["entry"] == ""  # nothing to pay with: signed only
    await opened.grant(me.public_key, 10)
    where = await anchor.anchor(7, digest)
    entry = await opened.entry(where["entry"])
    assert entry["certificate"]["valid"]
    assert entry["ops"] == [{"op": "transfer", "to": peer_id_of(digest), "amount": 1}]
    assert (opened.balance(), opened.balance(digest)) == (9, 1)
    assert is_signed(7, digest, me.peer_id, where["signature"])
    assert not is_signed(8, digest, me.peer_id, where["signature"])
    assert (await opened.verify()).verified
