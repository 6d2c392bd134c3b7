"""One peer's part of a layer: its call is sent, waited for, checked, counted; or the part is computed here.

Owns: a call from its form to its partial sums or its failure, what a generation reports about who computed what, and
which answers are still to be counted for payment. Does not own: who is asked and when to try again (``session``), the
form itself (``asking``), money (``purse``).

Invariants:
1. A job never raises RiosError: what went wrong stands in the :class:`dmoe.asking.Work`; the peer or its shards rest.
2. What was begun is taken or dropped; either way the dispatcher sees it end.
3. Every answer that arrives is counted for payment, once, by :meth:`Jobs.settle`.
4. A sum group is taken, and reported, from the first who answers it (``hedging``).
5. No call leaves for a peer that the privacy rule keeps from the layer, whoever planned it (:meth:`Jobs._form`).
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from config.errors import BusyError, RemoteError, RiosError
from config.vocabulary import PeerId
from dmoe.asking import Request, Work, answer_of
from dmoe.audit import Auditor
from dmoe.bills import Payers
from dmoe.core import calls, wire
from dmoe.core.calls import Indices
from dmoe.core.dispatch import PEER_WIDE, Need
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.routes import ModelMap, Place, Table
from dmoe.core.sharing import Chosen
from dmoe.core.wire import FloatRows
from dmoe.ports import Quote
from dmoe.purse import Owed, Purse
from dmoe.replicas import Replicas, now_us
from dmoe.worker import Worker
from p2p import trace
from p2p.face import LeftError, Network, Pending, Reply
from p2p.trace import Kind, Span

if TYPE_CHECKING:
    from dmoe.hedging import Hedges, Race

log = logging.getLogger(__name__)

PATIENCE_MS = 2_000
"""How long a call may take before another replica is asked, where there is one and nothing better is known."""
_PEER_FAULTS = frozenset(("unavailable", "deadline", "payment_required", "protocol", "integrity"))
"""Failures that say something about the peer, not about one of its shards."""
_FREE = Quote(0, 0, 0)
_NO_ROWS = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all sessions of a node use."""

    network: Network
    worker: Worker | None
    purse: Purse
    replicas: Replicas
    hedges: "Hedges"
    call_timeout_ms: int
    audit: Auditor | None = None
    renormalise: bool = False
    """Do without experts that nobody has, where the router chose others too."""


@dataclass(slots=True, eq=False)
class Job:
    """The groups one peer shall answer; ``replaceable`` if others could answer each of them too. ``pending``: the
    call has left already. ``race``: others are asked as well if it is late. ``scope``: what comes before."""

    peer: PeerId
    groups: list[int]
    replaceable: bool
    group_rows: int
    places: Sequence[Place]
    quote: Quote
    expected_us: float
    payers: Payers
    start_ns: int = 0
    channel: bytes = b""
    request: Request | None = None
    pending: Pending | None = None
    race: "Race | None" = None
    scope: trio.CancelScope | None = None
    is_counted: bool = False
    """Its answer, or that there will be none, was counted for payment."""
    span: Span | None = None
    late: bool = False
    """Others have answered, and its own answer is taken elsewhere (:meth:`Jobs.take_late`)."""

    @property
    def has_answered(self) -> bool:
        """Whether its answer is here, though nobody may have looked at it."""
        return self.pending is not None and self.pending.answered_ns > 0


