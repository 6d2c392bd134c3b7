"""Signing in with another provider: a real one, built with authlib, in a process of its own."""

import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import trio
from gateway_rig import Rig, serving
from identity_rig import ME, add_user, bearer, client, problem, sign_in

from config.errors import ConfigError

pytestmark = pytest.mark.usefixtures("cheap_hashes")

CLIENT_ID, SECRET = "rios-test", "s3cret with spaces & signs"
START, LINK = "/v1/auth/oidc/start", "/v1/auth/oidc/link"


class Provider:
    def __init__(self, port: int) -> None:
        self.issuer = f"http://127.0.0.1:{port}"

    def lie(self, **lies: object) -> None:
        httpx.post(f"{self.issuer}/lie", json=lies).raise_for_status()

    def asked(self) -> dict[str, str]:
        return httpx.get(f"{self.issuer}/asked").json()


@pytest.fixture(scope="module")
def running() -> Iterator[Provider]:
    command = [sys.executable, str(Path(__file__).with_name("oidc_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Provider(int(process.stdout.readline()))
        process.stdin.close()


@pytest.fixture
def provider(running: Provider) -> Provider:
    running.lie()
    return running


@asynccontextmanager
async def served(tmp_path: Path, provider: Provider, **settings: object) -> AsyncIterator[Rig]:
    secret = tmp_path / "secret"
    secret.write_text(f"{SECRET}\n")
    secret.chmod(0o600)
    known = {"oidc_issuer": provider.issuer, "oidc_client_id": CLIENT_ID, "oidc_credentials_file": str(secret)}
    async with serving(tmp_path, **{**known, "oidc_sign_up": True, **settings}) as rig:
        yield rig


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
        location = (await http.post(LINK, headers=token)).json()["location"]
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
            location = (await other.post(LINK, headers=token)).json()["location"]
            assert problem(await other.get(await answer_of(other, location))) == (409, "conflict")
            location = (await other.post(LINK, headers=token)).json()["location"]
            callback = await answer_of(other, location)
            await other.post("/v1/auth/logout", headers=token)
            assert (await other.get(callback)).status_code == 401, "who began it has left"
        await trio.to_thread.run_sync(rig.accounts.set_disabled, "grace", True)
        async with client(rig) as other:
            assert problem(await come(other)) == (403, "forbidden")


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
