"""``GET /v1/models`` and ``GET /v1/models/{model}``

A model is listed under its name, or under its id where two models share a name; either finds it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from config.generation import ModelInfo
from gateway.errors import ApiError
from gateway.openai.job import Service
from gateway.request import json_response


class ModelDetails(msgspec.Struct, kw_only=True):
    """What RiOS adds. ``reason``: why it is not ready."""

    model_id: str
    context_tokens: int
    ready: bool
    reason: str


class ModelObject(msgspec.Struct, kw_only=True):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    rios: ModelDetails


class ModelList(msgspec.Struct, kw_only=True):
    """All of them: there are no pages."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


async def list_models(request: Request) -> Response:
    """All models."""
    service: Service = request.app.state.service
    models = service.engine.models()
    return json_response({"object": "list", "data": [_entry(name, info) for name, info in public_models(models)]})


async def retrieve_model(request: Request) -> Response:
    """One model. Raises ApiError ``not_found``."""
    service: Service = request.app.state.service
    wanted = request.path_params["model"]
    for name, info in public_models(service.engine.models()):
        if wanted in (name, info.id):
            return json_response(_entry(name, info))
    raise ApiError(
        "not_found", f"the model {wanted!r:.100} does not exist", param="model", public_code="model_not_found"
    )


def public_models(models: Sequence[ModelInfo]) -> list[tuple[str, ModelInfo]]:
    """Models under the names that clients use."""
    names = Counter(info.name for info in models)
    return [(info.name if names[info.name] == 1 and info.name else info.id, info) for info in models]


def _entry(name: str, info: ModelInfo) -> dict[str, Any]:
    rios = {"model_id": info.id, "context_tokens": info.context_tokens, "ready": info.ready, "reason": info.reason}
    return {"id": name, "object": "model", "created": info.created, "owned_by": "rios", "rios": rios}
