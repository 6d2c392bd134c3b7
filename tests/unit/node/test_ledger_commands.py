"""``rios ledger`` with the daemon stopped: what the file says, in JSON, text and CSV. (With it running: tests/e2e.)"""

import csv
import io
import json
from pathlib import Path

import pytest

from ledger.core import certificate as certificates
from ledger.core.certificate import Verifier
from ledger.core.objects import Entry, Grant, Signed, Transfer, Votes, Voucher, parse, sign
from ledger.keys import EpochKeys
from ledger.lineage import FOUND, Lineage
from ledger.mark import INTACT, Mark
from ledger.records import ChannelRow, Own, Proof
from ledger.store import Store
from node.cli import main
from node.repair import _rebuild
from p2p import keyfile
from p2p.core import codec
from tests.unit.ledger.ledger_kit import Maker

CREDIT = 1_000_000


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RIOS_CONFIG", raising=False)
    (tmp_path / "data" / "rios").mkdir(parents=True)
    return tmp_path / "data" / "rios"


@pytest.fixture
def made(home):
    """A node (person 1) with the ledger of a network of four witnesses."""
    maker = Maker(5, f=1)
    keyfile.save(home / "identity.key", maker.people[1], passphrase="not needed to look")
    (home / "genesis.json").write_text(maker.genesis.to_json())
    maker.entry(0, *(Grant(p.public_key, 100 * CREDIT) for p in maker.people[1:]))
    maker.entry(1, Transfer(maker.people[2].public_key, 1_500_000), Transfer(maker.people[3].public_key, 1))
    maker.channel = maker.open(1, 2, 10 * CREDIT)
    maker.claim(maker.channel, 2 * CREDIT)
    store = Store(home / "ledger.db", maker.genesis.net)
    store.commit(maker.finals)
    store.close()
    return maker


def said(capsys, *words, code=0):
    capsys.readouterr()
    assert main(["ledger", *words]) == code
    return capsys.readouterr().out


def told(capsys, *words, code=0):
    return json.loads(said(capsys, *words, "--json", code=code))


def test_balance_and_statement_agree(made, capsys):
    me = made.people[1].peer_id
    balance = told(capsys, "balance")
    assert (balance["account"], balance["balance"], balance["locked"]) == (me, 88_499_999, 8 * CREDIT)
    assert "88.499999 credits free" in said(capsys, "balance")
    lines = told(capsys, "statement")
    assert [(line["kind"], line["amount"]) for line in lines] == [
        ("grant", 100 * CREDIT), ("transfer", -1_500_000), ("transfer", -1), ("open", -10 * CREDIT),
    ]  # fmt: skip
    assert lines[-1]["balance"] == balance["balance"]
    assert "-1.500000" in said(capsys, "statement")
    other = made.people[2].peer_id
    assert told(capsys, "statement", other)[-1]["balance"] == told(capsys, "balance", other)["balance"]
    rows = list(csv.DictReader(io.StringIO(said(capsys, "statement", other, "--csv"))))
    assert [(r["kind"], r["amount_microcredits"], r["amount"]) for r in rows][-1] == ("claim", "2000000", "2.000000")


def test_an_entry_is_shown_with_its_certificate_by_id_slot_or_channel(made, capsys):
    me = made.people[1].peer_id
    by_slot = told(capsys, "entry", f"{me}:1")
    assert told(capsys, "entry", by_slot["id"]) == by_slot
    assert by_slot["ops"][0] == {"op": "transfer", "to": made.people[2].peer_id, "amount": 1_500_000}
    assert by_slot["certificate"]["valid"] is True
    assert {vote["witness"] for vote in by_slot["certificate"]["votes"]} == {p.peer_id for p in made.people[:3]}
    claim = told(capsys, "entry", made.channel.hex())
    assert (claim["kind"], claim["cumulative"], claim["channel"]) == ("claim", 2 * CREDIT, made.channel.hex())
    assert told(capsys, "entry", claim["id"]) == claim
    assert "3 votes, valid" in said(capsys, "entry", f"{me}:1")
    for name, code in (("junk", 2), (f"{me}:0x1", 2), (f"{me}:99", 1), ("ab" * 32, 1)):
        assert "error" in told(capsys, "entry", name, code=code)


