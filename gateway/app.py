"""The routes together: which path is answered by what, and how errors become answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import trio
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from config.errors import LocalError, RiosError
from gateway import pages
from gateway.accounts import Accounts
from gateway.errors import ApiError, error_headers, error_object, error_status, internal_error, invalid
from gateway.exchange import Exchanges
from gateway.openai.chat import chat
from gateway.openai.completions import completions
from gateway.openai.embeddings import embeddings
from gateway.openai.job import Service
from gateway.openai.models import list_models, public_models, retrieve_model
from gateway.openapi import document
from gateway.ports import Health, LedgerView
from gateway.request import identify, json_response

_USAGE_ROWS_MAX = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What routes outside OpenAI's API need."""

    accounts: Accounts
    health: Health
    ledger_view: LedgerView | None
    require_key: bool
    version: str


def build_app(service: Service, site: Site, *, body_bytes_max: int) -> ASGIApp:
    """The ASGI application."""
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", retrieve_model),
        Route("/v1/billing/balance", _balance),
        Route("/v1/billing/usage", _usage),
        Route("/v1/ledger/balance", _ledger_balance),
        Route("/healthz", _healthz),
        Route("/readyz", _readyz),
        Route("/metrics", _metrics),
        Route("/openapi.json", _openapi),
        Route("/", _home),
    ]
    handlers = {
        RiosError: _rios_error,
        HTTPException: _http_error,
        ClientDisconnect: _client_left,
        Exception: _bug,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    app.state.service = service
    app.state.site = site
    return Exchanges(app, service.metrics, body_bytes_max=body_bytes_max)


async def _balance(request: Request) -> Response:
    principal, site = await identify(request), request.app.state.site
    money = await request.app.state.service.till.in_thread(site.accounts.balance, principal.user_id)
    return json_response({"balance": money.balance, "reserved": money.reserved, "available": money.available})


async def _usage(request: Request) -> Response:
    principal, site = await identify(request), request.app.state.site
    text = request.query_params.get("limit", "100")
    if not text.isdecimal() or not 1 <= int(text[:9]) <= _USAGE_ROWS_MAX:
        raise invalid("limit", f"limit must be a number from 1 to {_USAGE_ROWS_MAX}")
    limit, before = int(text), request.query_params.get("before", "")

    def fetch() -> Sequence[object]:
        return site.accounts.usage(principal.user_id, limit=limit, before=before)  # type: ignore[no-any-return]

    rows = await request.app.state.service.till.in_thread(fetch)
    return json_response({"object": "list", "data": rows, "has_more": len(rows) == limit})


async def _ledger_balance(request: Request) -> Response:
    await identify(request)
    view: LedgerView | None = request.app.state.site.ledger_view
    if view is None:
        raise ApiError("not_found", "this gateway shows no ledger", public_code="not_found")
    return json_response({"account": view.account(), "balance": view.balance()})


async def _healthz(request: Request) -> Response:
    return json_response({"status": "ok"})


async def _readyz(request: Request) -> Response:
    reasons = await _problems(request)
    return json_response({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)


async def _problems(request: Request) -> list[str]:
    """Why this gateway cannot answer, as far as known; empty if it can."""
    site: Site = request.app.state.site
    ready, reasons = site.health.ready()
    problems = [] if ready else list(reasons) or ["the node is not ready"]
    try:
        with trio.fail_after(2):
            await request.app.state.service.till.in_thread(site.accounts.database.ping)
    except LocalError as error:
        problems.append(error.message)
    except trio.TooSlowError:
        problems.append("the accounts database does not answer")
    return problems


async def _metrics(request: Request) -> Response:
    body = generate_latest(request.app.state.service.metrics.registry)
    return Response(body, headers={"content-type": CONTENT_TYPE_LATEST})


async def _openapi(request: Request) -> Response:
    return json_response(document(request.app.state.site.version))


async def _home(request: Request) -> Response:
    site: Site = request.app.state.site
    models = public_models(request.app.state.service.engine.models())
    page = pages.home(f"{request.base_url}v1", models, await _problems(request), keys=site.require_key)
    return HTMLResponse(page, headers=pages.HEADERS)


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
