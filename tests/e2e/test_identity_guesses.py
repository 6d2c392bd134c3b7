"""Guesses are bounded, and those of strangers shut nobody out."""

from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa
import trio
from gateway_rig import serving
from identity_rig import PASSWORD, Clock, add_user, bearer, client, sign_in

from config.settings import GatewaySettings
from gateway.accounts import open_accounts
from gateway.db import stamps
from gateway.db.identity import guesses as db_guesses
from gateway.identity import guesses

pytestmark = pytest.mark.usefixtures("cheap_hashes")


async def test_guesses_from_elsewhere_shut_nobody_out(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not who is signed in, nor who comes from where they signed in lately; and a crowd of addresses is bounded."""
    now = stamps.now_ms()
    clock = Clock(real=lambda: now)
    monkeypatch.setattr(guesses, "now_ms", clock)
    monkeypatch.setattr(guesses, "ACCOUNT", guesses.Allowance(burst=12, interval_ms=120_000))
    async with serving(tmp_path, database=database, trusted_proxies=("127.0.0.1",)) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")

        async def attempt(address: str, password: str = "wrong") -> int:
            http.headers["x-forwarded-for"] = address
            return (await sign_in(http, "grace", password=password)).status_code

        at_home, elsewhere = "2001:db8:1::1", "2001:db8:2::1"
        http.headers["x-forwarded-for"] = at_home
        headers = bearer(await sign_in(http, "grace"))
        crowd = [await attempt(f"203.0.113.{number % 4}") for number in range(16)]
        assert crowd == [401] * 12 + [429] * 4, "all of them together"
        assert await attempt(elsewhere, PASSWORD) == 429, "a stranger like them"
        http.headers["x-forwarded-for"] = elsewhere
        change = {"password": PASSWORD, "new_password": "an even longer one"}
        assert (await http.post("/v1/auth/password", json=change, headers=headers)).status_code == 204, "is signed in"
        assert await attempt("2001:db8:1::2", "an even longer one") == 200, "the same /64"
        theirs = [await attempt(at_home) for _ in range(guesses.HERE.burst + 1)]
        assert theirs == [401] * guesses.HERE.burst + [429], "a known address has no end of guesses either"
        clock.offset_ms += guesses.KNOWN_MS + 1
        crowd = [await attempt(f"203.0.113.{number % 4}") for number in range(12)]
        assert crowd == [401] * 12
        assert await attempt(at_home, "an even longer one") == 429, "that was long ago"


async def test_guesses_in_a_session_are_its_own(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        taken, own = bearer(await sign_in(http, "grace")), bearer(await sign_in(http, "grace"))
        change = {"password": "wrong", "new_password": "an even longer one"}
        statuses = [
            (await http.post("/v1/auth/password", json=change, headers=taken)).status_code
            for _ in range(guesses.SESSION.burst + 1)
        ]
        assert statuses == [401] * guesses.SESSION.burst + [429]
        right = {**change, "password": PASSWORD}
        assert (await http.post("/v1/auth/password", json=right, headers=own)).status_code == 204


def test_the_places_known_for_an_account_are_bounded(tmp_path: Path, database: str) -> None:
    with open_accounts(GatewaySettings(database=database), tmp_path) as accounts:
        for number in range(3 * guesses.KNOWN_MAX):
            guesses.know(accounts.database, f"203.0.113.{number}", "grace@example.com")
            guesses.know(accounts.database, "203.0.113.1", f"user{number}@example.com")
        with accounts.database.read() as connection:
            subjects = connection.execute(sa.select(db_guesses.c.subject)).scalars().all()
    counts = Counter(subject.rpartition(":")[0] for subject in subjects)
    assert sorted(counts.values()) == [1] * 3 * guesses.KNOWN_MAX + [guesses.KNOWN_MAX]
