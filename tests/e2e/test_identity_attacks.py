"""What must not let anybody in: forged tokens, other sites' pages, sessions that were planted, guesses by the clock."""

import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import sqlalchemy as sa
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gateway_rig import Rig, read_all, serving
from identity_rig import LOGIN, ME, PASSWORD, REFRESH, add_user, bearer, client, problem, sign_in

from config.errors import BusyError, ConfigError, IntegrityError, LocalError
from gateway import guard
from gateway.audit import OPERATOR
from gateway.identity import passwords, people, tokens
from gateway.identity.vault import Vault, open_vault

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi there"}]}


def encoded(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Forge:
    """What an attacker knows: the gateway's public key, an own good token, how tokens look."""

    def __init__(self, token: str, public: Any, private: Any) -> None:
        self.header = jwt.get_unverified_header(token)
        self.claims = jwt.decode(token, options={"verify_signature": False})
        self.token = token
        self.public = public
        self.private = private
        """The gateway's own key: nobody has it, but tokens that only lack one thing must not pass either."""

    def signed(self, key: Any = None, *, header: dict[str, Any] | None = None, **claims: Any) -> str:
        said = {name: value for name, value in {**self.claims, **claims}.items() if value is not None}
        shown = {name: value for name, value in {**self.header, **(header or {})}.items() if value is not None}
        body = f"{encoded(shown)}.{encoded(said)}"
        return f"{body}.{encoded((key or self.private).sign(body.encode()))}"

    def none(self, name: str) -> str:
        return f"{encoded({**self.header, 'alg': name})}.{encoded(self.claims)}."

    def hmac(self, secret: bytes) -> str:
        body = f"{encoded({**self.header, 'alg': 'HS256'})}.{encoded(self.claims)}"
        return f"{body}.{encoded(hmac.digest(secret, body.encode(), hashlib.sha256))}"

    def pem(self) -> bytes:
        return self.public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


HOUR = 3600
MALLORY = Ed25519PrivateKey.generate()

FORGERIES: dict[str, Callable[[Forge], str]] = {
    "alg none": lambda f: f.none("none"),
    "alg None": lambda f: f.none("nOnE"),
    "no signature": lambda f: f.token.rpartition(".")[0] + ".",
    "HS256 with the raw public key": lambda f: f.hmac(f.public.public_bytes_raw()),
    "HS256 with the public key as PEM": lambda f: f.hmac(f.pem()),
    "HS256 without a secret": lambda f: f.hmac(b""),
    "signed by another key": lambda f: f.signed(MALLORY),
    "an unknown kid": lambda f: f.signed(MALLORY, header={"kid": "0" * 32}),
    "a kid that is a path": lambda f: f.signed(MALLORY, header={"kid": "../../../../dev/null"}),
    "a kid that is SQL": lambda f: f.signed(MALLORY, header={"kid": "x' OR '1'='1"}),
    "a kid that is a list": lambda f: f.signed(header={"kid": ["a"]}),
    "no kid": lambda f: f.signed(header={"kid": None}),
    "a key of its own in the header": lambda f: f.signed(
        MALLORY, header={"jwk": {"kty": "OKP", "crv": "Ed25519", "x": encoded(MALLORY.public_key().public_bytes_raw())}}
    ),
    "an unknown critical header": lambda f: f.signed(header={"crit": ["exp"]}),
    "another type": lambda f: f.signed(header={"typ": "JWT"}),
    "another algorithm's name": lambda f: f.signed(header={"alg": "ES256"}),
    "expired": lambda f: f.signed(exp=int(time.time()) - 60),
    "not yet": lambda f: f.signed(nbf=int(time.time()) + HOUR),
    "issued later": lambda f: f.signed(iat=int(time.time()) + HOUR),
    "without an end": lambda f: f.signed(exp=None),
    "without an id": lambda f: f.signed(jti=None),
    "an end that is text": lambda f: f.signed(exp="soon"),
    "another audience": lambda f: f.signed(aud="somebody-else"),
    "a list of audiences": lambda f: f.signed(aud=["somebody-else", tokens.AUDIENCE]),
    "another issuer": lambda f: f.signed(iss="https://evil.example"),
    "another user": lambda f: f.signed(sub="local"),
    "another user, signed anew": lambda f: f.signed(MALLORY, sub="local"),
    "no session": lambda f: f.signed(sid="0" * 32),
    "a session that is a number": lambda f: f.signed(sid=7),
    "claims changed": lambda f: ".".join(
        [f.token.split(".")[0], encoded({**f.claims, "sub": "root"}), f.token.split(".")[2]]
    ),
    "claims that are a list": lambda f: f"{encoded(f.header)}.{encoded([])}.{f.token.split('.')[2]}",
    "claims that are too deep": lambda f: f"{encoded(f.header)}.{encoded(b'[' * 2000)}.{f.token.split('.')[2]}",
    "too long": lambda f: f.signed(more="x" * 5000),
    "bytes that are no JSON": lambda f: f"eyJ{'_' * 9}.{'_' * 8}.{'_' * 8}",
}


async def forge(rig: Rig, token: str) -> Forge:
    vault = await trio.to_thread.run_sync(open_vault, "", Path(rig.accounts.database.place).parent)
    public, signing = await trio.to_thread.run_sync(tokens.read_keys, rig.accounts.database, vault)
    return Forge(token, public[signing[0]], signing[1])


async def test_no_forged_token_passes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        made = await sign_in(http, "grace")
        forger = await forge(rig, made.json()["access_token"])
        good = {"authorization": f"Bearer {forger.signed(jti='0' * 32)}"}
        assert (await http.get(ME, headers=good)).status_code == 200, "the forge itself works"
        with caplog.at_level(logging.INFO, "rios.security"):
            for name, make in FORGERIES.items():
                caplog.clear()
                answer = await http.get(ME, headers={"authorization": f"Bearer {make(forger)}"})
                assert problem(answer) == (401, "invalid_api_key"), name
        # Role and scopes in a token are nobody's.
        wide = {"authorization": f"Bearer {forger.signed(role='admin', scope='users:manage')}"}
        assert problem(await http.post("/v1/auth/invites", json={"user_id": "x"}, headers=wide)) == (403, "forbidden")


async def test_a_bad_token_is_nobodys_even_where_no_key_is_needed(tmp_path: Path) -> None:
    async with serving(tmp_path, require_key=False) as rig, client(rig) as http:
        assert (await http.get(ME)).json()["user_id"] == "local"
        assert (await http.get(ME, headers={"authorization": "Bearer sk-anything"})).json()["user_id"] == "local"
        await trio.to_thread.run_sync(add_user, rig, "grace")
        forger = await forge(rig, (await sign_in(http, "grace")).json()["access_token"])
        for name in ("alg none", "expired", "signed by another key"):
            answer = await http.get(ME, headers={"authorization": f"Bearer {FORGERIES[name](forger)}"})
            assert answer.status_code == 401, name


async def test_a_revoked_signing_key_reaches_every_gateway(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(guard, "CACHE_SECONDS", 0.0)
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        made = await sign_in(http, "grace")
        assert (await http.get(ME, headers=bearer(made))).status_code == 200
        assert await trio.to_thread.run_sync(tokens.revoke_keys, rig.accounts.database, OPERATOR) == 1
        assert (await http.get(ME, headers=bearer(made))).status_code == 401
        fresh = await http.post(REFRESH, json={"refresh_token": made.json()["refresh_token"]})
        assert (await http.get(ME, headers=bearer(fresh))).status_code == 200, "refreshing gives one of a new key"


async def test_keys_are_replaced_when_they_are_old(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "FRESH_SECONDS", 0.0)
    async with serving(tmp_path, database=database) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        before = await sign_in(http, "grace")
        real = tokens.now_ms
        monkeypatch.setattr(tokens, "now_ms", lambda: real() + tokens.ROTATE_MS + 60_000)
        after = await sign_in(http, "grace")
        kids = [jwt.get_unverified_header(each.json()["access_token"])["kid"] for each in (before, after)]
        assert kids[0] != kids[1]
        for each in (before, after):
            assert (await http.get(ME, headers=bearer(each))).status_code == 200, "the old one still verifies"
        monkeypatch.setattr(tokens, "now_ms", lambda: real() + tokens.ROTATE_MS + 3 * HOUR * 1000)
        published = (await http.get("/.well-known/jwks.json")).json()["keys"]
        assert [key["kid"] for key in published] != kids
        assert kids[0] not in {key["kid"] for key in published}, "until no token of it can be valid"


async def test_the_published_keys_verify_tokens_elsewhere(tmp_path: Path) -> None:
    async with serving(tmp_path, identity_public_url="https://gateway.example/") as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        made = await sign_in(http, "grace")
        published = jwt.PyJWKSet.from_dict((await http.get("/.well-known/jwks.json")).json())
        token = made.json()["access_token"]
        key = published[jwt.get_unverified_header(token)["kid"]]
        claims = jwt.decode(token, key, algorithms=["EdDSA"], audience="rios-gateway", issuer="https://gateway.example")
        assert claims["exp"] - claims["iat"] == 900
        assert not {"role", "scope", "email"} & set(claims)


async def test_other_sites_cannot_use_a_browsers_session(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        token = (await sign_in(http, "grace", cookie=True)).json()["csrf_token"]
        own = {"x-csrf-token": token, "origin": rig.gateway.url}
        for headers in (
            {},
            {"x-csrf-token": ""},
            {"x-csrf-token": token[:-1] + "0" if token[-1] != "0" else token[:-1] + "1"},
            {"x-csrf-token": "ÿ".encode("latin-1")},
            {"x-csrf-token": token, "origin": "https://evil.example"},
            {"x-csrf-token": token, "origin": "null"},
            {"x-csrf-token": token, "origin": rig.gateway.url.replace("127.0.0.1", "127.0.0.1.evil.example")},
            {**own, "sec-fetch-site": "cross-site"},
            {**own, "sec-fetch-site": "same-site"},
        ):
            for method, path in (
                ("POST", CHAT),
                ("POST", "/v1/auth/logout"),
                ("POST", "/v1/auth/password"),
                ("DELETE", "/v1/auth/sessions/x"),
            ):
                answer = await http.request(method, path, headers=headers, json=BODY if method == "POST" else None)
                assert problem(answer) == (403, "forbidden"), (headers, path)
        assert (await http.get(ME, headers={"sec-fetch-site": "cross-site"})).status_code == 200, "reading is no harm"
        assert (await http.post(CHAT, json=BODY, headers=own)).status_code == 402
        assert (await http.post(CHAT, json=BODY, headers={**own, "sec-fetch-site": "same-origin"})).status_code == 402
        async with client(rig) as other:
            eve = (await sign_in(http, "grace", cookie=True)).json()["csrf_token"]
            await sign_in(other, "grace", cookie=True)
            answer = await other.post(CHAT, json=BODY, headers={"x-csrf-token": eve})
            assert problem(answer) == (403, "forbidden"), "the token of another session"
        assert "without a CSRF token" in caplog.text


async def test_other_sites_cannot_sign_anybody_in(tmp_path: Path) -> None:
    """Else they would put victims into a session that the attacker reads."""
    async with serving(tmp_path, identity_sign_up=True) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "mallory")
        for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
            login = {"email": "mallory@example.com", "password": PASSWORD, "cookie": True}
            assert problem(await http.post(LOGIN, json=login, headers=headers)) == (403, "forbidden")
            new = {"email": "new@example.com", "password": PASSWORD}
            assert problem(await http.post("/v1/auth/register", json=new, headers=headers)) == (403, "forbidden")
        assert not http.cookies


async def test_other_sites_cannot_use_a_gateway_that_needs_no_key(tmp_path: Path) -> None:
    async with serving(tmp_path, require_key=False) as rig, client(rig) as http:
        port = rig.gateway.port
        for headers in (
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site", "authorization": "Bearer none-needed"},
            # DNS rebinding: the page's own name resolves to this machine by now.
            {"origin": f"http://evil.example:{port}", "host": f"evil.example:{port}"},
            {"sec-fetch-site": "same-origin", "host": f"evil.example:{port}"},
            {"origin": "http://[::", "host": "[::"},
            {"host": "anything.example"},
        ):
            answer = await http.post(CHAT, content=json.dumps(BODY), headers={"content-type": "text/plain", **headers})
            assert problem(answer) == (403, "forbidden"), headers
        for headers in (
            {},
            {"origin": rig.gateway.url},
            {"origin": f"http://localhost:{port}", "host": f"localhost:{port}"},
            {"sec-fetch-site": "same-origin"},
            {"sec-fetch-site": "none"},
        ):
            assert (await http.post(CHAT, json=BODY, headers=headers)).status_code == 200, headers
        for path in ("/v1/auth/invites", "/v1/auth/totp/enrol"):
            assert problem(await http.post(path, json={"user_id": "local"})) == (403, "forbidden"), "nobody is no admin"


async def test_other_sites_read_nothing_of_a_gateway_that_needs_no_key(tmp_path: Path) -> None:
    """A page whose name was pointed at this machine reads its own site: no header tells it from a program."""
    async with serving(tmp_path, require_key=False) as rig, client(rig) as http:
        form = {"files": {"file": ("a.jsonl", b'{"secret": "prompt"}')}, "data": {"purpose": "user_data"}}
        name = (await http.post("/v1/files", **form)).json()["id"]
        evil = {"host": f"evil.example:{rig.gateway.port}"}
        for path in ("/v1/files", f"/v1/files/{name}/content", "/v1/events", "/v1/models", ME, "/dashboard"):
            for more in ({}, {"authorization": "Bearer none-needed"}, {"sec-fetch-site": "same-origin"}):
                answer = await http.get(path, headers={**evil, **more})
                assert answer.status_code == 403, (path, more)
                assert "secret" not in answer.text
        told = (await http.get(ME, headers=evil)).json()["error"]["message"]
        assert "identity_public_url" in told
        assert "API key" in told
        assert (await http.head(ME, headers=evil)).status_code == 403
        for host in ("localhost", "127.0.0.1:1"):
            assert (await http.get(f"/v1/files/{name}/content", headers={"host": host})).status_code == 200
        keyed = {"authorization": f"Bearer {rig.key}", **evil}
        assert (await http.get("/v1/files", headers=keyed)).json()["data"] == [], "a key is no page's to send"


async def test_a_name_of_ones_own_where_no_key_is_needed(tmp_path: Path) -> None:
    url = "http://box.lan:8080"
    async with serving(tmp_path, require_key=False, identity_public_url=url) as rig, client(rig) as http:
        for headers, status in (
            ({"origin": url, "host": "box.lan:8080"}, 200),
            ({"origin": url, "host": "127.0.0.1:9"}, 200),  # a proxy that rewrites Host
            ({"origin": "http://box.lan.evil.example:8080", "host": "box.lan.evil.example:8080"}, 403),
        ):
            assert (await http.post(CHAT, json=BODY, headers=headers)).status_code == status, headers
            assert (await http.get(ME, headers={"host": headers["host"]})).status_code == status, headers


async def test_a_planted_session_becomes_nobodys(tmp_path: Path, database: str) -> None:
    """Session fixation: what a browser brought along is not what it leaves with, and ends."""
    async with serving(tmp_path, database=database) as rig, client(rig) as attacker, client(rig) as victim:
        await trio.to_thread.run_sync(add_user, rig, "mallory")
        await trio.to_thread.run_sync(add_user, rig, "grace")
        await sign_in(attacker, "mallory", cookie=True)
        planted = attacker.cookies["rios_session"]
        victim.cookies.set("rios_session", planted)
        made = await sign_in(victim, "grace", cookie=True)
        issued = made.headers["set-cookie"].partition(";")[0].partition("=")[2]
        assert issued.partition("_")[0] != planted.partition("_")[0]
        assert issued.partition("_")[2] != planted.partition("_")[2]
        assert (await attacker.get(ME)).status_code == 401
        for invented in ("0" * 32 + "_" + "A" * 43, "x", planted.partition("_")[0] + "_" + "A" * 43, "a" * 5000):
            async with client(rig, cookie=f"rios_session={invented}") as other:
                assert problem(await other.get(ME)) == (401, "invalid_api_key")
                made = await sign_in(other, "grace", cookie=True)
                assert not made.headers["set-cookie"].startswith(f"rios_session={invented}")


async def test_a_cookie_is_not_a_token_nor_the_other_way_round(tmp_path: Path) -> None:
    async with serving(tmp_path) as rig, client(rig) as http, client(rig) as bare:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        tokens_of = (await sign_in(bare, "grace")).json()
        await sign_in(http, "grace", cookie=True)
        cookie = http.cookies["rios_session"]
        forger = await forge(rig, tokens_of["access_token"])
        borrowed = forger.signed(sid=cookie.partition("_")[0])
        for secret in (cookie, tokens_of["refresh_token"], borrowed):
            answer = await bare.get(ME, headers={"authorization": f"Bearer {secret}"})
            assert problem(answer) == (401, "invalid_api_key")
        for value in (
            tokens_of["session_id"] + "_" + "A" * 43,
            tokens_of["session_id"] + "_",
            tokens_of["access_token"],
        ):
            assert (await bare.get(ME, headers={"cookie": f"rios_session={value}"})).status_code == 401
        assert (await bare.post(REFRESH, json={"refresh_token": cookie})).status_code == 401


async def test_whoever_it_is_for_a_refusal_costs_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same statements and one verification with the same parameters: what time could tell is not there."""
    async with serving(tmp_path) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "known")
        await trio.to_thread.run_sync(lambda: rig.accounts.create_user("bare", email="bare@example.com"))
        await trio.to_thread.run_sync(add_user, rig, "off")
        await trio.to_thread.run_sync(rig.accounts.set_disabled, "off", True)
        work: list[str] = []
        verify = passwords.verify_password

        def counted(password: str, stored: str | None) -> bool:
            work.append("verify " + (stored or passwords._NOBODYS_HASH).rpartition("$")[0].rpartition("$")[0])
            return verify(password, stored)

        def statement(*event: Any) -> None:
            if any(table in event[2] for table in ("guesses", "passwords", "second_factors", "sessions", "audit")):
                work.append(event[2])

        monkeypatch.setattr(passwords, "verify_password", counted)
        sa.event.listen(rig.accounts.database.engine, "before_cursor_execute", statement)
        seen: dict[str, tuple[list[str], str]] = {}
        for name in ("known", "nobody", "bare", "off"):
            work.clear()
            answer = await sign_in(http, name, password="wrong password")
            seen[name] = (list(work), answer.text)
        assert len(seen["known"][0]) >= 5
        assert sum(step.startswith("verify $argon2id$") for step in seen["known"][0]) == 1
        assert seen["known"] == seen["nobody"] == seen["bare"] == seen["off"]


async def test_text_from_outside_stays_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Header and log injection, and SQL in every field."""
    async with serving(tmp_path, identity_sign_up=True) as rig, client(rig) as http:
        await trio.to_thread.run_sync(add_user, rig, "grace")
        with caplog.at_level(logging.INFO, "rios.security"):
            for text in ("a\r\nset-cookie: x=y", "' OR 1=1 --", "\x00", "\ud800", "%n%s{0}", "a@b\r\nc"):
                body = json.dumps({"email": f"{text}@x", "password": text, "code": text}).encode()
                for path in (LOGIN, "/v1/auth/register"):
                    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
                    assert answer.status_code in (400, 401), (text, answer.text)
                    assert "set-cookie" not in answer.headers
        assert all("\n" not in record.getMessage() for record in caplog.records)
        name = "eve\r\nset-cookie: x=y"
        new = {"email": "eve@x", "password": PASSWORD, "name": name}
        assert (await http.post("/v1/auth/register", json=new)).status_code == 400
        raw = await trio.open_tcp_stream(rig.gateway.host, rig.gateway.port)
        async with raw:
            head = "GET /v1/auth/oidc/start?next=/%0d%0aset-cookie:x=y HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
            await raw.send_all(head.encode())
            assert b"set-cookie:x" not in (await read_all(raw)).lower()


async def test_addresses_behind_a_proxy(tmp_path: Path) -> None:
    forwarded = {"x-forwarded-for": "6.6.6.6, 203.0.113.9"}
    for proxies, address in (((), "127.0.0.1"), (("127.0.0.1",), "203.0.113.9")):
        async with serving(tmp_path, trusted_proxies=proxies) as rig, client(rig, **forwarded) as http:
            if not proxies:
                await trio.to_thread.run_sync(add_user, rig, "grace")
            headers = bearer(await sign_in(http, "grace"))
            rows = (await http.get("/v1/auth/sessions", headers=headers)).json()["data"]
            assert rows[0]["address"] == address


def test_the_key_file(tmp_path: Path) -> None:
    vault = open_vault("", tmp_path)
    path = tmp_path / "gateway.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert open_vault("", tmp_path) == open_vault(str(path), Path("/nowhere")) == vault
    assert vault.key.hex() not in repr(vault)
    sealed = vault.seal(b"secret", "for one")
    assert vault.unseal(sealed, "for one") == b"secret"
    for damaged, purpose in ((sealed, "for another"), (sealed[:-1], "for one"), (sealed[:10], "for one")):
        with pytest.raises(IntegrityError):
            vault.unseal(damaged, purpose)
    with pytest.raises(LocalError, match="another key file"):
        Vault(b"x" * 32).unseal(sealed, "for one")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="open to others"):
        open_vault("", tmp_path)
    path.chmod(0o600)
    for text in ("", "abc", "00" * 31, "zz" * 32, "00" * 33):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not a key of 64 hex digits"):
            open_vault("", tmp_path)
    path.unlink()
    path.mkdir(0o700)
    with pytest.raises(LocalError, match="cannot read"):
        open_vault("", tmp_path)


async def test_a_second_gateway_without_the_key_file_says_so(tmp_path: Path, postgresql: str) -> None:
    from postgresql import new_database

    database = new_database(postgresql)
    async with (
        serving(tmp_path / "a", database=database) as first,
        serving(tmp_path / "b", database=database) as second,
        client(first) as one,
        client(second) as two,
    ):
        await trio.to_thread.run_sync(add_user, first, "grace")
        headers = bearer(await sign_in(one, "grace"))
        begun = await one.post("/v1/auth/totp/enrol", json={"password": PASSWORD}, headers=headers)
        assert begun.status_code == 200
        answer = await two.post("/v1/auth/totp/confirm", json={"code": "123456"}, headers=headers)
        assert answer.status_code == 500
        assert "another key file" in answer.text


async def test_a_crowd_that_signs_in_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "WAITING_MAX", 2)
    checker, outcomes = passwords.Passwords(), []

    async def check() -> None:
        try:
            outcomes.append(await checker.matches("x", None))
        except BusyError:
            outcomes.append("busy")

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(check)
    assert outcomes.count("busy") == 7
    assert outcomes.count(False) == 3


def test_passwords_are_the_same_however_they_are_typed() -> None:
    stored = passwords.hash_password("café au lait ①")
    assert stored.startswith("$argon2id$v=19$m=36864,t=2,p=1$")
    assert passwords.verify_password("cafe\u0301 au lait 1", stored)
    assert not passwords.verify_password("cafe au lait 1", stored)
    assert not passwords.verify_password("x", None)
    assert not passwords.verify_password("x", "damaged")
    assert passwords.is_outdated("$argon2id$v=19$m=8,t=1,p=1$AAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAA")


async def test_an_old_hash_is_renewed_by_signing_in(tmp_path: Path) -> None:
    from argon2 import PasswordHasher

    async with serving(tmp_path) as rig, client(rig) as http:
        user = await trio.to_thread.run_sync(add_user, rig, "grace")
        database = rig.accounts.database
        old = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1).hash(PASSWORD)
        await trio.to_thread.run_sync(people.set_password, database, OPERATOR, user, old)
        assert (await sign_in(http, "grace")).status_code == 200
        stored = people.by_id(database, user).password_hash
        assert stored is not None
        assert stored.startswith("$argon2id$v=19$m=36864,t=2,p=1$")
        assert (await sign_in(http, "grace")).status_code == 200
