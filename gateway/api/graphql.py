"""``POST /graphql``: the read side in one query. JSON only, so that no other site's form can send one."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, TypeVar

import msgspec
import trio
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from config.errors import BusyError
from gateway.endpoint import Endpoint, caller
from gateway.errors import ApiError
from gateway.openai.requests import read_body
from gateway.request import json_response

_TEXT_CHARACTERS_MAX = 16 << 10
_UNDER_WAY_MAX = 64
_USER_UNDER_WAY_MAX = 4
_RETRY_MS = 1000

T = TypeVar("T")


class Documents:
    """Those that a gateway answers now. They have a thread of their own: what reserves money and lets callers in
    must not wait behind graphql-core. One: two would take the interpreter from each other, and from the event loop."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)
        self._by_user: Counter[str] = Counter()

    async def run(self, user: str, work: Callable[[], T]) -> T:
        """Run one of a user's. Raises ApiError ``rate_limited``, BusyError."""
        with self._place(user):
            return await trio.to_thread.run_sync(work, limiter=self._limiter, abandon_on_cancel=True)

    @contextmanager
    def _place(self, user: str) -> Iterator[None]:
        if self._by_user[user] >= _USER_UNDER_WAY_MAX:
            message = f"this user has {_USER_UNDER_WAY_MAX} GraphQL queries under way"
            raise ApiError("rate_limited", message, "try again when one has ended", retry_after_ms=_RETRY_MS)
        if self._by_user.total() >= _UNDER_WAY_MAX:
            raise BusyError("too many GraphQL queries are under way", "try again later", retry_after_ms=_RETRY_MS)
        self._by_user[user] += 1
        try:
            yield
        finally:
            self._by_user[user] -= 1
            if not self._by_user[user]:
                del self._by_user[user]


class GraphqlBody(msgspec.Struct, kw_only=True, rename="camel"):
    """As GraphQL clients send it. ``extensions`` are not looked at."""

    query: Annotated[str, Meta(min_length=1, max_length=_TEXT_CHARACTERS_MAX)]
    variables: dict[str, Any] | None = None
    operation_name: str | None = None
    extensions: dict[str, Any] | None = None


class GraphqlError(msgspec.Struct, kw_only=True):
    """What is wrong, and where. ``extensions.code`` as in the errors of ``/v1``."""

    message: str
    extensions: dict[str, Any]
    locations: list[dict[str, int]] = []
    path: list[str | int] = []


class GraphqlAnswer(msgspec.Struct, kw_only=True):
    """``data``: what could be answered, also beside errors."""

    data: dict[str, Any] | None = None
    errors: list[GraphqlError] = []


async def graphql(request: Request) -> Response:
    """Answer a query with what the caller may see."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError("invalid_request", "the content type must be application/json", status=415)
    body = await read_body(request, GraphqlBody)
    state = request.app.state
    principal = caller(request).principal
    work = partial(_answer, principal, state.site, state.service, body)
    found = await state.site.documents.run(principal.user_id, work)
    return json_response(found, headers={"cache-control": "no-store"})


def _answer(principal: Any, site: Any, service: Any, body: GraphqlBody) -> dict[str, Any]:  # noqa: ANN401
    from gateway.graphql import answering, fields  # noqa: PLC0415 - only a gateway that is asked in GraphQL pays for it

    asked = fields.Asked(principal=principal, site=site, service=service)
    return answering.answer(asked, body.query, body.variables or {}, body.operation_name)


ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/graphql",
        handle=graphql,
        needs="graphql",
        summary="Several things in one query, for reading",
        body=GraphqlBody,
        answer=GraphqlAnswer,
    ),
)
