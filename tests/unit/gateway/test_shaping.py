"""What answers to GET share, and the headers that an endpoint declares."""

import gzip
import json

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from gateway.endpoint import Endpoint, routes_of
from gateway.errors import ApiError
from gateway.shaping import shape

THING = {"object": "thing", "id": "t1", "name": "n" * 2000, "more": {"name": "inner", "x": 1}}


def request(query: str = "", **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request(
        {"type": "http", "method": "GET", "path": "/", "query_string": query.encode(), "headers": raw, "state": {}}
    )


def answer(value: object = THING, **headers: str) -> Response:
    return Response(json.dumps(value), 200, headers, "application/json")


def body(response: Response) -> object:
    return json.loads(bytes(response.body))


def test_fields_leave_what_was_named() -> None:
    assert body(shape(request("fields=more"), answer(), compress=True)) == {
        "object": "thing",
        "id": "t1",
        "more": {"name": "inner", "x": 1},
    }
    rows = {"object": "list", "data": [THING, THING], "has_more": False}
    assert body(shape(request("fields=none"), answer(rows), compress=True)) == {
        "object": "list",
        "data": [{"object": "thing", "id": "t1"}] * 2,
        "has_more": False,
    }
    with pytest.raises(ApiError, match="fields names"):
        shape(request("fields=" + ",".join(map(str, range(65)))), answer(), compress=True)


def test_what_holds_a_secret_is_not_compressed() -> None:
    packed = shape(request(accept_encoding="br, gzip"), answer(), compress=True)
    assert json.loads(gzip.decompress(bytes(packed.body))) == THING
    for whole in (
        shape(request(accept_encoding="gzip"), answer(), compress=False),
        shape(request(accept_encoding="gzip"), answer(**{"cache-control": "no-store"}), compress=True),
        shape(request(accept_encoding="gzip;q=0, br"), answer(), compress=True),
        shape(request(), answer(), compress=True),
    ):
        assert "content-encoding" not in whole.headers
        assert body(whole) == THING


@pytest.mark.parametrize("tags", ["*", "{}", '"a", {}', '{}, W/"b"'])
def test_a_known_tag_gets_no_body(tags: str) -> None:
    tag = shape(request(), answer(), compress=True).headers["etag"]
    same = shape(request(if_none_match=tags.format(tag)), answer(), compress=True)
    assert (same.status_code, bytes(same.body), same.headers["etag"]) == (304, b"", tag)


def test_errors_and_streams_are_left_alone() -> None:
    for response in (Response(b"{}", 404, media_type="application/json"), Response(b"x", media_type="text/plain")):
        assert shape(request("fields=id", accept_encoding="gzip"), response, compress=True) is response


async def test_a_route_says_when_it_goes() -> None:
    async def handle(_request: Request) -> Response:
        return answer()

    endpoint = Endpoint(
        method="GET",
        path="/old",
        handle=handle,
        needs=None,
        summary="Old",
        secret=True,
        deprecated="@1798761600",
        sunset="Fri, 01 Jan 2027 00:00:00 GMT",
    )
    asked, sent = request(), []

    async def send(message: Message) -> None:
        sent.append(message)

    await routes_of([endpoint])[0].endpoint(asked.scope, asked.receive, send)
    told = dict(sent[0]["headers"])
    assert told[b"deprecation"] == b"@1798761600"
    assert told[b"sunset"].startswith(b"Fri, 01 Jan 2027")
    assert told[b"cache-control"] == b"no-store"
