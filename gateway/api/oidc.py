"""``/v1/auth/oidc``: signing in with another provider, in a browser."""

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from gateway.accounts import Principal
from gateway.api.auth import client_of, identity_of, signed_in
from gateway.endpoint import Endpoint, Parameter, caller
from gateway.errors import ApiError
from gateway.identity.browser import CSRF_HEADER, local_path
from gateway.identity.oidc import Oidc
from gateway.identity.proofs import own_session
from gateway.request import json_response

_PATH = "/"


class Elsewhere(msgspec.Struct):
    """Where the browser shall go."""

    location: str


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
    session_id = own_session(caller(request).principal)
    location, cookie = await _oidc(request).begin(_PATH, linker=session_id)
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
    response = RedirectResponse(flow.path, 303, {"cache-control": "no-store"})
    home.set_flow(request, response, "")
    if made is not None:
        signed_in(request, made, response)
    return response


async def _linker(request: Request, session_id: str) -> Principal:
    """Who began to link: the session must still be this browser's."""
    guard, home = request.app.state.service.guard, identity_of(request).home
    principal: Principal = await guard.authenticate(home.credentials_of(request))
    if principal.session_id != session_id:
        raise ApiError("forbidden", "the session that began this has ended", "begin again")
    return principal


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
        answer=Elsewhere,
        parameters=(Parameter(name=CSRF_HEADER, place="header"),),
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
)
