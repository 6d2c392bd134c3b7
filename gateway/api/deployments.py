"""``/v1/deployments``: which models the swarm serves, with how many replicas, and how far that is."""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from config.swarm import DeploymentMode, DeploymentState, ShardHealth
from gateway.api.workers import swarm_of
from gateway.deployments import Desk, Owned
from gateway.endpoint import Caller, Endpoint, caller
from gateway.listing import PAGING, page_of, part
from gateway.openai.requests import read_body
from gateway.request import json_response

_Replicas = Annotated[int, Meta(ge=1, le=64)]


class DeploymentBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``POST /v1/deployments``"""

    model: Annotated[str, Meta(min_length=1, max_length=255)]
    """Id, or name where one model alone has it."""
    replicas: _Replicas | None = None
    """Of every shard; by default what the node's settings say."""
    mode: DeploymentMode = "experts"


class ScaleBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``PATCH /v1/deployments/{model}``"""

    replicas: _Replicas


class DeploymentObject(msgspec.Struct, kw_only=True):
    """A deployment. ``mine``: the caller may scale it and take it back."""

    id: str
    object: Literal["deployment"] = "deployment"
    model: str
    mode: DeploymentMode
    replicas: int
    state: DeploymentState
    reason: str
    owner: str | None
    """User id; None where no user of this gateway made it."""
    mine: bool
    deployers: Sequence[str]
    replicas_min: int
    shards_ready: int
    shards: Sequence[ShardHealth]


class DeploymentList(msgspec.Struct, kw_only=True):
    """``GET /v1/deployments``"""

    object: Literal["list"] = "list"
    data: Sequence[DeploymentObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def desk_of(request: Request) -> Desk:
    """Deployments with their owners."""
    till = request.app.state.service.till
    return Desk(swarm_of(request), till.database, till.in_thread, request.app.state.site.changes)


async def list_deployments(request: Request) -> Response:
    """All of them: anybody who may read deployments may read everybody's."""
    found = [shown(caller(request), each) for each in await desk_of(request).list()]
    return json_response(part(found, page_of(request), lambda each: each.id))


async def get_deployment(request: Request) -> Response:
    """One, with the health of each shard."""
    return json_response(shown(caller(request), await desk_of(request).get(request.path_params["model"])))


async def create_deployment(request: Request) -> Response:
    """Ask the swarm to serve a model."""
    body = await read_body(request, DeploymentBody)
    made = await desk_of(request).create(caller(request), body.model, body.replicas, body.mode)
    return json_response(shown(caller(request), made), 201)


async def scale_deployment(request: Request) -> Response:
    """Change how many replicas it should have."""
    body = await read_body(request, ScaleBody)
    found = await desk_of(request).scale(caller(request), request.path_params["model"], body.replicas)
    return json_response(shown(caller(request), found))


async def delete_deployment(request: Request) -> Response:
    """Take it back: its holders drop it when they need the room."""
    await desk_of(request).delete(caller(request), request.path_params["model"])
    return Response(status_code=204)


def shown(who: Caller, owned: Owned) -> DeploymentObject:
    """A deployment as this caller sees it."""
    each = owned.deployment
    return DeploymentObject(
        id=each.id,
        model=each.model,
        mode=each.mode,
        replicas=each.replicas,
        state=each.state,
        reason=each.reason,
        owner=owned.owner or None,
        mine=each.deployed_here and who.may_change(owned.owner, "deployments:write"),
        deployers=each.deployers,
        replicas_min=each.replicas_min,
        shards_ready=each.shards_ready,
        shards=each.shards,
    )


_PATH = "/v1/deployments/{model:path}"
ENDPOINTS = (
    Endpoint(
        method="GET",
        path="/v1/deployments",
        handle=list_deployments,
        needs="deployments:read",
        summary="What the swarm serves or is to serve",
        answer=DeploymentList,
        parameters=PAGING,
    ),
    Endpoint(
        method="POST",
        path="/v1/deployments",
        handle=create_deployment,
        needs="deployments:write",
        summary="Ask the swarm to serve a model",
        body=DeploymentBody,
        answer=DeploymentObject,
        status=201,
    ),
    Endpoint(
        method="GET",
        path=_PATH,
        handle=get_deployment,
        needs="deployments:read",
        summary="One deployment with the health of each shard",
        answer=DeploymentObject,
    ),
    Endpoint(
        method="PATCH",
        path=_PATH,
        handle=scale_deployment,
        needs="deployments:write",
        summary="Change the replicas of a deployment",
        body=ScaleBody,
        answer=DeploymentObject,
    ),
    Endpoint(
        method="DELETE",
        path=_PATH,
        handle=delete_deployment,
        needs="deployments:write",
        summary="Take a deployment back",
        status=204,
    ),
)
