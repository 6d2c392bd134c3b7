"""Signing in, going on and leaving, over HTTP, on SQLite and on a real PostgreSQL alike."""

import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pyotp
import pytest
import sqlalchemy as sa
import trio
from gateway_rig import listening, serving
from identity_rig import LOGIN, ME, PASSWORD, REFRESH, Clock, add_user, bearer, client, enrolled, problem, sign_in

from config.errors import RequestError
from config.settings import GatewaySettings
from gateway import audit, guard, managing
from gateway.accounts import open_accounts
from gateway.audit import OPERATOR
from gateway.db import stamps
from gateway.db.identity import sessions as db_sessions
from gateway.identity import factors, guesses, invites, passwords, people, sessions
from gateway.identity.vault import Vault
from gateway.listing import Page

pytestmark = pytest.mark.usefixtures("cheap_hashes")

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}]}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Moves the time of second factors, guesses and sessions, which otherwise stands still."""
    now = stamps.now_ms()
    made = Clock(real=lambda: now)
    for module in (factors, guesses, sessions):
        monkeypatch.setattr(module, "now_ms", made)
    return made


async def test_sign_in_use_refresh_and_leave(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        await trio.to_thread.run_sync(rig.accounts.credit, "grace", 10_000)
        first = await sign_in(http, "grace")
        assert first.status_code == 200, first.text
        assert (first.json()["user_id"], first.json()["expires_in"]) == (user_id, 900)
        assert first.headers["cache-control"] == "no-store"
        assert "set-cookie" not in first.headers
        me = (await http.get(ME, headers=bearer(first))).json()
        assert (me["name"], me["role"], me["session_id"]) == ("grace", "developer", first.json()["session_id"])
        answer = await http.post(CHAT, json=BODY, headers=bearer(first))
        assert answer.status_code == 200, answer.text
        # A session is not the operator's own free user: it pays.
        assert (await rig.balance("grace")).balance == 10_000 - 2 - 2 * 7
        second = await http.post(REFRESH, json={"refresh_token": first.json()["refresh_token"]})
        assert second.json()["session_id"] == first.json()["session_id"]
        assert (await http.post("/v1/auth/logout", headers=bearer(second))).status_code == 204
        for ended in (first, second):
            assert problem(await http.get(ME, headers=bearer(ended))) == (401, "invalid_api_key")
        again = await http.post(REFRESH, json={"refresh_token": second.json()["refresh_token"]})
        assert problem(again) == (401, "invalid_api_key")


async def test_a_stolen_refresh_token_ends_the_session_for_both(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        first = await sign_in(http, "grace")
        stolen = {"refresh_token": first.json()["refresh_token"]}
        thief = await http.post(REFRESH, json=stolen)
        with caplog.at_level(logging.WARNING, "rios.security"):
            assert problem(await http.post(REFRESH, json=stolen)) == (401, "invalid_api_key")
        assert "was used again" in caplog.text
        assert stolen["refresh_token"] not in caplog.text
        assert problem(await http.get(ME, headers=bearer(thief))) == (401, "invalid_api_key")
        theirs = {"refresh_token": thief.json()["refresh_token"]}
        assert problem(await http.post(REFRESH, json=theirs)) == (401, "invalid_api_key")


async def test_two_uses_of_a_refresh_token_at_the_same_moment_are_not_both_first(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        token = {"refresh_token": (await sign_in(http, "grace")).json()["refresh_token"]}
        statuses: list[int] = []

        async def use() -> None:
            statuses.append((await http.post(REFRESH, json=token)).status_code)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(use)
        assert statuses.count(200) <= 1
        assert set(statuses) <= {200, 401}


async def test_second_factor(tmp_path: Path, database: str, clock: Clock) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        headers = bearer(await sign_in(http, "grace"))
        app, codes = await enrolled(http, headers, clock)
        assert len(set(codes)) == 10
        assert problem(await sign_in(http, "grace")) == (401, "totp_required")
        assert problem(await sign_in(http, "grace", password="wrong", code=app.code())) == (401, "invalid_credentials")
        code = app.code()
        assert (await sign_in(http, "grace", code=code)).status_code == 200
        assert problem(await sign_in(http, "grace", code=code)) == (401, "invalid_code"), "a step works once"
        earlier = app.code()
        later = app.code()
        assert (await sign_in(http, "grace", code=later)).status_code == 200
        assert problem(await sign_in(http, "grace", code=earlier)) == (401, "invalid_code"), "nor does one before it"
        for wrong in ("000000", "12345", "abcdef", "١٢٣٤٥٦", "x" * 64):
            assert problem(await sign_in(http, "grace", code=wrong)) == (401, "invalid_code")
        assert (await sign_in(http, "grace", code=codes[0].upper())).status_code == 200
        assert problem(await sign_in(http, "grace", code=codes[0])) == (401, "invalid_code"), "a recovery code, too"
        again = await http.post("/v1/auth/totp/enrol", json={"password": PASSWORD}, headers=headers)
        assert problem(again) == (409, "conflict")
        off = {"password": PASSWORD, "code": app.code()}
        wrong = await http.post("/v1/auth/totp/disable", json={**off, "password": "x"}, headers=headers)
        assert problem(wrong) == (401, "invalid_credentials")
        assert (await http.post("/v1/auth/totp/disable", json=off, headers=headers)).status_code == 204
        assert (await sign_in(http, "grace")).status_code == 200


async def test_a_code_at_the_same_moment_works_once(tmp_path: Path, database: str, clock: Clock) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        app, codes = await enrolled(http, bearer(await sign_in(http, "grace")), clock)
        for code in (app.code(), codes[0]):
            statuses: list[int] = []

            async def use(code: str = code, statuses: list[int] = statuses) -> None:
                statuses.append((await sign_in(http, "grace", code=code)).status_code)

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(use)
            assert sorted(statuses) == [200, 401, 401, 401]


async def test_a_factor_that_was_never_confirmed_shuts_nobody_out(tmp_path: Path, clock: Clock) -> None:
    async with serving(tmp_path) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        headers = bearer(await sign_in(http, "grace"))
        begun = await http.post("/v1/auth/totp/enrol", json={"password": PASSWORD}, headers=headers)
        assert re.fullmatch(
            r"otpauth://totp/RiOS:grace%40example.com\?secret=[A-Z2-7]{32}&issuer=RiOS", begun.json()["uri"]
        )
        stored = (tmp_path / "gateway.db").read_bytes() + (tmp_path / "gateway.db-wal").read_bytes()
        assert begun.json()["secret"].encode() not in stored
        wrong = await http.post("/v1/auth/totp/confirm", json={"code": "000000"}, headers=headers)
        assert problem(wrong) == (401, "invalid_code")
        assert (await sign_in(http, "grace")).status_code == 200


async def test_a_new_password_ends_the_other_sessions(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        other, own = await sign_in(http, "grace"), await sign_in(http, "grace")
        change = {"password": PASSWORD, "new_password": "an even longer one"}
        wrong = await http.post("/v1/auth/password", json={**change, "password": "guess"}, headers=bearer(own))
        assert problem(wrong) == (401, "invalid_credentials")
        for weak in ("short", "a" * 20, "GRACE@example.com"):
            answer = await http.post("/v1/auth/password", json={**change, "new_password": weak}, headers=bearer(own))
            assert problem(answer) == (400, "weak_password")
            assert answer.json()["error"]["param"] == "new_password"
        assert (await http.post("/v1/auth/password", json=change, headers=bearer(own))).status_code == 204
        assert (await http.get(ME, headers=bearer(own))).status_code == 200
        assert problem(await http.get(ME, headers=bearer(other))) == (401, "invalid_api_key")
        assert problem(await sign_in(http, "grace")) == (401, "invalid_credentials")
        assert (await sign_in(http, "grace", password="an even longer one")).status_code == 200


async def test_a_new_password_needs_a_code_where_there_is_a_second_factor(tmp_path: Path, clock: Clock) -> None:
    """A session that somebody found open, and a password they saw typed, do not shut the owner out."""
    async with serving(tmp_path) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        headers = bearer(await sign_in(http, "grace"))
        app, _ = await enrolled(http, headers, clock)
        change = {"password": PASSWORD, "new_password": "an even longer one"}
        for code, why in (("", "totp_required"), ("000000", "invalid_code")):
            answer = await http.post("/v1/auth/password", json={**change, "code": code}, headers=headers)
            assert problem(answer) == (401, why)
        code = app.code()
        weak = await http.post("/v1/auth/password", json={**change, "new_password": "x", "code": code}, headers=headers)
        assert problem(weak) == (400, "weak_password"), "and the code can be used still"
        assert (await http.post("/v1/auth/password", json={**change, "code": code}, headers=headers)).status_code == 204


async def test_a_password_that_changes_while_one_signs_in_with_it(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is half in with the old password does not end up all in."""
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        verify = passwords.verify_password

        def slow(password: str, stored: str | None) -> bool:
            good = verify(password, stored)
            people.set_password(rig.accounts.database, OPERATOR, user_id, passwords.hash_password("an even longer one"))
            return good

        monkeypatch.setattr(passwords, "verify_password", slow)
        assert (await sign_in(http, "grace")).status_code == 401
        assert sessions.of_user(rig.accounts.database, user_id) == []


