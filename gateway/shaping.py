"""What answers to reading requests share: ``fields=``, a weak ETag, gzip.

Only whole JSON answers of GET are touched. What holds a secret is not compressed (an attacker who can make a browser
repeat requests could read it from their lengths: BREACH): its endpoint says so, or its answer says ``no-store``.
"""

import gzip
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import invalid

_GZIP_BYTES_MIN = 1024
_FIELDS_MAX = 64


def shape(request: Request, response: Response, *, compress: bool) -> Response:
    """The answer as this caller wants it. Raises ApiError for ``fields`` that are none."""
    if response.status_code != 200 or response.media_type != "application/json":
        return response
    body = bytes(response.body)
    names = request.query_params.get("fields")
    if names is not None:
        body = msgspec.json.encode(_only(msgspec.json.decode(body), _names(names)))
    headers = {k: v for k, v in response.headers.items() if k not in ("content-length", "content-type")}
    # sha256 as in RFC 9110's sense of weak: the same value, maybe in another encoding
    headers["etag"] = tag = f'W/"{hashlib.sha256(body).hexdigest()[:24]}"'
    headers.setdefault("cache-control", "private, no-cache")
    headers["vary"] = "authorization, cookie, accept-encoding"
    if is_known(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    compress = compress and "no-store" not in headers["cache-control"]
    if compress and len(body) >= _GZIP_BYTES_MIN and _takes_gzip(request.headers.get("accept-encoding", "")):
        headers["content-encoding"] = "gzip"
        body = gzip.compress(body, 5, mtime=0)
    return Response(body, 200, headers, "application/json")


def _names(text: str) -> frozenset[str]:
    names = frozenset(filter(None, (part.strip() for part in text.split(","))))
    if not names or len(names) > _FIELDS_MAX:
        raise invalid("fields", f"fields names 1 to {_FIELDS_MAX} fields, with commas between them")
    return names


def _only(value: Any, names: frozenset[str]) -> Any:  # noqa: ANN401 - any JSON
    """A thing, or the things of a list, with these fields alone (``id`` and ``object`` stay)."""
    if isinstance(value, Mapping) and value.get("object") == "list" and isinstance(value.get("data"), Sequence):
        return {**value, "data": [_only(each, names) for each in value["data"]]}
    if isinstance(value, Mapping):
        return {k: v for k, v in value.items() if k in names or k in ("id", "object")}
    return value


def is_known(header: str, tag: str) -> bool:
    """Whether a client has what this tag stands for, by its ``If-None-Match``."""
    return header.strip() == "*" or tag in (part.strip() for part in header.split(","))


def _takes_gzip(header: str) -> bool:
    for part in header.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() in ("gzip", "*"):
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
