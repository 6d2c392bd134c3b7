"""``/v1/billing``: balances, usage, transactions, invoices, top-ups and payments."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import sqlalchemy as sa
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.accounts import Usage
from gateway.audit import actor_of
from gateway.billing import invoices, payment, sheet, statements
from gateway.billing.statements import BYS, Span
from gateway.db import stamps
from gateway.endpoint import Endpoint, Parameter, caller
from gateway.errors import ApiError, invalid
from gateway.listing import PAGING, USER, check_cursor, page_of, shown, whose
from gateway.openai.requests import read_body, read_bytes
from gateway.request import json_response

T = TypeVar("T")

_BEFORE = Parameter(
    name="before",
    description="The same as after (rows older than this one), from before lists had it.",
    schema={"type": "string", "maxLength": 128, "deprecated": True},
)
_TIME_MAX = 1 << 53
_MS_PER_DAY = 86_400_000
CSV = "text/csv"

Id = Annotated[str, Meta(min_length=1, max_length=64)]
Amount = Annotated[int, Meta(ge=1, le=1 << 53)]
Reference = Annotated[str, Meta(max_length=200)]


class Posting(msgspec.Struct, kw_only=True):
    """One side of a transaction. ``amount`` is what it added to the account, microcredits."""

    object: Literal["posting"] = "posting"
    id: str
    transaction_id: str
    account_id: str
    user_id: str | None
    amount: int
    kind: str
    reference: str
    created_at_ms: int


class PostingList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[Posting]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BalanceObject(msgspec.Struct, kw_only=True):
    """Microcredits. ``reserved``: what running requests hold back; ``available``: what is left for new ones."""

    balance: int
    reserved: int
    available: int


class UsageList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[Usage]
    first_id: str | None
    last_id: str | None
    has_more: bool


class UsageSum(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Usage added up. Of ``day`` (its first millisecond, UTC), ``model``, ``key`` and ``user``: those asked for. Only
    an admin is told what the swarm was paid (``swarm_nano``: 1e-9 microcredits; ``swarm_cost``: rounded down) and the
    ``margin``."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    microcredits: int
    swarm_nano: int | None = None
    swarm_cost: int | None = None
    margin: int | None = None
    day: int | None = None
    model: str | None = None
    key: str | None = None
    user: str | None = None


class UsageSums(msgspec.Struct, kw_only=True):
    """In the order of what it is added up by."""

    object: Literal["list"] = "list"
    data: list[UsageSum]
    has_more: bool


class InvoiceLine(msgspec.Struct, kw_only=True):
    """One model at one price. Prices are microcredits per million tokens."""

    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    input_price: int
    output_price: int
    microcredits: int


class Invoice(msgspec.Struct, kw_only=True):
    """A closed month."""

    object: Literal["invoice"] = "invoice"
    id: str
    number: int
    user_id: str
    month: str
    microcredits: int
    lines: list[InvoiceLine]
    closed_at_ms: int


class InvoiceList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[Invoice]
    first_id: str | None
    last_id: str | None
    has_more: bool


class TopUpBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``reference`` counts once, e.g. a payment's number."""

    user_id: Id
    microcredits: Amount
    reference: Reference = ""


class PaymentBody(msgspec.Struct, kw_only=True):
    """A payment that was made. ``id`` counts once."""

    id: Annotated[str, Meta(min_length=1, max_length=200)]
    user_id: Id
    microcredits: Amount


class Booked(msgspec.Struct, kw_only=True):
    """``booked``: whether it is new."""

    object: Literal["top_up"] = "top_up"
    transaction_id: str
    booked: bool


async def _write(request: Request, work: Callable[[], T]) -> T:
    found: T = await request.app.state.service.till.in_thread(work)
    return found


async def _look(request: Request, work: Callable[[sa.Connection], T]) -> T:
    """Read what may be a moment old."""
    till = request.app.state.service.till
    found: T = await till.in_thread(till.database.look, work)
    return found


def _csv(text: str, name: str) -> Response:
    return Response(text, headers={"content-disposition": f'attachment; filename="{name}"'}, media_type=CSV)