class Jobs:
    """The jobs of one generation, and what they add up to."""

    def __init__(self, shared: Shared, model: ModelMap, privacy: Privacy = OPEN) -> None:
        self.rows: dict[PeerId, int] = {}
        """Rows (times groups) that each peer computed."""
        self.served: dict[PeerId, set[tuple[int, int]]] = {}
        """(layer, group) that each peer computed."""
        self.done: dict[PeerId, Indices] = {}
        """Of the pass under way: per peer and row, how many sum groups it computed that the row needs."""
        self.places: dict[PeerId, set[tuple[int, int]]] = {}
        """Of the pass under way, as ``served``."""
        self._shared = shared
        self._model = model
        self._privacy = privacy
        self._me = shared.network.peer_id
        self._dispatcher = shared.replicas.dispatcher
        self._owed: deque[tuple[Owed, Payers, int, Chosen]] = deque()
        """With whose rows they are: who pays, the first row, and which of those from there on."""
        self.payers = Payers((), (), shared.purse.bills.purpose("asked"))
        """For whom the pass under way is."""

    def begin_pass(self) -> None:
        """From here on it is another pass."""
        self.done, self.places = {}, {}

    def _computed(self, work: Work, peer: PeerId, groups: Sequence[int]) -> None:
        places = {(work.layer, group) for group in groups}
        self.rows[peer] = self.rows.get(peer, 0) + len(groups) * work.count
        self.served.setdefault(peer, set()).update(places)
        self.places.setdefault(peer, set()).update(places)
        done, end = self.done.get(peer, _NO_ROWS), work.first + work.count
        if len(done) < end:
            done = np.concatenate([done, np.zeros(end - len(done), np.int32)])
        done[work.first : end] += work.needed(groups)
        self.done[peer] = done

    def job(self, work: Work, peer: PeerId, needs: Sequence[Need], table: Table) -> Job:
        """What one peer shall do of a layer."""
        groups = [need.group for need in needs]
        replaceable = all(len(need.replicas) > 1 for need in needs)
        places = [self._model.layers[work.layer][group] for group in groups]
        group_rows = len(groups) * work.count
        expected_us = self._dispatcher.estimate(peer).finish_us(group_rows)
        quote = table.quotes.get(peer, _FREE)
        return Job(peer, groups, replaceable, group_rows, places, quote, expected_us, self.payers)

    def begin(self, work: Work, job: Job) -> bool:
        """Send a job's call now, if nothing has to be waited for first."""
        channel = self._shared.purse.ready(job.peer, job.quote)
        if channel is None:
            return False
        job.start_ns = perf_counter_ns()
        header, buffers = self._form(work, job, channel)
        left_ms = self._left_ms(work, job)
        try:
            with self._span(work, job).here():
                job.pending = self._shared.network.begin(job.peer, calls.METHOD, header, buffers, deadline_ms=left_ms)
        except RiosError:
            return False  # the slow way meets it again and deals with it
        if job.pending is None:
            return False
        self._dispatcher.started(job.peer, job.group_rows)
        return True

    def _span(self, work: Work, job: Job) -> Span:
        """The call as a part of its request's trace, from when it is first sent until it is over."""
        if job.span is None:
            kind: Kind = "internal" if job.peer == self._me else "client"
            job.span = trace.begin(calls.METHOD, kind, peer=str(job.peer), layer=work.layer, groups=len(job.groups))
        return job.span

    def drop(self, job: Job) -> None:
        """Nobody waits for a job's answer any more."""
        self._end_span(job)
        if job.pending is not None:
            self._lost(job)
            job.pending.cancel()
            job.pending = None
            self._dispatcher.ended(job.peer, job.group_rows)

    def _lost(self, job: Job) -> None:
        """A call that has left is given up: its peer may compute and count it all the same."""
        request = job.request
        if job.is_counted or request is None or not job.channel:
            return
        job.is_counted = True
        members, costs = [place.experts for place in job.places], [place.flops_per_row for place in job.places]
        kflop = calls.kflop(members, costs, request.rows, request.experts)
        self._shared.purse.lost(job.peer, job.channel, job.quote, kflop)

    async def ask(self, work: Work, job: Job) -> None:
        """Let one peer answer its groups; puts partial sums, or the failure, into ``work``. Never raises RiosError."""
        if job.pending is None:
            self._dispatcher.started(job.peer, job.group_rows)
            job.start_ns = perf_counter_ns()
        elif work.has(job.groups) and self._shared.hedges.later(self, work, job):
            return
        try:
            with self._span(work, job).here():
                await self._take(work, job)
        except LeftError:
            if self._shared.hedges.later(self, work, job):
                return
        except BaseException:
            self._lost(job)
            self._over(job)
            raise
        self._over(job)

    async def ask_unless_beaten(self, work: Work, job: Job) -> None:
        """:meth:`ask` for a call that has not left; it is given up if another is quicker before it does."""
        with trio.CancelScope() as job.scope:
            await self.ask(work, job)

    async def take_late(self, work: Work, job: Job) -> None:
        """The answer of a job that was beaten, for its payment and for what it says about the peer."""
        try:
            await self._take(work, job)
        except BaseException:
            self._lost(job)
            raise
        finally:
            self._over(job)
            self.settle()

    def beaten(self, job: Job) -> None:
        """Others have answered a job's groups before its peer did."""
        if not job.has_answered:
            waited_us = (perf_counter_ns() - job.start_ns) / 1000
            self._dispatcher.lagged(job.peer, waited_us, job.expected_us, now_us())
        if job.pending is not None:
            job.pending.leave()
        elif job.scope is not None:
            job.scope.cancel()

    def _end_span(self, job: Job) -> None:
        if job.span is not None:
            job.span.end()

    def _over(self, job: Job) -> None:
        self._end_span(job)
        if job.pending is not None:
            job.pending.cancel()
            job.pending = None
        self._dispatcher.ended(job.peer, job.group_rows)

    async def _take(self, work: Work, job: Job) -> None:
        try:
            if job.peer == self._me:
                service_us = await self._compute(work, job)
                total_us = (perf_counter_ns() - job.start_ns) / 1000
            else:
                service_us, total_us = await self._call(work, job)
            shards = [place.shard for place in job.places]
            service_us = service_us or total_us
            self._dispatcher.answered(job.peer, shards, job.group_rows, total_us, service_us)
            if job.peer != self._me:
                self._dispatcher.took(job.peer, total_us, job.expected_us, now_us())
        except RiosError as error:
            self._failed(work, job, error)

    def _failed(self, work: Work, job: Job, error: RiosError) -> None:
        peer, places = job.peer, job.places
        if error.code == "deadline":
            self._lost(job)
        log.debug("layer %d at %s failed: %s", work.layer, peer, error)
        if job.span is not None:
            job.span.end(error)
        shards = [place.shard for place in places]
        pause_ms = max(5, error.retry_after_ms) if isinstance(error, BusyError) else 0
        if pause_ms:
            self._dispatcher.rest(peer, shards, now_us(), pause_ms * 1000)
        else:
            wide = error.code in _PEER_FAULTS
            self._dispatcher.failed(peer, (PEER_WIDE,) if wide else shards, now_us())
        if work.has(job.groups):
            return  # others have answered: nothing has to be tried again
        work.error = error
        work.calls_failed += 1
        for place in places:
            if pause_ms:
                work.busy_ms[place.group] = min(pause_ms, work.busy_ms.get(place.group, pause_ms))
            work.tried.setdefault(place.group, set()).add(peer)

    async def _compute(self, work: Work, job: Job) -> float:
        worker, model_id = self._shared.worker, self._model.model_id
        assert worker is not None
        start = perf_counter_ns()
        loaded = [worker.local(model_id, work.layer, group) for group in job.groups]
        here = [shard for shard in loaded if shard is not None]
        if len(here) < len(job.groups):
            raise RemoteError("not_found", f"a shard of layer {work.layer} was unloaded meanwhile")
        partials = await worker.compute(here, work.layer, work.rows, work.experts, work.weights, work.deadline)
        self._put(work, job, [wire.rounded(rows, self._model.dtype) for rows in partials])
        return (perf_counter_ns() - start) / 1000

    def _form(self, work: Work, job: Job, channel: bytes) -> tuple[dict[str, Any], Sequence[calls.Buffer]]:
        """Header and buffers of a job's call, paid on this channel."""
        layer, layers = work.layer, len(self._model.layers)
        assert self._privacy.allows(job.peer, layer, layer, layers), f"layer {layer} is not for {job.peer}"
        request = job.request = job.request or Request(work, job.places)
        job.channel = channel
        model, number = self._model, job.quote.number
        shape, top_k = request.shape, model.top_k
        return calls.build(model.model_id, work.layer, job.groups, number, channel, shape, top_k), request.buffers

    async def _call(self, work: Work, job: Job) -> tuple[float, float]:
        """Take a peer's answer; how long it says it computed, and how long all of it took (us)."""
        try:
            if job.pending is not None:
                reply = await job.pending.wait()
                answered_ns = job.pending.answered_ns
            else:
                ready = self._shared.purse.ready(job.peer, job.quote)
                reply = await self._send(work, job, ready if ready is not None else await self._channel(work, job))
                answered_ns = perf_counter_ns()
        except RemoteError as error:
            if error.code != "payment_required" or self._shared.purse.buyer is None or work.has(job.groups):
                raise
            reply = await self._send(work, job, await self._channel(work, job, reopen=True))
            answered_ns = perf_counter_ns()
        request = job.request
        assert request is not None
        answer, service_us = answer_of(reply, job.peer, len(job.groups), request.shape)
        audit = self._shared.audit
        picked = audit is not None and audit.picks()
        if job.channel or picked:
            owed = self._owed_of(work, job, request, reply)
            if job.channel:
                job.is_counted = True
                self._owed.append((owed, job.payers, work.first, request.chosen))
            if picked and audit is not None:
                audit.take(owed)
        self._put(work, job, [request.spread(work, rows) for rows in answer])
        return service_us, (answered_ns - job.start_ns) / 1000

    def _put(self, work: Work, job: Job, partials: Sequence[FloatRows]) -> None:
        """Partial sums (``f32[N, H]`` each, as on the wire) have come; those that nobody else brought are taken."""
        known = work.partials
        news = {group: rows for group, rows in zip(job.groups, partials, strict=True) if group not in known}
        work.partials.update(news)
        if news:
            self._computed(work, job.peer, list(news))

    def _owed_of(self, work: Work, job: Job, request: Request, reply: Reply) -> Owed:
        return Owed(
            job.peer,
            job.channel,
            job.quote,
            self._model.model_id,
            work.layer,
            job.places,
            request.rows,
            request.experts,
            calls.Bytes(request.buffers, calls.bf16_of(request.shape)),
            calls.Bytes(reply.buffers, calls.bf16_of(reply.header)),
            calls.device_of(reply.header),
            self._privacy,
        )

    def settle(self) -> None:
        """Count the answers that arrived, for payment: hashing them can wait while others are waited for."""
        while self._owed:
            self._shared.purse.count(*self._owed.popleft())

    async def _channel(self, work: Work, job: Job, *, reopen: bool = False) -> bytes:
        """The channel to the job's peer; a peer that lets one wait for it is left like one that does not answer."""
        left_ms = self._left_ms(work, job)
        with trio.move_on_after(left_ms / 1000):
            return await self._shared.purse.channel(job.peer, job.quote, reopen=reopen)
        message = f"no payment channel to {job.peer} came about in {left_ms} ms"
        raise RemoteError("deadline", message, peer_id=job.peer)

    async def _send(self, work: Work, job: Job, channel: bytes) -> Reply:
        header, buffers = self._form(work, job, channel)
        left_ms = self._left_ms(work, job)
        send = partial(self._shared.network.call, job.peer, calls.METHOD, header, buffers, deadline_ms=left_ms)
        job.pending = self._shared.hedges.detached(send) if job.race is not None else None
        return await (job.pending.wait() if job.pending is not None else send())

    def _left_ms(self, work: Work, job: Job) -> int:
        """How long this peer may keep the layer waiting; where another could answer, half of the time is left to it."""
        left_ms = (work.deadline - trio.current_time()) * 1000
        if job.replaceable and not work.tried:  # a second try may wait as long as there is time
            expected_us = self._dispatcher.estimate(job.peer).finish_us(work.count * len(job.groups))
            left_ms = min(left_ms / 2, max(PATIENCE_MS, 20 * expected_us / 1000))
        return max(1, int(left_ms))