def test_an_entry_that_waits_for_its_certificate_is_shown_as_that(made, home, capsys):
    me = made.people[1]
    known = made.state.account(me.public_key)
    signed = sign(me, Entry(made.genesis.net, me.public_key, 3, known.head, (Transfer(me.public_key, 1),)))
    store = Store(home / "ledger.db", made.genesis.net)
    store.commit([Own(3, signed)])
    store.close()
    assert "no certificate yet" in told(capsys, "entry", f"{me.peer_id}:3")["state"]


def test_a_forged_vote_shows(made, home, capsys):
    store = Store(home / "ledger.db", made.genesis.net)
    store._writer.execute("UPDATE headers SET signature = zeroblob(64) WHERE id = 1")
    store.close()
    shown = told(capsys, "entry", f"{made.people[0].peer_id}:1", code=1)
    assert "not signed by its witness" in shown["certificate"]["problem"]
    assert told(capsys, "verify", code=1)["verified"] is False


def test_audit_shows_double_spends_double_votes_and_stopped_channels(made, home, capsys):
    thief, liar = made.people[2], made.people[0]
    assert "nothing is held against it" in said(capsys, "audit", thief.peer_id)
    bodies = [
        Entry(made.genesis.net, thief.public_key, 1, bytes(32), (Transfer(made.people[n].public_key, 7),))
        for n in (1, 3)
    ]
    a, b = (sign(thief, body) for body in bodies)
    voucher = Voucher(made.genesis.net, made.channel, 1, 5, bytes(32))
    row = ChannelRow(
        side="sell", channel=made.channel, peer_id=thief.peer_id, voucher=codec.encode(voucher), signature=bytes(64),
        receipt_n=1, receipt_cumulative=1, calls=1, kflop=1, kv_units=0, microcredits=1, nano=0, stopped="it lied",
    )  # fmt: skip
    header = codec.decode(Votes, made.certificates[0].votes[0].header, bytes_max=4096)
    twice = sign(liar, Votes(header.net, 0, header.witness, header.batch_no, header.prev, b"r" * 32))
    store = Store(home / "ledger.db", made.genesis.net)
    store.commit([Proof(thief.public_key, 1, a, b), row])
    store._writer.execute("INSERT INTO headers VALUES (999, ?, ?)", (twice.body, twice.signature))
    store.close()
    shown = told(capsys, "audit", thief.peer_id, code=1)
    assert [(e["seq"], e["proved"]) for e in shown["equivocations"]] == [(1, True)]
    assert shown["stopped_channels"][0]["why"] == "it lied"
    assert shown["double_batches"] == []
    shown = told(capsys, "audit", liar.peer_id, code=1)
    assert [(e["batch"], e["proved"]) for e in shown["double_batches"]] == [(header.batch_no, True)]
    assert "two batches of votes" in said(capsys, "audit", liar.peer_id, code=1)


def test_a_forged_proof_proves_nothing(made, home, capsys):
    thief = made.people[2]
    body = Entry(made.genesis.net, thief.public_key, 1, bytes(32), (Transfer(thief.public_key, 7),))
    good, forged = sign(thief, body), sign(made.people[3], replace_ops(body))
    store = Store(home / "ledger.db", made.genesis.net)
    store.commit([Proof(thief.public_key, 1, good, Signed(forged.body, forged.signature))])
    store.close()
    assert told(capsys, "audit", thief.peer_id)["equivocations"][0]["proved"] is False


def replace_ops(body):
    return Entry(body.net, body.account, body.seq, body.prev, (Transfer(body.account, 8),))


