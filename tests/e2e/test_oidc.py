"""Signing in with another provider: a real one, built with authlib, in a process of its own."""

import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import trio
from gateway_rig import Rig, serving
from identity_rig import (
    ME,
    PASSWORD,
    Clock,
    add_user,
    bearer,
    client,
    enrolled,
    problem,
    sign_in,
)
from oidc_rig import CLIENT_ID, Provider, served

from config.errors import ConfigError
from gateway import audit
from gateway.db import stamps
from gateway.identity import factors, passwords, people, sessions
from gateway.listing import Page

pytestmark = pytest.mark.usefixtures("cheap_hashes")

START, LINK = "/v1/auth/oidc/start", "/v1/auth/oidc/link"
CODE = "/v1/auth/oidc/code"
PROOF = {"password": PASSWORD}


async def answer_of(http: httpx.AsyncClient, location: str) -> str:
    """What the provider sends the browser back with: the callback's URL."""
    async with httpx.AsyncClient() as outside:
        back = await outside.get(location)
    assert back.status_code == 302, back.text
    return back.headers["location"]


async def come(http: httpx.AsyncClient, path: str = "/") -> httpx.Response:
    """Sign in as a browser does, up to the callback's answer."""
    begun = await http.get(START, params={"next": path})
    assert begun.status_code == 303, begun.text
    return await http.get(await answer_of(http, begun.headers["location"]))


async def test_sign_in_makes_a_user_once(tmp_path: Path, database: str, provider: Provider) -> None:
    async with served(tmp_path, provider, database=database) as rig, client(rig) as http:
        done = await come(http, "/dashboard?tab=1")
        assert (done.status_code, done.headers["location"]) == (303, "/dashboard?tab=1"), done.text
        asked = provider.asked()
        assert asked["code_challenge_method"] == "S256"
        assert min(len(asked[name]) for name in ("state", "nonce", "code_challenge")) >= 43
        assert asked["redirect_uri"] == f"{rig.gateway.url}/v1/auth/oidc/callback"
        me = (await http.get(ME)).json()
        assert (me["name"], me["role"]) == ("grace", "developer")
        assert rig.accounts.find_user("grace").email == "grace@provider.example"
        first = http.cookies["rios_session"]
        assert (await come(http)).status_code == 303
        assert (await http.get(ME)).json()["user_id"] == me["user_id"]
        assert http.cookies["rios_session"] != first
        async with client(rig) as other:
            stale = await other.get(ME, headers={"cookie": f"rios_session={first}"})
        assert stale.status_code == 401, "the session that was replaced has ended"


async def test_an_e_mail_address_links_nobody(tmp_path: Path, database: str, provider: Provider) -> None:
    """Whoever controls an address at the provider does not become the user who has it here."""
    async with served(tmp_path, provider, database=database) as rig, client(rig) as http:
        victim = await trio.to_thread.run_sync(add_user, rig, "victim")
        provider.lie(user={"sub": "mallory", "preferred_username": "victim", "email": "victim@example.com"})
        assert (await come(http)).status_code == 303
        me = (await http.get(ME)).json()
        assert me["user_id"] != victim
        assert me["name"].startswith("victim-")
        assert rig.accounts.find_user(me["name"]).email is None
        provider.lie(user={"sub": "other", "email": "other@example.com", "email_verified": False})
        assert (await come(http)).status_code == 303
        assert rig.accounts.find_user((await http.get(ME)).json()["name"]).email is None


async def test_the_same_newcomer_from_several_browsers_is_one_user(
    tmp_path: Path, database: str, provider: Provider
) -> None:
    async with served(tmp_path, provider, database=database) as rig:
        found: set[str] = set()

        async def newcomer() -> None:
            async with client(rig) as http:
                assert (await come(http)).status_code == 303
                found.add((await http.get(ME)).json()["user_id"])

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(newcomer)
        assert len(found) == 1
        names = [user.name for user in await trio.to_thread.run_sync(rig.accounts.list_users)]
        assert sorted(names) == ["ada", "grace", "local"]


