"""``POST /graphql``: the read side in one query. JSON only, so that no other site's form can send one."""

from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoint import Endpoint, caller
from gateway.errors import ApiError
from gateway.openai.requests import read_body
from gateway.request import json_response

_TEXT_CHARACTERS_MAX = 16 << 10


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
    work = partial(_answer, caller(request).principal, state.site, state.service, body)
    return json_response(await state.service.till.in_thread(work), headers={"cache-control": "no-store"})


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