async def test_a_new_password_and_a_session_that_ends_do_not_deadlock(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        await sign_in(http, "grace")
        books_of = rig.accounts.database

        def both() -> None:
            with ThreadPoolExecutor(1) as pool:
                with books_of.write() as connection:
                    connection.execute(sa.update(db_sessions).values(revoked_at_ms=1))
                    changed = pool.submit(people.set_password, books_of, OPERATOR, user_id, "a hash")
                    time.sleep(0.5)  # by now it waits for the session
                    audit.record(connection, OPERATOR, "session.ended", "s", owner_id=user_id)
                changed.result(10)

        await trio.to_thread.run_sync(both)


async def test_signing_up_only_where_it_is_allowed(tmp_path: Path, database: str) -> None:
    new = {"email": " New@Example.com ", "password": PASSWORD}
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        assert problem(await http.post("/v1/auth/register", json=new)) == (403, "forbidden")
    async with serving(tmp_path, database=database, identity_sign_up=True) as rig, client(rig) as http:
        made = await http.post("/v1/auth/register", json=new)
        assert (made.status_code, made.json()["email"]) == (201, "new@example.com")
        assert problem(await http.post("/v1/auth/register", json=new)) == (409, "conflict")
        for wrong in ({"email": "no address"}, {"email": "a@b\nc"}, {"password": "short"}):
            assert (await http.post("/v1/auth/register", json={**new, **wrong})).status_code == 400
        answer = await sign_in(http, "new")
        assert (await http.get(ME, headers=bearer(answer))).json()["role"] == "developer"


async def test_an_invite_sets_a_password_once(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(lambda: add_user(rig, "root", role="admin"))
        guest = await trio.to_thread.run_sync(lambda: rig.accounts.create_user("eve", email="eve@example.com"))
        assert problem(await sign_in(http, "eve")) == (401, "invalid_credentials")
        headers = bearer(await sign_in(http, "root"))
        for_eve = {"user_id": guest.id}
        stale = (await http.post("/v1/auth/invites", json=for_eve, headers=headers)).json()["token"]
        token = (await http.post("/v1/auth/invites", json=for_eve, headers=headers)).json()["token"]
        assert problem(await http.post("/v1/auth/accept", json={"token": token, "password": "weak"})) == (
            400,
            "weak_password",
        )
        for wrong in (stale, token[:-1] + "_", "rios_invite_x"):
            answer = await http.post("/v1/auth/accept", json={"token": wrong, "password": PASSWORD})
            assert problem(answer) == (401, "invalid_api_key")
        accept = {"token": token, "password": PASSWORD}
        assert (await http.post("/v1/auth/accept", json=accept)).status_code == 204
        assert problem(await http.post("/v1/auth/accept", json=accept)) == (401, "invalid_api_key")
        answer = await sign_in(http, "eve")
        not_admin = await http.post("/v1/auth/invites", json=for_eve, headers=bearer(answer))
        assert problem(not_admin) == (403, "forbidden")
        nobody = await http.post("/v1/auth/invites", json={"user_id": "nobody"}, headers=headers)
        assert problem(nobody) == (404, "not_found")


async def test_an_invite_is_used_once_by_one_of_many(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        guest = await trio.to_thread.run_sync(lambda: rig.accounts.create_user("eve", email="eve@example.com"))
        make = partial(invites.create, rig.accounts.database, OPERATOR, guest.id)
        token = (await trio.to_thread.run_sync(make)).token
        found: dict[str, int] = {}

        async def accept(password: str) -> None:
            answer = await http.post("/v1/auth/accept", json={"token": token, "password": password})
            found[password] = answer.status_code

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(accept, f"a password of one's own {number}")
        assert sorted(found.values()) == [204, 401, 401, 401]
        for password, status in found.items():
            signed_in = (await sign_in(http, "eve", password=password)).status_code == 200
            assert signed_in is (status == 204), "nobody is told that a password is theirs which is not"


@pytest.mark.parametrize("by", ["another invite", "the clock"])
async def test_an_invite_that_ends_while_the_password_is_hashed_sets_none(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        guest = await trio.to_thread.run_sync(lambda: rig.accounts.create_user("eve", email="eve@example.com"))
        make = partial(invites.create, rig.accounts.database, OPERATOR, guest.id)
        made = await trio.to_thread.run_sync(make)
        later: list[str] = []
        hashed = passwords.Passwords.hashed

        async def slow(self: passwords.Passwords, password: str) -> str:
            if by == "the clock":
                monkeypatch.setattr(invites, "now_ms", lambda: made.expires_at_ms)
            elif not later:
                later.append((await trio.to_thread.run_sync(make)).token)
            return await hashed(self, password)

        monkeypatch.setattr(passwords.Passwords, "hashed", slow)
        accept = {"token": made.token, "password": PASSWORD}
        assert problem(await http.post("/v1/auth/accept", json=accept)) == (401, "invalid_api_key")
        assert problem(await sign_in(http, "eve")) == (401, "invalid_credentials")
        for token in later:
            accept["token"] = token
            assert (await http.post("/v1/auth/accept", json=accept)).status_code == 204, "the new one works"


def test_a_code_is_of_the_secret_it_was_made_with(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who enrols anew while a first code is looked at switches on nothing that their authenticator does not have."""
    with open_accounts(GatewaySettings(database=database), tmp_path) as accounts:
        opened, vault, user_id = accounts.database, Vault(bytes(32)), accounts.create_user("grace").id
        seen = factors._step_of

        def meanwhile(*arguments: object) -> object:
            found = seen(*arguments)
            monkeypatch.setattr(factors, "_step_of", seen)
            factors.remove(opened, OPERATOR, user_id)
            again.append(factors.enrol(opened, vault, user_id, "grace").secret)
            return found

        again: list[str] = []
        code = pyotp.TOTP(factors.enrol(opened, vault, user_id, "grace").secret).now()
        monkeypatch.setattr(factors, "_step_of", meanwhile)
        with pytest.raises(RequestError, match="enrolled anew, meanwhile"):
            factors.confirm(opened, vault, OPERATOR, user_id, code)
        code = pyotp.TOTP(again[0]).now()
        assert factors.confirm(opened, vault, OPERATOR, user_id, code)
        monkeypatch.setattr(factors, "_step_of", meanwhile)
        monkeypatch.setattr(factors, "now_ms", lambda: stamps.now_ms() + 30_000)
        code = pyotp.TOTP(again[0]).at(factors.now_ms() // 1000)
        assert not factors.use(opened, vault, user_id, code), "nor does it use up a step of the new one"
        code = pyotp.TOTP(again[1]).at(factors.now_ms() // 1000)
        assert factors.confirm(opened, vault, OPERATOR, user_id, code)


async def test_sessions_are_listed_and_ended(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig, **{"user-agent": "lap top"}) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        await trio.to_thread.run_sync(add_user, rig, "eve")
        phone, laptop, eve = await sign_in(http, "grace"), await sign_in(http, "grace"), await sign_in(http, "eve")
        rows = (await http.get("/v1/auth/sessions", headers=bearer(laptop))).json()["data"]
        assert [row["current"] for row in rows].count(True) == 1
        assert {row["id"] for row in rows} == {phone.json()["session_id"], laptop.json()["session_id"]}
        assert {(row["agent"], row["address"], row["method"]) for row in rows} == {("lap top", "127.0.0.1", "password")}
        path = f"/v1/auth/sessions/{phone.json()['session_id']}"
        assert problem(await http.delete(path, headers=bearer(eve))) == (404, "not_found"), "not another user's"
        assert (await http.delete(path, headers=bearer(laptop))).status_code == 204
        assert problem(await http.delete(path, headers=bearer(laptop))) == (404, "not_found")
        assert problem(await http.get(ME, headers=bearer(phone))) == (401, "invalid_api_key")


async def test_keys_cannot_change_how_one_signs_in(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, rig.http() as http:
        for path, body in (
            ("password", {"new_password": PASSWORD}),
            ("totp/enrol", {}),
            ("totp/confirm", {"code": "123456"}),
            ("totp/disable", {"code": "123456"}),
            ("logout", {}),
            ("oidc/link", {}),
        ):
            assert problem(await http.post(f"/v1/auth/{path}", json=body)) == (403, "forbidden"), path
        assert (await http.get(ME)).json()["key_id"] is not None


async def test_a_session_ends_in_time(
    tmp_path: Path, database: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "CACHE_SECONDS", 0.0)
    async with serving(tmp_path, database=database, identity_session_hours=1) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        made = await sign_in(http, "grace")
        clock.offset_ms = 3_590_000
        assert (await http.get(ME, headers=bearer(made))).status_code == 200
        clock.offset_ms = 3_601_000
        assert (await http.get(ME, headers=bearer(made))).status_code == 401
        answer = await http.post(REFRESH, json={"refresh_token": made.json()["refresh_token"]})
        assert answer.status_code == 401


async def test_role_and_disabling_reach_a_session_within_seconds(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "CACHE_SECONDS", 0.0)
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(lambda: add_user(rig, "root", role="admin"))
        await trio.to_thread.run_sync(add_user, rig, "grace")
        headers = bearer(await sign_in(http, "grace"))
        assert (await http.post(CHAT, json=BODY, headers=headers)).status_code == 402
        user = rig.accounts.find_user("grace")
        change = managing.UserChange(role="viewer")
        await trio.to_thread.run_sync(managing.change_user, rig.accounts, OPERATOR, user.id, None, change)
        assert problem(await http.post(CHAT, json=BODY, headers=headers)) == (403, "forbidden")
        await trio.to_thread.run_sync(rig.accounts.set_disabled, "grace", True)
        assert problem(await http.get(ME, headers=headers)) == (403, "forbidden")
        assert problem(await sign_in(http, "grace")) == (403, "forbidden")


async def test_guesses_are_limited_per_account_and_address(
    tmp_path: Path, database: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        for name in ("grace", "nobody"):
            for _ in range(guesses.HERE.burst):
                assert problem(await sign_in(http, name, password="guess")) == (401, "invalid_credentials")
            limited = await sign_in(http, name)
            assert problem(limited) == (429, "rate_limit_exceeded"), "also for the right password"
            assert 1 <= int(limited.headers["retry-after"]) <= guesses.HERE.interval_ms // 1000
        clock.offset_ms += guesses.HERE.interval_ms
        assert (await sign_in(http, "grace")).status_code == 200
        assert (await sign_in(http, "grace")).status_code == 200, "a success is no guess"
        left = guesses.ADDRESS.burst  # It, too, is forgotten by now.
        statuses = [(await sign_in(http, f"user{n}", password="guess")).status_code for n in range(left + 1)]
        assert statuses == [401] * left + [429]
        assert "guess" not in caplog.text.replace("guesses", "")
        sample = rig.registry.get_sample_value
        assert sample("rios_gateway_sign_ins_total", {"method": "password", "result": "limited"}) == 3


async def test_a_browser_session(tmp_path: Path, database: str) -> None:
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        made = await sign_in(http, "grace", cookie=True)
        assert set(made.json()) == {"session_id", "user_id", "csrf_token"}
        cookie = made.headers["set-cookie"].lower()
        assert cookie.startswith("rios_session=")
        assert {"httponly", "path=/", "samesite=lax"} <= {part.strip() for part in cookie.split(";")}
        assert "secure" not in cookie, "the gateway is reached over plain HTTP here"
        token = {"x-csrf-token": made.json()["csrf_token"]}
        assert (await http.get(ME)).json()["csrf_token"] == token["x-csrf-token"]
        assert (await http.post(CHAT, json=BODY, headers=token)).status_code == 402
        assert (await http.post("/v1/auth/logout", headers=token)).status_code == 204
        assert "rios_session" not in http.cookies
        assert problem(await http.get(ME)) == (401, "invalid_api_key")


async def test_behind_tls_the_cookie_is_bound_to_the_host(tmp_path: Path) -> None:
    async with serving(tmp_path, identity_public_url="https://gateway.example") as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        made = await sign_in(http, "grace", cookie=True)
        name, value = made.headers["set-cookie"].partition(";")[0].split("=")
        assert name == "__Host-rios_session"
        assert "; secure" in made.headers["set-cookie"].lower()
        assert (await http.get(ME, headers={"cookie": f"{name}={value}"})).status_code == 200
        assert (await http.get(ME, headers={"cookie": f"rios_session={value}"})).status_code == 401


@pytest.mark.parametrize(
    ("trusted", "said", "secure"),
    [
        (True, ["https"], True),
        (True, ["http", "https"], True),
        (True, ["HTTPS"], True),
        (True, ["https, http"], False),
        (True, ["https", "http"], False),
        (True, ["http"], False),
        (True, ["gopher"], False),
        (True, [], False),
        (False, ["https"], False),
    ],
)
async def test_behind_a_trusted_proxy_with_tls_the_cookie_is_bound_to_the_host(
    tmp_path: Path, trusted: bool, said: list[str], secure: bool
) -> None:
    """By the last word, which is the proxy's own: what stands in front of it, a client may have written."""
    async with serving(tmp_path, trusted_proxies=("127.0.0.1",) if trusted else ()) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        words = [("x-forwarded-proto", each) for each in said]
        http.headers = httpx.Headers([*http.headers.multi_items(), *words])
        made = await sign_in(http, "grace", cookie=True)
        cookie = made.headers["set-cookie"]
        assert (cookie.startswith("__Host-rios_session="), "; secure" in cookie.lower()) == (secure, secure)
        assert ("strict-transport-security" in made.headers) == secure
        value = cookie.partition(";")[0]
        assert (await http.get(ME, headers=[*words, ("cookie", value)])).status_code == 200


async def test_two_gateways_share_sessions_keys_and_revocations(tmp_path: Path, postgresql: str) -> None:
    """With a key file each; TOTP secrets need the same one."""
    from postgresql import new_database

    database = new_database(postgresql)
    async with (
        serving(tmp_path / "a", database=database) as first,
        serving(tmp_path / "b", database=database) as second,
        client(first) as one,
        client(second) as two,
    ):
        await trio.to_thread.run_sync(add_user, first, "grace")
        at_first, at_second = await sign_in(one, "grace"), await sign_in(two, "grace")
        for http in (one, two):
            for answer in (at_first, at_second):
                assert (await http.get(ME, headers=bearer(answer))).status_code == 200
        ids = [{key["kid"] for key in (await http.get("/.well-known/jwks.json")).json()["keys"]} for http in (one, two)]
        assert len(ids[1]) == 2
        refreshed = await two.post(REFRESH, json={"refresh_token": at_first.json()["refresh_token"]})
        assert (await one.get(ME, headers=bearer(refreshed))).status_code == 200
        assert (await one.post("/v1/auth/logout", headers=bearer(at_first))).status_code == 204
        with trio.fail_after(guard.CACHE_SECONDS + 1):
            while (await two.get(ME, headers=bearer(refreshed))).status_code == 200:  # noqa: ASYNC110 - another gateway
                await trio.sleep(0.25)


async def test_the_database_goes_away_and_comes_back(tmp_path: Path, database: str) -> None:
    gone = False

    def refuse(*_: object) -> None:
        if gone:
            raise sa.exc.OperationalError("connect", None, OSError("connection refused"))

    with listening("begin", refuse):
        async with serving(tmp_path, database=database) as rig, client(rig) as http:
            await trio.to_thread.run_sync(add_user, rig, "grace")
            made = await sign_in(http, "grace")
            gone = True
            for answer in (
                await sign_in(http, "grace"),
                await http.post(REFRESH, json={"refresh_token": made.json()["refresh_token"]}),
                await http.get(ME, headers=bearer(made)),
            ):
                assert answer.status_code == 503, answer.text
            gone = False
            assert (await http.get(ME, headers=bearer(made))).status_code == 200
            assert (await sign_in(http, "grace")).status_code == 200
            again = await http.post(REFRESH, json={"refresh_token": made.json()["refresh_token"]})
            assert again.status_code == 200, "what did not happen used nothing up"


async def test_what_happened_stands_in_the_audit_log(tmp_path: Path, database: str, clock: Clock) -> None:
    async with serving(tmp_path, database=database, identity_sign_up=True) as rig, client(rig) as http:
        await http.post("/v1/auth/register", json={"email": "grace@example.com", "password": PASSWORD})
        made = await sign_in(http, "grace")
        headers, user_id = bearer(made), made.json()["user_id"]
        app, _ = await enrolled(http, headers, clock)
        off = {"password": PASSWORD, "code": app.code()}
        await http.post("/v1/auth/totp/disable", json=off, headers=headers)
        await sign_in(http, "grace")
        change = {"password": PASSWORD, "new_password": "an even longer one"}
        await http.post("/v1/auth/password", json=change, headers=headers)
        await http.post("/v1/auth/logout", headers=headers)
        find = partial(audit.rows, rig.accounts.database, Page(100), owner=user_id)
        rows = list(reversed(await trio.to_thread.run_sync(find)))
        assert [row.action for row in rows] == [
            "user.created",
            "session.started",
            "second_factor.enabled",
            "second_factor.disabled",
            "session.started",
            "sessions.ended",
            "password.changed",
            "session.ended",
        ]
        assert {row.user_id for row in rows} == {user_id}
        assert rows[0].by == "address 127.0.0.1"
        assert rows[-1].by == f"session {made.json()['session_id']}"
        assert PASSWORD not in str(rows)


async def test_bodies_that_are_wrong(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, client(rig) as http:
        for body in ({}, {"email": 1, "password": "x"}, {"email": "a@b", "password": "x", "admin": True}, [], "x"):
            answer: httpx.Response = await http.post(LOGIN, json=body)
            assert answer.status_code == 400, body
