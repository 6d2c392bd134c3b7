"""``/v1/users``"""

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway import managing
from gateway.accounts import User
from gateway.api.auth import Code, client_of, identity_of
from gateway.audit import actor_of
from gateway.endpoint import Endpoint, caller, permitted
from gateway.listing import PAGING_BOTH, page_of, shown
from gateway.making import KEY, REPLAYED, asked_of
from gateway.openai.requests import read_body
from gateway.request import json_response
from gateway.roles import Role

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Email = Annotated[str, Meta(min_length=3, max_length=254)]


class NewUser(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A user to add. ``email``: what they sign in with."""

    name: Name
    email: Email | None = None
    role: Role = "developer"


class UserPatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What is left out stays. ``role`` and ``disabled`` need users:manage, ``email`` that or a session. One's own
    ``email`` needs the ``password`` in a session, and a ``code`` with a second factor."""

    name: Name | None = None
    email: Email | None = None
    role: Role | None = None
    disabled: bool | None = None
    password: Annotated[str, Meta(max_length=1024)] = ""
    code: Code = ""


class UserObject(msgspec.Struct, kw_only=True):
    """A user."""

    object: Literal["user"] = "user"
    id: str
    name: str
    email: str | None
    role: Role
    disabled: bool
    created_at_ms: int


class UserList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[UserObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def user_object(user: User) -> UserObject:
    """As the API shows it."""
    return UserObject(
        id=user.id,
        name=user.name,
        email=user.email,
        role=user.role,
        disabled=user.disabled,
        created_at_ms=user.created_at_ms,
    )


async def _run(request: Request, work: Any) -> Any:  # noqa: ANN401 - whatever the work gives
    return await request.app.state.service.till.in_thread(work)


async def list_users(request: Request) -> Response:
    """Those within reach."""
    page = page_of(request, both=True)
    accounts, owner = request.app.state.site.accounts, caller(request).owner
    find = partial(managing.list_users, accounts, page, owner=owner)
    rows = [user_object(user) for user in await _run(request, find)]
    return json_response(shown(rows, page, lambda row: row.id))


async def create_user(request: Request) -> Response:
    """Add one."""
    body = await read_body(request, NewUser)
    actor, asked = actor_of(caller(request).principal), asked_of(request, body)
    add = partial(managing.add_user, request.app.state.site.accounts, actor, body.name, body.email, body.role, asked)
    user, replayed = await _run(request, add)
    return json_response(user_object(user), 201, REPLAYED if replayed else None)


async def get_user(request: Request) -> Response:
    """One of them."""
    find = partial(
        managing.get_user, request.app.state.site.accounts, request.path_params["user"], caller(request).owner
    )
    return json_response(user_object(await _run(request, find)))


async def change_user(request: Request) -> Response:
    """Another name, e-mail, role; shut out or let in."""
    body, who = await read_body(request, UserPatch), caller(request)
    if body.role is not None or body.disabled is not None:
        permitted(who.principal, "users:manage")
    if body.email is not None and not who.principal.session_id:
        permitted(who.principal, "users:manage")  # what somebody signs in with is not changed with a key that was found
    if body.email is not None and who.principal.session_id and request.path_params["user"] == who.user_id:
        await identity_of(request).prove(who.principal, body.password, body.code, client_of(request))
    change = managing.UserChange(name=body.name, email=body.email, role=body.role, disabled=body.disabled)
    return await _change(request, change)


async def end_user(request: Request) -> Response:
    """Shut a user out for good: their keys and sessions end. What they paid and used stays in the books."""
    return await _change(request, managing.UserChange(disabled=True))


async def _change(request: Request, change: managing.UserChange) -> Response:
    who, user_id = caller(request), request.path_params["user"]
    accounts = request.app.state.site.accounts
    work = partial(managing.change_user, accounts, actor_of(who.principal), user_id, who.owner, change)
    user = await _run(request, work)
    request.app.state.service.guard.forget(user_id)
    return json_response(user_object(user))


ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/users",
        handle=list_users,
        needs="users:read",
        summary="Users, newest first",
        answer=UserList,
        parameters=PAGING_BOTH,
    ),
    Endpoint(
        method="POST",
        path="/v1/users",
        handle=create_user,
        needs="users:manage",
        summary="Add a user",
        body=NewUser,
        answer=UserObject,
        status=201,
        parameters=(KEY,),
    ),
    Endpoint(
        method="GET",
        path="/v1/users/{user}",
        handle=get_user,
        needs="users:read",
        summary="A user",
        answer=UserObject,
    ),
    Endpoint(
        method="PATCH",
        path="/v1/users/{user}",
        handle=change_user,
        needs="users:write",
        summary="Change a user",
        body=UserPatch,
        answer=UserObject,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/users/{user}",
        handle=end_user,
        needs="users:manage",
        summary="Shut a user out and end their keys and sessions",
        answer=UserObject,
    ),
)
