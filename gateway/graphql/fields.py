"""What can be asked, and with which permission: parts of the schema, each with the functions behind its fields.

A field without a function is an attribute of what its parent gave, ``createdAtMs`` being ``created_at_ms``. Functions
run in a thread: they may block on the database, and ask the event loop with :meth:`Asked.on_trio`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import trio

from gateway import audit, managing
from gateway.accounts import Accounts, Principal, User
from gateway.endpoint import Caller
from gateway.errors import invalid
from gateway.graphql.limits import LIMIT_MAX
from gateway.listing import Page, check_cursor, shown
from gateway.openai.models import public_models
from gateway.roles import Permission

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: who asks, and whom to ask. ``site`` and ``service`` are those of ``gateway/app.py``."""

    principal: Principal
    site: Any
    service: Any

    @property
    def accounts(self) -> Accounts:
        """The accounts; blocking."""
        found: Accounts = self.site.accounts
        return found

    def on_trio(self, ask: Callable[..., T], *arguments: object) -> T:
        """What a function of the event loop's gives."""
        return trio.from_thread.run_sync(ask, *arguments)

    def wait(self, ask: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """What an async function gives."""
        return trio.from_thread.run(ask, *arguments)


Resolve = Callable[..., Any]
"""``(asked, caller, parent, **arguments)``"""


@dataclass(frozen=True, slots=True)
class Field:
    """A field with a function. ``needs``: what the caller must be allowed."""

    needs: Permission
    resolve: Resolve
    is_lookup: bool = True
    """It asks the database."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the schema: types in SDL (``extend type Query``: what can be asked), and fields by ``Type.name``."""

    sdl: str
    fields: Mapping[str, Field] = field(default_factory=dict)


def page(limit: int, after: str | None) -> Page:
    """The arguments of a list. Raises ApiError."""
    if not 1 <= limit <= LIMIT_MAX:
        raise invalid("limit", f"limit must be a number from 1 to {LIMIT_MAX}")
    check_cursor("after", after or "")
    return Page(limit, after or "")


# --- users and keys


def _me(asked: Asked, who: Caller, parent: None) -> dict[str, Any]:
    principal = who.principal
    return {
        "user_id": principal.user_id,
        "name": principal.user_name,
        "role": principal.role,
        "scopes": sorted(principal.scopes),
        "key_id": principal.key_id,
        "session_id": principal.session_id or None,
    }


def _users(asked: Asked, who: Caller, parent: None, limit: int, after: str | None = None) -> Any:  # noqa: ANN401
    wanted = page(limit, after)
    return shown(managing.list_users(asked.accounts, wanted, owner=who.owner), wanted, lambda row: row.id)


def _user(asked: Asked, who: Caller, parent: None, id: str) -> User:
    return managing.get_user(asked.accounts, id, who.owner)


def _keys(asked: Asked, who: Caller, parent: User | None, limit: int, after: str | None = None) -> Any:  # noqa: ANN401
    wanted, user = page(limit, after), parent.id if parent else ""
    rows = managing.list_keys(asked.accounts, wanted, owner=who.owner, user=user)
    return shown([managing.key_fields(row) for row in rows], wanted, lambda row: row["id"])


_PEOPLE = Part(
    """
    type Me { userId: ID! name: String! role: String! scopes: [String!]! keyId: ID sessionId: ID }
    type User {
      id: ID! name: String! email: String role: String! disabled: Boolean! createdAtMs: Int64!
      apiKeys(limit: Int! = 20, after: ID): ApiKeys!
    }
    type Users { data: [User!]! lastId: ID hasMore: Boolean! }
    type ApiKey {
      id: ID! userId: ID! name: String! scopes: [String!]! cache: Boolean!
      createdAtMs: Int64! expiresAtMs: Int64 revokedAtMs: Int64
    }
    type ApiKeys { data: [ApiKey!]! lastId: ID hasMore: Boolean! }
    extend type Query {
      me: Me
      user(id: ID!): User
      users(limit: Int! = 20, after: ID): Users
      apiKeys(limit: Int! = 20, after: ID): ApiKeys
    }
    """,
    {
        "Query.me": Field("users:read", _me, is_lookup=False),
        "Query.user": Field("users:read", _user),
        "Query.users": Field("users:read", _users),
        "Query.apiKeys": Field("keys:read", _keys),
        "User.apiKeys": Field("keys:read", _keys),
    },
)


# --- models


def _models(asked: Asked, who: Caller, parent: None) -> Sequence[Mapping[str, Any]]:
    return [
        {
            "id": name,
            "created": info.created,
            "model_id": info.id,
            "context_tokens": info.context_tokens,
            "ready": info.ready,
            "reason": info.reason,
        }
        for name, info in public_models(asked.on_trio(asked.service.engine.models))
    ]


_MODELS = Part(
    """
    type Model { id: ID! created: Int64! modelId: ID! contextTokens: Int! ready: Boolean! reason: String! }
    extend type Query { models: [Model!] }
    """,
    {"Query.models": Field("models:read", _models, is_lookup=False)},
)


# --- money, of the caller


def _balance(asked: Asked, who: Caller, parent: None) -> Any:  # noqa: ANN401
    return asked.accounts.balance(who.user_id)


def _usage(asked: Asked, who: Caller, parent: None, limit: int, after: str | None = None) -> Any:  # noqa: ANN401
    wanted = page(limit, after)
    rows = asked.accounts.usage(who.user_id, limit=wanted.fetch, before=wanted.after)
    return shown(rows, wanted, lambda row: row.id)


_MONEY = Part(
    """
    type Balance { balance: Int64! reserved: Int64! available: Int64! }
    type Usage {
      id: ID! requestId: ID! keyId: ID endpoint: String! model: String! promptTokens: Int! completionTokens: Int!
      microcredits: Int64! outcome: String! createdAtMs: Int64!
    }
    type Usages { data: [Usage!]! lastId: ID hasMore: Boolean! }
    extend type Query {
      balance: Balance
      usage(limit: Int! = 20, after: ID): Usages
    }
    """,
    {"Query.balance": Field("billing:read", _balance), "Query.usage": Field("billing:read", _usage)},
)


# --- the audit log


def _audit(asked: Asked, who: Caller, parent: None, limit: int, after: str | None = None) -> Any:  # noqa: ANN401
    wanted = page(limit, after)
    return shown(audit.rows(asked.accounts.database, wanted, owner=who.owner), wanted, lambda row: str(row.place))


_AUDIT = Part(
    """
    type AuditRow {
      place: Int64! createdAtMs: Int64! userId: ID! by: String! action: String! target: String! ownerId: ID!
      detail: String! hash: String!
    }
    type AuditRows { data: [AuditRow!]! lastId: ID hasMore: Boolean! }
    extend type Query { audit(limit: Int! = 20, after: ID): AuditRows }
    """,
    {"Query.audit": Field("audit:read", _audit)},
)

PARTS: Sequence[Part] = (_PEOPLE, _MODELS, _MONEY, _AUDIT)
"""The whole schema."""
