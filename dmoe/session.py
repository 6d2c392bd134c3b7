"""The experts of one model for one generation: a layer's calls, wherever the replicas are, and their sum.

Owns: one layer's rounds of calls with deadline and retries, and what a generation reports about who computed it. Does
not own: the choice of replicas (``core.dispatch``), who offers what (``replicas``), the form of a call (``asking``),
payment (``purse``).

Invariants:
1. The sum does not depend on who computed which group: every partial is rounded as on the wire and added in group
   order; every replica, the local one too, computes with the rows as the wire rounds them.
2. One call per peer and layer (and chunk of rows), all peers at the same time.
3. A failed call is tried at another replica within the deadline and the retry budget; which peer failed is remembered.
4. Every answer that arrives is counted for payment, once, at the latest when its token is done or its run fails.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import numpy as np
import trio

from config.errors import BusyError, RemoteError, RiosError
from config.vocabulary import PeerId
from dmoe.asking import Request, Work, answer_of
from dmoe.core import calls, wire
from dmoe.core.calls import Indices, Weights
from dmoe.core.dispatch import PEER_WIDE, Need
from dmoe.core.routes import ModelMap, Place, Table
from dmoe.core.wire import FloatRows
from dmoe.ports import Quote
from dmoe.purse import Owed, Purse
from dmoe.replicas import Replicas
from dmoe.worker import Worker
from p2p.face import Network, Reply

log = logging.getLogger(__name__)

CHUNK_ROWS = 128
CHUNK_BYTES_MAX = 4 << 20
CHUNKS_AT_ONCE = 4
PLAN_US = 200_000
"""How long the plan of a layer with few rows is kept: a few tokens."""
PLAN_ROWS_MAX = 8
PATIENCE_MS = 2_000
"""How long a call may take before another replica is asked, where there is one and nothing better is known."""
ROUNDS_MAX = 1000
OPEN_SECONDS_MAX = 3.0
"""How long a generation waits for channels to be opened before it starts; what is late opens at first use."""
GRACE_SECONDS = 1.0
"""How long a layer without a replica waits for an advert of a new one: shards move while they are called."""
_PEER_FAULTS = frozenset(("unavailable", "deadline", "payment_required", "protocol", "integrity"))
"""Failures that say something about the peer, not about one of its shards."""
_FREE = Quote(0, 0, 0)


@dataclass(slots=True)
class CallerReport:
    """Who computed a generation: rows (times groups) per peer, what each served, and how often a call was repeated."""

    rows: dict[str, int]
    serving: dict[str, dict[str, list[int]]]
    retries: int


@dataclass(frozen=True, slots=True)
class _Job:
    """The groups one peer shall answer; ``replaceable`` if somebody else could answer one of them too."""

    peer: PeerId
    groups: list[int]
    replaceable: bool


@dataclass(frozen=True, slots=True)
class Shared:
    """What all sessions of a node use."""

    network: Network
    worker: Worker | None
    purse: Purse
    replicas: Replicas
    call_timeout_ms: int


class CallerSession:
    """The experts of one model as the layer loop sees them (:class:`dmoe.layers.Experts`), for one generation."""

    def __init__(self, shared: Shared, model: ModelMap) -> None:
        self._shared = shared
        self._model = model
        self._me = shared.network.peer_id
        self._replicas = shared.replicas
        self._dispatcher = shared.replicas.dispatcher
        self._plans: dict[int, tuple[object, int, dict[PeerId, list[int]]]] = {}
        self._owed: list[Owed] = []
        self._rows: dict[PeerId, int] = {}
        self._served: dict[PeerId, set[tuple[int, int]]] = {}
        self._retries = 0
        groups = max(1, max(len(places) for places in model.layers))
        self._chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES_MAX // (2 * model.width * groups)))

    async def open(self) -> None:
        """Open channels to the workers this generation will likely use, all at once. Failures show at first use."""
        _, table = self._replicas.table(self._model)
        likely: set[PeerId] = set()
        for needs in table.needs:
            likely.update(self._dispatcher.plan(needs, 1, _now_us(), 1.0))
        async with trio.open_nursery() as nursery:
            for peer in likely & set(table.quotes):
                nursery.start_soon(self._open_channel, peer, table.quotes[peer])

    async def _open_channel(self, peer: PeerId, quote: Quote) -> None:
        reason = f"nothing came about in {OPEN_SECONDS_MAX} s"
        with trio.move_on_after(OPEN_SECONDS_MAX):
            try:
                await self._shared.purse.channel(peer, quote)
                return
            except RiosError as error:
                reason = str(error)
        log.info("no channel to %s: %s", peer, reason)
        self._dispatcher.failed(peer, (PEER_WIDE,), _now_us())  # others come first, here and in the next generation

    def report(self) -> CallerReport:
        """Who computed what so far."""
        serving = {}
        for peer, places in self._served.items():
            groups = {(layer, group) for layer, group in places}
            experts = {e for layer, group in groups for e in self._model.layers[layer][group].experts}
            serving[str(peer)] = {"layers": sorted({layer for layer, _ in groups}), "experts": sorted(experts)}
        return CallerReport({str(peer): rows for peer, rows in self._rows.items()}, serving, self._retries)

    async def run(self, layer: int, h: FloatRows, routing: Any) -> FloatRows:  # noqa: ANN401 - dmoe.layers.Routing
        """``f32[N, H] -> f32[N, H]``: the sum over all chosen experts of this layer.

        Raises RemoteError ``no_replica``, ``deadline`` or ``payment_required`` if the layer cannot be computed.
        """
        try:
            return await self._run(layer, h, routing.experts, routing.weights)
        except BaseException:
            self._settle_owed()
            raise

    async def _run(self, layer: int, h: FloatRows, experts: Indices | None, weights: Weights | None) -> FloatRows:
        count, size = len(h), self._chunk_rows
        if count <= size:
            out = await self._run_chunk(layer, h, experts, weights)
            if layer == len(self._model.layers) - 1:
                self._settle_owed()
            return out
        out = np.empty_like(h)
        failures: list[RiosError] = []
        limiter = trio.CapacityLimiter(CHUNKS_AT_ONCE)

        async def part(rows: slice) -> None:
            own_experts = None if experts is None else experts[rows]
            own_weights = None if weights is None else weights[rows]
            try:
                async with limiter:
                    out[rows] = await self._run_chunk(layer, h[rows], own_experts, own_weights)
                self._settle_owed()  # the other chunks are still on their way
            except RiosError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for start in range(0, count, size):
                nursery.start_soon(part, slice(start, start + size))
        if failures:
            raise failures[0]
        self._settle_owed()
        return out

    async def _run_chunk(self, layer: int, h: FloatRows, experts: Indices | None, weights: Weights | None) -> FloatRows:
        deadline = trio.current_time() + self._shared.call_timeout_ms / 1000
        work = Work(self._model, layer, h, experts, weights, deadline)
        missing = work.wanted
        rounds = 0
        while missing:
            await self._round(work, missing, first=not work.tried)
            missing = [group for group in missing if group not in work.partials]
            if missing:
                rounds += 1
                self._check_going_on(work, rounds)
        return work.total()

    def _check_going_on(self, work: Work, rounds: int) -> None:
        """After a round with failures: is there time and budget for another?"""
        if trio.current_time() >= work.deadline or rounds > ROUNDS_MAX:
            cause = f"; last: {work.error}" if work.error else ""
            message = f"layer {work.layer} of {self._model.name} took longer than {self._shared.call_timeout_ms} ms"
            raise RemoteError("deadline", message + cause)
        for _ in range(work.calls_failed):
            self._retries += 1
            if not self._dispatcher.may_retry():
                assert work.error is not None
                raise work.error
        work.calls_failed = 0

    # --- one round: plan, call everybody, wait

    async def _round(self, work: Work, groups: Sequence[int], *, first: bool) -> None:
        version, table = self._replicas.table(self._model)
        needs = table.needs[work.layer]
        if len(groups) != len(needs):
            needs = tuple(needs[group] for group in groups)
        plan = self._plan(work, needs, version, keep=first and len(groups) == len(self._model.layers[work.layer]))
        if sum(map(len, plan.values())) < len(needs) and not await self._wait_busy(work, needs, plan):
            return
        jobs = [
            _Job(peer, [needs[p].group for p in ps], any(len(needs[p].replicas) > 1 for p in ps))
            for peer, ps in plan.items()
        ]
        local = [job for job in jobs if job.peer == self._me]
        remote = [job for job in jobs if job.peer != self._me]
        if len(remote) + len(local) == 1:
            await self._ask(work, jobs[0], table)
            return
        async with trio.open_nursery() as nursery:
            for job in remote if local else remote[1:]:
                nursery.start_soon(self._ask, work, job, table)
            if local:
                await _let_others_send()
            await self._ask(work, local[0] if local else remote[0], table)
            self._settle_owed()  # of the layer before: this one's other answers are still on their way

    def _plan(self, work: Work, needs: Sequence[Need], version: object, *, keep: bool) -> dict[PeerId, list[int]]:
        now_us, rows = _now_us(), work.count
        keep = keep and rows <= PLAN_ROWS_MAX
        if keep:
            known = self._plans.get(work.layer)
            if known is not None and known[0] == (version, self._dispatcher.changes) and now_us < known[1]:
                return known[2]
        plan = self._dispatcher.plan(needs, rows, now_us, self._replicas.dice(), work.tried)
        if keep:
            self._plans[work.layer] = ((version, self._dispatcher.changes), now_us + PLAN_US, plan)
        return plan

    async def _wait_busy(self, work: Work, needs: Sequence[Need], plan: dict[PeerId, list[int]]) -> bool:
        """Some groups have nobody left to ask. True: go on with the others; False: waited, plan again. Raises if hope
        is gone."""
        planned = {position for positions in plan.values() for position in positions}
        lost = [need.group for position, need in enumerate(needs) if position not in planned]
        gone = [group for group in lost if group not in work.busy_ms]
        if gone and not await self._wait_change(work):
            raise self._no_replica(work, gone[0])
        if gone:
            return False
        if plan:
            return True
        pause = min(work.busy_ms[group] for group in lost) / 1000
        for group in lost:
            work.tried.pop(group, None)
            del work.busy_ms[group]
        await trio.sleep(max(0.0, min(pause, work.deadline - trio.current_time())))
        return False

    async def _wait_change(self, work: Work) -> bool:
        """Wait for the directory to change; False once the grace is over, or if money is what is missing."""
        if work.error is not None and work.error.code == "payment_required":
            return False
        now = trio.current_time()
        work.grace_until = work.grace_until or min(work.deadline, now + GRACE_SECONDS)
        with trio.move_on_at(work.grace_until):
            await self._replicas.changed.wait()
            return True
        return False

    def _no_replica(self, work: Work, group: int) -> RiosError:
        if work.error is not None and work.error.code == "payment_required":
            return work.error
        place = self._model.layers[work.layer][group]
        why = self._replicas.why_missing(self._model, place)
        cause = f"; last error: {work.error.message}" if work.error else ""
        which = f"{'expert' if len(place.experts) == 1 else 'experts'} {_ranges(place.experts)}"
        return RemoteError(
            "no_replica",
            f"no replica of layer {work.layer}, {which} (shard {place.shard_id}) of {self._model.name}: {why}{cause}",
            "start a node that serves this model, or raise its replica count",
        )

    # --- one call

    async def _ask(self, work: Work, job: _Job, table: Table) -> None:
        """Ask one peer for its groups; puts partial sums, or the failure, into ``work``. Never raises RiosError."""
        peer, groups = job.peer, job.groups
        places = [self._model.layers[work.layer][group] for group in groups]
        shards = [place.shard for place in places]
        group_rows = len(groups) * work.count
        self._dispatcher.started(peer, group_rows)
        try:
            start = perf_counter_ns()
            if peer == self._me:
                service_us = await self._compute(work, groups)
            else:
                service_us = await self._call(work, job, places, table.quotes.get(peer, _FREE))
            total_us = (perf_counter_ns() - start) / 1000
            self._dispatcher.answered(peer, shards, group_rows, total_us, service_us if service_us else total_us)
            self._rows[peer] = self._rows.get(peer, 0) + group_rows
            served = self._served.setdefault(peer, set())
            for group in groups:
                served.add((work.layer, group))
        except RiosError as error:
            self._failed(work, peer, places, error)
        finally:
            self._dispatcher.ended(peer, group_rows)

    def _failed(self, work: Work, peer: PeerId, places: Sequence[Place], error: RiosError) -> None:
        log.debug("layer %d at %s failed: %s", work.layer, peer, error)
        work.error = error
        work.calls_failed += 1
        shards = [place.shard for place in places]
        if isinstance(error, BusyError):
            pause_ms = max(5, error.retry_after_ms)
            self._dispatcher.rest(peer, shards, _now_us(), pause_ms * 1000)
            for place in places:
                work.busy_ms[place.group] = min(pause_ms, work.busy_ms.get(place.group, pause_ms))
        else:
            wide = error.code in _PEER_FAULTS
            self._dispatcher.failed(peer, (PEER_WIDE,) if wide else shards, _now_us())
        for place in places:
            work.tried.setdefault(place.group, set()).add(peer)

    async def _compute(self, work: Work, groups: Sequence[int]) -> float:
        worker, model_id = self._shared.worker, self._model.model_id
        assert worker is not None
        start = perf_counter_ns()
        loaded = [worker.local(model_id, work.layer, group) for group in groups]
        here = [shard for shard in loaded if shard is not None]
        if len(here) < len(groups):
            raise RemoteError("not_found", f"a shard of layer {work.layer} was unloaded meanwhile")
        partials = await worker.compute(here, work.layer, work.rows, work.experts, work.weights, work.deadline)
        for group, partial in zip(groups, partials, strict=True):
            work.partials[group] = wire.rounded(partial, self._model.dtype)
        return (perf_counter_ns() - start) / 1000

    async def _call(self, work: Work, job: _Job, places: Sequence[Place], quote: Quote) -> float:
        peer, groups, purse = job.peer, job.groups, self._shared.purse
        request = Request(work, places)
        ready = purse.ready(peer)
        channel = ready if ready is not None else await self._channel(work, job, quote)
        model = self._model
        header = calls.build(model.model_id, work.layer, groups, quote.number, channel, request.shape, model.top_k)
        try:
            reply = await self._send(work, job, header, request.buffers)
        except RemoteError as error:
            if error.code != "payment_required" or purse.buyer is None:
                raise
            channel = header["channel"] = await self._channel(work, job, quote, reopen=True)
            reply = await self._send(work, job, header, request.buffers)
        answer, service_us = answer_of(reply, peer, len(groups), request.shape)
        if channel:
            self._owe(work, job, request, channel, quote, reply)
        for group, partial in zip(groups, answer, strict=True):
            work.partials[group] = request.spread(work, partial)
        return service_us

    def _owe(self, work: Work, job: _Job, request: Request, channel: bytes, quote: Quote, reply: Reply) -> None:
        owed = Owed(
            job.peer,
            channel,
            quote,
            self._model.model_id,
            work.layer,
            request.places,
            request.rows,
            request.experts,
            request.buffers,
            reply.buffers[0],
        )
        self._owed.append(owed)

    def _settle_owed(self) -> None:
        """Count the answers that arrived, for payment: hashing them can wait while others are waited for."""
        while self._owed:
            self._shared.purse.count(self._owed.pop())

    async def _channel(self, work: Work, job: _Job, quote: Quote, *, reopen: bool = False) -> bytes:
        """The channel to the job's peer; a peer that lets one wait for it is left like one that does not answer."""
        left_ms = self._left_ms(work, job)
        with trio.move_on_after(left_ms / 1000):
            return await self._shared.purse.channel(job.peer, quote, reopen=reopen)
        message = f"no payment channel to {job.peer} came about in {left_ms} ms"
        raise RemoteError("deadline", message, peer_id=job.peer)

    async def _send(self, work: Work, job: _Job, header: dict[str, Any], buffers: Sequence[calls.Buffer]) -> Reply:
        return await self._shared.network.call(
            job.peer, calls.METHOD, header, buffers, deadline_ms=self._left_ms(work, job)
        )

    def _left_ms(self, work: Work, job: _Job) -> int:
        """How long this peer may keep the layer waiting."""
        left_ms = (work.deadline - trio.current_time()) * 1000
        if job.replaceable and not work.tried:  # a second try may wait as long as there is time
            expected_us = self._dispatcher.estimate(job.peer).finish_us(work.count * len(job.groups))
            left_ms = min(left_ms, max(PATIENCE_MS, 20 * expected_us / 1000))
        return max(1, int(left_ms))


async def _let_others_send() -> None:
    """Let the calls just started reach the socket before this task occupies the event loop."""
    for _ in range(3):
        await trio.lowlevel.checkpoint()


def _now_us() -> int:
    return perf_counter_ns() // 1000


def _ranges(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
