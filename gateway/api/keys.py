"""``/v1/api-keys``"""

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway import managing
from gateway.audit import actor_of
from gateway.endpoint import Endpoint, Parameter, caller
from gateway.listing import PAGING_BOTH, page_of, shown
from gateway.making import KEY, asked_of
from gateway.openai.requests import read_body
from gateway.request import json_response
from gateway.roles import Permission

Name = Annotated[str, Meta(max_length=200)]
Expiry = Annotated[int, Meta(ge=0, le=1 << 53)]


class NewKeyBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A key to make. ``user_id``: for whom, by default the caller. ``scopes``: none for all that its maker has.
    ``cache``: what was answered before at temperature 0 may answer its requests again."""

    name: Name = ""
    user_id: Annotated[str, Meta(max_length=64)] = ""
    scopes: list[Permission] = []
    expires_at_ms: Expiry | None = None
    cache: bool = False


class KeyPatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What is left out stays."""

    name: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    scopes: list[Permission] | None = None
    expires_at_ms: Expiry | None = None
    cache: bool | None = None


class KeyObject(msgspec.Struct, kw_only=True):
    """A key without its secret."""

    object: Literal["api_key"] = "api_key"
    id: str
    user_id: str
    name: str
    scopes: list[str]
    created_at_ms: int
    expires_at_ms: int | None
    revoked_at_ms: int | None
    cache: bool


class NewKeyObject(KeyObject, kw_only=True):
    """A key with its ``secret``, which is shown this once."""

    secret: str


class KeyList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[KeyObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


async def _run(request: Request, work: Any) -> Any:  # noqa: ANN401 - whatever the work gives
    return await request.app.state.service.till.in_thread(work)


async def list_keys(request: Request) -> Response:
    """Those within reach."""
    page = page_of(request, both=True)
    accounts, user = request.app.state.site.accounts, request.query_params.get("user_id", "")
    find = partial(managing.list_keys, accounts, page, owner=caller(request).owner, user=user)
    rows = [KeyObject(**managing.key_fields(key)) for key in await _run(request, find)]
    return json_response(shown(rows, page, lambda row: row.id))


async def create_key(request: Request) -> Response:
    """Make one."""
    body, who = await read_body(request, NewKeyBody), caller(request)
    make = partial(
        managing.add_key,
        request.app.state.site.accounts,
        who.principal,
        body.user_id or who.user_id,
        body.name,
        body.scopes,
        body.expires_at_ms,
        owner=who.owner,
        cache=body.cache,
        asked=asked_of(request, body),
    )
    made = await _run(request, make)
    return json_response(NewKeyObject(**managing.key_fields(made.key), secret=made.secret), 201)


async def get_key(request: Request) -> Response:
    """One of them."""
    find = partial(managing.get_key, request.app.state.site.accounts, request.path_params["key"], caller(request).owner)
    return json_response(KeyObject(**managing.key_fields(await _run(request, find))))


async def change_key(request: Request) -> Response:
    """Another name, other scopes, another end, another way to be answered."""
    body, who = await read_body(request, KeyPatch), caller(request)
    change = managing.KeyChange(name=body.name, scopes=body.scopes, expires_at_ms=body.expires_at_ms, cache=body.cache)
    accounts, key_id = request.app.state.site.accounts, request.path_params["key"]
    key = await _run(request, partial(managing.change_key, accounts, who.principal, key_id, who.owner, change))
    request.app.state.service.guard.forget(key.user_id)
    return json_response(KeyObject(**managing.key_fields(key)))


async def end_key(request: Request) -> Response:
    """Revoke one; other gateways follow within seconds."""
    who, accounts = caller(request), request.app.state.site.accounts
    work = partial(managing.end_key, accounts, actor_of(who.principal), request.path_params["key"], who.owner)
    key = await _run(request, work)
    request.app.state.service.guard.forget(key.user_id)
    return json_response(KeyObject(**managing.key_fields(key)))


_USER = Parameter(name="user_id", description="Only this user's keys.")

ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/api-keys",
        handle=list_keys,
        needs="keys:read",
        summary="Keys, newest first",
        answer=KeyList,
        parameters=(*PAGING_BOTH, _USER),
    ),
    Endpoint(
        method="POST",
        path="/v1/api-keys",
        handle=create_key,
        needs="keys:write",
        summary="Make a key; its secret is shown this once",
        body=NewKeyBody,
        answer=NewKeyObject,
        status=201,
        secret=True,
        parameters=(KEY,),
    ),
    Endpoint(
        method="GET",
        path="/v1/api-keys/{key}",
        handle=get_key,
        needs="keys:read",
        summary="A key",
        answer=KeyObject,
    ),
    Endpoint(
        method="PATCH",
        path="/v1/api-keys/{key}",
        handle=change_key,
        needs="keys:write",
        summary="Change a key",
        body=KeyPatch,
        answer=KeyObject,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/api-keys/{key}",
        handle=end_key,
        needs="keys:write",
        summary="Revoke a key",
        answer=KeyObject,
    ),
)
