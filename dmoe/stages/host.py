"""Serves stages: keeps sequences' caches, runs rows through whole layers, gives the rows on, and meters it.

Owns: the RPCs ``stage.open``, ``stage.run``, ``stage.show`` and ``stage.close``, which stages are loaded, admission,
what is metered. Does not own: what runs together (``loaded``), whose caches are here (``tickets``), which shards come
here (``dmoe.hosting``), what work costs (the ledger, behind :class:`dmoe.ports.Seller`).

Who opens a ticket pays for it, by the channel and at the quote named then. A run may come from anybody who knows its
tickets: that is how the host before this one gives its rows on. The answer to a run follows when the hosts behind this
one have answered: nobody waits for it, but it says who did what, and what went wrong where.

Invariants:
1. A run is refused before it is queued, never dropped after.
2. What is answered is counted once, with the same kFLOP and leaf as at the orchestrator.
3. Rows leave rounded to the manifest's wire dtype; a result goes to the owner of its tickets and to nobody else.
4. A stage is freed only after the last run on it has ended; its tickets end with it.
5. Caches and weights together stay within ``ram_bytes_max``.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio

from config.errors import BusyError, RemoteError, RequestError, RiosError
from config.vocabulary import PeerId
from dmoe.core import stagecalls, wire
from dmoe.core.demand import Use
from dmoe.core.history import History, position_bytes
from dmoe.core.stagecalls import Failure, Hop, Part, RunCall, Step
from dmoe.core.wire import FloatRows
from dmoe.kv import Cache
from dmoe.loaded import why_withdrawn
from dmoe.ports import Quote, Seller
from dmoe.stages.loaded import Job, LoadedStage, Place, StagePlan
from dmoe.stages.segment import Segment
from dmoe.stages.tickets import Ticket, Tickets
from p2p import trace
from p2p.face import Call, Network, Reply

log = logging.getLogger(__name__)

EXPIRE_SECONDS = 5.0
HOP_PATIENCE = 0.9
"""Each host gives the next one this part of the time it has left, so that the one that is late is named, not those who
wait for it."""
DELIVERY_SHARE_MS = 50
CREDIT_SECONDS = 3.0
"""How long a run waits for a voucher, where the payer owes as much as is lent."""
ORDER_SECONDS = 1.0
"""How long a run waits for the rows in front of it, if none of its sequence is being computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a host gives. ``ram_bytes_max``: weights and caches together; ``kv_bytes_max``: of that, caches."""

    sequences_max: int = 256
    kv_bytes_max: int = 1 << 30
    ram_bytes_max: int = 1 << 62
    idle_seconds: float = 300.0
    queue_rows_max: int = 4096
    batch_rows_max: int = 512


class StageHost:
    """Loaded stages and their RPCs. :meth:`run` must be running for runs to be computed."""

    def __init__(
        self,
        network: Network,
        *,
        quote: Quote,
        seller: Seller | None = None,
        limits: Limits | None = None,
        paused: Callable[[], bool] = lambda: False,
        device: str = "",
    ) -> None:
        self.quote = quote
        self.device = device
        """The class of machine that the answers are signed for."""
        self.changes = 0
        """Counts loads and unloads."""
        self._network = network
        self._seller = seller
        self._limits = limits or Limits()
        self._paused = paused
        self._tickets = Tickets(
            sequences_max=self._limits.sequences_max,
            kv_bytes_max=self._limits.kv_bytes_max,
            idle_seconds=self._limits.idle_seconds,
        )
        self._stages: dict[tuple[str, tuple[int, int]], LoadedStage] = {}
        self._nursery: trio.Nursery | None = None
        self._active = 0
        self._calm = trio.lowlevel.ParkingLot()
        self._stopping = False
        self._runs = self._forwarded = self._delivered = 0
        network.serve(stagecalls.OPEN, self._open)
        network.serve(stagecalls.RUN, self._run)
        network.serve(stagecalls.CLOSE, self._close)
        network.serve(stagecalls.SHOW, self._show)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled (call :meth:`drain` first to finish what is in flight), then free every stage."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                while True:
                    await trio.sleep(EXPIRE_SECONDS)
                    self._tickets.expire(trio.current_time())
        finally:
            self._nursery = None
            self._tickets.close_all()
            for stage in self._stages.values():
                stage.segment.close()
                stage.closed = True
            self._stages.clear()

    async def drain(self) -> None:
        """Take no new runs and wait until those in flight are answered."""
        self._stopping = True
        await self.drained()

    async def drained(self) -> None:
        """Wait until no run is in flight."""
        while self._active:
            await self._calm.park()

    # --- stages

    def load(self, plan: StagePlan, segment: Segment) -> None:
        """Serve a stage from now on."""
        key = (plan.model_id, plan.layers)
        assert key not in self._stages, f"{plan.shard_id} is loaded already"
        limits = self._limits
        self._stages[key] = LoadedStage(
            plan, segment, queue_rows_max=limits.queue_rows_max, batch_rows_max=limits.batch_rows_max
        )
        self.changes += 1

    async def unload(self, model_id: str, shard_id: str) -> None:
        """Stop serving a stage, wait for the runs on it, and free it and its caches. Unknown ones are ignored."""
        found = [(k, s) for k, s in self._stages.items() if (s.plan.model_id, s.plan.shard_id) == (model_id, shard_id)]
        for key, stage in found:
            del self._stages[key]
            self.changes += 1
            self._tickets.close_all(stage)
            await stage.close()

    def local(self, model_id: str, layers: tuple[int, int]) -> LoadedStage | None:
        """The loaded stage over these layers, if any."""
        return self._stages.get((model_id, layers))

    def indices(self, model_id: str) -> frozenset[int]:
        """Manifest indices of the loaded stages of a model."""
        return frozenset(s.plan.index for (model, _), s in self._stages.items() if model == model_id)

    def withdrawn(self) -> dict[tuple[str, int], str]:
        """Loaded stages that are not fit to be served any more, by model id and manifest index, and why."""
        every = {(stage.plan.model_id, stage.plan.index): stage.segment for stage in self._stages.values()}
        return {key: why for key, segment in every.items() if (why := why_withdrawn(segment))}

    def uses(self) -> dict[tuple[str, int], Use]:
        """A sample of every loaded stage, by model id and manifest index."""
        return {
            (stage.plan.model_id, stage.plan.index): Use(stage.rows_waiting, stage.rows, stage.row_seconds * 1e6)
            for stage in self._stages.values()
        }

    def ram_bytes(self) -> int:
        """Memory of the loaded stages and of the caches."""
        return sum(stage.segment.ram_bytes for stage in self._stages.values()) + self._tickets.kv_bytes

    def rows_waiting(self) -> int:
        """Rows in all queues (part of the advert's load)."""
        return sum(stage.rows_waiting for stage in self._stages.values())

    def statistics(self) -> dict[str, Any]:
        """Figures of the moment, JSON-able: totals and per model and stage."""
        stages: dict[str, dict[str, Any]] = {}
        for stage in self._stages.values():
            stages.setdefault(stage.plan.model_id, {})[stage.plan.shard_id] = stage.statistics()
        return {
            "runs": self._runs,
            "forwarded": self._forwarded,
            "delivered": self._delivered,
            "active": self._active,
            "sequences": len(self._tickets),
            "kv_bytes": self._tickets.kv_bytes,
            "stages": stages,
        }

    # --- this node's own sequences

    async def open(
        self,
        stage: LoadedStage,
        owner: PeerId,
        capacity: int,
        *,
        like: bytes = b"",
        length: int = 0,
        signed: bool = False,
    ) -> Ticket:
        """A cache at a stage here; ``signed``: what comes and goes is remembered. Raises RequestError or BusyError if
        there is no room for it."""
        plan = stage.plan
        if capacity > plan.context:
            message = f"{capacity} positions exceed the model's context of {plan.context}"
            raise RequestError("context_length_exceeded", message)
        kv_bytes = (plan.position_bytes + (position_bytes(plan.width, plan.dtype) if signed else 0)) * capacity
        source = self._tickets.find(like) if like else None
        if source is not None and (source.owner != owner or source.stage is not stage):
            raise RequestError("not_found", "that ticket is another's, or of other layers")
        if source is not None and not length <= min(source.cache.length, capacity):
            message = f"{length} positions are wanted of a cache that holds {source.cache.length}"
            raise RequestError("conflict", message, "run what is missing first")
        now = trio.current_time()
        histories: list[History] = []

        def remember() -> None:
            known = source.history if source is not None else None
            histories.append(known.fork(length) if known is not None else History(plan.width, plan.dtype))

        self._tickets.begin([source] if source else [])  # it must not make room for its own copy
        try:
            self._tickets.make_room(owner, kv_bytes, now)
            if self.ram_bytes() + kv_bytes > self._limits.ram_bytes_max:
                raise BusyError("this node's memory for models is in use", "ask another replica", retry_after_ms=1000)
            like_cache = source.cache if source else None
            cache = await self._cache(stage, kv_bytes, capacity, like_cache, length, remember)
        finally:
            self._tickets.end([source] if source else [], now)
        if stage.closed:
            cache.close()
            raise RequestError("not_found", f"{plan.shard_id} is not served here any more", "ask another replica")
        ticket = Ticket(owner, stage, cache, kv_bytes, b"", self.quote, now)
        ticket.history = histories[0] if signed else None
        self._tickets.add(ticket)
        return ticket

    async def _cache(
        self,
        stage: LoadedStage,
        kv_bytes: int,
        capacity: int,
        like: Cache | None,
        length: int,
        copied: Callable[[], None],
    ) -> Cache:
        """A cache whose room is kept while one waits for it."""
        self._tickets.kv_bytes += kv_bytes
        self._tickets.opening += 1
        try:
            return await stage.open(capacity, like, length, copied)
        finally:
            self._tickets.kv_bytes -= kv_bytes
            self._tickets.opening -= 1

    def close(self, ticket: Ticket) -> None:
        """Free a cache."""
        self._tickets.close(ticket)

    async def compute(
        self, tickets: Sequence[Ticket], places: Sequence[tuple[int, int]], x: FloatRows, deadline: float, number: int
    ) -> Job:
        """``f32[N, H]`` through a stage in pass ``number``: ``places`` are (position, rows) per ticket. ``deadline`` is
        a trio time."""
        if self._nursery is None:
            raise RemoteError("unavailable", "this node is shutting down", "ask another replica")
        wanted = [Place(t, position, rows) for t, (position, rows) in zip(tickets, places, strict=True)]
        stage = tickets[0].stage
        self._tickets.begin(tickets)
        try:
            return await stage.run(number, wanted, x, deadline, self._nursery)
        finally:
            stage.when_free(wanted, lambda: self._tickets.end(tickets, trio.current_time()))

    # --- calls

    async def _open(self, call: Call) -> Reply:
        self._check_open()
        asked = stagecalls.parse_open(call.header)
        stage = self._stages.get((asked.model_id, asked.layers))
        if stage is None:
            first, last = asked.layers
            what = f"the stage of layers {first} to {last} of model {asked.model_id[:12]}"
            raise RequestError("not_found", f"{what} is not served here", "read this node's advert again")
        paid = self._admit(call.peer_id, asked.channel, asked.quote)
        quote = self.quote  # it may change meanwhile
        ticket = await self.open(stage, call.peer_id, asked.capacity, like=asked.like, length=asked.length, signed=True)
        ticket.channel, ticket.quote = asked.channel if paid else b"", quote
        return Reply({"ticket": ticket.token})

    async def _close(self, call: Call) -> Reply:
        for token in stagecalls.tickets_of(call.header):
            try:
                ticket = self._tickets.find(token)
            except RequestError:
                continue
            if ticket.owner == call.peer_id:
                self.close(ticket)
        return Reply({})

    async def _show(self, call: Call) -> Reply:
        """Rows that went out, for whoever pays for them and did not see them."""
        token, first, rows = stagecalls.parse_show(call.header)
        ticket = self._tickets.find(token)
        if ticket.owner != call.peer_id or ticket.history is None:
            raise RequestError("not_found", "there is no such ticket here (any more)", "open another one")
        if first + rows > ticket.history.length:
            raise RequestError("conflict", f"{ticket.history.length} positions are known, not {first + rows}")
        shape, buffer = ticket.history.sent(first, rows)
        return Reply(shape, (buffer,))

    async def _run(self, call: Call) -> Reply:
        self._check_open()
        self._active += 1
        try:
            asked = stagecalls.parse_run(call.header, call.buffers)
            tickets = [self._tickets.find(part.ticket) for part in asked.parts]
            self._check_run(asked, tickets)
            await self._credit(tickets[0], call.deadline)
            await self._turn(asked.parts, tickets, call.deadline)
            if any(ticket.closed for ticket in tickets):
                raise RequestError("not_found", "a ticket was closed while its run waited", "open another one")
            return await self._answer(call, asked, tickets)
        finally:
            self._active -= 1
            self._calm.unpark_all()

    async def _turn(self, parts: Sequence[Part], tickets: Sequence[Ticket], deadline: float) -> None:
        """Wait for the piece in front of a run, where there is one: the pieces of a prompt are sent one behind the
        other, and the tasks that take them may start in any order. Pieces that do not come are waited for together."""
        due = trio.current_time() + ORDER_SECONDS
        for part, ticket in zip(parts, tickets, strict=True):
            while ticket.cache.length < part.position and not ticket.closed:
                with trio.move_on_at(deadline if ticket.users else min(deadline, due)) as scope:
                    await ticket.rested.wait()
                if scope.cancelled_caught:
                    break  # what is missing is said when it runs
                due = trio.current_time() + ORDER_SECONDS

    def _check_open(self) -> None:
        if self._stopping:
            raise RemoteError("unavailable", "this node is shutting down", "ask another replica")
        if self._paused():
            raise RemoteError("unavailable", "this node is paused by its operator", "ask another replica")

    def _check_run(self, asked: RunCall, tickets: Sequence[Ticket]) -> None:
        first = tickets[0]
        plan = first.stage.plan
        if any((t.stage, t.owner, t.channel) != (first.stage, first.owner, first.channel) for t in tickets):
            raise RequestError("invalid_request", "the tickets of one run are of different stages or owners")
        if asked.rows.shape[1] != plan.width or asked.dtype != plan.dtype:
            found = f"{asked.rows.shape[1]} wide in {asked.dtype}"
            raise RequestError("invalid_request", f"rows are {found}; the model needs {plan.width} in {plan.dtype}")
        if asked.reply and asked.hops:
            raise RequestError("invalid_request", "an answer with rows and a next host exclude each other")

    async def _credit(self, ticket: Ticket, deadline: float) -> None:
        """Wait for the voucher that is missing, if it is only that: receipts and vouchers travel apart from runs, and
        the runs of a prompt come faster. Raises RemoteError ``payment_required``."""
        if not ticket.channel or self._seller is None:
            return
        left = min(CREDIT_SECONDS, deadline - trio.current_time())
        await self._seller.credited(ticket.channel, left)
        self._seller.admit(ticket.owner, ticket.channel, ticket.quote)

    def _admit(self, payer: PeerId, channel: bytes, quote: int) -> bool:
        """Whether the ticket's work is metered. Work that is free here needs no channel."""
        if self._seller is None or (not self.quote.microcredits_per_tflop and not channel):
            return False
        if quote != self.quote.number:
            message = f"quote {quote} is not valid here any more; it is {self.quote.number} now"
            raise RequestError("conflict", message, "read this node's advert again")
        self._seller.admit(payer, channel, self.quote)
        return True

    async def _answer(self, call: Call, asked: RunCall, tickets: list[Ticket]) -> Reply:
        places = [(part.position, part.rows) for part in asked.parts]
        job = await self.compute(tickets, places, asked.rows, call.deadline, asked.number)
        assert job.answer is not None
        rows = job.answer if asked.hops else _kept(job.answer, asked.parts)
        shape, buffer = wire.encode(rows, asked.dtype)
        self._runs += 1
        sending = None if asked.reply else self._send(asked, tickets[0].owner, shape, buffer, call.deadline)
        # from here on nobody waits for this host
        started = sending.begin() if sending is not None else None
        step = self._step(job, asked.parts)
        self._count(tickets[0], asked.parts, step)
        if sending is None:
            return Reply({**stagecalls.answer_header([step], None), **shape}, (buffer,))
        trail, failure = await sending.end(started)
        return Reply(stagecalls.answer_header([step, *trail], failure))

    def _send(
        self, asked: RunCall, owner: PeerId, shape: dict[str, Any], buffer: memoryview, deadline: float
    ) -> "_Sending":
        left_ms = (deadline - trio.current_time()) * 1000
        if not asked.hops:
            self._delivered += 1
            header = {"pass": asked.number, **shape}
            return _Sending(self._network, owner, stagecalls.RESULT, header, buffer, left_ms, -1)
        self._forwarded += 1
        hop, behind = asked.hops[0], asked.hops[1:]
        parts = _next_parts(asked.parts, hop)
        header = stagecalls.run_header(asked.number, parts, behind, shape, reply=False)
        left_ms = HOP_PATIENCE * left_ms - DELIVERY_SHARE_MS
        return _Sending(self._network, hop.peer_id, stagecalls.RUN, header, buffer, left_ms, len(behind), len(parts))

    def _step(self, job: Job, parts: Sequence[Part]) -> Step:
        service_us, waited_us = int((job.ended - job.queued) * 1e6), int((job.started - job.queued) * 1e6)
        said = []
        for part, added in zip(parts, job.added, strict=True):
            assert added is not None, "tickets of others have a history"
            said.append(added.said(part.outputs))
        return Step(service_us, waited_us, self.device, tuple(said))

    def _count(self, ticket: Ticket, parts: Sequence[Part], step: Step) -> None:
        if not ticket.channel or self._seller is None:
            return
        plan = ticket.stage.plan
        for part, said in zip(parts, step.said, strict=True):
            work = stagecalls.kflop(plan.flops_per_row, part)
            leaf = stagecalls.leaf(plan.model_id, plan.layers, part, step.device, said.came, said.went)
            self._seller.served(ticket.owner, ticket.channel, ticket.quote, work, leaf)


class _Sending:
    """Rows on their way to the next host (which has ``behind`` more behind it), or (-1) to the orchestrator."""

    def __init__(
        self,
        network: Network,
        peer: PeerId,
        method: str,
        header: dict[str, Any],
        buffer: memoryview,
        left_ms: float,
        behind: int,
        parts: int = 0,
    ) -> None:
        self._network = network
        self._peer = peer
        self._call = (peer, method, header, (buffer,))
        self._left_ms = max(1, int(left_ms))
        self._behind, self._parts = behind, parts
        self._span = trace.begin(method, "client", peer=str(peer))

    def begin(self) -> Any:  # noqa: ANN401 - p2p.face.Pending or None
        """Send at once what can be sent at once."""
        try:
            with self._span.here():
                return self._network.begin(*self._call, deadline_ms=self._left_ms)
        except RiosError:
            return None  # the slow way meets it again and names it

    async def end(self, pending: Any) -> tuple[list[Step], Failure | None]:  # noqa: ANN401
        """What became of it: the trail behind this host, and the failure if there is one."""
        try:
            if pending is not None:
                reply = await pending.wait()
            else:
                with self._span.here():
                    reply = await self._network.call(*self._call, deadline_ms=self._left_ms)
            if self._behind < 0:
                return [], None
            trail, failure = stagecalls.parse_answer(reply.header, self._behind, self._parts)
        except RiosError as error:
            log.debug("giving rows to %s: %s", self._peer, error)
            self._span.end(error)
            retry_ms = error.retry_after_ms if isinstance(error, BusyError) else 0
            return [], Failure(int(self._behind >= 0), error.code, error.message, error.hint, retry_ms)
        finally:
            self._span.end()
        if failure is None:
            return trail, None
        return trail, Failure(failure.hop + 1, failure.code, failure.message, failure.hint, failure.retry_after_ms)


def _next_parts(parts: Sequence[Part], hop: Hop) -> list[Part]:
    tickets = zip(parts, hop.tickets, strict=True)
    return [Part(ticket, part.position, part.rows, part.outputs) for part, ticket in tickets]


def _kept(rows: FloatRows, parts: Sequence[Part]) -> FloatRows:
    """The rows that the orchestrator wants."""
    wanted = stagecalls.kept_rows(parts)
    if len(wanted) == 1:
        return rows[wanted[0]]
    return np.concatenate([rows[each] for each in wanted])
