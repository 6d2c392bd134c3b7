"""Answers under an idempotency key: generated once, charged once, told to everybody who asks with that key.

Owns: the answers under way here, each in a task of its own, and following one. Does not own: what is kept of them
(``gateway/idempotency.py``), what an answer looks like (a :class:`gateway.openai.stream.Shape`).

An answer under a key does not end with its client's connection: who comes again joins it, or gets what it said. A
retry in another gateway is told to come back; one after a crash generates again, by the same seed and route.

Invariants:
1. The end of an answer is told only when answer and charge are durable, in one transaction.
2. An answer that did not come about costs nothing, and the key is let go.
3. Bounded: :data:`RUNS_MAX` answers under way, :data:`ANSWER_BYTES_MAX` of one. A longer one, or one whose caller may
   not generate any more, ends, is charged as far as it came, and its key says so from then on.
"""

import logging
import re
import secrets
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from config.errors import BusyError, RiosError
from config.generation import Delta
from gateway import idempotency
from gateway.accounts import Principal
from gateway.errors import ApiError, error_body, internal_error, invalid
from gateway.idempotency import HEADER, Begun, Wanted
from gateway.money import Closing, Settlement
from gateway.openai.choices import conclude, generate
from gateway.openai.job import SEEDS, Held, Job, Order, Service, open_jobs
from gateway.openai.stream import Events, Shape, Writer, whole_body
from gateway.standing import Hold

_logger = logging.getLogger("rios.gateway")

RUNS_MAX = 1024
ANSWER_BYTES_MAX = 16 << 20
_INLINE_BYTES_MAX = 1 << 16
_RELEASE_SECONDS = 2.0
_STOP_SECONDS = 1.0
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_REPLAYED = (b"idempotency-replayed", b"true")
_STREAM, _JSON = "text/event-stream", "application/json"
_TOO_LONG, _CUT_OFF = 413, 403
"""Statuses of answers that were ended before their end."""
_KEEP_SECONDS = 2.0
_LOGPROB_BYTES = 32
"""A token's log probability takes more than that in JSON, but where two share an entry."""


