"""Who may do what: roles, permissions, and how far each reaches. Pure; the one table that access is decided by.

A route names the permission it needs (``gateway/endpoint.py``); a role gives each permission a reach: nothing, what the
caller owns, or everything. A key's scopes narrow what its user's role allows and never widen it.
"""

from collections.abc import Collection, Mapping
from enum import IntEnum
from typing import Literal, get_args

Role = Literal["admin", "developer", "worker", "viewer"]
"""admin runs the gateway; developer builds on it; worker lends hardware to it; viewer looks."""
ROLES: tuple[Role, ...] = get_args(Role)

Permission = Literal[
    "inference",
    "models:read",
    "graphql",
    "files",
    "batches",
    "users:read",
    "users:write",
    "users:manage",
    "keys:read",
    "keys:write",
    "deployments:read",
    "deployments:write",
    "workers:read",
    "billing:read",
    "billing:write",
    "billing:manage",
    "ledger:read",
    "audit:read",
    "webhooks:read",
    "webhooks:write",
    "events:read",
    "settings:read",
]
PERMISSIONS: tuple[Permission, ...] = get_args(Permission)


class Reach(IntEnum):
    """How far a permission goes."""

    NONE = 0
    OWN = 1
    ALL = 2


def _row(admin: int, developer: int, worker: int, viewer: int) -> Mapping[Role, Reach]:
    return dict(zip(ROLES, map(Reach, (admin, developer, worker, viewer)), strict=True))


_NONE, _OWN, _ALL = Reach

# columns: admin, developer, worker, viewer
TABLE: Mapping[Permission, Mapping[Role, Reach]] = {
    "inference": _row(_OWN, _OWN, _NONE, _NONE),
    "models:read": _row(_ALL, _ALL, _ALL, _ALL),
    "graphql": _row(_OWN, _OWN, _OWN, _OWN),  # lets in; each field needs its own
    "files": _row(_ALL, _OWN, _NONE, _NONE),
    "batches": _row(_ALL, _OWN, _NONE, _NONE),
    "users:read": _row(_ALL, _OWN, _OWN, _OWN),
    "users:write": _row(_ALL, _OWN, _OWN, _OWN),
    "users:manage": _row(_ALL, _NONE, _NONE, _NONE),
    "keys:read": _row(_ALL, _OWN, _OWN, _OWN),
    "keys:write": _row(_ALL, _OWN, _OWN, _OWN),
    "deployments:read": _row(_ALL, _ALL, _ALL, _ALL),
    "deployments:write": _row(_ALL, _OWN, _NONE, _NONE),
    "workers:read": _row(_ALL, _ALL, _ALL, _ALL),
    "billing:read": _row(_ALL, _OWN, _OWN, _OWN),
    "billing:write": _row(_ALL, _OWN, _OWN, _NONE),
    "billing:manage": _row(_ALL, _NONE, _NONE, _NONE),
    "ledger:read": _row(_ALL, _ALL, _ALL, _ALL),
    "audit:read": _row(_ALL, _OWN, _OWN, _OWN),
    "webhooks:read": _row(_ALL, _OWN, _OWN, _OWN),
    "webhooks:write": _row(_ALL, _OWN, _OWN, _NONE),
    "events:read": _row(_ALL, _OWN, _OWN, _OWN),
    "settings:read": _row(_ALL, _NONE, _NONE, _NONE),
}


def reach_of(role: Role, permission: Permission, scopes: Collection[str] = ()) -> Reach:
    """How far a caller with this role may go; no scopes: all that the role has."""
    if scopes and permission not in scopes:
        return Reach.NONE
    return TABLE[permission][role]
