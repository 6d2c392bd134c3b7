"""What routes share: who sends a request, and answers in JSON."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from config.generation import PrivacyWish
from gateway.accounts import Principal
from gateway.errors import invalid

PRIVACY_HEADER = "x-rios-privacy"
_WISHES: dict[str, PrivacyWish] = {"": "", "trusted": "trusted", "local": "local"}


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


def privacy_of(request: Request) -> PrivacyWish:
    """Who may see this request's hidden states, beyond what the operator laid down. Raises ApiError."""
    asked = ",".join(request.headers.getlist(PRIVACY_HEADER)).strip().lower()
    if asked not in _WISHES:
        raise invalid(PRIVACY_HEADER, f"{PRIVACY_HEADER} is trusted or local, not {asked!r:.60}")
    return _WISHES[asked]


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as a JSON answer."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
