"""``/v1/auth``: what one signs in with: passwords, second factors, invites. Changing it needs a session."""

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.accounts import Principal
from gateway.api.auth import CSRF, Password, Token, client_of, identity_of, private, refuse_foreign
from gateway.endpoint import Endpoint, caller
from gateway.identity.factors import Enrolment
from gateway.identity.invites import Invite
from gateway.identity.proofs import own_session
from gateway.identity.sessions import Client
from gateway.openai.requests import read_body

B = TypeVar("B", bound=msgspec.Struct)


class PasswordChange(msgspec.Struct, forbid_unknown_fields=True):
    """``password`` is the one until now; empty if there was none. ``code``: with a second factor."""

    new_password: Password
    password: Annotated[str, Meta(max_length=1024)] = ""
    code: Annotated[str, Meta(max_length=64)] = ""


class Proof(msgspec.Struct, forbid_unknown_fields=True):
    """The user's password; empty if there is none."""

    password: Annotated[str, Meta(max_length=1024)] = ""


class FactorCode(msgspec.Struct, forbid_unknown_fields=True):
    """A code of the authenticator."""

    code: Annotated[str, Meta(min_length=1, max_length=64)]


class FactorDisable(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Password and a code (or a recovery code)."""

    code: Annotated[str, Meta(min_length=1, max_length=64)]
    password: Annotated[str, Meta(max_length=1024)] = ""


class InviteFor(msgspec.Struct, forbid_unknown_fields=True):
    """The id of a user who shall set a password."""

    user_id: Annotated[str, Meta(min_length=1, max_length=64)]


class Accept(msgspec.Struct, forbid_unknown_fields=True):
    """An invite, and the password to set."""

    token: Token
    password: Password


class RecoveryCodes(msgspec.Struct):
    """Shown once; each signs in once in the place of a code."""

    recovery_codes: list[str]


async def _signed_in(request: Request, kind: type[B]) -> tuple[Principal, B, Client]:
    """The caller, who must have signed in, and what they send from where. Raises ApiError."""
    principal = caller(request).principal
    own_session(principal)
    return principal, await read_body(request, kind), client_of(request)


async def password(request: Request) -> Response:
    """Change the caller's password."""
    who, body, client = await _signed_in(request, PasswordChange)
    await identity_of(request).change_password(who, body.password, body.new_password, client, body.code)
    return Response(status_code=204)


async def enrol(request: Request) -> Response:
    """Begin to set a second factor up."""
    who, body, client = await _signed_in(request, Proof)
    return private(await identity_of(request).enrol(who, body.password, client))


async def confirm(request: Request) -> Response:
    """Switch the second factor on."""
    who, body, client = await _signed_in(request, FactorCode)
    codes = await identity_of(request).confirm(who, body.code, client)
    return private(RecoveryCodes(list(codes)))


async def disable(request: Request) -> Response:
    """Switch the second factor off."""
    who, body, client = await _signed_in(request, FactorDisable)
    await identity_of(request).disable_factor(who, body.password, body.code, client)
    return Response(status_code=204)


async def invite(request: Request) -> Response:
    """Let somebody set the password of a user."""
    body = await read_body(request, InviteFor)
    return private(await identity_of(request).invite(caller(request).principal, body.user_id), 201)


async def accept(request: Request) -> Response:
    """Set the password that an invite is for."""
    refuse_foreign(request)
    body = await read_body(request, Accept)
    await identity_of(request).accept(body.token, body.password, client_of(request))
    return Response(status_code=204)


ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/auth/password",
        handle=password,
        needs="users:write",
        summary="Change the password; other sessions end",
        body=PasswordChange,
        status=204,
        parameters=CSRF,
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/totp/enrol",
        handle=enrol,
        needs="users:write",
        summary="Begin to set up a second factor",
        body=Proof,
        answer=Enrolment,
        parameters=CSRF,
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/totp/confirm",
        handle=confirm,
        needs="users:write",
        summary="Switch the second factor on with its first code",
        body=FactorCode,
        answer=RecoveryCodes,
        parameters=CSRF,
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/totp/disable",
        handle=disable,
        needs="users:write",
        summary="Switch the second factor off",
        body=FactorDisable,
        status=204,
        parameters=CSRF,
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/invites",
        handle=invite,
        needs="users:manage",
        summary="Let somebody set the password of a user",
        body=InviteFor,
        answer=Invite,
        status=201,
        parameters=CSRF,
    ),
    Endpoint(
        method="POST",
        path="/v1/auth/accept",
        handle=accept,
        needs=None,
        summary="Set the password that an invite is for",
        body=Accept,
        status=204,
    ),
)
