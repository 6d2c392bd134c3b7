"""What each page shows: one function a page, from the caller to the values its template reads."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request

from config.errors import RiosError
from config.settings import GatewaySettings
from gateway import audit as records
from gateway.accounts import ApiKey, User
from gateway.api.deployments import DeploymentObject, desk_of, shown
from gateway.billing import usage
from gateway.dashboard import charts
from gateway.dashboard.session import can
from gateway.db import stamps
from gateway.endpoint import Caller
from gateway.identity import people
from gateway.listing import Page
from gateway.openai.models import public_models
from gateway.roles import PERMISSIONS, ROLES, reach_of

Values = Mapping[str, Any]

_PERIODS = {"7": 7, "30": 30, "90": 90}
_RECENT_ROWS = 8
_LEDGER_ROWS = 40
_AUDIT_ROWS = 100


async def overview(request: Request, caller: Caller) -> Values:
    """The state of everything on one page."""
    site, till = request.app.state.site, request.app.state.service.till
    ready, reasons = site.health.ready()
    recent = await till.in_thread(usage.newest, till.database, own_only(caller, "billing:read"), _RECENT_ROWS)
    money = await till.in_thread(site.accounts.balance, caller.user_id)
    ledger = site.ledger_view
    return {
        "base_url": f"{site.home.url or str(request.base_url).rstrip('/')}/v1",
        "ready": ready,
        "reasons": reasons,
        "recent": recent,
        "money": money,
        "ledger": ledger.summary() if ledger is not None else None,
        "node_balance": ledger.balance() if ledger is not None else None,
        "deployments": await _deployments(request, caller),
        **_swarm(request),
    }


async def swarm(request: Request, caller: Caller) -> Values:
    """Workers and the map."""
    return _swarm(request)


async def deployments(request: Request, caller: Caller) -> Values:
    """What is served, and the form to ask for more."""
    found = await _deployments(request, caller)
    served = {each.id for each in found}
    models = public_models(request.app.state.service.engine.models())
    return {
        "deployments": found,
        "models": [(name, info.id) for name, info in models if info.id not in served],
        "may_write": can(caller, "deployments:write"),
    }


async def requests(request: Request, caller: Caller) -> Values:
    """What is being answered now, and what was answered last."""
    till, everybody = request.app.state.service.till, can(caller, "users:manage")
    owner = None if everybody else caller.user_id
    recent = await till.in_thread(usage.newest, till.database, owner, 50)
    return {"recent": recent, "everybody": everybody, "names": await names_of(request, caller)}


async def chat(request: Request, caller: Caller) -> Values:
    """The playground."""
    models = public_models(request.app.state.service.engine.models())
    return {"models": models, "asked": request.query_params.get("model", "")}


async def ledger(request: Request, caller: Caller) -> Values:
    """Balances, flows, entries and witnesses of the node's ledger."""
    view = request.app.state.site.ledger_view
    if view is None:
        return {"ledger": None}
    statement = list(await view.statement())
    return {
        "ledger": view.summary(),
        "node_balance": view.balance(),
        "committee": view.committee(),
        "entries": await view.entries(limit=_LEDGER_ROWS, before=None),
        "channels": await view.channels(),
        "statement": statement[: -_LEDGER_ROWS - 1 : -1],
        "flows": flows(statement),
    }


async def entry(request: Request, caller: Caller) -> Values:
    """One entry with its certificate."""
    view = request.app.state.site.ledger_view
    if view is None:
        return {"entry": None, "problem": "This node has no ledger."}
    try:
        return {"entry": await view.entry(request.path_params["name"]), "problem": ""}
    except RiosError as error:
        return {"entry": None, "problem": str(error)}


def flows(statement: Sequence[Any]) -> Sequence[tuple[str, int, int]]:
    """Peer, what came from it and what went to it, the largest sum first."""
    sums: dict[str, list[int]] = {}
    for line in statement:
        both = sums.setdefault(line.peer_id, [0, 0])
        both[line.amount < 0] += abs(line.amount)
    return sorted(((peer, came, went) for peer, (came, went) in sums.items()), key=lambda row: -(row[1] + row[2]))[:12]