def _wants_csv(request: Request) -> bool:
    asked = request.query_params.get("format", "json")
    if asked not in ("json", "csv"):
        raise invalid("format", "format must be json or csv")
    return asked == "csv"


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal()) or int(text[:20]) > _TIME_MAX:
        raise invalid(name, f"{name} must be unix milliseconds")
    return int(text[:20])


# --- reading


async def balance(request: Request) -> Response:
    """The caller's money."""
    site = request.app.state.site
    money = await request.app.state.service.till.in_thread(site.accounts.balance, caller(request).user_id)
    return json_response(BalanceObject(balance=money.balance, reserved=money.reserved, available=money.available))


async def usage(request: Request) -> Response:
    """The caller's settled requests, newest first."""
    page, site = page_of(request), request.app.state.site
    older = request.query_params.get("before", "")
    check_cursor("before", older)
    page = replace(page, after=page.after or older)
    find = partial(site.accounts.usage, caller(request).user_id, limit=page.fetch, before=page.after)
    rows = await request.app.state.service.till.in_thread(find)
    return json_response(shown(rows, page, lambda row: row.id))


async def usage_summary(request: Request) -> Response:
    """Usage added up, as JSON or CSV."""
    by = tuple(dict.fromkeys(request.query_params.get("by", "day").split(",")))
    if not set(by) <= set(BYS):
        raise invalid("by", f"by names some of {', '.join(BYS)}, between commas")
    now, csv = stamps.now_ms(), _wants_csv(request)
    span = Span(
        owner=whose(request),
        from_ms=_number(request, "from_ms", now - 31 * _MS_PER_DAY),
        to_ms=_number(request, "to_ms", now + 1),
    )
    margins = caller(request).may_change("", "billing:manage")
    find = partial(statements.sum_usage, span=span, by=by, with_costs=margins)  # type: ignore[arg-type]
    rows = await _look(request, find)
    if csv:
        columns = (*by, "requests", "prompt_tokens", "completion_tokens", "microcredits")
        columns += ("swarm_nano", "swarm_cost", "margin") if margins else ()
        return _csv(sheet.to_csv(columns, [[row[name] for name in columns] for row in rows]), "usage.csv")
    data = [UsageSum(**row) for row in rows]
    return json_response(UsageSums(data=data, has_more=len(data) == statements.ROWS_MAX))


async def transactions(request: Request) -> Response:
    """What was posted."""
    return await _postings(request, ())


async def top_ups(request: Request) -> Response:
    """What was paid in."""
    return await _postings(request, ("credit", "payment"))


async def _postings(request: Request, kinds: Sequence[str]) -> Response:
    page = page_of(request)
    find = partial(statements.list_postings, owner=whose(request), kinds=kinds, limit=page.fetch, after=page.after)
    found = await _look(request, find)
    rows = [Posting(id=f"{row['transaction_id']}:{row['account_id']}", **row) for row in found]
    return json_response(shown(rows, page, lambda row: row.id))


async def list_invoices(request: Request) -> Response:
    """Closed months."""
    page = page_of(request)
    if page.after and not (page.after.isascii() and page.after.isdecimal() and len(page.after) < 18):
        raise invalid("after", "after must be the number of an invoice")
    find = partial(invoices.list_invoices, owner=whose(request), limit=page.fetch, after=page.after)
    rows = [_invoice(each) for each in await _look(request, find)]
    return json_response(shown(rows, page, lambda row: row.id))


async def get_invoice(request: Request) -> Response:
    """One, as JSON or CSV."""
    text, csv = request.path_params["number"], _wants_csv(request)
    if not (text.isascii() and text.isdecimal() and len(text) < 18):
        raise ApiError("not_found", f"there is no invoice {text!r:.40}", public_code="not_found")
    find = partial(invoices.get_invoice, number=int(text), owner=caller(request).owner)
    found = await _look(request, find)
    if csv:
        return _csv(invoices.as_csv(found), f"invoice-{found['number']}.csv")
    return json_response(_invoice(found))


