"""What routes share: who sends a request, and answers in JSON."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.accounts import Principal


async def identify(request: Request) -> Principal:
    """Authenticate a request and count it; its answer will carry the limits' headers.

    Raises ApiError ``unauthenticated``, ``forbidden`` or ``rate_limited``.
    """
    service = request.app.state.service
    principal: Principal = await service.guard.authenticate(request.headers.get("authorization", ""))
    key = principal.key_id or principal.user_id
    # Read when the answer starts, so that they show what the request itself used.
    request.scope["state"]["limits"] = lambda: service.limits.headers(key)
    service.limits.take_request(key)
    return principal


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as a JSON answer."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
