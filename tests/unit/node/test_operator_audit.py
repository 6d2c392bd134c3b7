"""What the operator changes with ``rios`` stands in the audit log as what people change over HTTP does."""

import json

import pytest
import sqlalchemy as sa

from config.settings import GatewaySettings
from gateway import audit
from gateway.accounts import open_accounts
from gateway.db.jobs import events
from gateway.listing import Page
from node.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run ``rios gateway``; its JSON."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RIOS_CONFIG", raising=False)

    def run(*words, code=0):
        assert main(["gateway", *words, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def test_money_and_keys_stand_in_the_audit_log_and_its_chain_holds(run, tmp_path):
    key = run("key", "create", "--user", "ann", "--name", "laptop")
    run("user", "credit", "ann", "2.5")
    run("key", "revoke", key["key_id"])
    run("key", "revoke", key["key_id"])
    run("user", "disable", "ann")
    with open_accounts(GatewaySettings(), tmp_path / "data" / "rios") as accounts:
        ann = accounts.find_user("ann").id
        rows = list(reversed(audit.rows(accounts.database, Page(20), owner=None)))
        assert [row.action for row in rows] == [
            "user.created",
            "key.created",
            "credit.booked",
            "key.revoked",
            "user.changed",
        ], "revoking again changes nothing"
        assert {(row.user_id, row.by, row.owner_id) for row in rows} == {("", "command line", ann)}
        assert [rows[1].target, rows[3].target] == [key["key_id"]] * 2
        assert json.loads(rows[1].detail) == {"name": "laptop", "scopes": ""}
        assert json.loads(rows[2].detail)["microcredits"] == 2_500_000
        assert key["secret"] not in str(rows)
        assert audit.verify(accounts.database)[0] == 5
        with accounts.database.read() as connection:
            told = list(connection.execute(sa.select(events.c.kind).order_by(events.c.place)).scalars())
        assert told == ["user.created", "key.created", "key.revoked", "user.changed"]


def test_what_is_refused_leaves_no_row(run, tmp_path):
    run("user", "credit", "nobody", "1", code=1)
    run("key", "revoke", "0000", code=1)
    run("key", "create", "--user", "ann", "--name", "two\nlines", code=1)
    with open_accounts(GatewaySettings(), tmp_path / "data" / "rios") as accounts:
        assert [row.action for row in audit.rows(accounts.database, Page(20), owner=None)] == ["user.created"]