def test_export_is_whole_and_can_be_checked_elsewhere(made, home, capsys, tmp_path):
    lines = [json.loads(line) for line in said(capsys, "export").splitlines()]
    assert len(lines) == 4
    for line in lines:
        item = Verifier(made.genesis).open(certificates.decode(bytes.fromhex(line["certificate"])))
        assert item.id.hex() == line["id"]
        assert parse(item.signed).id == item.id
    rows = list(csv.DictReader(io.StringIO(said(capsys, "export", "--csv"))))
    assert len(rows) == 4 + 2 + 1 + 1
    assert (rows[4]["op"], rows[4]["amount"], rows[4]["credits"]) == ("transfer", "1500000", "1.500000")
    target = tmp_path / "out.csv"
    assert told(capsys, "export", "--csv", "--output", str(target))["objects"] == 4
    assert target.read_text().count("\n") == 9
    assert "exists already" in told(capsys, "export", "--output", str(target), code=1)["error"]["message"]
    assert len(said(capsys, "export", "--account", made.people[1].peer_id).splitlines()) == 3


def test_channels_and_verify_without_a_daemon(made, capsys):
    (channel,) = told(capsys, "channels")
    assert (channel["channel"], channel["lock"], channel["paid"]) == (made.channel.hex(), 10 * CREDIT, 2 * CREDIT)
    assert said(capsys, "channels", "--csv").startswith("channel,side,payer,payee,lock_microcredits,lock,")
    assert told(capsys, "verify")["digest"] == made.state.digest().hex()


def test_what_needs_the_daemon_says_so(made, capsys):
    for words in (("settle",), ("grant", made.people[2].peer_id, "1"), ("transfer", made.people[2].peer_id, "1")):
        assert told(capsys, *words, code=3)["error"]["code"] == "not_running"


def test_repair_without_peers_saves_what_can_be_read_and_says_so(made, home, capsys, monkeypatch):
    monkeypatch.setattr("node.repair.SECONDS_FOR_PEERS", 0.1)
    monkeypatch.setenv("RIOS_PASSPHRASE", "not needed to look")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    quiet = ("--set", "p2p.listen=/ip4/127.0.0.1/tcp/0", "--set", "p2p.mdns=off")
    assert told(capsys, "repair", *quiet)["repaired"] is False
    store = Store(home / "ledger.db", made.genesis.net)
    store._writer.execute("UPDATE entries SET signature = zeroblob(64) WHERE id = 3")
    store.close()
    report = told(capsys, "repair", *quiet)
    assert report["repaired"]
    assert "not signed by its account" in report["problem"]
    assert (report["salvaged"]["entries"], report["salvaged"]["refused"]) == (2, 1)
    assert report["verified"]
    assert report["agrees_with"] == []
    assert (home / report["moved_to"]).exists()
    assert told(capsys, "verify")["verified"] is True
    (home / "ledger.db").write_bytes(b"\xa5" * 40960)
    text = said(capsys, "repair", *quiet)
    assert "not readable to the end, or" in text
    assert "start the node, it fetches the rest" in text
    assert "stays silent for its epoch" in text


def test_a_repair_that_finds_promises_lost_silences_every_key_of_the_node(made, home, capsys, monkeypatch):
    monkeypatch.setattr("node.repair.SECONDS_FOR_PEERS", 0.1)
    monkeypatch.setenv("RIOS_PASSPHRASE", "not needed to look")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    me = made.people[1]
    key = EpochKeys(me, home / "epoch-keys", "not needed to look").create().public_key
    (home / "ledger.db").write_bytes(b"\xa5" * 40960)  # nor is there a mark beside it
    quiet = ("--set", "p2p.listen=/ip4/127.0.0.1/tcp/0", "--set", "p2p.mdns=off")
    assert told(capsys, "repair", *quiet)["restored"]
    store, mark = Store(home / "ledger.db", made.genesis.net), Mark(home / "ledger.db")
    lineage = Lineage(store, mark, [me.public_key, key])
    assert lineage.verdict == INTACT
    assert lineage.has_forgotten(key)
    assert lineage.has_forgotten(me.public_key)
    assert lineage.wallet_unsure == FOUND
    mark.close()
    store.close()


