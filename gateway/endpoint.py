"""What a route is: one value that says path, permission and shapes; made into routes, and into the OpenAPI document.

The wrapper made here is the one place where a request is let in: it authenticates the caller and asks ``gateway/roles``
whether, and how far, they may do what the endpoint does. Handlers read :func:`caller` and keep to its reach.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.accounts import Principal
from gateway.errors import ApiError
from gateway.exchange import BODY_BYTES_FREE
from gateway.request import identify, refuse_nul
from gateway.roles import Permission, Reach, reach_of
from gateway.shaping import shape

_FORM_BYTES = 64 << 10
"""What a form has around its file."""
_CONVERTER = re.compile(r":\w+\}")

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A query parameter or header."""

    name: str
    place: Literal["query", "header"] = "query"
    description: str = ""
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One method of one path. ``needs`` None: open to everybody, without a key, with a small body."""

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    """As Starlette writes it: ``/v1/models/{model:path}``."""
    handle: Handler
    needs: Permission | None
    summary: str
    body: Any = None
    """Type of the JSON body (msgspec), None for none."""
    answer: Any = None
    """Type of the JSON answer, None for any JSON."""
    event: Any = None
    """Type of the JSON of each server-sent event, where the answer is a stream of them."""
    status: int = 200
    """Of an answer that is not an error."""
    media: Sequence[str] = ("application/json",)
    """What an answer's content can be."""
    body_media: str = "application/json"
    parameters: Sequence[Parameter] = ()
    uploads: bool = False
    """Bodies may be as large as files, and are read piece by piece."""
    secret: bool = False
    """Answers hold secrets: they are not compressed, and nobody keeps them."""
    deprecated: str = ""
    """Since when it should not be used any more, as the ``Deprecation`` header has it (RFC 9745); empty: it may."""
    sunset: str = ""
    """From when on it may be gone (RFC 8594)."""

    @property
    def template(self) -> str:
        """The path as OpenAPI and metrics write it: ``/v1/models/{model}``."""
        return _CONVERTER.sub("}", self.path)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and how far the endpoint's permission reaches for them: what they own, or everything."""

    principal: Principal
    reach: Reach

    @property
    def user_id(self) -> str:
        """The caller's own user."""
        return self.principal.user_id

    @property
    def owner(self) -> str | None:
        """The only user whose things may be seen or changed; None: anybody's."""
        return None if self.reach is Reach.ALL else self.principal.user_id

    def may_touch(self, owner_id: str) -> bool:
        """Whether a thing of this owner is within reach. If not, answer as if it did not exist."""
        return self.reach is Reach.ALL or owner_id == self.principal.user_id

    def may_change(self, owner_id: str, permission: Permission) -> bool:
        """The same under another permission than the endpoint's own: what a page offers to do."""
        reach = reach_of(self.principal.role, permission, self.principal.scopes)
        return reach is Reach.ALL or (reach is Reach.OWN and owner_id == self.principal.user_id)


def caller(request: Request) -> Caller:
    """The caller that the endpoint's wrapper let in."""
    found: Caller = request.scope["state"]["caller"]
    return found


def routes_of(endpoints: Sequence[Endpoint]) -> list[Route]:
    """Starlette's routes, in the same order."""
    return [Route(each.path, _Guarded(each), methods=[each.method]) for each in endpoints]


class _Guarded:
    """An endpoint as an ASGI application: what it raises is for the application around it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._answer = _guarded(endpoint)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        response = await self._answer(Request(scope, receive, send))
        await response(scope, receive, send)


def _guarded(endpoint: Endpoint) -> Handler:
    template, more = endpoint.template, _headers(endpoint)

    async def answer(request: Request) -> Response:
        state = request.scope["state"]
        state["route"] = template
        if endpoint.uploads:
            state["upload_bytes_max"] = request.app.state.site.upload_bytes_max + _FORM_BYTES
        if endpoint.needs is None:
            refuse_nul(request)
            state["body_bytes_max"] = BODY_BYTES_FREE
        else:
            principal = await identify(request)
            state["caller"] = Caller(principal, permitted(principal, endpoint.needs))
        response = await endpoint.handle(request)
        if endpoint.method == "GET" and endpoint.needs is not None:
            response = shape(request, response, compress=not endpoint.secret)
        for name, value in more:
            response.headers[name] = value
        return response

    return answer


def _headers(endpoint: Endpoint) -> list[tuple[str, str]]:
    found = [("deprecation", endpoint.deprecated), ("sunset", endpoint.sunset)]
    found.append(("cache-control", "no-store" if endpoint.secret else ""))
    return [(name, value) for name, value in found if value]


def permitted(principal: Principal, permission: Permission) -> Reach:
    """How far the principal may go. Raises ApiError ``forbidden``."""
    reach = reach_of(principal.role, permission, principal.scopes)
    if reach is Reach.NONE:
        why = f"the role {principal.role} does not have it"
        if reach_of(principal.role, permission) is not Reach.NONE:
            why = "this key's scopes do not have it"
        raise ApiError("forbidden", f"this needs the permission {permission}, and {why}", "ask an admin")
    return reach
