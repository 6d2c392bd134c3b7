"""Every page and file of the dashboard, with the permission it needs; and the one place where a page is let out.

Pages are no part of the API (they are not in its document): a caller without a session is sent to sign in, one without
the permission gets a page that says so. Every answer carries :data:`HEADERS`; there is no inline script or style.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from config.errors import RiosError
from gateway.billing import usage
from gateway.dashboard import views, words
from gateway.dashboard.assets import asset, assets
from gateway.dashboard.billing import billing
from gateway.dashboard.live import live
from gateway.dashboard.session import can, current_caller
from gateway.db import stamps
from gateway.endpoint import Caller
from gateway.errors import error_status, told
from gateway.identity.browser import csrf_of
from gateway.openai.models import public_models
from gateway.request import json_response
from gateway.roles import Permission

if TYPE_CHECKING:
    from jinja2 import Environment

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
SIGN_IN = "/dashboard/sign-in"
INVITE = "/dashboard/invite"
THEMES = ("light", "dark")
_THEME_COOKIE = "rios_theme"

View = Callable[[Request, Caller], Awaitable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page. ``group`` is its heading in the navigation; "": it does not stand there."""

    path: str
    title: str
    template: str
    needs: Permission
    view: View
    group: str = ""
    icon: str = ""


PAGES = (
    Page(
        path="", title="Overview", template="overview", needs="workers:read", view=views.overview, group="Network",
        icon="overview",
    ),
    Page(
        path="/swarm", title="Swarm", template="swarm", needs="workers:read", view=views.swarm, group="Network",
        icon="swarm",
    ),
    Page(
        path="/deployments", title="Deployments", template="deployments", needs="deployments:read",
        view=views.deployments, group="Network", icon="deployments",
    ),
    Page(
        path="/ledger", title="Ledger", template="ledger", needs="ledger:read", view=views.ledger, group="Network",
        icon="ledger",
    ),
    Page(
        path="/chat", title="Playground", template="chat", needs="inference", view=views.chat, group="Build",
        icon="chat",
    ),
    Page(
        path="/requests", title="Requests", template="requests", needs="billing:read", view=views.requests,
        group="Build", icon="requests",
    ),
    Page(
        path="/usage", title="Usage", template="usage", needs="billing:read", view=views.usage_page, group="Build",
        icon="usage",
    ),
    Page(
        path="/billing", title="Billing", template="billing", needs="billing:read", view=billing, group="Build",
        icon="billing",
    ),
    Page(
        path="/keys", title="API keys", template="keys", needs="keys:read", view=views.keys, group="Build",
        icon="keys",
    ),
    Page(
        path="/users", title="Users", template="users", needs="users:manage", view=views.users, group="Operate",
        icon="users",
    ),
    Page(
        path="/audit", title="Audit", template="audit", needs="audit:read", view=views.audit, group="Operate",
        icon="audit",
    ),
    Page(
        path="/settings", title="Settings", template="settings", needs="settings:read", view=views.settings,
        group="Operate", icon="settings",
    ),
    Page(path="/account", title="Your account", template="account", needs="users:read", view=views.account),
    Page(path="/ledger/{name}", title="Ledger entry", template="entry", needs="ledger:read", view=views.entry),
)  # fmt: skip


def _handler(page: Page) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        request.scope["state"]["route"] = f"/dashboard{page.path}"
        try:
            caller = await current_caller(request, page.needs)
        except RiosError as error:
            return _refused(request, error)
        if caller is None:
            return RedirectResponse(f"{SIGN_IN}?next={quote(request.url.path)}", 303, HEADERS)
        values = await page.view(request, caller)
        return render(request, page.template, {**values, "page": page, "caller": caller})

    return answer


async def sign_in(request: Request) -> Response:
    """The page to sign in with; its script calls the API."""
    request.scope["state"]["route"] = SIGN_IN
    following = request.query_params.get("next", "")
    elsewhere = request.query_params.get("code") == "1"  # the other provider sent them back: only the code is missing
    values = {"next": following if _is_own(following) else "/dashboard", "elsewhere": elsewhere}
    return render(request, "sign_in", values)


async def invite(request: Request) -> Response:
    """Where an invite leads: the page to choose a password on."""
    request.scope["state"]["route"] = INVITE
    return render(request, "invite", {})


def _is_own(path: str) -> bool:
    """A way back into the dashboard, and nowhere else: ``//host`` and ``/\\host`` are other sites to a browser."""
    return path == "/dashboard" or (path.startswith("/dashboard/") and "\\" not in path and path.isprintable())


async def export(request: Request) -> Response:
    """``GET /dashboard/usage.csv`` and ``.json``: the settled requests that the caller may see, newest first."""
    request.scope["state"]["route"] = "/dashboard/usage.{kind}"
    caller = await current_caller(request, "billing:read")
    if caller is None:
        return RedirectResponse(f"{SIGN_IN}?next=/dashboard/usage", 303, HEADERS)
    till = request.app.state.service.till
    owner = caller.user_id if request.query_params.get("of") == "mine" else caller.owner
    rows = await till.in_thread(usage.newest, till.database, owner, usage.EXPORT_ROWS_MAX)
    kind = request.path_params["kind"]
    headers = {**HEADERS, "content-disposition": f'attachment; filename="rios-usage.{kind}"'}
    if kind == "json":
        return json_response([{**views.to_json(row), "user": user} for row, user in rows], headers=headers)
    return Response(usage.as_csv(rows), headers=headers, media_type="text/csv; charset=utf-8")


def render(request: Request, template: str, values: Mapping[str, Any], status: int = 200) -> Response:
    """A page of the dashboard."""
    caller = values.get("caller")
    theme = request.cookies.get(_THEME_COOKIE, "")
    site = request.app.state.site
    names = {info.id: name for name, info in public_models(request.app.state.service.engine.models())}
    session = site.home.session_of(request)
    common = {
        "csrf": csrf_of(session) if session else "",
        "groups": _groups(caller) if caller is not None else {},
        "static": f"/dashboard/static/{assets().version}",
        "theme": theme if theme in THEMES else "",
        "now_ms": stamps.now_ms(),
        "model_names": names,
        "to_json": views.to_json,
        "can": can,
        "signed_in": bool(session),
        "oidc": site.identity.oidc is not None,
        "page": None,
        "caller": None,
    }
    html = _templates().get_template(f"{template}.html").render({**common, **values})
    return HTMLResponse(html, status, HEADERS)


def _groups(caller: Caller) -> Mapping[str, Sequence[Page]]:
    """The navigation: what this caller may open, by heading."""
    found: dict[str, list[Page]] = {}
    for page in PAGES:
        if page.group and can(caller, page.needs):
            found.setdefault(page.group, []).append(page)
    return found


def _refused(request: Request, error: RiosError) -> Response:
    return render(request, "refused", {"reason": told(error)}, error_status(error))


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415 - not before the first page

    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(words.FILTERS)
    return environment


ROUTES = [
    Route("/dashboard/static/{version}/{name}", asset, methods=["GET"]),
    Route("/dashboard/live", live, methods=["GET"]),
    Route("/dashboard/usage.{kind:str}", export, methods=["GET"]),
    Route(SIGN_IN, sign_in, methods=["GET"]),
    Route(INVITE, invite, methods=["GET"]),
    *(Route(f"/dashboard{page.path}", _handler(page), methods=["GET"]) for page in PAGES),
]
