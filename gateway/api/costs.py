"""``/v1/billing/usage/{usage}/cost``: what one request was charged, and what the swarm was paid for it. For admins."""

from functools import partial
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.billing import statements
from gateway.endpoint import Endpoint
from gateway.errors import ApiError
from gateway.request import json_response


class CostLine(msgspec.Struct, kw_only=True):
    """Calls that were paid on one channel. Calls that were shared with other requests count in each of them."""

    channel: str
    peer_id: str
    calls: int
    nano: int


class UsageCost(msgspec.Struct, kw_only=True):
    """A settled request: its charge, what the swarm was paid for it (``swarm_nano``: 1e-9 microcredits; ``swarm_cost``:
    microcredits, rounded down), what is left, and on which channels it was paid."""

    object: Literal["usage.cost"] = "usage.cost"
    id: str
    request_id: str
    user_id: str
    microcredits: int
    swarm_nano: int
    swarm_cost: int
    margin: int
    channels: list[CostLine]


async def usage_cost(request: Request) -> Response:
    """What one request was charged and cost."""
    name = request.path_params["usage"]
    till = request.app.state.service.till
    find = partial(statements.find_cost, name=name)
    found = await till.in_thread(till.database.look, find)
    if found is None:
        raise ApiError("not_found", f"there is no settled request {name!r:.80}", public_code="not_found")
    lines = [CostLine(**line) for line in found.pop("channels")]
    return json_response(UsageCost(**found, channels=lines))


ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/billing/usage/{usage}/cost",
        handle=usage_cost,
        needs="billing:manage",
        summary="What a settled request was charged, what the swarm was paid for it and where, for admins",
        answer=UsageCost,
    ),
)
