"""The OpenAPI document, made from the endpoints themselves."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.endpoint import Endpoint, Parameter

_ERRORS = {
    "400": "The request is wrong; param names the field.",
    "401": "No API key, or not a valid one.",
    "402": "The balance does not cover the request.",
    "403": "The user is disabled, or may not do this.",
    "404": "No such thing, or not one that the caller may see.",
    "408": "The body did not arrive in time.",
    "409": "It contradicts what is there, or somebody works on it; see retry-after.",
    "413": "The body is too large.",
    "415": "The body has another content type than the one described.",
    "422": "The idempotency key stands for another request.",
    "429": "A limit of the key is reached; see retry-after.",
    "503": "This node cannot answer now; see retry-after.",
}
_ABOUT = """OpenAI-compatible API of a RiOS node. Answers carry an extension field `rios`.

Every answer to GET takes `fields=a,b`: only these fields of the thing, or of the things of a list, come (`id` and
`object` always), so it may lack what its schema requires. It has a weak ETag; `If-None-Match` gets 304.

The schema of `text/event-stream` is that of one event. The `data` of events is JSON, up to a last `[DONE]` where an
answer ends; a stream that fails ends with an error instead."""
_EVENTS = "text/event-stream"
_ERROR = {"$ref": "#/components/schemas/Error"}
_IN_PATH = re.compile(r"\{(\w+)\}")


def document(version: str, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """The document as JSON-able values."""
    types = [kind for each in endpoints for kind in (each.body, each.answer, each.event) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    shapes = dict(zip(map(id, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for each in endpoints:
        paths.setdefault(each.template, {})[each.method.lower()] = _operation(each, shapes)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "RiOS gateway",
            "version": version,
            "description": _ABOUT,
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _error_schema()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, shapes: dict[int, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {str(endpoint.status): {"description": "Done"}}
    if endpoint.status not in (204, 303):
        responses[str(endpoint.status)]["content"] = {
            media: _content(endpoint, media, shapes) for media in endpoint.media
        }
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": responses}
    if endpoint.deprecated:
        operation["deprecated"] = True
    if endpoint.needs is None:
        operation["security"] = []
    elif endpoint.method == "GET":
        responses["304"] = {"description": "It is as If-None-Match has it."}
    if endpoint.needs is not None or endpoint.body is not None or endpoint.parameters:
        error = {"application/json": {"schema": _ERROR}}
        responses.update({status: {"description": text, "content": error} for status, text in _ERRORS.items()})
    if endpoint.body is not None:
        content = {endpoint.body_media: {"schema": shapes[id(endpoint.body)]}}
        operation["requestBody"] = {"required": True, "content": content}
    parameters = [*map(_in_path, _IN_PATH.findall(endpoint.template)), *map(_parameter, endpoint.parameters)]
    if parameters:
        operation["parameters"] = parameters
    return operation


def _content(endpoint: Endpoint, media: str, shapes: dict[int, Any]) -> dict[str, Any]:
    if media == _EVENTS and endpoint.event is not None:
        return {"schema": _event(shapes[id(endpoint.event)])}
    return {} if endpoint.answer is None else {"schema": shapes[id(endpoint.answer)]}


def _event(shape: dict[str, Any]) -> dict[str, Any]:
    """One server-sent event, in the way of OpenAPI 3.2: the text that is its data, and what that text says."""
    content = {"anyOf": [shape, _ERROR]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    fields = {"data": data, "event": {"type": "string"}, "id": {"type": "string"}}
    return {"type": "object", "properties": fields, "required": ["data"]}


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _parameter(each: Parameter) -> dict[str, Any]:
    described = {"name": each.name, "in": each.place, "required": False, "schema": dict(each.schema)}
    return {**described, "description": each.description} if each.description else described


def _error_schema() -> dict[str, Any]:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    fields = {"message": text, "type": text, "param": maybe, "code": maybe}
    error = {"type": "object", "properties": fields, "required": [*fields]}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
