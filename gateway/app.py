"""The routes together: which path is answered by what, and how errors become answers."""

import hashlib
from dataclasses import dataclass, field
from functools import cache

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from config.errors import RiosError
from config.settings import GatewaySettings
from gateway.accounts import Accounts
from gateway.api import (
    audit,
    auth,
    batches,
    billing,
    budgets,
    costs,
    credentials,
    deployments,
    events,
    files,
    graphql,
    health,
    keys,
    ledger,
    oidc,
    users,
    webhooks,
    workers,
)
from gateway.dashboard.live import Live
from gateway.dashboard.routes import ROUTES
from gateway.deployments import Changes
from gateway.endpoint import Endpoint, routes_of
from gateway.errors import ApiError, error_headers, error_object, error_status, internal_error
from gateway.events import Bus
from gateway.exchange import Exchanges
from gateway.identity.browser import Home
from gateway.identity.identity import Identity
from gateway.jobs.courier import Courier
from gateway.jobs.runner import Runner
from gateway.openai import endpoints as openai
from gateway.openai.job import Service
from gateway.openapi import document
from gateway.ports import Health, LedgerView, Swarm
from gateway.request import json_response
from gateway.shaping import is_known


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What routes outside OpenAI's API need."""

    accounts: Accounts
    identity: Identity
    home: Home
    health: Health
    ledger_view: LedgerView | None
    swarm: Swarm | None
    settings: GatewaySettings
    """As the operator wrote them, for the page that shows them."""
    runner: Runner
    events: Bus
    courier: Courier
    upload_bytes_max: int
    require_key: bool
    version: str
    payment_secret: bytes = b""
    """What signed reports of payments are checked with; empty: none are taken."""
    changes: Changes = field(default_factory=Changes)
    """Of deployments."""
    documents: graphql.Documents = field(default_factory=graphql.Documents)
    """The GraphQL queries under way."""


def build_app(service: Service, site: Site, live: Live, *, body_bytes_max: int) -> ASGIApp:
    """The ASGI application."""
    handlers = {
        RiosError: _rios_error,
        HTTPException: _http_error,
        ClientDisconnect: _client_left,
        Exception: _bug,
    }
    routes = [*events.SOCKETS, *routes_of(ENDPOINTS), *ROUTES]
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    app.state.service = service
    app.state.site = site
    app.state.live = live
    proxies = site.identity.rules.proxies
    return Exchanges(app, service.metrics, body_bytes_max=body_bytes_max, proxies=proxies)


async def _openapi(request: Request) -> Response:
    body, tag = _encoded(request.app.state.site.version)
    headers = {"etag": tag, "cache-control": "public, no-cache"}
    if is_known(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    return Response(body, 200, headers, "application/json")


@cache
def _encoded(version: str) -> tuple[bytes, str]:
    """The document and its tag: made once, for it takes longer than most requests, and anybody may ask."""
    body = msgspec.json.encode(document(version, ENDPOINTS))
    return body, f'"{hashlib.sha256(body).hexdigest()[:24]}"'


ENDPOINTS = (
    *openai.ENDPOINTS,
    *files.ENDPOINTS,
    *batches.ENDPOINTS,
    *webhooks.ENDPOINTS,
    *events.ENDPOINTS,
    *auth.ENDPOINTS,
    *credentials.ENDPOINTS,
    *oidc.ENDPOINTS,
    *users.ENDPOINTS,
    *keys.ENDPOINTS,
    *audit.ENDPOINTS,
    *billing.ENDPOINTS,
    *budgets.ENDPOINTS,
    *costs.ENDPOINTS,
    *workers.ENDPOINTS,
    *deployments.ENDPOINTS,
    *ledger.ENDPOINTS,
    *graphql.ENDPOINTS,
    *health.ENDPOINTS,
    Endpoint(method="GET", path="/openapi.json", handle=_openapi, needs=None, summary="This document"),
)
"""Everything that the gateway answers."""


async def _rios_error(request: Request, error: RiosError) -> Response:
    return json_response(error_object(error), error_status(error), error_headers(error))


async def _http_error(request: Request, error: HTTPException) -> Response:
    if error.status_code == 405:
        text = f"{request.url.path} does not take {request.method}"
        refusal = ApiError("invalid_request", text, status=405, public_code="method_not_allowed")
    else:
        text = f"there is nothing at {request.url.path:.200}"
        refusal = ApiError("not_found", text, public_code="not_found")
    return json_response(error_object(refusal), error_status(refusal), dict(error.headers or {}))


async def _client_left(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # Nobody reads it.


async def _bug(request: Request, error: Exception) -> Response:
    return json_response(error_object(internal_error(request.scope["state"]["request_id"])), 500)