async def usage_page(request: Request, caller: Caller) -> Values:
    """Charts of what was used, and the way to take it away."""
    till, owner = request.app.state.service.till, own_only(caller, "billing:read")
    whose = "mine" if request.query_params.get("of") == "mine" or owner is not None else "all"
    days = _PERIODS.get(request.query_params.get("days", ""), 30)
    end = stamps.now_ms() // usage.DAY_MS + 1
    period = ((end - days) * usage.DAY_MS, end * usage.DAY_MS)
    user_id = caller.user_id if whose == "mine" else None
    rows = await till.in_thread(usage.by_day, till.database, user_id, *period)
    models = await till.in_thread(usage.by_model, till.database, user_id, *period)
    return {
        "chart": charts.daily(rows, end - days, days),
        "models": models,
        "total": {name: sum(getattr(row, name) for row in rows) for name in _SUMS},
        "days": days,
        "whose": whose,
        "may_see_all": owner is None,
        "share": charts.share,
        "money": await till.in_thread(request.app.state.site.accounts.balance, caller.user_id),
    }


_SUMS = ("requests", "prompt_tokens", "completion_tokens", "microcredits")


async def keys(request: Request, caller: Caller) -> Values:
    """The caller's keys, or everybody's."""
    accounts, till = request.app.state.site.accounts, request.app.state.service.till
    own = own_only(caller, "keys:read")
    found: Sequence[ApiKey] = await till.in_thread(accounts.list_keys, own)
    role = caller.principal.role
    return {
        "keys": sorted(found, key=lambda key: (key.revoked_at_ms is not None, -key.created_at_ms)),
        "names": await names_of(request, caller),
        "may_write": can(caller, "keys:write"),
        "scopes": [each for each in PERMISSIONS if reach_of(role, each)],
    }


async def users(request: Request, caller: Caller) -> Values:
    """Everybody, for admins."""
    accounts, till = request.app.state.site.accounts, request.app.state.service.till

    def fetch() -> Sequence[tuple[User, int]]:
        return [(user, accounts.balance(user.id).balance) for user in accounts.list_users()]

    return {"users": await till.in_thread(fetch), "roles": ROLES}


async def account(request: Request, caller: Caller) -> Values:
    """The caller's own: second factor, password, sessions, identities at the other provider."""
    identity, principal = request.app.state.site.identity, caller.principal
    return {
        "links": await identity.links(caller.user_id) if principal.session_id else [],
        "sessions": await identity.sessions(principal) if principal.session_id else [],
        "has_factor": await _has_factor(request, caller),
    }


async def _has_factor(request: Request, caller: Caller) -> bool:
    till = request.app.state.service.till
    person = await till.in_thread(people.by_id, till.database, caller.user_id)
    return bool(person.has_second_factor)


async def audit(request: Request, caller: Caller) -> Values:
    """Who did what, newest first; ``before`` goes on from an earlier page."""
    site, till = request.app.state.site, request.app.state.service.till
    text = request.query_params.get("before", "")
    page = Page(_AUDIT_ROWS, after=text if text.isascii() and text.isdecimal() and len(text) <= 18 else "")
    find = partial(records.rows, site.accounts.database, page, owner=caller.owner)
    rows = list(await till.in_thread(find))
    return {
        "rows": rows[:_AUDIT_ROWS],
        "older": rows[_AUDIT_ROWS - 1].place if len(rows) > _AUDIT_ROWS else None,
        "names": await names_of(request, caller),
    }


async def settings(request: Request, caller: Caller) -> Values:
    """The gateway's settings as the node read them; there are no secrets among them."""
    read: GatewaySettings = request.app.state.site.settings
    rows = [
        (field.name, getattr(read, field.name), field.default, field.metadata.get("help", ""))
        for field in fields(GatewaySettings)
    ]
    return {"settings": rows, "version": request.app.state.site.version}


def _swarm(request: Request) -> Values:
    view = request.app.state.site.swarm
    if view is None:
        return {"workers": [], "maps": [], "has_swarm": False}
    return {"workers": view.workers(), "maps": view.maps(), "has_swarm": True}


async def _deployments(request: Request, caller: Caller) -> Sequence[DeploymentObject]:
    if request.app.state.site.swarm is None:
        return []
    return [shown(caller, each) for each in await desk_of(request).list()]


async def names_of(request: Request, caller: Caller) -> Mapping[str, str]:
    """User id -> name, of those that the caller may see."""
    if not can(caller, "users:manage"):
        return {caller.user_id: caller.principal.user_name}
    accounts, till = request.app.state.site.accounts, request.app.state.service.till
    everybody = await till.in_thread(accounts.list_users)
    return {user.id: user.name for user in everybody}


def own_only(caller: Caller, permission: Any) -> str | None:  # noqa: ANN401 - Permission
    """The only user whose things may be shown; None: everybody's."""
    return None if caller.may_change("", permission) else caller.user_id


def to_json(value: Any) -> Any:  # noqa: ANN401 - JSON
    """What a page hands to its script."""
    return msgspec.to_builtins(value)
