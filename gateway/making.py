"""Requests that make things under an idempotency key: the thing is made once, however often the request comes.

A route takes ``KEY`` among its parameters and gives :func:`asked_of` to what makes the thing, which calls
``idempotency.made_before`` and ``idempotency.keep_made`` in its own transaction.
"""

import msgspec
from starlette.requests import Request

from gateway import idempotency
from gateway.endpoint import Parameter, caller
from gateway.idempotency import Wanted
from gateway.openai.keyed import key_of

KEY = Parameter(
    name=idempotency.HEADER,
    place="header",
    description="The same key and body within 24 hours: made once.",
    schema={"type": "string", "maxLength": 255},
)
REPLAYED = {"idempotency-replayed": "true"}


def asked_of(request: Request, body: msgspec.Struct) -> Wanted | None:
    """What a key stands for; None without one. Raises ApiError for a key that cannot be."""
    key = key_of(request)
    if not key:
        return None
    asked = f"{request.method} {request.url.path}"
    data = msgspec.json.encode(body, order="deterministic")
    return idempotency.wanted(caller(request).principal.account_id, key, asked, data, "")
