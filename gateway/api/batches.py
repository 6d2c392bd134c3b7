"""``/v1/batches``: as OpenAI's clients use them."""

from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.endpoint import Endpoint, caller
from gateway.errors import invalid
from gateway.jobs import batches
from gateway.jobs.batches import Batch
from gateway.listing import PAGING, page_of, shown
from gateway.openai.requests import read_body
from gateway.request import json_response

_METADATA_MAX = 16
_METADATA_KEY_MAX, _METADATA_VALUE_MAX = 64, 512

Id = Annotated[str, Meta(min_length=1, max_length=64)]
Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled", "expired"]


class NewBatch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """``metadata``: up to 16 texts of the client's own."""

    input_file_id: Id
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


class BatchError(msgspec.Struct, kw_only=True):
    """What is wrong with a line of the input."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(msgspec.Struct, kw_only=True):
    """The first of them."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(msgspec.Struct, kw_only=True):
    """Lines."""

    total: int
    completed: int
    failed: int


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch. Times in seconds, as OpenAI has them."""

    object: Literal["batch"] = "batch"
    id: str
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(msgspec.Struct, kw_only=True):
    """Newest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_object(batch: Batch) -> BatchObject:
    """As the API shows it."""
    errors = msgspec.json.decode(batch.errors, type=list[BatchError])
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=BatchErrors(data=errors) if errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,  # type: ignore[arg-type]
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at_ms // 1000,
        in_progress_at=_seconds(batch.in_progress_at_ms),
        expires_at=batch.expires_at_ms // 1000,
        finalizing_at=_seconds(batch.finalizing_at_ms),
        completed_at=_ended(batch, "completed"),
        failed_at=_ended(batch, "failed"),
        expired_at=_ended(batch, "expired"),
        cancelling_at=_seconds(batch.cancelling_at_ms),
        cancelled_at=_ended(batch, "cancelled"),
        request_counts=RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        metadata=msgspec.json.decode(batch.metadata),
    )


def _seconds(ms: int | None) -> int | None:
    return None if ms is None else ms // 1000


def _ended(batch: Batch, status: str) -> int | None:
    return _seconds(batch.ended_at_ms) if batch.status == status else None


async def _run(request: Request, function: Any, *arguments: Any, **more: Any) -> Any:  # noqa: ANN401 - of any function
    till = request.app.state.service.till
    return await till.in_thread(partial(function, till.database, *arguments, **more))


async def create_batch(request: Request) -> Response:
    """Begin one."""
    body, who = await read_body(request, NewBatch), caller(request).principal
    batch = await _run(
        request,
        batches.create,
        user_id=who.user_id,
        key_id=who.key_id,
        file_id=body.input_file_id,
        endpoint=body.endpoint,
        window=body.completion_window,
        metadata=msgspec.json.encode(_metadata(body.metadata)).decode(),
    )
    request.app.state.site.runner.wake()
    return json_response(batch_object(batch))


def _metadata(given: dict[str, str] | None) -> dict[str, str] | None:
    if given is not None and len(given) > _METADATA_MAX:
        raise invalid("metadata", f"metadata has {_METADATA_MAX} entries at most")
    for key, value in (given or {}).items():
        if len(key) > _METADATA_KEY_MAX or len(value) > _METADATA_VALUE_MAX:
            most = f"keys of {_METADATA_KEY_MAX} and values of {_METADATA_VALUE_MAX} characters at most"
            raise invalid("metadata", f"metadata has {most}")
    return given


async def list_batches(request: Request) -> Response:
    """Those within reach."""
    page = page_of(request)
    rows = await _run(request, batches.list_batches, owner=caller(request).owner, limit=page.fetch, after=page.after)
    return json_response(shown([batch_object(row) for row in rows], page, lambda row: row.id))


async def get_batch(request: Request) -> Response:
    """One of them."""
    batch = await _run(request, batches.get, request.path_params["batch"], caller(request).owner)
    return json_response(batch_object(batch))


async def cancel_batch(request: Request) -> Response:
    """Stop one; what is answered stays and is paid for."""
    batch = await _run(request, batches.cancel, request.path_params["batch"], caller(request).owner)
    request.app.state.site.runner.wake()
    return json_response(batch_object(batch))


ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/batches",
        handle=create_batch,
        needs="batches",
        summary="Answer the lines of a file",
        body=NewBatch,
        answer=BatchObject,
    ),
    Endpoint(
        method="GET",
        path="/v1/batches",
        handle=list_batches,
        needs="batches",
        summary="Batches, newest first",
        answer=BatchList,
        parameters=PAGING,
    ),
    Endpoint(
        method="GET",
        path="/v1/batches/{batch}",
        handle=get_batch,
        needs="batches",
        summary="A batch",
        answer=BatchObject,
    ),
    Endpoint(
        method="POST",
        path="/v1/batches/{batch}/cancel",
        handle=cancel_batch,
        needs="batches",
        summary="Stop a batch",
        answer=BatchObject,
    ),
)
