"""People who sign in to a gateway, for tests."""

from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import pyotp
import trio
from gateway_rig import Rig

from gateway.audit import OPERATOR
from gateway.identity import people
from gateway.identity.passwords import hash_password
from gateway.roles import Role

PASSWORD = "correct horse battery staple"
LOGIN, REFRESH, ME = "/v1/auth/login", "/v1/auth/refresh", "/v1/auth/me"


def add_user(rig: Rig, name: str, *, role: Role = "developer", password: str = PASSWORD) -> str:
    """A user with an e-mail address NAME@example.com; their id. Blocking."""
    user = rig.accounts.create_user(name, role=role, email=f"{name}@example.com")
    people.set_password(rig.accounts.database, OPERATOR, user.id, hash_password(password))
    return user.id


def client(rig: Rig, **headers: str) -> httpx.AsyncClient:
    """Without a key."""
    return httpx.AsyncClient(base_url=rig.gateway.url, headers=headers, timeout=20)


async def sign_in(http: httpx.AsyncClient, name: str, *, password: str = PASSWORD, **more: object) -> httpx.Response:
    return await http.post(LOGIN, json={"email": f"{name}@example.com", "password": password, **more})


def bearer(answer: httpx.Response) -> dict[str, str]:
    return {"authorization": f"Bearer {answer.json()['access_token']}"}


def problem(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@dataclass
class Clock:
    """The gateway's wall clock, moved by tests instead of waited for."""

    offset_ms: int = 0
    real: Callable[[], int] = field(default=lambda: 0)

    def __call__(self) -> int:
        return self.real() + self.offset_ms


@dataclass
class Authenticator:
    """An app with a secret. Each code is asked for once: it moves on by a step, as time would."""

    secret: str
    clock: Clock

    def code(self) -> str:
        self.clock.offset_ms += 30_000
        return pyotp.TOTP(self.secret).at(self.clock() // 1000)


async def enrolled(http: httpx.AsyncClient, headers: dict[str, str], clock: Clock) -> tuple[Authenticator, list[str]]:
    """Set a second factor up, over HTTP; the app and the recovery codes."""
    begun = await http.post("/v1/auth/totp/enrol", json={"password": PASSWORD}, headers=headers)
    assert begun.status_code == 200, begun.text
    app = Authenticator(begun.json()["secret"], clock)
    done = await http.post("/v1/auth/totp/confirm", json={"code": app.code()}, headers=headers)
    assert done.status_code == 200, done.text
    return app, done.json()["recovery_codes"]


async def in_thread(function: Callable[..., object], *arguments: object) -> object:
    return await trio.to_thread.run_sync(function, *arguments)
