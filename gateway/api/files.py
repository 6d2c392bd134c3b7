"""``/v1/files``: as OpenAI's clients use them."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.endpoint import Endpoint, Parameter, caller
from gateway.errors import invalid
from gateway.jobs import files
from gateway.jobs.files import PURPOSES, File
from gateway.jobs.multipart import Form
from gateway.listing import PAGING, page_of, shown
from gateway.request import json_response


class FileObject(msgspec.Struct, kw_only=True):
    """A file without its bytes. ``created_at`` in seconds, as OpenAI has it."""

    object: Literal["file"] = "file"
    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(msgspec.Struct, kw_only=True):
    """Newest first, unless ``order`` says ``asc``."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, kw_only=True):
    """It is gone."""

    object: Literal["file"] = "file"
    id: str
    deleted: bool = True


class UploadForm(msgspec.Struct, kw_only=True):
    """``multipart/form-data``: the purpose, and the file's bytes."""

    purpose: Literal["batch", "user_data", "evals"]
    file: bytes


def file_object(file: File) -> FileObject:
    """As the API shows it."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at_ms // 1000,
        filename=file.filename,
        purpose=file.purpose,
    )


async def _run(request: Request, function: Any, *arguments: Any, **more: Any) -> Any:  # noqa: ANN401 - of any function
    till = request.app.state.service.till
    return await till.in_thread(partial(function, till.database, *arguments, **more))


async def upload(request: Request) -> Response:
    """Take a file in, piece by piece."""
    form = Form(request.headers.get("content-type", ""))
    till, bytes_max = request.app.state.service.till, request.app.state.site.upload_bytes_max
    made = await till.in_thread(partial(files.Upload, till.database, caller(request).user_id, bytes_max=bytes_max))
    done = False
    try:
        async with aclosing(request.stream()) as body:
            async for data in body:
                for piece in form.feed(data):
                    await till.in_thread(made.write, piece)
        filename, purpose = form.end()
        if purpose not in PURPOSES[:-1]:
            raise invalid("purpose", f"purpose is one of {', '.join(PURPOSES[:-1])}")
        file = await till.in_thread(made.finish, filename, purpose)
        done = True
    finally:
        if not done:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                await till.in_thread(made.drop)
    return json_response(file_object(file))


async def list_files(request: Request) -> Response:
    """Those within reach."""
    page, query = page_of(request), request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", "order is asc or desc")
    rows = await _run(
        request,
        files.list_files,
        owner=caller(request).owner,
        purpose=query.get("purpose", ""),
        limit=page.fetch,
        after=page.after,
        newest_first=order == "desc",
    )
    return json_response(shown([file_object(file) for file in rows], page, lambda row: row.id))


async def get_file(request: Request) -> Response:
    """What is known of one."""
    file = await _run(request, files.get_file, request.path_params["file"], caller(request).owner)
    return json_response(file_object(file))


async def content(request: Request) -> Response:
    """Its bytes, piece by piece."""
    file: File = await _run(request, files.get_file, request.path_params["file"], caller(request).owner)

    async def pieces() -> AsyncIterator[bytes]:
        place = 0
        while (data := await _run(request, files.read_chunk, file.id, place)) is not None:
            yield data
            place += 1

    headers = {"content-length": str(file.bytes), "content-disposition": "attachment"}
    return _Pieces(pieces(), headers)


class _Pieces(Response):
    """A body that comes piece by piece. Starlette's own one listens for the client's disconnect, as the exchange does
    here already."""

    def __init__(self, pieces: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(headers=headers, media_type="application/octet-stream")
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._pieces:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def delete_file(request: Request) -> Response:
    """Delete one."""
    file_id = request.path_params["file"]
    await _run(request, files.delete_file, file_id, caller(request).owner)
    return json_response(FileDeleted(id=file_id))


_PURPOSE = Parameter(name="purpose", description="Only files of this purpose.")
_ORDER = Parameter(name="order", schema={"type": "string", "enum": ["asc", "desc"]})

ENDPOINTS = (
    Endpoint(
        method="POST",
        path="/v1/files",
        handle=upload,
        needs="files",
        summary="Upload a file",
        body=UploadForm,
        body_media="multipart/form-data",
        uploads=True,
        answer=FileObject,
    ),
    Endpoint(
        method="GET",
        path="/v1/files",
        handle=list_files,
        needs="files",
        summary="Files",
        answer=FileList,
        parameters=(*PAGING, _PURPOSE, _ORDER),
    ),
    Endpoint(
        method="GET", path="/v1/files/{file}", handle=get_file, needs="files", summary="A file", answer=FileObject
    ),
    Endpoint(
        method="GET",
        path="/v1/files/{file}/content",
        handle=content,
        needs="files",
        summary="A file's bytes",
        media=("application/octet-stream",),
    ),
    Endpoint(
        method="DELETE",
        path="/v1/files/{file}",
        handle=delete_file,
        needs="files",
        summary="Delete a file",
        answer=FileDeleted,
    ),
)
