"""Serves experts: answers what peers ask of the shards loaded here, and meters it.

Owns: which shards are loaded, admission, what a call is answered, statistics. Does not own: which shards are here
(``hosting``), what runs when and together (``batches``), what a shard computes (``runtime``), what work costs (the
ledger, behind :class:`dmoe.ports.Seller`).

A small call that finds nobody waiting is answered in the connection's reader, without a task; every other one in a task
that waits for its batch.

Invariants:
1. A call is refused (busy, with a hint) before it is queued, never dropped after.
2. A row's answer does not depend on the batch it ran in (the shard's promise) nor on who else waited.
3. What is answered is counted once, with the same kFLOP and leaf as at the caller.
4. A shard is closed only after the last call on it has ended.
5. While :attr:`Worker.paused`, peers are refused by name and this node's own answers are computed as ever.
"""

from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import trio

from config.errors import RemoteError, RequestError, RiosError
from config.vocabulary import PeerId
from dmoe.batches import Batches
from dmoe.core import calls, wire
from dmoe.core.calls import ExpertCall, Indices, Weights
from dmoe.core.demand import Use
from dmoe.core.wire import FloatRows
from dmoe.loaded import LoadedShard, Partials, Several, Shard, ShardPlan, plan_of, stacked, why_withdrawn
from dmoe.ports import Quote, Seller
from p2p.face import Call, Network, Reply

ANSWER_BYTES_MAX = 32 << 20
SEVERAL_MAX = 4096
"""Choices of groups that are known; callers choose them."""
QUICK_BYTES_MAX = 64 << 10
"""A request with more activations than this is not looked at in the reader: it would not run there anyway."""


