"""What routes share: who sends a request, and answers in JSON."""

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from config.generation import PrivacyWish
from gateway.accounts import Principal
from gateway.address import client_address, neighbourhood
from gateway.errors import ApiError, invalid
from gateway.limits import Meter

PRIVACY_HEADER = "x-rios-privacy"
_WISHES: dict[str, PrivacyWish] = {"": "", "trusted": "trusted", "local": "local"}


async def identify(request: HTTPConnection) -> Principal:
    """Authenticate a request and count it; its answer will carry the limits' headers.

    Raises ApiError ``unauthenticated``, ``forbidden`` or ``rate_limited``; and what :func:`refuse_nul` raises.
    """
    refuse_nul(request)
    service, site = request.app.state.service, request.app.state.site
    principal: Principal = await service.guard.authenticate(site.home.credentials_of(request))
    address = client_address(request, site.identity.rules.proxies)
    meter = service.metering.meter(principal, address)
    known = principal.key_id or principal.session_id
    request.scope["state"]["sender"] = principal.user_id if known else neighbourhood(address)
    # Read when the answer starts, so that they show what the request itself used.
    request.scope["state"]["meter"] = meter
    await meter.request()
    return principal


def refuse_nul(request: HTTPConnection) -> None:
    """No name holds NUL, and PostgreSQL takes none. Raises ApiError."""
    if "\0" in request.scope["path"]:
        raise ApiError("not_found", "there is nothing at a path with NUL", public_code="not_found")
    if b"%00" in request.scope["query_string"]:
        raise invalid(None, "the query must not hold NUL")


def meter_of(request: Request) -> Meter:
    """The meter of a request that :func:`identify` let in."""
    meter: Meter = request.scope["state"]["meter"]
    return meter


def privacy_of(request: Request) -> PrivacyWish:
    """Who may see this request's hidden states, beyond what the operator laid down. Raises ApiError."""
    asked = ",".join(request.headers.getlist(PRIVACY_HEADER)).strip().lower()
    if asked not in _WISHES:
        raise invalid(PRIVACY_HEADER, f"{PRIVACY_HEADER} is trusted or local, not {asked!r:.60}")
    return _WISHES[asked]


def json_response(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``value`` as a JSON answer."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
