"""``/v1/workers`` and ``/v1/swarm/map``: the swarm as this gateway's node sees it."""

from collections.abc import Sequence
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from config.swarm import ModelMap, Worker
from gateway.endpoint import Endpoint, Parameter
from gateway.errors import ApiError
from gateway.listing import PAGING, page_of, part
from gateway.ports import Swarm
from gateway.request import json_response


class WorkerList(msgspec.Struct, kw_only=True):
    """``GET /v1/workers``"""

    object: Literal["list"] = "list"
    data: Sequence[Worker]
    first_id: str | None
    last_id: str | None
    has_more: bool


class MapList(msgspec.Struct, kw_only=True):
    """``GET /v1/swarm/map``"""

    object: Literal["list"] = "list"
    data: Sequence[ModelMap]


def swarm_of(request: Request) -> Swarm:
    """The node's swarm. Raises ApiError ``not_found`` where the gateway runs without a node."""
    swarm: Swarm | None = request.app.state.site.swarm
    if swarm is None:
        raise ApiError("not_found", "this gateway shows no swarm", public_code="not_found")
    return swarm


async def list_workers(request: Request) -> Response:
    """Every node known; ``health`` keeps those of one health, ``model`` those that hold something of a model."""
    health, model = request.query_params.get("health"), request.query_params.get("model")
    found = [
        worker
        for worker in swarm_of(request).workers()
        if health in (None, worker.health) and (model is None or model in worker.models)
    ]
    return json_response(part(found, page_of(request), lambda worker: worker.peer_id))


async def get_worker(request: Request) -> Response:
    """One node. Raises ApiError ``not_found``."""
    wanted = request.path_params["peer_id"]
    for worker in swarm_of(request).workers():
        if worker.peer_id == wanted:
            return json_response(worker)
    raise ApiError("not_found", f"no worker {wanted!r:.100} is known", public_code="not_found")


async def swarm_map(request: Request) -> Response:
    """Who holds which layers and experts; ``model`` (name or id) keeps one model."""
    model = request.query_params.get("model")
    found = [each for each in swarm_of(request).maps() if model in (None, each.id, each.model)]
    return json_response(MapList(data=found))


_MODEL = Parameter(name="model", description="Only what holds something of the model with this id.")

ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/workers",
        handle=list_workers,
        needs="workers:read",
        summary="The swarm's nodes as this one sees them",
        answer=WorkerList,
        parameters=(
            *PAGING,
            _MODEL,
            Parameter(
                name="health",
                description="Only those of this health.",
                schema={
                    "type": "string",
                    "enum": ["healthy", "unlinked", "resting", "paused", "banned", "gone"],
                },
            ),
        ),
    ),
    Endpoint(
        method="GET",
        path="/v1/workers/{peer_id}",
        handle=get_worker,
        needs="workers:read",
        summary="One node",
        answer=Worker,
    ),
    Endpoint(
        method="GET",
        path="/v1/swarm/map",
        handle=swarm_map,
        needs="workers:read",
        summary="Who holds which layers and experts of which model",
        answer=MapList,
        parameters=(Parameter(name="model", description="Only this model, by name or id."),),
    ),
)
