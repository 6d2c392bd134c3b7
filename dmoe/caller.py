"""Calls experts wherever their replicas are, local ones directly, others by ``expert.run``, and adds what they answer.

Owns: one layer's calls with deadline, retries and payment, and what a generation reports about who computed it. Does
not own: the choice of replicas (``core.dispatch``), who offers what (``core.routes``), money (the ledger, behind
:class:`dmoe.ports.Buyer`).

Invariants:
1. The sum does not depend on who computed which group: every partial is rounded as on the wire and added in group
   order; every replica, the local one too, computes with the rows as the wire rounds them.
2. One call per peer and layer (and chunk of rows), all peers at the same time.
3. A failed call is tried at another replica within the deadline and the retry budget; which peer failed is remembered.
4. Every answer that arrives is counted for payment, once, at the latest when its token is done or its run fails.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from time import perf_counter_ns
from typing import Any

import numpy as np
import trio

from config.errors import BusyError, IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from dmoe.core import calls, wire
from dmoe.core.calls import Indices, Weights
from dmoe.core.dispatch import PEER_WIDE, Dispatcher, Need
from dmoe.core.manifest import Manifest
from dmoe.core.routes import ModelMap, Place, Table, map_of, paused_with, row_us_of, table_of
from dmoe.core.wire import FloatRows
from dmoe.ports import Buyer, Quote
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


class Caller:
    """What all sessions of a node share: estimates, holds, tables of replicas. :meth:`run` keeps the tables fresh."""

    def __init__(
        self,
        network: Network,
        *,
        worker: Worker | None = None,
        buyer: Buyer | None = None,
        call_timeout_ms: int = 10_000,
        random: Random | None = None,
    ) -> None:
        self.network = network
        self.worker = worker
        self.buyer = buyer
        self.call_timeout_ms = call_timeout_ms
        self.dispatcher = Dispatcher(network.peer_id)
        self.dice = (random or Random()).random
        self.changed = trio.Event()
        """Set at the next change of the directory."""
        self.last_seen: dict[tuple[str, int], float] = {}
        self._version = 0
        self._maps: dict[str, ModelMap] = {}
        self._tables: dict[str, tuple[tuple[int, int], Table]] = {}
        self._opening: dict[PeerId, trio.Lock] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the directory until cancelled."""
        task_status.started()
        while True:
            await self.network.directory.wait_change()
            self._version += 1
            self.changed.set()
            self.changed = trio.Event()

    def session(self, manifest: Manifest) -> "CallerSession":
        """The experts of one model for one generation."""
        model = self._maps.get(manifest.model_id)
        if model is None:
            model = self._maps[manifest.model_id] = map_of(manifest)
        return CallerSession(self, model)

    def table(self, model: ModelMap) -> tuple[tuple[int, int], Table]:
        """The current table of a model and its version."""
        version = (self._version, self.worker.changes if self.worker else 0)
        known = self._tables.get(model.model_id)
        if known is not None and known[0] == version:
            return known
        now = trio.current_time()
        if known is not None:  # what the old table offered was there until now
            self.last_seen.update({(model.model_id, shard): now for shard in known[1].offered})
        adverts = self.network.directory.adverts()
        local = self.worker.indices(model.model_id) if self.worker else frozenset()
        own_price = self.worker.quote.microcredits_per_tflop if self.worker else 0
        table = table_of(model, adverts, self.network.peer_id, local, own_price)
        self.dispatcher.forget(adverts)
        for peer in table.quotes:
            row_us = row_us_of(model.layers[0], adverts[peer].hardware.expert_kflop_per_s)
            if row_us is not None:
                self.dispatcher.prior(peer, row_us)
        self._tables[model.model_id] = (version, table)
        return version, table

    async def channel(self, worker: PeerId, quote: Quote, *, reopen: bool = False) -> bytes:
        """The channel to pay a worker with; opened first where there is none (or ``reopen``)."""
        if self.buyer is None:
            return b""
        channel = None if reopen else self.buyer.channel(worker)
        if channel is not None:
            return channel
        if not quote.microcredits_per_tflop and not reopen:
            return b""
        lock = self._opening.setdefault(worker, trio.Lock())
        async with lock:  # calls that wait here find it open
            channel = None if reopen else self.buyer.channel(worker)
            return channel if channel is not None else await self.buyer.open_channel(worker)

    def statistics(self) -> dict[str, Any]:
        """What is known about each peer, JSON-able."""
        return {
            peer: {
                "calls": known.calls,
                "round_trip_us": round(known.round_trip_us),
                "row_us": round(known.row_us, 1),
                "in_flight": known.in_flight,
            }
            for peer, known in self.dispatcher.peers.items()
        }


