"""Lists, page by page, as OpenAI's clients read them: newest first, ``after`` is the id of the last row seen.

A list that goes both ways (``PAGING_BOTH``, ``page_of(..., both=True)``, :func:`window`) also takes ``before``: the
page in front of the first row seen. ``has_more`` tells whether there are more in the direction that was asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from starlette.requests import Request

from gateway.endpoint import Parameter, caller
from gateway.errors import ApiError, invalid

LIMIT_MAX = 1000
_LIMIT_DEFAULT = 100
_ID_CHARACTERS_MAX = 128

Row = TypeVar("Row")

PAGING = (
    Parameter(
        name="limit",
        description=f"Rows at most, {_LIMIT_DEFAULT} if it is left out.",
        schema={"type": "integer", "minimum": 1, "maximum": LIMIT_MAX},
    ),
    Parameter(
        name="after",
        description="The id of the last row of the page before.",
        schema={"type": "string", "maxLength": _ID_CHARACTERS_MAX},
    ),
)
"""The query parameters of every list."""

PAGING_BOTH = (
    *PAGING,
    Parameter(
        name="before",
        description="The id of the first row of the page behind; not together with after.",
        schema={"type": "string", "maxLength": _ID_CHARACTERS_MAX},
    ),
)
"""Of a list that goes both ways."""

USER = Parameter(name="user_id", description="Only this user's.", schema={"type": "string", "maxLength": 64})
"""Of a list that admins see whole."""


def whose(request: Request) -> str | None:
    """Whose things are asked for (:data:`USER`), within the caller's reach; None: everybody's. Raises ApiError."""
    asked, owner = request.query_params.get("user_id", ""), caller(request).owner
    if len(asked) > _ID_CHARACTERS_MAX:
        raise invalid("user_id", "user_id must be the id of a user")
    if owner is not None and asked not in ("", owner):
        raise ApiError("not_found", f"there is no user {asked!r:.80}", public_code="not_found")
    return owner or asked or None


@dataclass(frozen=True, slots=True)
class Page:
    """What part of a list is asked for. ``after`` is empty for its beginning, ``before`` for going on."""

    limit: int
    after: str = ""
    before: str = ""

    @property
    def fetch(self) -> int:
        """Rows to fetch: one more than shown tells whether there are more."""
        return self.limit + 1


def page_of(request: Request, *, both: bool = False) -> Page:
    """Raises ApiError for a limit that is none, or a cursor that cannot be."""
    text = request.query_params.get("limit", str(_LIMIT_DEFAULT))
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:9]) <= LIMIT_MAX:
        raise invalid("limit", f"limit must be a number from 1 to {LIMIT_MAX}")
    after = request.query_params.get("after", "")
    before = request.query_params.get("before", "") if both else ""
    for name, cursor in (("after", after), ("before", before)):
        check_cursor(name, cursor)
    if after and before:
        raise invalid("before", "a page is after a row or before one, not both")
    return Page(int(text[:9]), after, before)


def check_cursor(name: str, cursor: str) -> None:
    """Raises ApiError for what is no row's id."""
    if len(cursor) > _ID_CHARACTERS_MAX or not cursor.isprintable():
        raise invalid(name, f"{name} must be the id of a row")


Edge = Callable[[str], Sequence[Any]]


def window(query: "sa.Select[Any]", page: Page, order: Sequence[sa.ColumnElement[Any]], edge: Edge) -> "sa.Select[Any]":
    """The query's rows of a page, newest first (last first if the page lies before a row; :func:`shown` turns them).

    ``order``: the columns that put rows in order, all of them growing; ``edge``: their values at a row's id.
    """
    if page.after:
        query = query.where(sa.tuple_(*order) < sa.tuple_(*edge(page.after)))
    if page.before:
        query = query.where(sa.tuple_(*order) > sa.tuple_(*edge(page.before)))
    return query.order_by(*(each.asc() if page.before else each.desc() for each in order)).limit(page.fetch)


def shown(rows: Sequence[Row], page: Page, id_of: Callable[[Row], str]) -> dict[str, object]:
    """The rows fetched for a page, as a list object."""
    data = rows[: page.limit]
    if page.before:
        data = data[::-1]
    return {
        "object": "list",
        "data": data,
        "first_id": id_of(data[0]) if data else None,
        "last_id": id_of(data[-1]) if data else None,
        "has_more": len(rows) > page.limit,
    }


def part(rows: Sequence[Row], page: Page, id_of: Callable[[Row], str]) -> dict[str, object]:
    """The same of a list that is here as a whole: what follows the row ``after``; nothing, if that has gone."""
    start = 0
    if page.after:
        start = next((place for place, row in enumerate(rows, 1) if id_of(row) == page.after), len(rows))
    return shown(rows[start : start + page.fetch], page, id_of)


def number_after(page: Page) -> int | None:
    """``after``, where ids of rows are numbers. Raises ApiError for what is none."""
    if not page.after:
        return None
    if not (page.after.isascii() and page.after.isdecimal() and len(page.after) <= 18):
        raise invalid("after", "after must be the id of a row")
    return int(page.after)
