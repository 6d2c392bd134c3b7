"""The OpenAPI document, made from the request types themselves."""

from typing import Any

import msgspec

from gateway.openai.embeddings import EmbeddingBody
from gateway.openai.requests import ChatBody, CompletionBody

_HEADERS = {
    "idempotency-key": "The same key and body within 24 hours: the same answer, charged once.",
    "x-rios-privacy": "trusted or local: who may compute, beyond what the operator laid down.",
}
_ERRORS = {
    "400": "The request is wrong; param names the field.",
    "401": "No API key, or not a valid one.",
    "402": "The balance does not cover the request.",
    "403": "The user is disabled.",
    "404": "No such model.",
    "409": "Another gateway answers a request with this idempotency key; see retry-after.",
    "413": "The body is too large.",
    "422": "The idempotency key stands for another request.",
    "429": "A limit of the key is reached; see retry-after.",
    "503": "This node cannot answer now; see retry-after.",
}


def document(version: str) -> dict[str, Any]:
    """The document as JSON-able values."""
    bodies, components = msgspec.json.schema_components(
        [ChatBody, CompletionBody, EmbeddingBody], ref_template="#/components/schemas/{name}"
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "RiOS gateway",
            "version": version,
            "description": "OpenAI-compatible API of a RiOS node. Answers carry an extension field `rios`.",
        },
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {
                "post": _operation("Answer a conversation", bodies[0], stream=True, parameters=_headers(*_HEADERS))
            },
            "/v1/completions": {
                "post": _operation("Continue a prompt", bodies[1], stream=True, parameters=_headers(*_HEADERS))
            },
            "/v1/embeddings": {
                "post": _operation("Texts as vectors", bodies[2], parameters=_headers("x-rios-privacy"))
            },
            "/v1/models": {"get": _operation("List models")},
            "/v1/models/{model}": {"get": _operation("One model", parameters=[_path("model")])},
            "/v1/billing/balance": {"get": _operation("The caller's balance")},
            "/v1/billing/usage": {
                "get": _operation("The caller's settled requests", parameters=[_query("limit"), _query("before")])
            },
            "/v1/ledger/balance": {"get": _operation("Balance of the node's own ledger account")},
            "/healthz": {"get": _operation("Is the process alive", open_to_all=True)},
            "/readyz": {"get": _operation("Can the node answer", open_to_all=True)},
            "/metrics": {"get": _operation("Prometheus metrics", open_to_all=True)},
        },
        "components": {
            "schemas": {**components, "Error": _error_schema()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(
    summary: str,
    body: dict[str, Any] | None = None,
    *,
    parameters: list[dict[str, Any]] | None = None,
    stream: bool = False,
    open_to_all: bool = False,
) -> dict[str, Any]:
    answers: dict[str, Any] = {"application/json": {}}
    if stream:
        answers["text/event-stream"] = {}
    responses: dict[str, Any] = {"200": {"description": "Done", "content": answers}}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if open_to_all:
        operation["security"] = []
    else:
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses.update({status: {"description": text, "content": error} for status, text in _ERRORS.items()})
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if parameters:
        operation["parameters"] = parameters
    return operation


def _headers(*names: str) -> list[dict[str, Any]]:
    text = {"type": "string", "maxLength": 255}
    return [{"name": n, "in": "header", "required": False, "description": _HEADERS[n], "schema": text} for n in names]


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query(name: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}


def _error_schema() -> dict[str, Any]:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    fields = {"message": text, "type": text, "param": maybe, "code": maybe}
    return {"type": "object", "properties": {"error": {"type": "object", "properties": fields}}}