async def test_linking_and_who_is_not_linked(tmp_path: Path, database: str, provider: Provider) -> None:
    async with served(tmp_path, provider, database=database, oidc_sign_up=False) as rig, client(rig) as http:
        assert problem(await come(http)) == (403, "forbidden")
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        token = {"x-csrf-token": (await sign_in(http, "grace", cookie=True)).json()["csrf_token"]}
        assert problem(await http.post(LINK)) == (403, "forbidden")
        location = (await http.post(LINK, json=PROOF, headers=token)).json()["location"]
        session = http.cookies["rios_session"]
        done = await http.get(await answer_of(http, location))
        assert done.status_code == 303, done.text
        assert http.cookies["rios_session"] == session, "linking signs nobody in"
        async with client(rig) as other:
            assert (await come(other)).status_code == 303
            assert (await other.get(ME)).json()["user_id"] == user_id
            # The same identity cannot belong to somebody else, too.
            await trio.to_thread.run_sync(add_user, rig, "eve")
            token = {"x-csrf-token": (await sign_in(other, "eve", cookie=True)).json()["csrf_token"]}
            location = (await other.post(LINK, json=PROOF, headers=token)).json()["location"]
            assert problem(await other.get(await answer_of(other, location))) == (409, "conflict")
            location = (await other.post(LINK, json=PROOF, headers=token)).json()["location"]
            callback = await answer_of(other, location)
            await other.post("/v1/auth/logout", headers=token)
            assert (await other.get(callback)).status_code == 401, "who began it has left"
        await trio.to_thread.run_sync(rig.accounts.set_disabled, "grace", True)
        async with client(rig) as other:
            assert problem(await come(other)) == (403, "forbidden")


async def linked(rig: Rig, http: httpx.AsyncClient, name: str) -> dict[str, str]:
    """Sign a browser in and link its identity at the provider; the headers for what it does next."""
    token = {"x-csrf-token": (await sign_in(http, name, cookie=True)).json()["csrf_token"]}
    begun = await http.post(LINK, json=PROOF, headers=token)
    assert begun.status_code == 200, begun.text
    assert (await http.get(await answer_of(http, begun.json()["location"]))).status_code == 303
    return token