@dataclass(frozen=True, slots=True)
class _Job:
    """The groups one peer shall answer; ``replaceable`` if somebody else could answer one of them too."""

    peer: PeerId
    groups: list[int]
    replaceable: bool


@dataclass(frozen=True, slots=True)
class _Owed:
    """An answer that arrived and is not counted for payment yet."""

    peer: PeerId
    channel: bytes
    quote: Quote
    layer: int
    places: Sequence[Place]
    rows: int
    experts: Indices | None
    request: Sequence[calls.Buffer]
    answer: calls.Buffer


@dataclass(slots=True)
class _Layer:
    """One chunk of rows of one layer on its way."""

    layer: int
    rows: FloatRows
    shape: dict[str, Any]
    buffer: memoryview
    experts: Indices | None
    weights: Weights | None
    deadline: float
    partials: dict[int, FloatRows] = field(default_factory=dict)
    tried: dict[int, set[PeerId]] = field(default_factory=dict)
    busy_ms: dict[int, int] = field(default_factory=dict)
    error: RiosError | None = None
    calls_failed: int = 0
    grace_until: float = 0.0


class CallerSession:
    """The experts of one model as the layer loop sees them (:class:`dmoe.layers.Experts`), for one generation."""

    def __init__(self, caller: Caller, model: ModelMap) -> None:
        self._caller = caller
        self._model = model
        self._dispatcher = caller.dispatcher
        self._plans: dict[int, tuple[object, int, dict[PeerId, list[int]]]] = {}
        self._owed: list[_Owed] = []
        self._rows: dict[PeerId, int] = {}
        self._served: dict[PeerId, set[tuple[int, int]]] = {}
        self._retries = 0
        groups = max(1, max(len(places) for places in model.layers))
        self._chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES_MAX // (2 * model.width * groups)))

    async def open(self) -> None:
        """Open channels to the workers this generation will likely use, all at once. Failures show at first use."""
        _, table = self._caller.table(self._model)
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
                await self._caller.channel(peer, quote)
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
        shape, buffer = wire.encode(h, self._model.dtype)
        seen = wire.decode(shape, buffer)
        timeout = self._caller.call_timeout_ms / 1000
        work = _Layer(layer, seen, shape, buffer, experts, weights, trio.current_time() + timeout)
        places = self._model.layers[layer]
        if experts is None:
            wanted: Sequence[int] = range(len(places))
        else:
            wanted = np.unique(self._model.group_of[experts]).tolist()
        missing = list(wanted)
        rounds = 0
        while missing:
            await self._round(work, missing, first=not work.tried)
            missing = [group for group in missing if group not in work.partials]
            if missing:
                rounds += 1
                self._check_going_on(work, rounds)
        return wire.total([work.partials[group] for group in wanted], seen.shape)

    def _check_going_on(self, work: _Layer, rounds: int) -> None:
        """After a round with failures: is there time and budget for another?"""
        if trio.current_time() >= work.deadline or rounds > ROUNDS_MAX:
            cause = f"; last: {work.error}" if work.error else ""
            message = f"layer {work.layer} of {self._model.name} took longer than {self._caller.call_timeout_ms} ms"
            raise RemoteError("deadline", message + cause)
        for _ in range(work.calls_failed):
            self._retries += 1
            if not self._dispatcher.may_retry():
                assert work.error is not None
                raise work.error
        work.calls_failed = 0

    # --- one round: plan, call everybody, wait

    async def _round(self, work: _Layer, groups: Sequence[int], *, first: bool) -> None:
        version, table = self._caller.table(self._model)
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
        me = self._caller.network.peer_id
        local = [job for job in jobs if job.peer == me]
        remote = [job for job in jobs if job.peer != me]
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

    def _plan(self, work: _Layer, needs: Sequence[Need], version: object, *, keep: bool) -> dict[PeerId, list[int]]:
        now_us, rows = _now_us(), len(work.rows)
        keep = keep and rows <= PLAN_ROWS_MAX
        if keep:
            known = self._plans.get(work.layer)
            if known is not None and known[0] == (version, self._dispatcher.changes) and now_us < known[1]:
                return known[2]
        plan = self._dispatcher.plan(needs, rows, now_us, self._caller.dice(), work.tried)
        if keep:
            self._plans[work.layer] = ((version, self._dispatcher.changes), now_us + PLAN_US, plan)
        return plan

    async def _wait_busy(self, work: _Layer, needs: Sequence[Need], plan: dict[PeerId, list[int]]) -> bool:
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

    async def _wait_change(self, work: _Layer) -> bool:
        """Wait for the directory to change; False once the grace is over, or if money is what is missing."""
        if work.error is not None and work.error.code == "payment_required":
            return False
        now = trio.current_time()
        work.grace_until = work.grace_until or min(work.deadline, now + GRACE_SECONDS)
        with trio.move_on_at(work.grace_until):
            await self._caller.changed.wait()
            return True
        return False

    def _no_replica(self, work: _Layer, group: int) -> RiosError:
        if work.error is not None and work.error.code == "payment_required":
            return work.error
        place = self._model.layers[work.layer][group]
        seen = self._caller.last_seen.get((self._model.model_id, place.shard))
        if place.shard in self._caller.table(self._model)[1].offered:
            when = "it is offered, but every call to it failed"
        else:
            when = f"last seen {trio.current_time() - seen:.0f} s ago" if seen is not None else "it was never seen"
            adverts = self._caller.network.directory.adverts()
            if paused := paused_with(self._model.model_id, place.shard, adverts):
                when += f"; {paused} that hold it are paused by their operators"
        cause = f"; last error: {work.error.message}" if work.error else ""
        which = f"{'expert' if len(place.experts) == 1 else 'experts'} {_ranges(place.experts)}"
        return RemoteError(
            "no_replica",
            f"no replica of layer {work.layer}, {which} (shard {place.shard_id}) of {self._model.name}: {when}{cause}",
            "start a node that serves this model, or raise its replica count",
        )

    # --- one call

    async def _ask(self, work: _Layer, job: _Job, table: Table) -> None:
        """Ask one peer for its groups; puts partial sums, or the failure, into ``work``. Never raises RiosError."""
        peer, groups = job.peer, job.groups
        places = [self._model.layers[work.layer][group] for group in groups]
        shards = [place.shard for place in places]
        group_rows = len(groups) * len(work.rows)
        self._dispatcher.started(peer, group_rows)
        try:
            start = perf_counter_ns()
            if peer == self._caller.network.peer_id:
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

    def _failed(self, work: _Layer, peer: PeerId, places: Sequence[Place], error: RiosError) -> None:
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

    async def _compute(self, work: _Layer, groups: Sequence[int]) -> float:
        worker, model_id = self._caller.worker, self._model.model_id
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

    async def _call(self, work: _Layer, job: _Job, places: Sequence[Place], quote: Quote) -> float:
        peer, groups = job.peer, job.groups
        chosen, shape, buffers = _request(work, self._model, places)
        ready = self._caller.buyer.channel(peer) if self._caller.buyer is not None else b""
        channel = ready if ready is not None else await self._channel(work, job, quote)
        model, top_k = self._model, self._model.top_k
        header = calls.build(model.model_id, work.layer, groups, quote.number, channel, shape, top_k)
        try:
            reply = await self._send(work, job, header, buffers)
        except RemoteError as error:
            if error.code != "payment_required" or self._caller.buyer is None:
                raise
            channel = header["channel"] = await self._channel(work, job, quote, reopen=True)
            reply = await self._send(work, job, header, buffers)
        answer, service_us = _answer(reply, peer, len(groups), shape)
        if self._caller.buyer is not None and channel:
            experts = None if work.experts is None else work.experts if chosen is None else work.experts[chosen]
            owed = _Owed(
                peer, channel, quote, work.layer, places, shape["shape"][0], experts, buffers, reply.buffers[0]
            )
            self._owed.append(owed)
        for group, partial in zip(groups, answer, strict=True):
            if chosen is not None:
                spread = np.zeros_like(work.rows)
                spread[chosen] = partial
                partial = spread
            work.partials[group] = partial
        return service_us

    def _settle_owed(self) -> None:
        """Count the answers that arrived, for payment: hashing them can wait while others are waited for."""
        buyer = self._caller.buyer
        while self._owed:
            owed = self._owed.pop()
            assert buyer is not None
            members = [place.experts for place in owed.places]
            costs = [place.flops_per_row for place in owed.places]
            kflop = calls.kflop(members, costs, owed.rows, owed.experts)
            groups = [place.group for place in owed.places]
            leaf = calls.leaf(self._model.model_id, owed.layer, groups, owed.request, owed.answer)
            buyer.used(owed.peer, owed.channel, owed.quote, kflop, leaf)

    async def _channel(self, work: _Layer, job: _Job, quote: Quote, *, reopen: bool = False) -> bytes:
        """The channel to the job's peer; a peer that lets one wait for it is left like one that does not answer."""
        left_ms = self._left_ms(work, job)
        with trio.move_on_after(left_ms / 1000):
            return await self._caller.channel(job.peer, quote, reopen=reopen)
        message = f"no payment channel to {job.peer} came about in {left_ms} ms"
        raise RemoteError("deadline", message, peer_id=job.peer)

    async def _send(self, work: _Layer, job: _Job, header: dict[str, Any], buffers: Sequence[calls.Buffer]) -> Reply:
        return await self._caller.network.call(
            job.peer, calls.METHOD, header, buffers, deadline_ms=self._left_ms(work, job)
        )

    def _left_ms(self, work: _Layer, job: _Job) -> int:
        """How long this peer may keep the layer waiting."""
        left_ms = (work.deadline - trio.current_time()) * 1000
        if job.replaceable and not work.tried:  # a second try may wait as long as there is time
            expected_us = self._dispatcher.estimate(job.peer).finish_us(len(work.rows) * len(job.groups))
            left_ms = min(left_ms, max(PATIENCE_MS, 20 * expected_us / 1000))
        return max(1, int(left_ms))


