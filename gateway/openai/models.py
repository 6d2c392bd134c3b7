"""``GET /v1/models`` and ``GET /v1/models/{model}``

A model is listed under its name, or under its id where two models share a name; either finds it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from config.generation import ModelInfo
from gateway.errors import ApiError
from gateway.openai.job import Service
from gateway.request import identify, json_response


async def list_models(request: Request) -> Response:
    """All models."""
    service: Service = request.app.state.service
    await identify(request)
    models = service.engine.models()
    return json_response({"object": "list", "data": [_entry(name, info) for name, info in public_models(models)]})


async def retrieve_model(request: Request) -> Response:
    """One model. Raises ApiError ``not_found``."""
    service: Service = request.app.state.service
    await identify(request)
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
