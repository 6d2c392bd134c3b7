"""Invites as text, and the swarm file: what a typing error, a damaged file or a curious reader gets."""

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import ConfigError, IntegrityError, LocalError
from p2p import swarmfile
from p2p.core import invite as invites
from p2p.core.invite import BLOCK_CHARS, PREFIX, Invite, Swarm

SEED = "/ip4/203.0.113.7/tcp/4701/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
MADE = Invite(Swarm(bytes(range(32)), "home", (SEED, SEED.replace("4701", "4702"))), b'{"format": "rios-genesis/1"}')
TEXT = invites.dumps(MADE)


@given(st.binary(min_size=32, max_size=32), st.text(max_size=64), st.lists(st.text(max_size=99)), st.binary())
def test_an_invite_comes_back_as_it_went(key, name, seeds, genesis):
    made = Invite(Swarm(key, name, tuple(seeds[:32])), genesis)
    assert invites.loads(invites.dumps(made)) == made


def test_the_invite_of_the_vectors():
    assert invites.dumps(Invite(Swarm(b"k" * 32, "n", ("s",)), b"g")) == (
        "rios1-lQHEIGtra2tra2tra2tra2tra2trymdha2tra2tra2tra2tra2troW6RoXPECOcxAWd-47E"
    )
    assert Swarm(b"k" * 32).id == "9aa98fca21f6c97b"


def test_line_breaks_do_not_count():
    broken = "  " + "\n ".join(TEXT[at : at + 50] for at in range(0, len(TEXT), 50)) + "\r\n"
    assert invites.loads(broken) == MADE


@given(st.integers(len(PREFIX), len(TEXT) - 1), st.sampled_from("aB3-_"))
def test_a_typing_error_is_named_by_its_place(at, other):
    if TEXT[at] == other or at == len(TEXT) - 1:
        return
    with pytest.raises(ConfigError) as error:
        invites.loads(TEXT[:at] + other + TEXT[at + 1 :])
    first = len(PREFIX) + (at - len(PREFIX)) // BLOCK_CHARS * BLOCK_CHARS + 1
    assert f"between characters {first} and {min(first + BLOCK_CHARS - 1, len(TEXT))}" in error.value.message


def test_what_is_no_invite_is_refused_by_name():
    for text, word in (
        ("", "begin with"),
        ("hello", "begin with"),
        (TEXT.removeprefix(PREFIX), "begin with"),
        ("rios2-" + TEXT.removeprefix(PREFIX), "version 2"),
        (TEXT[:-40], "cut short"),
        (TEXT + "abcd" * 20, "cut short or has text too many"),
        (TEXT[:20] + "." + TEXT[21:], "character 21"),
        (PREFIX, "content"),
        (PREFIX + "A" * (1 << 18), "longer"),
    ):
        with pytest.raises(ConfigError) as error:
            invites.loads(text)
        assert word in error.value.message
        assert error.value.hint
        assert TEXT[20:40] not in str(error.value)


def test_the_key_shows_nowhere():
    for shown in (repr(MADE), str(MADE.swarm), MADE.swarm.id):
        assert MADE.swarm.key.hex()[:8] not in shown
        assert repr(MADE.swarm.key)[2:-1] not in shown


def test_the_swarm_file_is_for_its_owner_only(tmp_path):
    path = tmp_path / "data" / "swarm.json"
    assert swarmfile.load(path) is None
    swarm = swarmfile.make("home")
    assert swarm.key != swarmfile.make("home").key
    before = os.umask(0)
    try:
        swarmfile.save(path, swarm)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert swarmfile.load(path) == swarm
    path.chmod(0o644)
    with pytest.raises(LocalError) as error:
        swarmfile.load(path)
    assert "chmod 600" in error.value.hint
    path.chmod(0o600)
    for damage in ("", "{", "[]", path.read_text()[:40], path.read_text().replace(swarm.key.hex(), "00")):
        path.write_text(damage)
        with pytest.raises(IntegrityError) as damaged:
            swarmfile.load(path)
        assert str(path) in damaged.value.message
        assert swarm.key.hex() not in str(damaged.value)
