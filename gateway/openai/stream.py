"""Answers as they come: server-sent events, or one JSON body at the end.

Owns the order of a stream (opening, pieces, closing, ``[DONE]``), its keep-alive comments and its failures: before
the first byte a failure is an ordinary error answer, after it a ``data: {"error": ...}`` event that ends the stream.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from config.errors import RiosError
from config.generation import Delta, Finished
from gateway.errors import error_body, internal_error
from gateway.openai.choices import Answer, joined, run_jobs
from gateway.openai.job import Order, Service, open_jobs

_logger = logging.getLogger("rios.gateway")

KEEP_ALIVE_SECONDS = 10.0
DONE = b"data: [DONE]\n\n"
_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Shape(Protocol):
    """How an endpoint writes its answers as JSON. ``choice`` counts them from 0."""

    def opening(self, choice: int) -> bytes:
        """Events before the first piece of an answer."""

    def piece(self, choice: int, delta: Delta) -> bytes:
        """The event of a piece of an answer."""

    def closing(self, choice: int, finished: Finished) -> bytes:
        """The event after the last piece of an answer."""

    def usage(self, finished: Finished) -> bytes:
        """What comes after all answers, before ``[DONE]``."""

    def whole(self, answers: Sequence[Answer], finished: Finished) -> dict[str, Any]:
        """The body of a reply that is not streamed."""


async def whole_answer(service: Service, order: Order, shape: Shape) -> Response:
    """Generate to the end and answer once."""
    pieces: list[list[Delta]] = [[] for _ in range(order.choices)]

    async def keep(choice: int, delta: Delta) -> None:
        pieces[choice].append(delta)

    async with open_jobs(service, order) as jobs:
        await run_jobs(jobs, keep)
        answers = [Answer.of(deltas, job.finished) for deltas, job in zip(pieces, jobs, strict=True)]
        body = msgspec.json.encode(shape.whole(answers, joined([job.finished for job in jobs])))
    return Response(body, media_type="application/json")


class EventStream(Response):
    """Generate and send each piece at once."""

    def __init__(self, service: Service, order: Order, shape: Shape) -> None:
        self._service = service
        self._order = order
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises RiosError if the generation fails before anything was sent."""
        writer = Writer(send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.keep_alive)
            failure = await self._run(writer)
            nursery.cancel_scope.cancel()
        if failure is None:
            return
        if not writer.started:
            raise failure
        await writer.end(b"data: " + error_body(failure) + b"\n\n")

    async def _run(self, writer: "Writer") -> RiosError | None:
        """The stream up to its end, or what went wrong."""
        shape = self._shape
        try:
            async with open_jobs(self._service, self._order) as jobs:
                leads = [shape.opening(choice) for choice in range(len(jobs))]

                async def show(choice: int, delta: Delta) -> None:
                    if shows(delta):
                        lead, leads[choice] = leads[choice], b""
                        await writer.write(lead + shape.piece(choice, delta))
                        jobs[choice].mark_delivered()

                await run_jobs(jobs, show)
                ends = [leads[choice] + shape.closing(choice, job.finished) for choice, job in enumerate(jobs)]
                tail = b"".join(ends) + shape.usage(joined([job.finished for job in jobs])) + DONE
            await writer.end(tail)
        except RiosError as error:
            return error
        except Exception:
            request_id = self._order.request.request_id
            _logger.exception("request %s failed", request_id)
            return internal_error(request_id)
        return None


def shows(delta: Delta) -> bool:
    """Whether a piece has something that a client sees."""
    return bool(delta.text or delta.logprobs or delta.tool_calls or delta.reasoning or delta.prompt_logprobs)


class Writer:
    """Sends events; owns when the answer starts and when a comment is due."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self.headers = _HEADERS
        self._send = send
        self._last_time = trio.current_time()

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece now."""
        self._last_time = trio.current_time()
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(self.headers)})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._last_time = trio.current_time()

    async def end(self, data: bytes) -> None:
        """Send the last piece."""
        await self.write(data, more=False)

    async def keep_alive(self) -> None:
        """Write a comment whenever nothing was written for a while, so that nothing between here and the client
        takes the silence for a dead connection."""
        while True:
            await trio.sleep_until(self._last_time + KEEP_ALIVE_SECONDS)
            if trio.current_time() >= self._last_time + KEEP_ALIVE_SECONDS:
                await self.write(b": keep-alive\n\n")


def usage_of(finished: Finished) -> Mapping[str, object]:
    """``usage`` of an answer."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


def rios_of(finished: Finished) -> Mapping[str, object]:
    """``rios``, the extension of an answer: who computed it, and how long that took."""
    return {
        "route": finished.route,
        "expert_rows": finished.expert_rows,
        "serving": finished.serving,
        "retries": finished.retries,
        "degraded": bool(finished.missing),
        "missing": [{"layer": layer, "expert": expert} for layer, expert in finished.missing],
        "prefill_seconds": finished.prefill_seconds,
        "decode_seconds": finished.decode_seconds,
    }


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