def _request(work: _Layer, model: ModelMap, places: Sequence[Place]) -> tuple[Any, dict[str, Any], list[calls.Buffer]]:
    """Which rows go to these groups (None: all), their shape header, and the buffers."""
    if work.experts is None:
        return None, work.shape, [work.buffer]
    assert work.weights is not None
    mask = np.isin(model.group_of[work.experts], [place.group for place in places]).any(axis=1)
    if mask.all():
        chosen, shape, buffer, experts, weights = None, work.shape, work.buffer, work.experts, work.weights
    else:
        chosen = np.flatnonzero(mask)
        shape, buffer = wire.encode(work.rows[chosen], model.dtype)  # already rounded: rounding again changes nothing
        experts, weights = work.experts[chosen], work.weights[chosen]
    ids, scales = np.ascontiguousarray(experts, "<i4"), np.ascontiguousarray(weights, "<f4")
    return chosen, shape, [buffer, ids.data.cast("B"), scales.data.cast("B")]


def _answer(reply: Reply, peer: PeerId, groups: int, shape: Mapping[str, Any]) -> tuple[FloatRows, float]:
    """The partial sums ``f32[G, N, H]`` and the service time the peer claims."""
    count, width = shape["shape"]
    if len(reply.buffers) != 1:
        raise RemoteError("protocol", f"{peer} answered with {len(reply.buffers)} buffers", peer_id=peer)
    try:
        rows = wire.decode(reply.header, reply.buffers[0])
    except IntegrityError as error:
        raise RemoteError("integrity", f"{peer} answered with {error.message}", peer_id=peer) from error
    if rows.shape != (groups * count, width) or reply.header.get("dtype") != shape.get("dtype"):
        raise RemoteError("protocol", f"{peer} answered with shape {list(rows.shape)}", peer_id=peer)
    service = reply.header.get("service_us", 0)
    return rows.reshape(groups, count, width), float(service) if type(service) is int and service >= 0 else 0.0


async def _let_others_send() -> None:
    """Let the calls just started reach the socket before this task occupies the event loop."""
    for _ in range(3):
        await trio.lowlevel.checkpoint()


def _now_us() -> int:
    return perf_counter_ns() // 1000


def _ranges(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
