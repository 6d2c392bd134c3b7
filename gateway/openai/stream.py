"""Answers as they come: server-sent events, or one JSON body at the end.

Owns the order of a stream (opening, pieces, closing, ``[DONE]``), its keep-alive comments and its failures: before
the first byte a failure is an ordinary error answer, after it a ``data: {"error": ...}`` event that ends the stream.
Each piece is written before the next one is made, so who reads slowly holds the engine up: ``gateway/turns.py`` ends
that where others wait.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import msgspec
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from config.errors import RiosError
from config.generation import Delta, Finished
from gateway.errors import error_body, internal_error
from gateway.inbox import READER
from gateway.openai.choices import Answer, joined, run_jobs
from gateway.openai.job import Job, Order, Service, open_jobs
from gateway.openai.remembered import HEADER, Memory

_logger = logging.getLogger("rios.gateway")

KEEP_ALIVE_SECONDS = 10.0
EVENTS = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-type", EVENTS.encode()),
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


async def whole_answer(service: Service, order: Order, shape: Shape, memory: Memory | None = None) -> Response:
    """Generate to the end and answer once."""
    with service.while_allowed(order.principal):
        return await _whole_answer(service, replace(order, whole=True), shape, memory)


async def _whole_answer(service: Service, order: Order, shape: Shape, memory: Memory | None) -> Response:
    pieces: list[list[Delta]] = [[] for _ in range(order.answers)]

    async def keep(choice: int, delta: Delta) -> None:
        pieces[choice].append(delta)

    async with open_jobs(service, order) as jobs:

        def end() -> bytes:
            return whole_body(shape, pieces, jobs, order.choices)

        body = await run_jobs(service.till, jobs, order.choices, keep, end)
    headers = {}
    if memory is not None:
        memory.keep(body, "application/json", [job.finished for job in jobs])
        headers[HEADER] = "miss"
    return Response(body, headers=headers, media_type="application/json")


def whole_body(shape: Shape, pieces: Sequence[Sequence[Delta]], jobs: Sequence[Job], each: int) -> bytes:
    """The reply of finished jobs, ``each`` to a prompt, and what they said."""
    answers = [Answer.of(deltas, job.finished) for deltas, job in zip(pieces, jobs, strict=True)]
    return msgspec.json.encode(shape.whole(answers, joined([job.finished for job in jobs], each)))


class EventStream(Response):
    """Generate and send each piece at once."""

    def __init__(self, service: Service, order: Order, shape: Shape, memory: Memory | None = None) -> None:
        self._memory = memory
        self._service = service
        self._order = order
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises RiosError if the generation fails before anything was sent."""
        self._order = replace(self._order, reader=scope["extensions"][READER])
        writer = Writer(send)
        if self._memory is not None:
            writer.headers = (*writer.headers, (HEADER.encode(), b"miss"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.keep_alive)
            end = await self._end(writer)
            nursery.cancel_scope.cancel()
        if isinstance(end, RiosError):
            if not writer.started:
                raise end
            end = b"data: " + error_body(end) + b"\n\n"
        await writer.end(end)

    async def _end(self, writer: "Writer") -> bytes | RiosError:
        """The stream but for its end: that, or what went wrong."""
        try:
            with self._service.while_allowed(self._order.principal):
                return await self._run(writer)
        except RiosError as error:
            return error
        except Exception:
            request_id = self._order.request.request_id
            _logger.exception("request %s failed", request_id)
            return internal_error(request_id)

    async def _run(self, writer: "Writer") -> bytes:
        memory, each = self._memory, self._order.choices
        said: list[bytes] = []
        async with open_jobs(self._service, self._order) as jobs:
            events = Events(self._shape, jobs, each)

            async def show(choice: int, delta: Delta) -> None:
                if piece := events.of(choice, delta):
                    if memory is not None:
                        said.append(piece)
                    await writer.write(piece)
                    jobs[choice].mark_delivered()

            tail = await run_jobs(self._service.till, jobs, each, show, events.tail)
        if memory is not None:
            memory.keep(b"".join([*said, tail]), EVENTS, [job.finished for job in jobs])
        return tail


class Events:
    """What a stream says of jobs, ``each`` to a prompt; owns that an answer's opening comes before all else of it."""

    def __init__(self, shape: Shape, jobs: Sequence[Job], each: int) -> None:
        self._shape, self._jobs, self._each = shape, jobs, each
        self._leads = [shape.opening(choice) for choice in range(len(jobs))]

    def of(self, choice: int, delta: Delta) -> bytes:
        """A piece; empty if there is nothing in it that a client sees."""
        if not (delta.text or delta.logprobs or delta.tool_calls or delta.reasoning or delta.prompt_logprobs):
            return b""
        lead, self._leads[choice] = self._leads[choice], b""
        return lead + self._shape.piece(choice, delta)

    def tail(self) -> bytes:
        """All that comes when the jobs have finished."""
        parts = [job.finished for job in self._jobs]
        ends = [self._leads[choice] + self._shape.closing(choice, part) for choice, part in enumerate(parts)]
        return b"".join(ends) + self._shape.usage(joined(parts, self._each)) + DONE


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