def _invoice(found: dict[str, Any]) -> Invoice:
    lines = [InvoiceLine(**line) for line in found["lines"]]
    return Invoice(id=str(found["number"]), **{**found, "lines": lines})


# --- money in


async def top_up(request: Request) -> Response:
    """Credit, by an admin."""
    body, who = await read_body(request, TopUpBody), caller(request)
    database, actor = request.app.state.service.till.database, actor_of(who.principal)
    work = partial(payment.top_up, database, actor, body.user_id, body.microcredits, body.reference)
    return json_response(Booked(transaction_id=await _write(request, work), booked=True), 201)


async def receive_payment(request: Request) -> Response:
    """A payment service reports a payment."""
    secret: bytes = request.app.state.site.payment_secret
    if not secret:
        hint = f"set gateway.billing_payment_secret_file or {payment.ENVIRONMENT}"
        raise ApiError("not_found", "this gateway takes no payments", hint, public_code="not_found")
    payment.check(secret, request.headers.get(payment.HEADER, ""), await read_bytes(request), int(time.time()))
    body = await read_body(request, PaymentBody)
    database = request.app.state.service.till.database
    name, new = await _write(request, partial(payment.book, database, body.id, body.user_id, body.microcredits))
    return json_response(Booked(transaction_id=name, booked=new))


_FORMAT = Parameter(name="format", description="json or csv.", schema={"type": "string", "enum": ["json", "csv"]})
_MOMENT = {"type": "integer", "minimum": 0, "maximum": _TIME_MAX}

ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/billing/balance",
        handle=balance,
        needs="billing:read",
        summary="The caller's balance",
        answer=BalanceObject,
    ),
    Endpoint(
        method="GET",
        path="/v1/billing/usage",
        handle=usage,
        needs="billing:read",
        summary="The caller's settled requests",
        answer=UsageList,
        parameters=(*PAGING, _BEFORE),
    ),
    Endpoint(
        method="GET",
        path="/v1/billing/usage/summary",
        handle=usage_summary,
        needs="billing:read",
        summary="Usage added up by day, model, key or user; the last 31 days if no span is given",
        answer=UsageSums,
        media=("application/json", CSV),
        parameters=(
            Parameter(name="by", description=f"Some of {', '.join(BYS)}, between commas."),
            Parameter(name="from_ms", description="From when on.", schema=_MOMENT),
            Parameter(name="to_ms", description="Before when.", schema=_MOMENT),
            USER,
            _FORMAT,
        ),
    ),
    Endpoint(
        method="GET",
        path="/v1/billing/transactions",
        handle=transactions,
        needs="billing:read",
        summary="Postings, newest first",
        answer=PostingList,
        parameters=(*PAGING, USER),
    ),
    Endpoint(
        method="GET",
        path="/v1/billing/topups",
        handle=top_ups,
        needs="billing:read",
        summary="What was paid in, newest first",
        answer=PostingList,
        parameters=(*PAGING, USER),
    ),
    Endpoint(
        method="POST",
        path="/v1/billing/topups",
        handle=top_up,
        needs="billing:manage",
        summary="Pay into a user's account",
        body=TopUpBody,
        answer=Booked,
        status=201,
    ),
    Endpoint(
        method="POST",
        path="/v1/billing/payments",
        handle=receive_payment,
        needs=None,
        summary="Report a payment, signed; a repetition books nothing",
        body=PaymentBody,
        answer=Booked,
        parameters=(Parameter(name=payment.HEADER, place="header", description="t=SECONDS,v1=HMAC-SHA256 in hex."),),
    ),
    Endpoint(
        method="GET",
        path="/v1/billing/invoices",
        handle=list_invoices,
        needs="billing:read",
        summary="Invoices of closed months, newest first",
        answer=InvoiceList,
        parameters=(*PAGING, USER),
    ),
    Endpoint(
        method="GET",
        path="/v1/billing/invoices/{number}",
        handle=get_invoice,
        needs="billing:read",
        summary="An invoice, as JSON or CSV",
        answer=Invoice,
        media=("application/json", CSV),
        parameters=(_FORMAT,),
    ),
)
