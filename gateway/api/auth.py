"""``/v1/auth``: signing up, in and out, and sessions. What it means stands in ``gateway/identity``."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.address import client_address
from gateway.endpoint import Endpoint, Parameter, caller
from gateway.identity.browser import CSRF_HEADER, csrf_of
from gateway.identity.identity import Identity, SignedIn
from gateway.identity.sessions import Client
from gateway.openai.requests import read_body
from gateway.request import json_response

Email = Annotated[str, Meta(min_length=3, max_length=254)]
Password = Annotated[str, Meta(min_length=1, max_length=1024)]
Code = Annotated[str, Meta(max_length=64)]
Token = Annotated[str, Meta(min_length=1, max_length=512)]


class Login(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``code``: of the second factor, or a recovery code. ``cookie``: for browsers, a session cookie and no tokens."""

    email: Email
    password: Password
    code: Code = ""
    cookie: bool = False


class Refresh(msgspec.Struct, forbid_unknown_fields=True):
    """A refresh token; it is used up."""

    refresh_token: Token


class Register(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A new user. ``name``: the e-mail address, if it is left out."""

    email: Email
    password: Password
    name: Annotated[str, Meta(max_length=200)] = ""


class Pair(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a sign-in gives: tokens, or (besides the cookie) the token that unsafe requests must show."""

    session_id: str
    user_id: str
    token_type: str = ""
    access_token: str = ""
    expires_in: int = 0
    refresh_token: str = ""
    csrf_token: str = ""


class Me(msgspec.Struct, kw_only=True):
    """Who the caller is."""

    user_id: str
    name: str
    role: str
    scopes: Sequence[str]
    session_id: str | None
    key_id: str | None
    csrf_token: str | None


class SessionRow(msgspec.Struct, kw_only=True):
    """A session. ``current``: the caller's own."""

    id: str
    method: str
    address: str
    agent: str
    created_at_ms: int
    seen_at_ms: int
    expires_at_ms: int
    current: bool


class SessionList(msgspec.Struct, kw_only=True):
    """Sessions that go on."""

    object: str = "list"
    data: list[SessionRow]


class UserMade(msgspec.Struct):
    """A user who can sign in now."""

    user_id: str
    name: str
    email: str


class KeySet(msgspec.Struct):
    """JSON Web Keys (RFC 7517)."""

    keys: list[dict[str, str]]


def identity_of(request: Request) -> Identity:
    """The gateway's identity part."""
    found: Identity = request.app.state.site.identity
    return found


def client_of(request: Request) -> Client:
    """Where a request comes from."""
    address = client_address(request, identity_of(request).rules.proxies)
    return Client(address=address, agent=request.headers.get("user-agent", ""))


def refuse_foreign(request: Request) -> None:
    """Pages of other sites cannot sign anybody in or out here. Raises ApiError ``forbidden``."""
    guard, home = request.app.state.service.guard, identity_of(request).home
    guard.refuse_foreign(home.credentials_of(request))


def signed_in(request: Request, made: SignedIn, response: Response) -> None:
    """Let the browser keep the session."""
    identity = identity_of(request)
    identity.home.set_session(request, response, made.cookie, identity.rules.session_seconds)


def _pair(request: Request, made: SignedIn) -> Response:
    pair = Pair(session_id=made.session_id, user_id=made.user_id)
    if made.cookie:
        pair.csrf_token = csrf_of(made.cookie)
    else:
        pair.token_type, pair.expires_in = "Bearer", identity_of(request).tokens.seconds
        pair.access_token, pair.refresh_token = made.access_token, made.refresh_token
    response = private(pair)
    if made.cookie:
        signed_in(request, made, response)
    return response


def private(value: object, status: int = 200) -> Response:
    """An answer that nobody on the way may keep."""
    return json_response(value, status, {"cache-control": "no-store"})


async def login(request: Request) -> Response:
    """Sign in with a password."""
    refuse_foreign(request)
    body, identity = await read_body(request, Login), identity_of(request)
    old = identity.home.session_of(request) if body.cookie else ""
    made = await identity.sign_in(
        body.email, body.password, body.code, client_of(request), cookie=body.cookie, replaces=old
    )
    return _pair(request, made)


async def refresh(request: Request) -> Response:
    """Go on with a session."""
    refuse_foreign(request)
    body = await read_body(request, Refresh)
    return _pair(request, await identity_of(request).refresh(body.refresh_token, client_of(request)))


async def register(request: Request) -> Response:
    """Sign up."""
    refuse_foreign(request)
    body = await read_body(request, Register)
    user = await identity_of(request).sign_up(body.email, body.password, body.name, client_of(request))
    return json_response(UserMade(user.id, user.name, user.email or ""), 201)


async def logout(request: Request) -> Response:
    """End the caller's session."""
    await identity_of(request).sign_out(caller(request).principal)
    response = Response(status_code=204)
    identity_of(request).home.drop_session(request, response)
    return response


async def me(request: Request) -> Response:
    """Who the caller is."""
    principal = caller(request).principal
    cookie = identity_of(request).home.session_of(request)
    by_cookie = bool(principal.session_id) and not request.headers.get("authorization")
    answer = Me(
        user_id=principal.user_id,
        name=principal.user_name,
        role=principal.role,
        scopes=sorted(principal.scopes),
        session_id=principal.session_id or None,
        key_id=principal.key_id,
        csrf_token=csrf_of(cookie) if by_cookie else None,
    )
    return private(answer)


async def sessions(request: Request) -> Response:
    """The caller's sessions."""
    principal = caller(request).principal
    rows = [
        SessionRow(
            id=each.id,
            method=each.method,
            address=each.address,
            agent=each.agent,
            created_at_ms=each.created_at_ms,
            seen_at_ms=each.seen_at_ms,
            expires_at_ms=each.expires_at_ms,
            current=each.id == principal.session_id,
        )
        for each in await identity_of(request).sessions(principal)
    ]
    return private(SessionList(data=rows))


async def end_session(request: Request) -> Response:
    """End one of the caller's sessions."""
    await identity_of(request).end_session(caller(request).principal, request.path_params["session"])
    return Response(status_code=204)


async def jwks(request: Request) -> Response:
    """The keys that access tokens are signed with, for others who want to check them."""
    keys = await identity_of(request).tokens.public_keys()
    return json_response(KeySet(keys), headers={"cache-control": "public, max-age=60"})


CSRF = (Parameter(name=CSRF_HEADER, place="header", description="With a session cookie: its token"),)

ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/auth/login",
        handle=login,
        needs=None,
        summary="Sign in with e-mail and password",
        body=Login,
        answer=Pair,
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/refresh",
        handle=refresh,
        needs=None,
        summary="The next access token",
        body=Refresh,
        answer=Pair,
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/register",
        handle=register,
        needs=None,
        summary="Sign up, if this gateway allows it",
        body=Register,
        answer=UserMade,
        status=201,
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/logout",
        handle=logout,
        needs="users:read",
        summary="End this session",
        status=204,
        parameters=CSRF,
    ),
    Endpoint(
        method="GET",
        path="/v1/auth/me",
        handle=me,
        needs="users:read",
        summary="Who the caller is",
        answer=Me,
    ),
    Endpoint(
        method="GET",
        path="/v1/auth/sessions",
        handle=sessions,
        needs="users:read",
        summary="The caller's sessions",
        answer=SessionList,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/auth/sessions/{session}",
        handle=end_session,
        needs="users:write",
        summary="End one of the caller's sessions",
        status=204,
        parameters=CSRF,
    ),
    Endpoint(
        method="GET",
        path="/.well-known/jwks.json",
        handle=jwks,
        needs=None,
        summary="The keys of access tokens",
        answer=KeySet,
    ),
)
