"""``rios gateway user``: who may sign in, from the command line, without a daemon."""

import io
import json

import pytest

from gateway.accounts import open_accounts
from gateway.identity import invites, passwords, people, sessions, tokens
from gateway.identity.sessions import Client
from gateway.identity.vault import Vault
from node import user_commands
from node.cli import main

PASSWORD = "correct horse battery staple"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command of ``rios gateway user`` with something on its standard input; its JSON."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RIOS_CONFIG", raising=False)

    def run(*words, stdin="", code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        assert main(["gateway", "user", *words, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def database(tmp_path):
    from config.settings import GatewaySettings

    with open_accounts(GatewaySettings(), tmp_path / "data" / "rios") as accounts:
        yield accounts.database


def test_a_first_admin(run, database):
    made = run(
        "create",
        "root",
        "--role",
        "admin",
        "--email",
        "Root@Example.com",
        "--password-file",
        "-",
        stdin=PASSWORD + "\n",
    )
    assert (made["role"], made["email"], made["has_password"]) == ("admin", "root@example.com", True)
    person = people.by_email(database, "root@example.com")
    assert passwords.verify_password(PASSWORD, person.password_hash)
    assert PASSWORD not in str(person.password_hash)


def test_without_a_password_there_is_an_invite(run, database):
    made = run("create", "ada", "--email", "ada@example.com")
    assert not made["has_password"]
    token = run("invite", "ada")["token"]
    assert invites.find(database, token) == made["id"]
    assert run("create", "bob")["email"] is None
    assert run("invite", "bob", code=1)["error"]["code"] == "invalid_request"


def test_a_new_password_and_what_it_ends(run, database, tmp_path):
    user = run("create", "ada", "--email", "ada@example.com", "--password-file", "-", stdin=PASSWORD)["id"]
    client = Client(address="::1")
    session, _ = sessions.start(database, user, "oidc", client, seconds=60, cookie=False)
    file = tmp_path / "password"
    file.write_text("another long one\n")
    run("password", "ada", "--password-file", str(file))
    assert sessions.by_id(database, session.id) is None
    assert passwords.verify_password("another long one", people.by_id(database, user).password_hash)


@pytest.mark.parametrize(
    ("words", "stdin", "says"),
    [
        (["create", "eve", "--password-file", "-"], PASSWORD, "needs an e-mail"),
        (["create", "eve", "--email", "eve@x", "--password-file", "-"], "short", "at least 10"),
        (["create", "eve", "--email", "eve@x", "--password-file", "-"], "a" * 12, "easily guessed"),
        (["create", "eve", "--email", "eve@x", "--password-file", "-"], f"{PASSWORD}\nmore", "one line"),
        (["create", "eve", "--email", "no address"], "", "not an e-mail address"),
        (["create", "eve", "--email", "ada@x"], "", "already a user"),
        (["create", "eve", "--role", "root"], "", "invalid choice"),
        (["password", "ada"], "", "no password"),
        (["password", "ada", "--password-file", "/nowhere"], "", "cannot read"),
        (["password", "nobody"], "", "no user"),
        (["password", "local", "--password-file", "-"], PASSWORD, "no e-mail"),
        (["role", "local", "admin"], "", "no user"),
    ],
)
def test_what_is_refused(run, words, stdin, says):
    run("create", "ada", "--email", "ada@x")
    monkey = run(*words, stdin=stdin, code=1 if says not in _USAGE else 2)
    assert says in monkey["error"]["message"]


_USAGE = ("needs an e-mail", "one line", "invalid choice", "no password", "cannot read")


def test_roles_factors_and_doors(run, database):
    user = run("create", "ada", "--email", "ada@x")["id"]
    assert run("role", "ada", "viewer")["role"] == "viewer"
    assert run("totp-reset", "ada") == {"user_id": user, "removed": False}
    assert run("disable", "ada")["disabled"]
    assert people.by_id(database, user).disabled
    assert not run("enable", "ada")["disabled"]
    client = Client(address="::1")
    session, _ = sessions.start(database, user, "oidc", client, seconds=60, cookie=True)
    assert run("sign-out", "ada")["ended"] == 1
    assert sessions.by_id(database, session.id) is None
    tokens.add_key(database, Vault(b"k" * 32))
    assert main(["gateway", "revoke-tokens"]) == 0
    assert tokens.read_keys(database, Vault(b"k" * 32))[0] == {}


def test_on_a_terminal_the_password_is_asked_for_twice(run, monkeypatch, database):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    answers = iter([PASSWORD, PASSWORD, PASSWORD, "something else", ""])
    monkeypatch.setattr(user_commands.getpass, "getpass", lambda prompt: next(answers))
    monkeypatch.setattr(io, "StringIO", Terminal)
    assert run("create", "ada", "--email", "ada@x")["has_password"]
    assert "differ" in run("create", "eve", "--email", "eve@x", code=2)["error"]["message"]
    assert not run("create", "eve", "--email", "eve@x")["has_password"]