@dataclass(slots=True, eq=False)
class Run:
    """One answer: what it said so far, and how it ended. ``replayed``: it was given before."""

    asked: Wanted
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    ended: bool = False
    complete: bool = False
    replayed: bool = False
    kept: bool = False
    """How it ended stands in the database."""
    failure: RiosError | None = None
    changed: trio.Event = field(default_factory=trio.Event)

    def put(self, data: bytes) -> None:
        """More of it. Raises ApiError ``too_large``."""
        if self.size + len(data) > ANSWER_BYTES_MAX:
            raise _too_long()
        if data:
            self.size += len(data)
            self.pieces.append(data)
            self._tell()

    def finish(self, data: bytes) -> None:
        """The last of it, which is durable already."""
        self.pieces.append(data)
        self.complete = True

    def end(self) -> None:
        """Nothing more comes."""
        self.ended = True
        self._tell()

    async def follow(self) -> AsyncIterator[bytes]:
        """All of it from the beginning, as it comes."""
        told = 0
        while True:
            if told < len(self.pieces):
                news, told = b"".join(self.pieces[told:]), len(self.pieces)
                yield news
            elif self.ended:
                return
            else:
                await self.changed.wait()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class Runs:
    """The answers under a key that this gateway generates now."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()

    async def run(self) -> None:
        """Until :meth:`stop`."""
        try:
            async with trio.open_nursery() as self._nursery:
                await trio.sleep_forever()
        finally:
            self._ended.set()

    async def stop(self) -> None:
        """End all of them; their keys are let go."""
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _STOP_SECONDS):
                await self._ended.wait()

    def join(self, service: Service, order: Order, shape: Shape, asked: Wanted, *, streamed: bool) -> Run:
        """The answer of a key, started if it is not under way. Raises ApiError for another body, BusyError."""
        run = self._runs.get(asked.id)
        if run is not None:
            if run.asked.body_sha256 != asked.body_sha256:
                raise idempotency.reused()
            return run
        if self._nursery is None or len(self._runs) >= RUNS_MAX:
            raise BusyError(f"{len(self._runs)} answers under idempotency keys are under way", "try again later")
        run = self._runs[asked.id] = Run(asked)
        self._nursery.start_soon(self._answer, service, order, shape, run, streamed)
        return run

    async def _answer(self, service: Service, order: Order, shape: Shape, run: Run, streamed: bool) -> None:
        try:
            till = service.till
            begun = await till.in_thread(idempotency.begin, till.database, run.asked, till.instance, _seed(order))
            if begun.stored is not None:
                run.replayed = True
                if begun.stored.status == 200:
                    run.finish(begun.stored.body)
                else:
                    run.failure = _too_long() if begun.stored.status == _TOO_LONG else _cut_off()
            else:
                await self._generate(service, order, shape, run, begun, streamed)
        except RiosError as error:
            run.failure = error
        except Exception:
            _logger.exception("request %s failed", order.request.request_id)
            run.failure = internal_error(order.request.request_id)
        finally:
            if run.failure is None and not run.complete:  # cancelled
                run.failure = RiosError("unavailable", "this gateway is stopping", "try again")
            self._runs.pop(run.asked.id, None)
            run.end()

    async def _generate(
        self, service: Service, order: Order, shape: Shape, run: Run, begun: Begun, streamed: bool
    ) -> None:
        sampling = replace(order.request.sampling, seed=begun.seed)
        route = begun.route or order.request.route
        request = replace(order.request, sampling=sampling, route=route)  # type: ignore[arg-type]
        drawn = order.request.sampling.seed is None
        held = replace(order, request=request, held=Held(run.asked.id, begun.holder), drawn=drawn)
        try:
            with service.while_allowed(order.principal) as hold:
                if streamed:
                    await _stream(service, held, shape, run, hold)
                else:
                    await _whole(service, held, shape, run, hold)
        finally:
            if not run.kept:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _RELEASE_SECONDS):
                    await self._release(service, run.asked.id, begun.holder)

    async def _release(self, service: Service, name: str, holder: str) -> None:
        try:
            await service.till.in_thread(idempotency.release, service.till.database, name, holder)
        except RiosError as error:
            _logger.error("an idempotency key is not let go yet: %s", error)  # the next request takes it over


async def _stream(service: Service, order: Order, shape: Shape, run: Run, hold: Hold) -> None:
    async with open_jobs(service, order) as jobs:
        events = Events(shape, jobs, order.choices)

        async def show(choice: int, delta: Delta) -> None:
            run.put(events.of(choice, delta))

        await _bounded(service, order, jobs, show, run, hold)
        tail = events.tail()
        await _keep(service, order, run, conclude(jobs, order.choices), b"".join([*run.pieces, tail]), _STREAM)
        run.finish(tail)


async def _whole(service: Service, order: Order, shape: Shape, run: Run, hold: Hold) -> None:
    pieces: list[list[Delta]] = [[] for _ in range(order.answers)]

    async def keep(choice: int, delta: Delta) -> None:
        pieces[choice].append(delta)
        run.size += _least_bytes(delta)
        if run.size > ANSWER_BYTES_MAX:
            raise _too_long()

    async with open_jobs(service, order) as jobs:
        await _bounded(service, order, jobs, keep, run, hold)
        body = whole_body(shape, pieces, jobs, order.choices)
        if len(body) > ANSWER_BYTES_MAX:
            await _keep_end(service, order, run, jobs, _TOO_LONG)
            raise _too_long()
        await _keep(service, order, run, conclude(jobs, order.choices), body, _JSON)
        run.finish(body)


def _least_bytes(delta: Delta) -> int:
    """What a piece adds to the answer's JSON at least; its real length is known when all of it is there."""
    places = (*delta.logprobs, *delta.prompt_logprobs)
    calls = sum(len(call.id) + len(call.name) + len(call.arguments) for call in delta.tool_calls)
    return len(delta.text) + len(delta.reasoning) + calls + _LOGPROB_BYTES * sum(1 + len(place.top) for place in places)


