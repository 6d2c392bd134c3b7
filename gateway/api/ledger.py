"""``/v1/ledger``: what the node's ledger says. Read only; anybody's accounts may be read, as every node holds them."""

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from config.accountbook import (
    LedgerBalance,
    LedgerChannel,
    LedgerCommittee,
    LedgerEntry,
    LedgerSummary,
    StatementLine,
)
from gateway.endpoint import Endpoint, Parameter
from gateway.errors import ApiError
from gateway.listing import PAGING, number_after, page_of, part, shown
from gateway.ports import LedgerView
from gateway.request import json_response


class Statement(msgspec.Struct, kw_only=True):
    """``GET /v1/ledger/statement``: newest first."""

    object: Literal["list"] = "list"
    data: Sequence[StatementLine]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EntryList(msgspec.Struct, kw_only=True):
    """``GET /v1/ledger/entries``: newest first."""

    object: Literal["list"] = "list"
    data: Sequence[LedgerEntry]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ChannelList(msgspec.Struct, kw_only=True):
    """``GET /v1/ledger/channels``"""

    object: Literal["list"] = "list"
    data: Sequence[LedgerChannel]
    first_id: str | None
    last_id: str | None
    has_more: bool


def ledger_of(request: Request) -> LedgerView:
    """The node's ledger. Raises ApiError ``not_found`` where there is none."""
    view: LedgerView | None = request.app.state.site.ledger_view
    if view is None:
        raise ApiError("not_found", "this gateway shows no ledger", public_code="not_found")
    return view


async def balance(request: Request) -> Response:
    """An account, by default the node's own."""
    return json_response(ledger_of(request).balance(_account(request)))


async def summary(request: Request) -> Response:
    """The whole ledger in numbers."""
    return json_response(ledger_of(request).summary())


async def statement(request: Request) -> Response:
    """What moved an account's balance, newest first."""
    page = page_of(request)
    lines = await ledger_of(request).statement(_account(request))
    return json_response(part(lines[::-1], page, lambda line: str(line.place)))


async def entries(request: Request) -> Response:
    """Final entries, newest first."""
    page = page_of(request)
    rows = await ledger_of(request).entries(limit=page.fetch, before=number_after(page))
    return json_response(shown(rows, page, lambda row: str(row.place)))


async def entry(request: Request) -> Response:
    """One entry or claim with its certificate, checked just now."""
    return json_response(await ledger_of(request).entry(request.path_params["name"]))


async def witnesses(request: Request) -> Response:
    """The committee in office."""
    return json_response(ledger_of(request).committee())


async def channels(request: Request) -> Response:
    """An account's channels."""
    page = page_of(request)
    rows = await ledger_of(request).channels(_account(request))
    return json_response(part(rows, page, lambda row: row.channel))


def _account(request: Request) -> str:
    return request.query_params.get("account", "")


_ACCOUNT = Parameter(name="account", description="A peer id; by default the node's own account.")


def _read(path: str, handle: Any, summary: str, answer: Any, *parameters: Parameter) -> Endpoint:  # noqa: ANN401 - types
    return Endpoint(
        method="GET",
        path=f"/v1/ledger{path}",
        handle=handle,
        needs="ledger:read",
        summary=summary,
        answer=answer,
        parameters=parameters,
    )


ENDPOINTS = (
    _read("", summary, "The ledger in numbers", LedgerSummary),
    _read("/balance", balance, "An account of the ledger", LedgerBalance, _ACCOUNT),
    _read("/statement", statement, "What moved an account's balance", Statement, _ACCOUNT, *PAGING),
    _read("/entries", entries, "Final entries, newest first", EntryList, *PAGING),
    _read("/entry/{name}", entry, "One entry or claim with its certificate", None),
    _read("/witnesses", witnesses, "The committee in office", LedgerCommittee),
    _read("/channels", channels, "An account's channels", ChannelList, _ACCOUNT, *PAGING),
)
