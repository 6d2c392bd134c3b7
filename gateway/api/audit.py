"""``/v1/audit``: what was changed, and by whom."""

from functools import partial
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway import audit
from gateway.endpoint import Endpoint, caller
from gateway.listing import PAGING_BOTH, page_of, shown
from gateway.request import json_response


class AuditRow(msgspec.Struct, kw_only=True):
    """One change. ``hash`` is over this row and the hash of the one before (``docs/api.md`` says how)."""

    object: Literal["audit_row"] = "audit_row"
    id: str
    place: int
    created_at_ms: int
    user_id: str
    by: str
    action: str
    target: str
    owner_id: str
    detail: str
    """JSON text, as it was hashed."""
    hash: str


class AuditList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[AuditRow]
    first_id: str | None
    last_id: str | None
    has_more: bool


async def list_rows(request: Request) -> Response:
    """All rows, or what the caller did and what was done to what is theirs."""
    page, site = page_of(request, both=True), request.app.state.site
    find = partial(audit.rows, site.accounts.database, page, owner=caller(request).owner)
    rows = [_row(row) for row in await request.app.state.service.till.in_thread(find)]
    return json_response(shown(rows, page, lambda row: row.id))


def _row(row: audit.Row) -> AuditRow:
    return AuditRow(
        id=str(row.place),
        place=row.place,
        created_at_ms=row.created_at_ms,
        user_id=row.user_id,
        by=row.by,
        action=row.action,
        target=row.target,
        owner_id=row.owner_id,
        detail=row.detail,
        hash=row.hash,
    )


ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/audit",
        handle=list_rows,
        needs="audit:read",
        summary="The audit log, newest first",
        answer=AuditList,
        parameters=PAGING_BOTH,
    ),
)
