"""Who may go on: what runs for a key, a session or a user that ended is ended too, on every gateway of the database.

A stream is let in once and may run for long. While it does, it holds a place here. One look a second at the database,
for all of them together and only while there are some, finds whose key, session or user ended, or may do less than when
it was let in.

Invariants:
1. What ends on any gateway, or on the command line, ends what runs for it within ``CHECK_SECONDS`` and one query; what
   ends on this gateway at once.
2. Nothing waits for a look: a request that is over within a second costs no query.
3. A database that is away takes nobody's rights.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
import trio

from config.errors import RiosError
from gateway.accounts import Principal
from gateway.db.identity import sessions, signing_keys
from gateway.db.models import LOCAL_USER, api_keys, users
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.errors import ApiError
from gateway.roles import Permission, Role, reach_of
from gateway.till import Till

_logger = logging.getLogger("rios.gateway")

CHECK_SECONDS = 1.0
_IDS_AT_ONCE = 1000


@dataclass(slots=True, eq=False)
class Hold:
    """Something that runs for somebody. ``refusal``: why it may not any more; ``over``: nothing is to be ended."""

    principal: Principal
    needs: tuple[Permission, ...]
    refusal: ApiError | None = None
    over: bool = False
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def is_local(self) -> bool:
        """Whether it is a request without credentials, which nothing can end."""
        who = self.principal
        return who.user_id == LOCAL_USER and who.key_id is None and not who.session_id


@dataclass(frozen=True, slots=True)
class _State:
    """What somebody may do now."""

    role: Role
    disabled: bool
    scopes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Found:
    """By their ids: what goes on, and who there is. ``signers``: signing keys that are good."""

    keys: Mapping[str, _State]
    sessions: Mapping[str, _State]
    users: Mapping[str, _State]
    signers: frozenset[str]


class Standing:
    """What runs on this gateway, and for whom. :meth:`run` must be running."""

    def __init__(self, till: Till) -> None:
        self._till = till
        self._holds: set[Hold] = set()
        self._begun = trio.Event()
        self._news = trio.Event()

    @contextmanager
    def while_allowed(self, principal: Principal, *needs: Permission) -> Iterator[Hold]:
        """Run the block as long as the principal may do as much as now. Raises ApiError if it was ended."""
        hold = Hold(principal, needs)
        if not hold.is_local:
            self._holds.add(hold)
            self._begun.set()
        try:
            with hold.scope:
                yield hold
        finally:
            self._holds.discard(hold)
        if hold.refusal is not None and hold.scope.cancelled_caught:
            raise hold.refusal

    def look_soon(self) -> None:
        """Something ended on this gateway."""
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            if not self._holds:
                self._begun = trio.Event()
                await self._begun.wait()
            with trio.move_on_after(CHECK_SECONDS):
                await self._news.wait()
            self._news = trio.Event()
            try:
                await self._look()
            except RiosError as error:
                _logger.error("whose streams shall end is not known yet: %s", error)

    async def _look(self) -> None:
        holds = tuple(self._holds)
        if not holds:
            return
        found = await self._till.in_thread(_find, self._till.database, [hold.principal for hold in holds])
        for hold in holds:
            if hold.over:
                continue
            hold.refusal = hold.refusal or _refusal(hold, found)
            if hold.refusal is not None:
                hold.scope.cancel()


def _refusal(hold: Hold, found: _Found) -> ApiError | None:
    who = hold.principal
    if who.key_id is not None:
        state, gone = found.keys.get(who.key_id), ("this API key has ended", "use another key")
    elif who.session_id:
        state, gone = found.sessions.get(who.session_id), ("this session has ended", "sign in again")
    else:
        state, gone = found.users.get(who.user_id), ("there is no such user any more", "")
    if state is not None and state.disabled:
        return ApiError("forbidden", f"the user {who.user_name!r} is disabled", "ask the operator")
    if state is None:
        user = found.users.get(who.user_id)  # disabling a user ends keys and sessions: say what happened
        if user is not None and user.disabled:
            return ApiError("forbidden", f"the user {who.user_name!r} is disabled", "ask the operator")
        return ApiError("unauthenticated", *gone)
    if who.signer_id and who.signer_id not in found.signers:
        return ApiError("unauthenticated", "this access token was revoked", "refresh it, or sign in again")
    for need in hold.needs:
        if reach_of(state.role, need, state.scopes) < reach_of(who.role, need, who.scopes):
            return ApiError("forbidden", f"this needs the permission {need}, which was taken back", "ask an admin")
    return None


def _find(database: Database, principals: Collection[Principal]) -> _Found:
    """What there is of them now. Blocking."""
    now, of_user = now_ms(), (users.c.role, users.c.disabled)
    key = (
        sa.select(api_keys.c.id, *of_user, api_keys.c.scopes)
        .join(users, users.c.id == api_keys.c.user_id)
        .where(api_keys.c.revoked_at_ms.is_(None))
        .where(sa.or_(api_keys.c.expires_at_ms.is_(None), api_keys.c.expires_at_ms > now))
    )
    session = (
        sa.select(sessions.c.id, *of_user)
        .join(users, users.c.id == sessions.c.user_id)
        .where(sessions.c.revoked_at_ms.is_(None), sessions.c.expires_at_ms > now)
    )
    signer = sa.select(signing_keys.c.id).where(signing_keys.c.revoked_at_ms.is_(None))
    with database.read() as connection:

        def states(query: sa.Select[Any], column: sa.Column[Any], ids: set[str]) -> dict[str, _State]:
            return {row.id: _state(row) for row in _rows(connection, query, column, ids)}

        return _Found(
            keys=states(key, api_keys.c.id, {each.key_id for each in principals if each.key_id}),
            sessions=states(session, sessions.c.id, {each.session_id for each in principals if each.session_id}),
            users=states(sa.select(users.c.id, *of_user), users.c.id, {each.user_id for each in principals}),
            signers=frozenset(
                row.id
                for row in _rows(
                    connection, signer, signing_keys.c.id, {each.signer_id for each in principals if each.signer_id}
                )
            ),
        )


def _rows(
    connection: sa.Connection, query: sa.Select[Any], column: sa.Column[Any], ids: set[str]
) -> Iterator[sa.Row[Any]]:
    wanted = sorted(ids)
    for first in range(0, len(wanted), _IDS_AT_ONCE):
        yield from connection.execute(query.where(column.in_(wanted[first : first + _IDS_AT_ONCE])))


def _state(row: sa.Row[Any]) -> _State:
    scopes = getattr(row, "scopes", "")
    return _State(row.role, row.disabled, frozenset(scopes.split()))
