"""``/v1/auth/oidc``: signing in with another provider, in a browser; ``/v1/users/{user}/identities``: with which."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from gateway.accounts import Principal
from gateway.api.auth import CSRF, Code, client_of, identity_of, refuse_foreign, signed_in
from gateway.api.credentials import FactorCode
from gateway.endpoint import Endpoint, Parameter, caller, permitted
from gateway.errors import ApiError
from gateway.identity.browser import local_path
from gateway.identity.identity import SignedIn
from gateway.identity.oidc import Oidc
from gateway.identity.people import Person
from gateway.identity.proofs import own_session
from gateway.openai.requests import read_body
from gateway.request import json_response

_PATH = "/"
_CODE_PAGE = "/dashboard/sign-in?code=1"


class Elsewhere(msgspec.Struct):
    """Where the browser shall go."""

    location: str


class LinkProof(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The user's password, empty if there is none, and a code (or a recovery code) where there is a second factor.
    ``next``: the path to go to afterwards."""

    password: Annotated[str, Meta(max_length=1024)] = ""
    code: Code = ""
    next: Annotated[str, Meta(max_length=1024)] = _PATH


class IdentityObject(msgspec.Struct, kw_only=True):
    """An identity at another provider that a user signs in with."""

    object: Literal["identity"] = "identity"
    id: str
    issuer: str
    subject: str
    created_at_ms: int


class IdentityList(msgspec.Struct, kw_only=True):
    """Oldest first."""

    object: Literal["list"] = "list"
    data: list[IdentityObject]


def _oidc(request: Request) -> Oidc:
    oidc = identity_of(request).oidc
    if oidc is None:
        raise ApiError("not_found", "this gateway has no other provider to sign in with", public_code="not_found")
    return oidc


async def start(request: Request) -> Response:
    """Send the browser to the provider."""
    location, cookie = await _oidc(request).begin(local_path(request.query_params.get("next", _PATH)))
    response = RedirectResponse(location, 303, {"cache-control": "no-store"})
    identity_of(request).home.set_flow(request, response, cookie)
    return response


async def link(request: Request) -> Response:
    """Begin to link an identity to the caller: where to send the browser."""
    principal = caller(request).principal
    session_id, body = own_session(principal), await read_body(request, LinkProof)
    # Whoever found the session open must not get in by it for ever.
    await identity_of(request).prove(principal, body.password, body.code, client_of(request))
    location, cookie = await _oidc(request).begin(local_path(body.next), linker=session_id)
    response = json_response(Elsewhere(location), headers={"cache-control": "no-store"})
    identity_of(request).home.set_flow(request, response, cookie)
    return response


async def callback(request: Request) -> Response:
    """The browser is back."""
    identity, home = identity_of(request), identity_of(request).home
    flow, visitor = await _oidc(request).finish(request.query_params, home.flow_of(request))
    linker = await _linker(request, flow.linker) if flow.linker else None
    made = await identity.sign_in_elsewhere(
        visitor, client_of(request), replaces=home.session_of(request), linker=linker
    )
    where, kept = flow.path, ""
    if isinstance(made, Person):
        where, kept = _CODE_PAGE, _oidc(request).halfway(made.id, visitor, flow.path)
    response = RedirectResponse(where, 303, {"cache-control": "no-store"})
    home.set_flow(request, response, kept)
    if isinstance(made, SignedIn):
        signed_in(request, made, response)
    return response


async def code(request: Request) -> Response:
    """The second factor of who came back."""
    refuse_foreign(request)
    body, identity, home = await read_body(request, FactorCode), identity_of(request), identity_of(request).home
    came = _oidc(request).halfway_of(home.flow_of(request))
    made = await identity.sign_in_halfway(came, body.code, client_of(request), replaces=home.session_of(request))
    response = json_response(Elsewhere(came.path), headers={"cache-control": "no-store"})
    home.set_flow(request, response, "")
    signed_in(request, made, response)
    return response


async def _linker(request: Request, session_id: str) -> Principal:
    """Who began to link: the session must still be this browser's."""
    guard, home = request.app.state.service.guard, identity_of(request).home
    principal: Principal = await guard.authenticate(home.credentials_of(request))
    if principal.session_id != session_id:
        raise ApiError("forbidden", "the session that began this has ended", "begin again")
    return principal


def _whose(request: Request) -> str:
    user_id: str = request.path_params["user"]
    if not caller(request).may_touch(user_id):
        raise ApiError("not_found", "there is no such user", public_code="not_found")
    return user_id


async def list_identities(request: Request) -> Response:
    """Those of a user."""
    rows = [
        IdentityObject(id=each.id, issuer=each.issuer, subject=each.subject, created_at_ms=each.created_at_ms)
        for each in await identity_of(request).links(_whose(request))
    ]
    return json_response(IdentityList(data=rows), headers={"cache-control": "no-store"})


async def end_identity(request: Request) -> Response:
    """Take one away."""
    principal, user_id = caller(request).principal, _whose(request)
    if not principal.session_id:
        permitted(principal, "users:manage")  # as with an e-mail address: not with a key that was found
    await identity_of(request).unlink(principal, user_id, request.path_params["identity"])
    return Response(status_code=204)


_NEXT = Parameter(name="next", description="The path to go to afterwards")

ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/auth/oidc/start",
        handle=start,
        needs=None,
        summary="Sign in with the other provider",
        status=303,
        parameters=(_NEXT,),
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/oidc/link",
        handle=link,
        needs="users:write",
        summary="Link an identity at the other provider",
        body=LinkProof,
        answer=Elsewhere,
        parameters=CSRF,
    ),
    Endpoint(
        method="GET",
        path="/v1/auth/oidc/callback",
        handle=callback,
        needs=None,
        summary="Where the other provider sends browsers back to",
        status=303,
        parameters=tuple(Parameter(name=name) for name in ("code", "state", "iss", "error")),
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/oidc/code",
        handle=code,
        needs=None,
        summary="The second factor, after the other provider",
        body=FactorCode,
        answer=Elsewhere,
    ),
    Endpoint(
        method="GET",
        path="/v1/users/{user}/identities",
        handle=list_identities,
        needs="users:read",
        summary="A user's identities at the other provider",
        answer=IdentityList,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/users/{user}/identities/{identity}",
        handle=end_identity,
        needs="users:write",
        summary="Unlink an identity at the other provider",
        status=204,
        parameters=CSRF,
    ),
)
