"""The experts of one model for generations that share passes: a layer's calls, wherever replicas are, and their sum.

Owns: one layer's rounds of calls with deadline and retries. Does not own: the choice of replicas (``core.dispatch``),
who offers what (``replicas``), a single call (``jobs``), payment (``purse``).

Invariants:
1. The sum does not depend on who computed which group: every partial is rounded as on the wire and added in group
   order; every replica, the local one too, computes with the rows as the wire rounds them.
2. One call per peer and layer (and chunk of rows), all peers at the same time.
3. If nobody has an expert that a sparse router chose, the layer fails; or, where the operator allows it, the weights
   of the row's other experts are rescaled to the same sum and the report names what is missing.
4. A failed call is tried at another replica within the deadline and the retry budget; which peer failed is remembered.
5. Every answer that arrives is counted for payment, once, at the latest when its token is done or its run fails.
6. Nothing is sent to a peer that the privacy rule keeps from the layer; a shard only such peers have is an error that
   names the rule, and never done without.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId
from dmoe.asking import Work
from dmoe.bills import Bill, Payers, Purpose
from dmoe.core.calls import Indices, Weights
from dmoe.core.dispatch import PEER_WIDE, Need
from dmoe.core.privacy import OPEN, Privacy
from dmoe.core.routes import ModelMap
from dmoe.core.wire import FloatRows
from dmoe.jobs import Job, Jobs, Shared
from dmoe.ports import Quote
from dmoe.replicas import now_us
from dmoe.tally import MISSING_TOLD_MAX, Share
from p2p import trace

log = logging.getLogger(__name__)

PAUSES_GROW_MAX, PAUSE_SPREAD = 32, 0.25
CHUNK_ROWS = 128
CHUNK_BYTES_MAX = 4 << 20
CHUNKS_AT_ONCE = 4
PLAN_US = 200_000
"""How long the plan of a layer with few rows is kept: a few tokens."""
PLAN_ROWS_MAX = 8
ROUNDS_MAX = 1000
OPEN_SECONDS_MAX = 3.0
"""How long a generation waits for channels to be opened before it starts; what is late opens at first use."""
SEARCHED_MAX = 4
"""Shards looked for at the same time."""
LOST_SECONDS = 5.0
"""How long sum groups that nobody had are not asked for again, unless the directory changes."""
GRACE_SECONDS = 1.0
"""How long a layer without a replica waits for an advert of a new one: shards move while they are called."""


@dataclass(slots=True)
class CallerReport:
    """Who computed a generation: rows (times groups) per peer, what each served, and how often a call was repeated."""

    rows: dict[str, int]
    serving: dict[str, dict[str, list[int]]]
    retries: int
    missing: tuple[tuple[int, int], ...] = ()
    """(layer, expert) that were chosen and done without."""


class CallerSession:
    """The experts of one model as the layer loop sees them (:class:`dmoe.segment.Experts`), for generations that share
    passes."""

    def __init__(self, shared: Shared, model: ModelMap, privacy: Privacy = OPEN) -> None:
        self._shared = shared
        self._model = model
        self._privacy = privacy
        self._me = shared.network.peer_id
        self._replicas = shared.replicas
        self._dispatcher = shared.replicas.dispatcher
        self._plans: dict[int, tuple[object, int, dict[PeerId, list[int]]]] = {}
        self._jobs = Jobs(shared, model, privacy)
        self._retries = self._retries_before = 0
        self._layer_before = len(model.layers)
        self._lost: dict[tuple[int, int], tuple[object, float]] = {}
        self._missing: set[tuple[int, int]] = set()
        self._lacking: list[tuple[int, int, Indices]] = []
        self._last_layer = max(layer for layer, places in enumerate(model.layers) if places)
        groups = max(1, max(len(places) for places in model.layers))
        self._chunk_rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES_MAX // (2 * model.width * groups)))

    async def open(self) -> None:
        """Open channels to the workers this generation will likely use, all at once. Failures show at first use."""
        _, table = self._replicas.table(self._model, self._privacy)
        likely: set[PeerId] = set()
        for needs in table.needs:
            likely.update(self._dispatcher.plan(needs, 1, now_us(), 1.0))
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
        self._dispatcher.failed(peer, (PEER_WIDE,), now_us())  # others come first, here and in the next generation

    def report(self) -> CallerReport:
        """Who computed what so far."""
        serving = {}
        for peer, places in self._jobs.served.items():
            groups = {(layer, group) for layer, group in places}
            experts = {e for layer, group in groups for e in self._model.layers[layer][group].experts}
            serving[str(peer)] = {"layers": sorted({layer for layer, _ in groups}), "experts": sorted(experts)}
        rows = {str(peer): rows for peer, rows in self._jobs.rows.items()}
        return CallerReport(rows, serving, self._retries, tuple(sorted(self._missing)[:MISSING_TOLD_MAX]))

    def begin(self, bills: Sequence[Bill | None], counts: Sequence[int], spare: Purpose = "kept") -> None:
        """See :class:`dmoe.tally.Meter`."""
        self._jobs.payers = Payers(bills, counts, self._shared.purse.bills.purpose(spare))

    def take(self, counts: Sequence[int]) -> list[Share]:
        """Who computed the last pass, split among sequences with so many rows each, in the order of the rows. A row
        counts once per sum group that it needed there."""
        retries = self._retries - self._retries_before
        shares, first = [], 0
        for count in counts:
            rows = {str(peer): int(done[first : first + count].sum()) for peer, done in self._jobs.done.items()}
            here = {peer: number for peer, number in rows.items() if number}
            places = {str(peer): places for peer, places in self._jobs.places.items() if str(peer) in here}
            lacking = {(layer, e) for layer, e, at in self._lacking if ((first <= at) & (at < first + count)).any()}
            shares.append(Share(here, places, retries, lacking))
            first += count
        return shares

    async def run(self, layer: int, h: FloatRows, routing: Any) -> FloatRows:  # noqa: ANN401 - dmoe.layers.Routing
        """``f32[N, H] -> f32[N, H]``: the sum over all chosen experts of this layer.

        Raises RemoteError ``no_replica``, ``deadline`` or ``payment_required`` if the layer cannot be computed.
        """
        if layer <= self._layer_before:
            self._jobs.begin_pass()
            self._lacking = []
            self._retries_before = self._retries
        self._layer_before = layer
        try:
            if not trace.current.get():
                return await self._run(layer, h, routing.experts, routing.weights)
            with trace.span("layer", layer=layer, rows=len(h)):
                return await self._run(layer, h, routing.experts, routing.weights)
        except BaseException:
            self._jobs.settle()
            raise

    async def _run(self, layer: int, h: FloatRows, experts: Indices | None, weights: Weights | None) -> FloatRows:
        count, size = len(h), self._chunk_rows
        if count <= size:
            out = await self._run_chunk(layer, 0, h, experts, weights)
            if layer == self._last_layer:
                self._jobs.settle()
            return out
        out = np.empty_like(h)
        failures: list[RiosError] = []
        limiter = trio.CapacityLimiter(CHUNKS_AT_ONCE)

        async def part(rows: slice) -> None:
            own_experts = None if experts is None else experts[rows]
            own_weights = None if weights is None else weights[rows]
            try:
                async with limiter:
                    out[rows] = await self._run_chunk(layer, rows.start, h[rows], own_experts, own_weights)
                self._jobs.settle()  # the other chunks are still on their way
            except RiosError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for start in range(0, count, size):
                nursery.start_soon(part, slice(start, start + size))
        if failures:
            raise failures[0]
        self._jobs.settle()
        return out

    async def _run_chunk(
        self, layer: int, first: int, h: FloatRows, experts: Indices | None, weights: Weights | None
    ) -> FloatRows:
        deadline = trio.current_time() + self._shared.call_timeout_ms / 1000
        work = Work(self._model, layer, h, experts, weights, deadline, first)
        missing = self._without_lost(work) if self._lost else work.wanted
        rounds = 0
        while missing:
            await self._round(work, missing, first=not work.tried)
            missing = [group for group in missing if group not in work.partials and group not in work.lost]
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
        version, table = self._replicas.table(self._model, self._privacy)
        needs = table.needs[work.layer]
        if len(groups) != len(needs):
            needs = tuple(needs[group] for group in groups)
        plan = self._plan(work, needs, version, keep=first and len(groups) == len(self._model.layers[work.layer]))
        if sum(map(len, plan.values())) < len(needs) and not await self._wait_busy(work, needs, plan):
            return
        asked = {peer: [needs[position] for position in positions] for peer, positions in plan.items()}
        jobs = {peer: self._jobs.job(work, peer, mine, table) for peer, mine in asked.items()}
        local = [job for peer, job in jobs.items() if peer == self._me]
        remote = [job for peer, job in jobs.items() if peer != self._me]
        begun: list[Job] = []
        try:
            slow: list[Job] = []
            for job in remote:
                self._shared.hedges.watch(self._jobs, work, job, asked[job.peer], table)
                (begun if self._jobs.begin(work, job) else slow).append(job)
            if not slow:
                await self._finish(work, local, begun)
                return
            async with trio.open_nursery() as nursery:
                for job in slow:
                    nursery.start_soon(self._ask_slow, work, job)
                if local:
                    await _let_others_send()
                await self._finish(work, local, begun)
        finally:
            for job in begun:  # after a cancellation
                if not job.late:
                    self._jobs.drop(job)
            for job in remote:
                if job.race is not None:
                    job.race.drop()
                    job.race = None

    async def _ask_slow(self, work: Work, job: Job) -> None:
        await self._jobs.ask_unless_beaten(work, job)
        if job.race is not None:
            await job.race.finish()

    async def _finish(self, work: Work, local: Sequence[Job], begun: Sequence[Job]) -> None:
        """Compute what is here, then take the answers of the calls that have left."""
        for job in local:
            await self._jobs.ask(work, job)
        self._jobs.settle()  # of the layer before: this one's answers are still on their way
        for job in begun:
            await self._jobs.ask(work, job)
            if job.race is not None:
                await job.race.finish()

    def _plan(self, work: Work, needs: Sequence[Need], version: object, *, keep: bool) -> dict[PeerId, list[int]]:
        now, rows = now_us(), work.count
        keep = keep and rows <= PLAN_ROWS_MAX
        if keep:
            known = self._plans.get(work.layer)
            if known is not None and known[0] == (version, self._dispatcher.changes) and now < known[1]:
                return known[2]
        plan = self._dispatcher.plan(needs, rows, now, self._replicas.dice(), work.tried)
        if keep:
            self._plans[work.layer] = ((version, self._dispatcher.changes), now + PLAN_US, plan)
        return plan

    async def _wait_busy(self, work: Work, needs: Sequence[Need], plan: dict[PeerId, list[int]]) -> bool:
        """Some groups have nobody left to ask. True: go on with the others; False: waited, plan again. Raises if hope
        is gone."""
        planned = {position for positions in plan.values() for position in positions}
        lost = [need.group for position, need in enumerate(needs) if position not in planned]
        gone = [group for group in lost if group not in work.busy_ms]
        if gone and not await self._wait_change(work, gone) and not self._do_without(work, gone):
            raise self._no_replica(work, gone[0])
        if gone:
            return False
        if plan:
            return True
        hint_s = min(work.busy_ms[group] for group in lost) / 1000
        for group in lost:
            work.tried.pop(group, None)
            del work.busy_ms[group]
        await trio.sleep(self._pause_seconds(work, hint_s))
        return False

    def _pause_seconds(self, work: Work, hint_s: float) -> float:
        """How long to wait when all are busy: what they said, twice as long each time they say it again, and a little
        more, so that callers do not come back all at once."""
        left_s = work.deadline - trio.current_time()
        grown_s = hint_s * min(1 << work.pauses, PAUSES_GROW_MAX) * (1 + PAUSE_SPREAD * self._replicas.dice())
        work.pauses += 1
        return max(0.0, min(grown_s, max(hint_s, left_s / 2), left_s))

    # --- doing without what nobody has

    def _do_without(self, work: Work, groups: Sequence[int]) -> bool:
        """Leave sum groups out of the sum, if that is allowed and every row has others."""
        paid = work.error is None or work.error.code != "payment_required"
        if not (self._shared.renormalise and work.experts is not None and paid):
            return False
        version, table = self._replicas.table(self._model, self._privacy)
        if any(self._model.layers[work.layer][group].shard in table.withheld for group in groups):
            return False
        news = [group for group in groups if (work.layer, group) not in self._lost]
        for group in groups:
            if not work.leave_out(group):
                return False
            self._lost[work.layer, group] = (version, trio.current_time() + LOST_SECONDS)
            for expert, rows in work.chosen_of(group):
                self._missing.add((work.layer, expert))
                self._lacking.append((work.layer, expert, rows))
        if news:
            log.warning("%s: layer %d goes on without sum groups %s", self._model.name, work.layer, news)
        return True

    def _without_lost(self, work: Work) -> Sequence[int]:
        """The wanted sum groups but for those that were lost a moment ago: nobody waits for them at every token."""
        version, now = self._replicas.table(self._model, self._privacy)[0], trio.current_time()
        found = []
        for group in work.wanted:
            known = self._lost.get((work.layer, group))
            if known is None or known[0] != version or now > known[1] or not self._do_without(work, (group,)):
                found.append(group)
        return found

    async def _wait_change(self, work: Work, gone: Sequence[int]) -> bool:
        """Wait for the directory to change, and look for replicas beyond its view meanwhile; False once the grace is
        over, or if money is what is missing."""
        if work.error is not None and work.error.code == "payment_required":
            return False
        now = trio.current_time()
        work.grace_until = work.grace_until or min(work.deadline, now + GRACE_SECONDS)
        with trio.move_on_at(work.grace_until):
            async with trio.open_nursery() as nursery:
                for group in gone[:SEARCHED_MAX]:
                    nursery.start_soon(self._search, self._model.layers[work.layer][group].shard)
                await self._replicas.changed.wait()
                nursery.cancel_scope.cancel()
            return True
        return False

    async def _search(self, shard: int) -> None:
        """Ask the swarm who serves a shard; whoever is found changes the directory."""
        try:
            await self._shared.network.directory.find_providers(self._model.model_id, shard)
        except RiosError as error:
            log.debug("looking for shard %d of %s: %s", shard, self._model.name, error)

    def _no_replica(self, work: Work, group: int) -> RiosError:
        if work.error is not None and work.error.code == "payment_required":
            return work.error
        place = self._model.layers[work.layer][group]
        why = self._replicas.why_missing(self._model, work.layer, place, self._privacy)
        cause = f"; last error: {work.error.message}" if work.error else ""
        which = f"{'expert' if len(place.experts) == 1 else 'experts'} {_ranges(place.experts)}"
        return RemoteError(
            "no_replica",
            f"no replica of layer {work.layer}, {which} (shard {place.shard_id}) of {self._model.name}: {why}{cause}",
            "start a node that serves this model, or raise its replica count",
        )


async def _let_others_send() -> None:
    """Let the calls just started reach the socket before this task occupies the event loop."""
    for _ in range(3):
        await trio.lowlevel.checkpoint()


def _ranges(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