async def _bounded(service: Service, order: Order, jobs: list[Job], take: object, run: Run, hold: Hold) -> None:
    """Generate; an answer that gets too long, or is ended, is charged as far as it came, and its key says so."""
    try:
        await generate(jobs, take)  # type: ignore[arg-type]
        await trio.lowlevel.checkpoint_if_cancelled()
        hold.over = True  # from here on it is complete: kept, and charged in full
    except BaseException as error:
        too_long = isinstance(error, ApiError) and error.code == "too_large"
        if too_long or hold.refusal is not None:
            await _keep_end(service, order, run, jobs, _TOO_LONG if too_long else _CUT_OFF)
        raise


async def _keep_end(service: Service, order: Order, run: Run, jobs: list[Job], status: int) -> None:
    """Charge answers as far as they came, and keep why they ended."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _KEEP_SECONDS):
        await _keep(service, order, run, [job.stop() for job in jobs], b"", _JSON, status=status)


async def _keep(
    service: Service, order: Order, run: Run, settlements: list[Settlement], body: bytes, kind: str, status: int = 200
) -> None:
    """Charge and keep an answer, durably."""
    assert order.held is not None
    closing = Closing(
        settlements=tuple(settlements),
        idempotency_id=order.held.id,
        holder=order.held.holder,
        status=status,
        content_type=kind,
        answer=await _compressed(body),
    )
    await service.till.finish(closing)
    run.kept = True


async def _compressed(body: bytes) -> bytes:
    if len(body) <= _INLINE_BYTES_MAX:
        return zlib.compress(body, 1)
    return await trio.to_thread.run_sync(zlib.compress, body, 1)


def _seed(order: Order) -> int:
    asked = order.request.sampling.seed
    return secrets.randbelow(SEEDS) if asked is None else asked


def _too_long() -> ApiError:
    most = f"{ANSWER_BYTES_MAX >> 20} MiB"
    return ApiError(
        "too_large", f"the answer is longer than the {most} kept under an idempotency key", "lower max_tokens"
    )


def _cut_off() -> ApiError:
    text = "the answer under this idempotency key was ended: its API key, session or user had ended"
    return ApiError("forbidden", text, "ask again with a new idempotency key")


# --- following one


def key_of(request: Request) -> str:
    """The idempotency key of a request; empty if it has none. Raises ApiError for one that cannot be."""
    keys = request.headers.getlist(HEADER)
    if not keys:
        return ""
    if len(keys) > 1 or _KEY.fullmatch(keys[0]) is None:
        raise invalid(HEADER, "an idempotency key is 1 to 255 visible ASCII characters, once")
    return keys[0]


async def keyed_answer(
    service: Service, order: Order, shape: Shape, key: str, body: msgspec.Struct, *, streamed: bool
) -> Response:
    """The answer under a key, streamed or at once. Raises RiosError."""
    data = msgspec.json.encode(body, order="deterministic")
    asked = idempotency.wanted(order.principal.account_id, key, order.endpoint, data, order.request.privacy)
    run = service.runs.join(service, order, shape, asked, streamed=streamed)
    if streamed:
        return _Follower(service, order.principal, run)
    with service.while_allowed(order.principal):
        async for _ in run.follow():
            pass
    if run.failure is not None:
        raise run.failure
    headers = {_REPLAYED[0].decode(): _REPLAYED[1].decode()} if run.replayed else None
    return Response(b"".join(run.pieces), headers=headers, media_type=_JSON)


class _Follower(Response):
    """Sends a streamed answer from its beginning, to whoever joins it."""

    def __init__(self, service: Service, who: Principal, run: Run) -> None:
        self._service, self._who, self._run = service, who, run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Raises RiosError if the generation fails before anything was sent."""
        writer = Writer(send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.keep_alive)
            failure = await self._follow(writer)
            nursery.cancel_scope.cancel()
        if failure is None:
            await writer.end(b"")
        elif writer.started:
            await writer.end(b"data: " + error_body(failure) + b"\n\n")
        else:
            raise failure

    async def _follow(self, writer: Writer) -> RiosError | None:
        """How it failed, if it did; also for this client alone, who may not listen any more."""
        try:
            with self._service.while_allowed(self._who):
                async for data in self._run.follow():
                    if self._run.replayed:
                        writer.headers = (*writer.headers, _REPLAYED)
                    await writer.write(data)
        except ApiError as refusal:
            return refusal
        return self._run.failure