def test_a_cut_write_ahead_log_is_the_ledger_as_it_was_before_and_repair_goes_through(made, home, capsys, monkeypatch):
    monkeypatch.setattr("node.repair.SECONDS_FOR_PEERS", 0.1)
    monkeypatch.setenv("RIOS_PASSPHRASE", "not needed to look")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    before = told(capsys, "verify")["digest"]
    known = len(made.finals)
    made.entry(2, Transfer(made.people[3].public_key, 5))
    store, files = Store(home / "ledger.db", made.genesis.net), (home / "ledger.db", home / "ledger.db-wal")
    store.commit(made.finals[known:])
    assert told(capsys, "verify")["digest"] == made.state.digest().hex() != before
    as_killed = [file.read_bytes() for file in files]
    store.close()
    for file, data in zip(files, as_killed, strict=True):
        file.write_bytes(data)
    files[1].write_bytes(as_killed[1][:-1])  # the last commit is torn
    report = told(capsys, "verify")
    assert (report["verified"], report["digest"]) == (True, before)
    quiet = ("--set", "p2p.listen=/ip4/127.0.0.1/tcp/0", "--set", "p2p.mdns=off")
    assert told(capsys, "repair", *quiet)["repaired"] is False
    report = told(capsys, "repair", "--force", *quiet)
    assert (report["verified"], report["digest"]) == (True, before)
    assert told(capsys, "verify")["digest"] == before


class Killed(BaseException):
    """The process ended here."""


def killed_as_it_moves(monkeypatch, path, genesis, ending):
    """A repair that dies just before it moves the file whose name ends so."""
    rename = Path.rename

    def dies(self, target):
        if self.name.endswith(ending):
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dies)
        with pytest.raises(Killed):
            _rebuild(path, genesis)


@pytest.mark.parametrize("ending", ["ledger.db", "ledger.db-wal", ".repaired"])
def test_a_repair_that_died_half_way_begins_again_with_the_old_file(made, home, capsys, monkeypatch, ending):
    monkeypatch.setattr("node.repair.SECONDS_FOR_PEERS", 0.1)
    monkeypatch.setenv("RIOS_PASSPHRASE", "not needed to look")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    quiet = ("--set", "p2p.listen=/ip4/127.0.0.1/tcp/0", "--set", "p2p.mdns=off")
    me, path = made.people[1].public_key, home / "ledger.db"
    store, mark = Store(path, made.genesis.net), Mark(path)
    lineage = Lineage(store, mark, [me])
    mine = [f.item for f in made.finals if isinstance(f.item.object, Entry) and f.item.object.account == me]
    own = [Own(item.object.seq, item.signed) for item in mine]
    store.commit([*own, lineage.unsure(b"")])
    lineage.signed(own[-1].seq)
    mark.close()
    files = (path, home / "ledger.db-wal")
    as_killed = [file.read_bytes() for file in files]  # the own chain stands in the write-ahead log only
    store.close()
    for file, data in zip(files, as_killed, strict=True):
        file.write_bytes(data)
    killed_as_it_moves(monkeypatch, path, made.genesis, ending)
    assert path.exists() == (ending == "ledger.db")
    if not path.exists():
        assert main(["run", *quiet]) != 0
        assert "rios ledger repair" in capsys.readouterr().err
        assert not path.exists(), "it did not begin anew"
    report = told(capsys, "repair", "--force", *quiet)
    assert report["salvaged"]["rows"]["wallet"] == len(own)
    assert report["salvaged"]["own_is_whole"]
    assert report["verified"]
    assert not report["restored"], "nothing is lost"
    assert told(capsys, "repair", *quiet)["repaired"] is False


def test_no_ledger_and_no_key_are_said(home, capsys):
    assert told(capsys, "verify", code=1)["error"]["code"] == "not_found"
    assert told(capsys, "balance", code=1)["error"]["code"] == "not_found"