class Worker:
    """Loaded shards and the RPC ``expert.run``. :meth:`run` must be running for calls that queue."""

    def __init__(
        self,
        network: Network,
        *,
        quote: Quote,
        seller: Seller | None = None,
        threads: int = 1,
        queue_rows_max: int = 4096,
        batch_rows_max: int = 512,
        device: str = "",
    ) -> None:
        """``device``: what kind of machine computes here; answers of one kind are equal bit for bit."""
        self.quote = quote
        self.changes = 0
        """Counts loads and unloads, so that callers can cache what is local."""
        self.paused = False
        """No new calls of peers, for as long as the operator wants."""
        self._network = network
        self._seller = seller
        self._queue_rows_max = queue_rows_max
        self._batches = Batches(threads=threads, queue_rows_max=queue_rows_max, batch_rows_max=batch_rows_max)
        self._shards: dict[tuple[str, str], LoadedShard] = {}
        self._places: dict[tuple[str, int, int], LoadedShard] = {}
        self._several: dict[tuple[str, int, tuple[int, ...]], Several] = {}
        self._calls = 0
        self._quick_calls = 0
        self._active = 0
        self._running = False
        self._stopping = False
        self.device = device
        self._uncounted: deque[tuple[Call, ExpertCall, Several, calls.Bytes]] = deque()
        self._to_count = trio.Event()
        network.serve(calls.METHOD, self._serve, quick=self._quick)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled (call :meth:`drain` first to finish what is in flight), then free every shard."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._count_behind)
                nursery.start_soon(self._batches.run)
                self._running = True
                await trio.lowlevel.checkpoint()  # both have begun
                task_status.started()
        finally:
            self._running = False
            self._count_all()
            for loaded in self._shards.values():
                loaded.shard.close()
            self._shards.clear()
            self._places.clear()
            self._several.clear()

    async def drain(self) -> None:
        """Take no new calls and wait until those in flight are answered."""
        self._stopping = True
        await self.drained()

    async def drained(self) -> None:
        """Wait until no call of a peer is in flight."""
        while self._active:
            await self._calm()

    async def _calm(self) -> None:
        """Until a call or a batch has ended."""
        await self._batches.calm.park()

    # --- shards

    def load(self, plan: ShardPlan, shard: Shard) -> None:
        """Serve a shard from now on."""
        key = (plan.model_id, plan.shard_id)
        assert key not in self._shards, f"{plan.shard_id} is loaded already"
        loaded = self._shards[key] = LoadedShard(plan, shard)
        for layer in range(plan.layers[0], plan.layers[1] + 1):
            if layer not in plan.dense_layers:
                self._places[plan.model_id, layer, plan.group] = loaded
        self.changes += 1

    async def unload(self, model_id: str, shard_id: str) -> None:
        """Stop serving a shard, wait for the calls on it, and free it. Unknown shards are ignored."""
        loaded = self._shards.pop((model_id, shard_id), None)
        if loaded is None:
            return
        self._places = {place: other for place, other in self._places.items() if other is not loaded}
        self._several.clear()
        self.changes += 1
        while not loaded.free:
            await self._calm()
        loaded.shard.close()
        if loaded.together is not None:
            await trio.to_thread.run_sync(loaded.together.tidy)

    def local(self, model_id: str, layer: int, group: int) -> LoadedShard | None:
        """The loaded shard that holds this sum group, if any."""
        return self._places.get((model_id, layer, group))

    def indices(self, model_id: str) -> frozenset[int]:
        """Manifest indices of the loaded shards of a model."""
        return frozenset(s.plan.index for (model, _), s in self._shards.items() if model == model_id)

    def withdrawn(self) -> dict[tuple[str, int], str]:
        """Loaded shards that are not fit to be served any more, by model id and manifest index, and why."""
        every = {(model, loaded.plan.index): loaded.shard for (model, _), loaded in self._shards.items()}
        return {key: why for key, shard in every.items() if (why := why_withdrawn(shard))}

    def uses(self) -> dict[tuple[str, int], Use]:
        """A sample of every loaded shard, by model id and manifest index."""
        return {
            (model, shard.plan.index): Use(shard.rows_waiting, shard.rows_computed, shard.row_seconds * 1e6)
            for (model, _), shard in self._shards.items()
        }

    def ram_bytes(self) -> int:
        """Memory the loaded shards take."""
        return sum(loaded.shard.ram_bytes for loaded in self._shards.values())

    def rows_waiting(self) -> int:
        """Rows in all queues (the advert's load)."""
        return sum(loaded.rows_waiting for loaded in self._shards.values())

    def statistics(self) -> dict[str, Any]:
        """Figures of the moment, JSON-able: totals and per model and shard."""
        shards: dict[str, dict[str, Any]] = {}
        for (model_id, shard_id), loaded in self._shards.items():
            shards.setdefault(model_id, {})[shard_id] = loaded.statistics()
        return {
            "calls": self._calls,
            "quick_calls": self._quick_calls,
            "refused": sum(self._batches.refused.values()),
            "refused_by": dict(self._batches.refused),
            "active": self._active,
            "batches": sum(loaded.batches for loaded in self._shards.values()),
            "shards": shards,
        }

    # --- calls

    def _quick(self, call: Call) -> Reply | None:
        """Answer in the reader if that is quick; None: :meth:`_serve` does it (or says what is wrong)."""
        if self._stopping or self.paused or not call.buffers or len(call.buffers[0]) > QUICK_BYTES_MAX:
            return None
        if self._batches.crowded(followed=call.followed):
            return None
        start = perf_counter()
        try:
            asked, shards, paid = self._open(call)
            partials = self._batches.now(shards, asked.layer, asked.rows, asked.experts, asked.weights)
        except RiosError:
            return None  # rare: the handler meets it again and tells the caller
        if partials is None:
            return None
        self._quick_calls += 1
        return self._reply(call, asked, shards, partials, start, paid=paid)

    async def _serve(self, call: Call) -> Reply:
        if self._stopping:
            raise RemoteError("unavailable", "this node is shutting down", "ask another replica")
        if self.paused:
            self._batches.refused["paused"] += 1
            raise RemoteError("unavailable", "this node is paused by its operator", "ask another replica")
        start = perf_counter()
        self._active += 1
        try:
            asked, shards, paid = self._open(call)
            partials = await self.compute(shards, asked.layer, asked.rows, asked.experts, asked.weights, call.deadline)
            return self._reply(call, asked, shards, partials, start, paid=paid)
        finally:
            self._active -= 1
            self._batches.answered()

    def _open(self, call: Call) -> tuple[ExpertCall, Several, bool]:
        """What is asked, of which shards, and whether it is metered. Raises RiosError if it is refused."""
        asked = calls.parse(call.header, call.buffers)
        shards = self._places_of(asked)
        return asked, shards, self._admit(call.peer_id, asked)

    def _reply(
        self,
        call: Call,
        asked: ExpertCall,
        shards: Several,
        partials: Partials,
        start: float,
        *,
        paid: bool,
    ) -> Reply:
        answer = stacked(partials)
        header, buffer = wire.encode(answer, asked.dtype)
        if paid:
            self._uncounted.append((call, asked, shards, calls.Bytes((buffer,), calls.bf16_of(header))))
            self._to_count.set()
            if not self._running:
                self._count_all()
        self._calls += 1
        self._batches.answered()
        spent = perf_counter() - start
        for loaded in shards:
            loaded.finished(len(asked.rows), spent)
        header["service_us"] = int(spent * 1e6)
        if self.device:
            header["device"] = self.device
        return Reply(header, (buffer,))

    def _served(self, asked: ExpertCall) -> Several:
        """The shards that are asked. Raises RequestError for one that is not here."""
        key = (asked.model_id, asked.layer, asked.groups)
        if (known := self._several.get(key)) is not None:
            return known
        shards = []
        for group in asked.groups:
            loaded = self._places.get((asked.model_id, asked.layer, group))
            if loaded is None:
                what = f"layer {asked.layer}, group {group} of model {asked.model_id[:12]}"
                raise RequestError("not_found", f"{what} is not served here", "read this node's advert again")
            shards.append(loaded)
        if len(self._several) >= SEVERAL_MAX:
            self._several.clear()
        found = self._several[key] = Several(shards)
        return found

    def _places_of(self, asked: ExpertCall) -> Several:
        shards = self._served(asked)
        plan, rows = shards[0].plan, asked.rows
        if rows.shape[1] != plan.width:
            raise RequestError("invalid_request", f"rows are {rows.shape[1]} wide, the model needs {plan.width}")
        if asked.dtype != plan.dtype:
            raise RequestError(
                "invalid_request", f"rows travel as {asked.dtype}, the model's manifest says {plan.dtype}"
            )
        if len(rows) > self._queue_rows_max:
            raise RequestError("too_large", f"{len(rows)} rows in one call, at most {self._queue_rows_max} fit")
        if rows.nbytes * len(shards) > ANSWER_BYTES_MAX:
            raise RequestError("too_large", f"the answer would exceed {ANSWER_BYTES_MAX} bytes", "ask with fewer rows")
        if (0 if asked.experts is None else asked.experts.shape[1]) != plan.top_k:
            raise RequestError("invalid_request", f"the model's router picks {plan.top_k} experts per row (0: all)")
        return shards

    def _admit(self, payer: PeerId, asked: ExpertCall) -> bool:
        """Whether the call is metered. Work that is free here needs no channel."""
        if self._seller is None or (not self.quote.microcredits_per_tflop and not asked.channel):
            return False
        if asked.quote != self.quote.number:
            message = f"quote {asked.quote} is not valid here any more; it is {self.quote.number} now"
            raise RequestError("conflict", message, "read this node's advert again")
        self._seller.admit(payer, asked.channel, self.quote)
        return True

    def _count_all(self) -> None:
        """Meter what was answered. A call is counted right after its answer left, not on its way."""
        while self._uncounted:
            self._count(*self._uncounted.popleft())

    async def _count_behind(self) -> None:
        while True:
            await self._to_count.wait()
            self._to_count = trio.Event()
            self._count_all()

    def _count(self, call: Call, asked: ExpertCall, shards: Sequence[LoadedShard], answer: calls.Bytes) -> None:
        assert self._seller is not None
        members, costs = [s.plan.experts for s in shards], [s.plan.flops_per_row for s in shards]
        work = calls.kflop(members, costs, len(asked.rows), asked.experts)
        request, rows = calls.Bytes(call.buffers, calls.bf16_of(call.header)), len(asked.rows)
        leaf = calls.leaf(asked.model_id, asked.layer, asked.groups, rows, self.device, request, answer)
        self._seller.served(call.peer_id, asked.channel, self.quote, work, leaf)

    async def compute(
        self,
        shards: Sequence[LoadedShard],
        layer: int,
        rows: FloatRows,
        experts: Indices | None,
        weights: Weights | None,
        deadline: float,
    ) -> Partials:
        """The unrounded partial sums of one layer, a matrix per shard, in order. ``deadline`` is a trio time.

        Raises BusyError if a queue is full or the work would not be done in time.
        """
        partials = self._batches.now(shards, layer, rows, experts, weights)
        if partials is None:
            partials = await self._batches.later(shards, layer, rows, experts, weights, deadline)
        return partials


__all__ = ["LoadedShard", "Shard", "ShardPlan", "Worker", "plan_of"]
