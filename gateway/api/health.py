"""Is it alive, can it answer, what do its numbers say, what does its API look like: open to everybody."""

import trio
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from config.errors import LocalError
from gateway import pages
from gateway.endpoint import Endpoint
from gateway.errors import told
from gateway.openai.models import public_models
from gateway.request import json_response


async def healthz(request: Request) -> Response:
    """The process answers."""
    return json_response({"status": "ok"})


async def readyz(request: Request) -> Response:
    """The node can answer requests, or why not."""
    reasons = await _problems(request)
    return json_response({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)


async def _problems(request: Request) -> list[str]:
    """Why this gateway cannot answer, as far as known; empty if it can."""
    site = request.app.state.site
    ready, reasons = site.health.ready()
    problems = [] if ready else list(reasons) or ["the node is not ready"]
    try:
        with trio.fail_after(2):
            await request.app.state.service.till.in_thread(site.accounts.database.ping)
    except LocalError as error:
        problems.append(told(error))
    except trio.TooSlowError:
        problems.append("the accounts database does not answer")
    return problems


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(request.app.state.service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


async def home(request: Request) -> Response:
    """A page for people who open the address in a browser."""
    site = request.app.state.site
    models = public_models(request.app.state.service.engine.models())
    page = pages.home(f"{request.base_url}v1", models, await _problems(request), keys=site.require_key)
    return HTMLResponse(page, headers=pages.HEADERS)


ENDPOINTS = (
    Endpoint(method="GET", path="/healthz", handle=healthz, needs=None, summary="Is the process alive"),
    Endpoint(method="GET", path="/readyz", handle=readyz, needs=None, summary="Can the node answer"),
    Endpoint(
        method="GET",
        path="/metrics",
        handle=metrics,
        needs=None,
        summary="Prometheus metrics",
        media=(CONTENT_TYPE_LATEST.partition(";")[0],),
    ),
    Endpoint(method="GET", path="/", handle=home, needs=None, summary="A page for people", media=("text/html",)),
)
