"""``/v1/billing/budgets`` and ``/v1/billing/limits``: what may be spent, and asked, by whom."""

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.audit import actor_of
from gateway.billing import budgets
from gateway.endpoint import Endpoint, caller
from gateway.listing import PAGING, USER, page_of, shown, whose
from gateway.openai.requests import read_body
from gateway.request import json_response

Id = Annotated[str, Meta(min_length=1, max_length=64)]
Limit = Annotated[int, Meta(ge=0, le=1 << 53)]


class BudgetAlert(msgspec.Struct, kw_only=True):
    """This share of the budget was reached."""

    percent: int
    spent: int
    created_at_ms: int


class BudgetObject(msgspec.Struct, kw_only=True):
    """What may be spent in a calendar month (UTC), microcredits. ``key_id`` null: by all requests of the user.
    ``by_admin``: only admins may change or remove it."""

    object: Literal["budget"] = "budget"
    id: str
    user_id: str
    key_id: str | None
    microcredits: int
    month: str
    spent: int
    reserved: int
    available: int
    alerts: list[BudgetAlert]
    by_admin: bool
    created_at_ms: int


class BudgetList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[BudgetObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BudgetBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``user_id``: whose, by default the caller's. ``key_id``: of this key of theirs alone."""

    microcredits: Limit
    user_id: Id | None = None
    key_id: Id | None = None


class KeyLimits(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What a key may ask for per minute; 0: what the gateway's settings say."""

    requests_per_minute: Annotated[int, Meta(ge=0, le=1 << 30)] = 0
    tokens_per_minute: Annotated[int, Meta(ge=0, le=1 << 40)] = 0


async def list_budgets(request: Request) -> Response:
    """Those within reach, this month."""
    page, owner, till = page_of(request), whose(request), request.app.state.service.till

    def find() -> list[BudgetObject]:
        with till.database.read() as connection:
            found = budgets.list_budgets(connection, owner=owner, limit=page.fetch, after=page.after)
            return [_budget(each) for each in found]

    return json_response(shown(await till.in_thread(find), page, lambda row: row.id))


async def set_budget(request: Request) -> Response:
    """Make or change one."""
    body, who = await read_body(request, BudgetBody), caller(request)
    wish = budgets.Wish(user_id=body.user_id or who.user_id, key_id=body.key_id or "", microcredits=body.microcredits)
    till = request.app.state.service.till
    work = partial(budgets.set_budget, till.database, actor_of(who.principal), wish, who.owner)
    return json_response(_budget(await till.in_thread(work)))


async def remove_budget(request: Request) -> Response:
    """End one."""
    who, till = caller(request), request.app.state.service.till
    name = request.path_params["budget"]
    work = partial(budgets.remove_budget, till.database, actor_of(who.principal), name, who.owner)
    await till.in_thread(work)
    return Response(status_code=204)


def _budget(found: Any) -> BudgetObject:  # noqa: ANN401
    alerts = [BudgetAlert(**alert) for alert in found["alerts"]]
    return BudgetObject(**{**found, "alerts": alerts})


async def set_key_limits(request: Request) -> Response:
    """A key's own limits."""
    body, who, service = await read_body(request, KeyLimits), caller(request), request.app.state.service
    work = partial(
        budgets.set_key_limits,
        service.till.database,
        actor_of(who.principal),
        request.path_params["key"],
        body.requests_per_minute,
        body.tokens_per_minute,
    )
    service.guard.forget(await service.till.in_thread(work))
    return json_response(body)


ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/billing/budgets",
        handle=list_budgets,
        needs="billing:read",
        summary="Budgets and how much of them is used this month",
        answer=BudgetList,
        parameters=(*PAGING, USER),
    ),
    Endpoint(
        method="PUT",
        path="/v1/billing/budgets",
        handle=set_budget,
        needs="billing:write",
        summary="Set the monthly budget of a user or of a key",
        body=BudgetBody,
        answer=BudgetObject,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/billing/budgets/{budget}",
        handle=remove_budget,
        needs="billing:write",
        summary="Remove a budget",
        status=204,
    ),
    Endpoint(
        method="PUT",
        path="/v1/billing/limits/{key}",
        handle=set_key_limits,
        needs="billing:manage",
        summary="Give a key limits of its own",
        body=KeyLimits,
        answer=KeyLimits,
    ),
)