async def test_a_session_alone_changes_nothing_of_how_one_signs_in(
    tmp_path: Path, database: str, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever took an open session, or an access token, neither links an identity of theirs nor moves the e-mail."""
    now = stamps.now_ms()
    clock = Clock(real=lambda: now)
    monkeypatch.setattr(factors, "now_ms", clock)
    async with served(tmp_path, provider, database=database) as rig, client(rig) as http:
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        headers = bearer(await sign_in(http, "grace"))
        app, codes = await enrolled(http, headers, clock)
        me = f"/v1/users/{user_id}"

        async def link(**proof: str) -> httpx.Response:
            return await http.post(LINK, json=proof, headers=headers)

        async def move(**proof: str) -> httpx.Response:
            return await http.patch(me, json={"email": "new@example.com", **proof}, headers=headers)

        for change in (link, move):
            assert problem(await change()) == (401, "invalid_credentials")
            assert problem(await change(password="wrong", code=app.code())) == (401, "invalid_credentials")
            assert problem(await change(password=PASSWORD)) == (401, "totp_required")
            assert problem(await change(password=PASSWORD, code="000000")) == (401, "invalid_code")
        assert rig.accounts.find_user("grace").email == "grace@example.com"
        assert (await link(password=PASSWORD, code=app.code())).status_code == 200
        assert (await http.patch(me, json={"name": "Grace"}, headers=headers)).status_code == 200, "a name is only that"
        assert (await move(password=PASSWORD, code=codes[0])).json()["email"] == "new@example.com"


async def test_identities_are_listed_and_taken_away(tmp_path: Path, database: str, provider: Provider) -> None:
    async with served(tmp_path, provider, database=database, oidc_sign_up=False) as rig:
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        await trio.to_thread.run_sync(add_user, rig, "eve")
        path = f"/v1/users/{user_id}/identities"
        async with client(rig) as http, client(rig) as other, client(rig) as eve:
            token = await linked(rig, http, "grace")
            (row,) = (await http.get(path)).json()["data"]
            assert (row["issuer"], bool(row["subject"])) == (provider.issuer, True)
            assert (await come(other)).status_code == 303
            hers = {"x-csrf-token": (await sign_in(eve, "eve", cookie=True)).json()["csrf_token"]}
            assert problem(await eve.get(path)) == (404, "not_found")
            assert problem(await eve.delete(f"{path}/{row['id']}", headers=hers)) == (404, "not_found")
            key = (await http.post("/v1/api-keys", json={}, headers=token)).json()["secret"]
            async with client(rig, authorization=f"Bearer {key}") as program:
                assert problem(await program.delete(f"{path}/{row['id']}")) == (403, "forbidden"), (
                    "a key that was found"
                )
            assert (await http.delete(f"{path}/{row['id']}", headers=token)).status_code == 204
            assert problem(await http.delete(f"{path}/{row['id']}", headers=token)) == (404, "not_found")
            assert (await http.get(path)).json()["data"] == []
            assert (await other.get(ME)).status_code == 401, "who came in by it is out"
            assert problem(await come(other)) == (403, "forbidden")
        rows = audit.rows(rig.accounts.database, Page(100), owner=user_id)
        assert {"identity.linked", "identity.unlinked"} <= {each.action for each in rows}


async def test_the_last_way_in_stays_until_there_is_a_password(
    tmp_path: Path, database: str, provider: Provider
) -> None:
    async with served(tmp_path, provider, database=database) as rig, client(rig) as http:
        assert (await come(http)).status_code == 303
        me = (await http.get(ME)).json()
        token, path = {"x-csrf-token": me["csrf_token"]}, f"/v1/users/{me['user_id']}/identities"
        (row,) = (await http.get(path)).json()["data"]
        assert problem(await http.delete(f"{path}/{row['id']}", headers=token)) == (409, "conflict")
        first = await http.post("/v1/auth/password", json={"new_password": PASSWORD}, headers=token)
        assert first.status_code == 204
        assert len((await http.get(path)).json()["data"]) == 1, "a first password takes nothing away"
        assert (await http.delete(f"{path}/{row['id']}", headers=token)).status_code == 204


async def test_the_second_factor_is_asked_for_here_too(
    tmp_path: Path, database: str, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = stamps.now_ms()
    clock = Clock(real=lambda: now)
    monkeypatch.setattr(factors, "now_ms", clock)
    async with served(tmp_path, provider, database=database, oidc_sign_up=False) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        app, codes = await enrolled(http, await linked(rig, http, "grace"), clock)
        async with client(rig) as other, client(rig) as stranger:
            done = await come(other, "/dashboard?tab=1")
            assert (done.status_code, done.headers["location"]) == (303, "/dashboard/sign-in?code=1")
            assert "rios_session" not in other.cookies
            assert "data-elsewhere" in (await other.get(done.headers["location"])).text
            assert problem(await other.post(CODE, json={"code": "000000"})) == (401, "invalid_code")
            assert problem(await stranger.post(CODE, json={"code": app.code()})) == (403, "forbidden")
            evil = {"sec-fetch-site": "cross-site"}
            assert (await other.post(CODE, json={"code": app.code()}, headers=evil)).status_code == 403
            code = app.code()
            came = await other.post(CODE, json={"code": code})
            assert (came.status_code, came.json()["location"]) == (200, "/dashboard?tab=1"), came.text
            assert (await other.get(ME)).json()["name"] == "grace"
            assert problem(await other.post(CODE, json={"code": codes[0]})) == (403, "forbidden"), "it is over"
        async with client(rig) as other:
            await come(other)
            await trio.to_thread.run_sync(rig.accounts.set_disabled, "grace", True)
            assert problem(await other.post(CODE, json={"code": codes[0]})) == (403, "forbidden")


@pytest.mark.parametrize("by", ["a new password", "unlinking"])
async def test_who_is_halfway_gets_no_further_without_the_link(
    tmp_path: Path, database: str, provider: Provider, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """What shuts somebody out shuts them out between the provider and the code, too; and no code is used up."""
    now = stamps.now_ms()
    clock = Clock(real=lambda: now)
    monkeypatch.setattr(factors, "now_ms", clock)
    async with served(tmp_path, provider, database=database, oidc_sign_up=False) as rig, client(rig) as http:
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        token = await linked(rig, http, "grace")
        _, codes = await enrolled(http, token, clock)
        async with client(rig) as thief:
            assert (await come(thief)).headers["location"] == "/dashboard/sign-in?code=1"
            if by == "unlinking":
                path = f"/v1/users/{user_id}/identities"
                (row,) = (await http.get(path)).json()["data"]
                assert (await http.delete(f"{path}/{row['id']}", headers=token)).status_code == 204
            else:
                change = {**PROOF, "new_password": "an even longer one", "code": codes[1]}
                assert (await http.post("/v1/auth/password", json=change, headers=token)).status_code == 204
            assert problem(await thief.post(CODE, json={"code": codes[0]})) == (403, "forbidden")
            assert (await thief.get(ME)).status_code == 401
        password = PASSWORD if by == "unlinking" else "an even longer one"
        async with client(rig) as other:
            assert (await sign_in(other, "grace", password=password, code=codes[0])).status_code == 200


@pytest.mark.parametrize("halfway", [False, True])
async def test_a_link_that_ends_while_somebody_comes_in_by_it_lets_nobody_in(
    tmp_path: Path, database: str, provider: Provider, monkeypatch: pytest.MonkeyPatch, halfway: bool
) -> None:
    now = stamps.now_ms()
    clock = Clock(real=lambda: now)
    monkeypatch.setattr(factors, "now_ms", clock)
    async with served(tmp_path, provider, database=database, oidc_sign_up=False) as rig, client(rig) as http:
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        token = await linked(rig, http, "grace")
        codes = (await enrolled(http, token, clock))[1] if halfway else []
        hashed = passwords.hash_password("an even longer one")
        async with client(rig) as thief:
            if halfway:
                await come(thief)
            start = sessions.start

            def late(*arguments: object, **more: object) -> object:
                people.set_password(rig.accounts.database, audit.OPERATOR, user_id, hashed)
                return start(*arguments, **more)

            monkeypatch.setattr(sessions, "start", late)
            refused = await thief.post(CODE, json={"code": codes[0]}) if halfway else await come(thief)
            assert problem(refused) == (403, "forbidden")
            assert (await thief.get(ME)).status_code == 401


async def test_without_a_password_only_a_new_session_changes_how_one_signs_in(
    tmp_path: Path, database: str, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(real=stamps.now_ms)
    monkeypatch.setattr(sessions, "now_ms", clock)
    async with served(tmp_path, provider, database=database) as rig, client(rig) as http:
        assert (await come(http)).status_code == 303
        clock.offset_ms = 601_000
        me = (await http.get(ME)).json()
        token, user = {"x-csrf-token": me["csrf_token"]}, f"/v1/users/{me['user_id']}"
        for answer in (
            await http.post(LINK, json={}, headers=token),
            await http.post("/v1/auth/password", json={"new_password": PASSWORD}, headers=token),
            await http.post("/v1/auth/totp/enrol", json={}, headers=token),
            await http.patch(user, json={"email": "thief@example.com"}, headers=token),
        ):
            assert problem(answer) == (401, "sign_in_again")
        assert (await come(http)).status_code == 303
        token = {"x-csrf-token": (await http.get(ME)).json()["csrf_token"]}
        assert (await http.post(LINK, json={}, headers=token)).status_code == 200


@pytest.mark.parametrize("by", ["oneself", "operator"])
async def test_a_new_password_ends_links(tmp_path: Path, database: str, provider: Provider, by: str) -> None:
    """Somebody else may have made them."""
    async with served(tmp_path, provider, database=database, oidc_sign_up=False) as rig, client(rig) as http:
        user_id = await trio.to_thread.run_sync(add_user, rig, "grace")
        token = await linked(rig, http, "grace")
        if by == "oneself":
            change = {**PROOF, "new_password": "an even longer one"}
            assert (await http.post("/v1/auth/password", json=change, headers=token)).status_code == 204
        else:
            hashed = passwords.hash_password("an even longer one")
            await trio.to_thread.run_sync(people.set_password, rig.accounts.database, audit.OPERATOR, user_id, hashed)
        async with client(rig) as other:
            assert problem(await come(other)) == (403, "forbidden")
        rows = audit.rows(rig.accounts.database, Page(100), owner=user_id)
        assert next(each.detail for each in rows if each.action == "password.changed") == '{"unlinked":1}'


LIES = {
    "alg none": {"alg": "none"},
    "HS256 with the public key": {"alg": "HS256"},
    "a key it does not publish": {"foreign": True},
    "another issuer": {"claims": {"iss": "https://evil.example"}},
    "another client": {"claims": {"aud": "somebody-else"}},
    "several clients": {"claims": {"aud": [CLIENT_ID, "somebody-else"]}},
    "issued to another client": {"claims": {"azp": "somebody-else"}},
    "another nonce": {"claims": {"nonce": "x" * 43}},
    "no nonce": {"claims": {"nonce": None}},
    "expired": {"claims": {"exp": int(time.time()) - 3600}},
    "no subject": {"claims": {"sub": None}},
    "an empty subject": {"claims": {"sub": ""}},
    "the answer of another provider": {"iss": "https://evil.example"},
    "an answer of nobody": {"iss": None},
    "refusal": {"error": True},
}


@pytest.mark.parametrize("lie", LIES)
async def test_lies_of_the_provider_let_nobody_in(
    tmp_path: Path, provider: Provider, caplog: pytest.LogCaptureFixture, lie: str
) -> None:
    async with served(tmp_path, provider) as rig, client(rig) as http:
        provider.lie(**LIES[lie])
        assert problem(await come(http)) == (403, "forbidden")
        assert "rios_session" not in http.cookies
        assert "refused a sign-in by another provider" in caplog.text
        provider.lie()
        assert (await come(http)).status_code == 303


async def test_an_answer_belongs_to_the_browser_that_asked(tmp_path: Path, provider: Provider) -> None:
    async with served(tmp_path, provider) as rig, client(rig) as attacker, client(rig) as victim:
        begun = await attacker.get(START)
        callback = await answer_of(attacker, begun.headers["location"])
        assert problem(await victim.get(callback)) == (403, "forbidden"), "without any flow"
        await victim.get(START)
        assert problem(await victim.get(callback)) == (403, "forbidden"), "with another flow"
        for field in ("state", "code"):
            changed = callback.replace(parse_qs(urlsplit(callback).query)[field][0], "changed")
            assert problem(await attacker.get(changed)) == (403, "forbidden")
        cookie = {"cookie": f"rios_oidc={attacker.cookies['rios_oidc'][:-4]}AAAA"}
        async with client(rig) as forger:
            assert problem(await forger.get(callback, headers=cookie)) == (403, "forbidden")
        assert (await attacker.get(callback)).status_code == 303
        assert problem(await attacker.get(callback)) == (403, "forbidden"), "the flow has ended"


async def test_where_to_go_afterwards_is_always_here(tmp_path: Path, provider: Provider) -> None:
    async with served(tmp_path, provider) as rig, client(rig) as http:
        for path in ("https://evil.example", "//evil.example", "/\\evil.example", "/a\r\nset-cookie: x=y", "", "x"):
            done = await come(http, path)
            assert (done.status_code, done.headers["location"]) == (303, "/"), path
            assert "x" not in http.cookies


async def test_a_provider_that_does_not_answer(tmp_path: Path, provider: Provider) -> None:
    gone = Provider(1)
    async with served(tmp_path, gone) as rig, client(rig) as http:
        answer = await http.get(START)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
        await trio.to_thread.run_sync(add_user, rig, "grace")
        assert (await http.get(ME, headers=bearer(await sign_in(http, "grace")))).status_code == 200
    # A server that is not the issuer it is asked as.
    other = Provider(0)
    other.issuer = provider.issuer.replace("127.0.0.1", "localhost")
    async with served(tmp_path, other) as rig, client(rig) as http:
        assert (await http.get(START)).status_code == 503


async def test_without_a_provider(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, client(rig) as http:
        for path in (START, "/v1/auth/oidc/callback?code=x&state=y"):
            assert problem(await http.get(path)) == (404, "not_found")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"oidc_issuer": "http://provider.example"}, "is not an https address"),
        ({"oidc_issuer": "provider"}, "is not an https address"),
        ({"oidc_client_id": ""}, "without gateway.oidc_client_id"),
        ({"oidc_credentials_file": "/nowhere"}, "does not exist"),
        ({"identity_public_url": "gateway.example"}, "is not an address"),
        ({"identity_key_file": "/nowhere/key"}, "does not exist"),
    ],
)
async def test_settings_that_cannot_be_right(
    tmp_path: Path, provider: Provider, settings: dict[str, object], message: str
) -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=message), allow_unwrapped=True, flatten_subgroups=True):
        async with served(tmp_path, provider, **settings):
            pass
