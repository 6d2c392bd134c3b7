"""Runs loaded shards: small calls at once on the event loop, everything else in threads, in batches.

Owns: the queues' bounds, the threads, what is run together. Does not own: who asked, what it costs, which shards exist.

A call that is expected to be quick and finds nobody waiting runs at once: a thread hop costs as much as a row, and a
token needs a call per layer in sequence. Everything else queues per shard. Whenever a thread is free, a shard that has
something waiting gets all of it, up to a row budget, run once (on the loop itself if that is quicker than a hop):
batches grow with the load, without a timer, while the loop goes on receiving. A large batch is divided over the threads
that are free; its rows do not notice.

Invariants:
1. A call is refused (busy, with a hint) before it is queued, never dropped after.
2. A row's answer does not depend on the batch it ran in (the shard's promise) nor on who else waited.
3. A shard runs one batch at a time.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter

import numpy as np
import trio

from config.errors import BusyError, RemoteError, RiosError
from dmoe.core.calls import Indices, Weights
from dmoe.core.wire import FloatRows
from dmoe.loaded import LOOP_SECONDS_LOST, Job, LoadedShard, Partials, Several, Together, joined
from dmoe.threads import Threads

log = logging.getLogger(__name__)

INLINE_SECONDS_MAX = 0.002
"""Work expected to take no longer may run on the event loop, when nobody waits."""
HOP_SECONDS = 0.0003
"""A batch expected to take no longer runs on the event loop even in a crowd: a thread would cost as much again."""
CROWD_SECONDS = 0.00015
"""A call that starts so soon after the last one ended has waited for it: calls are crowding."""
CROWD_MEMORY_SECONDS = 0.005
"""How long calls queue after they were last seen to crowd, so that the loop receives while a batch runs."""
PASSED_OVER_MAX = 4
"""So many batches of others may run before a shard's few rows do."""
LIMITS = ("queue_rows_max", "deadline", "paused")
"""Why a call is refused here: the setting ``dmoe.queue_rows_max``, its own deadline, or the operator's wish."""
PART_ROWS_MIN = 32
"""A batch is divided into parts of at least so many rows: fewer would waste more on loading weights than they save."""


class Batches:
    """The queues of a worker's shards and the threads that empty them. :meth:`later` needs :meth:`run` to run."""

    def __init__(self, *, threads: int, queue_rows_max: int, batch_rows_max: int) -> None:
        self.refused = dict.fromkeys(LIMITS, 0)
        """Calls told busy, by the limit that was hit."""
        self.calm = trio.lowlevel.ParkingLot()
        """Who waits for the end of calls or batches is woken at every one."""
        self._threads = Threads(threads)
        self._queue_rows_max = queue_rows_max
        self._batch_rows_max = batch_rows_max
        self._ready: deque[LoadedShard] = deque()
        self._filled = trio.Event()
        self._last_end = 0.0
        self._crowd_until = 0.0
        self._running = self._starting = False

    async def run(self) -> None:
        """Start what was queued since the last turn of the loop, so that what arrived together runs together."""
        self._running = True
        try:
            while True:
                await self._filled.wait()
                self._filled = trio.Event()
                self._start()
        finally:
            self._running = False
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._threads.close)
            self._refuse_waiting()

    # --- at once

    def crowded(self, *, followed: bool = False) -> bool:
        """Whether calls compete, so that they had better queue. ``followed``: another waits behind this one."""
        now = perf_counter()
        if followed or now - self._last_end < CROWD_SECONDS:
            self._crowd_until = now + CROWD_MEMORY_SECONDS
        return now < self._crowd_until

    def now(
        self,
        shards: Sequence[LoadedShard],
        layer: int,
        rows: FloatRows,
        experts: Indices | None,
        weights: Weights | None,
    ) -> Partials | None:
        """The unrounded partial sums of one layer, a matrix per shard, at once; None if they should queue.

        A shard that failed here, or was far slower than expected, runs in threads for a while: there it may take its
        time, and its error is told.
        """
        if self.crowded():
            return None
        start = perf_counter()
        expected = 0.0
        for loaded in shards:
            if not loaded.free or not loaded.away.is_over(start):
                return None
            expected += loaded.row_seconds
        if expected * len(rows) > INLINE_SECONDS_MAX:
            return None
        several = shards if isinstance(shards, Several) else Several(shards)
        out: list[FloatRows] = []
        for some, together in several.bunches:
            found = self._bunch_now(some, together, layer, rows, experts, weights)
            if found is None:
                return None
            if len(some) == len(several):
                return found
            out += found
        return out

    def _bunch_now(
        self,
        shards: Sequence[LoadedShard],
        together: Sequence[Together],
        layer: int,
        rows: FloatRows,
        experts: Indices | None,
        weights: Weights | None,
    ) -> Partials | None:
        """Shards that are asked in one go."""
        start = perf_counter()
        try:
            out = _partials(shards, together, layer, rows, experts, weights)
        except RiosError:
            for loaded in shards:
                loaded.away.begin(perf_counter())
            return None
        end = self._last_end = perf_counter()
        spent = (end - start) / len(shards)
        for loaded in shards:
            if end - start > LOOP_SECONDS_LOST:
                loaded.away.begin(end)
            loaded.ran(len(rows), spent)
            loaded.calls_at_once += 1
        return out

    def answered(self) -> None:
        """A call's answer is ready: what starts right after this was waiting for it."""
        self._last_end = perf_counter()
        self.calm.unpark_all()

    # --- in turn

    async def later(
        self,
        shards: Sequence[LoadedShard],
        layer: int,
        rows: FloatRows,
        experts: Indices | None,
        weights: Weights | None,
        deadline: float,
    ) -> list[FloatRows]:
        """The same, through the queues. ``deadline`` is a trio time.

        Raises BusyError if a queue is full or the work would not be done in time, RemoteError ``unavailable`` at the
        end.
        """
        if not self._running:
            raise _shutting_down()
        self._check_room(shards, len(rows), deadline)
        left, done = len(shards), trio.Event()

        def one_done() -> None:
            nonlocal left
            left -= 1
            if not left:
                done.set()

        jobs = [Job(layer, rows, experts, weights, one_done) for _ in shards]
        for loaded, job in zip(shards, jobs, strict=True):
            self._put(loaded, job)
        try:
            await done.wait()
        except BaseException:
            for loaded, job in zip(shards, jobs, strict=True):
                loaded.forget(job)
            raise
        for job in jobs:
            if job.error is not None:
                raise job.error
        return [job.answer for job in jobs if job.answer is not None]

    def _check_room(self, shards: Sequence[LoadedShard], rows: int, deadline: float) -> None:
        time_left = deadline - trio.current_time()
        for loaded in shards:
            if not loaded.rows_waiting:
                continue
            wait = (loaded.rows_waiting + rows) * loaded.row_seconds
            if loaded.rows_waiting + rows > self._queue_rows_max:
                limit = "queue_rows_max"
                why = f"{rows} more would exceed dmoe.queue_rows_max = {self._queue_rows_max}"
            elif wait > time_left:
                limit, why = "deadline", f"they take {wait:.3f} s, the call's deadline is in {time_left:.3f} s"
            else:
                continue
            self.refused[limit] += 1
            message = f"{loaded.plan.shard_id}: {loaded.rows_waiting} rows wait already; {why}"
            raise BusyError(message, "ask another replica", retry_after_ms=max(1, int(wait * 1000)))

    def _put(self, loaded: LoadedShard, job: Job) -> None:
        if loaded.free:
            self._ready.append(loaded)
        else:
            self._crowd_until = perf_counter() + CROWD_MEMORY_SECONDS
        loaded.put(job)
        self._filled.set()

    def _start(self) -> None:
        """Give free threads something to do."""
        if self._starting:
            return
        if not self._running:
            self._refuse_waiting()
        while self._ready and self._threads.free > (kept := self._kept()):
            loaded = self._next()
            if not loaded.waiting or loaded.running:  # its callers may have gone
                continue
            jobs = [(loaded, loaded.take(self._batch_rows_max))]
            if self._threads.free - kept == 1:  # nobody else would run them meanwhile
                jobs += self._mates(*jobs[0])
            batch = _Batch(jobs, self._ended)
            if not batch.may_run_here:
                batch.start(self._threads, self._threads.free - kept)
                continue
            self._starting = True
            try:
                batch.run()
            finally:
                self._starting = False
            self._filled.set()  # the rest in the next turn: the loop receives between two batches
            return

    def _mates(self, loaded: LoadedShard, jobs: Sequence[Job]) -> Iterator[tuple[LoadedShard, list[Job]]]:
        """What waits at other shards of the same place, if it is the same calls' rows: it costs no run of its own."""
        if loaded.together is None:
            return
        place, most = loaded.together.place, self._batch_rows_max
        for other in list(self._ready):
            if other.running or other.together is None or other.together.place is not place:
                continue
            if other.waiting and other.asks_like(jobs, most):
                self._ready.remove(other)
                other.passed_over = 0
                yield other, other.take(most)

    def _refuse_waiting(self) -> None:
        """Nothing will run any more: whoever waits learns it."""
        while self._ready:
            loaded = self._ready.popleft()
            for job in list(loaded.waiting):
                loaded.forget(job)
                job.error = _shutting_down()
                job.done()

    def _kept(self) -> int:
        """How many threads stay idle. In a crowd of small calls one does: the event loop needs a core, and fewer
        batches at a time are larger ones."""
        if self._threads.count == 1 or perf_counter() >= self._crowd_until:
            return 0
        return 0 if max(map(_rows_waiting, self._ready)) >= 2 * PART_ROWS_MIN else 1

    def _next(self) -> LoadedShard:
        """The shard with most rows waiting: small batches waste most, and grow meanwhile. One that was passed over
        :data:`PASSED_OVER_MAX` times comes first."""
        ready = self._ready
        loaded = ready[0]
        if len(ready) > 1 and loaded.passed_over < PASSED_OVER_MAX:
            loaded = max(ready, key=_rows_waiting)
            for other in ready:
                other.passed_over += 1
        ready.remove(loaded)
        loaded.passed_over = 0
        return loaded

    def _ended(self, shards: Sequence[LoadedShard], calls: int) -> None:
        if calls > 1:
            self._crowd_until = perf_counter() + CROWD_MEMORY_SECONDS
        self._ready.extend(loaded for loaded in shards if loaded.waiting)
        self.calm.unpark_all()
        self._start()


def _partials(
    shards: Sequence[LoadedShard],
    together: Sequence[Together],
    layer: int,
    rows: FloatRows,
    experts: Indices | None,
    weights: Weights | None,
) -> Partials:
    """Of one bunch (see :class:`dmoe.loaded.Several`)."""
    if len(together) > 1:
        return together[0].partials(together, layer, rows, experts, weights)
    return [shards[0].shard.partial(layer, rows, experts, weights)]


def _shutting_down() -> RemoteError:
    return RemoteError("unavailable", "this node is shutting down", "ask another replica")


def _rows_waiting(loaded: LoadedShard) -> int:
    return loaded.rows_waiting


class _Batch:
    """Jobs of one layer that run together, in one thread or in parts: of one shard, or the same calls' at several of
    one place."""

    def __init__(
        self,
        jobs: Sequence[tuple[LoadedShard, Sequence[Job]]],
        ended: Callable[[Sequence[LoadedShard], int], None],
    ) -> None:
        self._shards = [loaded for loaded, _ in jobs]
        self._jobs = [mine for _, mine in jobs]
        self._ended = ended
        self._rows, self._experts, self._weights = joined(self._jobs[0])
        self._left = 0
        self._answers: list[Partials] = []
        """Per part, a matrix per shard."""
        self._error: BaseException | None = None
        self._begun = 0.0

    @property
    def seconds(self) -> float:
        """How long it is expected to take on one thread."""
        return sum(loaded.row_seconds for loaded in self._shards) * len(self._rows)

    @property
    def may_run_here(self) -> bool:
        """Whether a thread would cost as much again as the work, and none of it is to be kept off the loop."""
        now = perf_counter()
        return self.seconds <= HOP_SECONDS and all(loaded.away.is_over(now) for loaded in self._shards)

    def run(self) -> None:
        """Run it here and now."""
        self._begin(1)
        self._run(0, slice(None))
        self._part_done()

    def start(self, threads: Threads, most: int) -> None:
        """Hand it to free threads, ``most`` of them at most."""
        count = len(self._rows)
        parts = max(1, min(most, count // PART_ROWS_MIN))
        self._begin(parts)
        bounds = [count * n // parts for n in range(parts + 1)]
        for n in range(parts):
            threads.submit(partial(self._run, n, slice(bounds[n], bounds[n + 1])), self._part_done)

    def _begin(self, parts: int) -> None:
        self._left, self._answers, self._begun = parts, [[] for _ in range(parts)], perf_counter()
        for loaded in self._shards:
            loaded.running = 1

    def _run(self, part: int, rows: slice) -> None:
        """One part; in a thread where there are several."""
        try:
            experts = None if self._experts is None else self._experts[rows]
            weights = None if self._weights is None else self._weights[rows]
            layer = self._jobs[0][0].layer
            (bunch,) = Several(self._shards).bunches
            self._answers[part] = _partials(*bunch, layer, self._rows[rows], experts, weights)
        except RiosError as error:  # a cell that ended: it has said so itself
            self._error = error
            for loaded in self._shards:
                loaded.away.begin(perf_counter())
        except Exception as error:
            log.exception("running %s failed", ", ".join(loaded.plan.shard_id for loaded in self._shards))
            self._error = error

    def _part_done(self) -> None:
        self._left -= 1
        if self._left:
            return
        spent = (perf_counter() - self._begun) / len(self._shards)
        for index, loaded in enumerate(self._shards):
            loaded.running = 0
            if self._error is None:
                loaded.ran(len(self._rows), spent)
            self._give(index)
        self._ended(self._shards, len(self._jobs[0]))

    def _give(self, shard: int) -> None:
        """Every job of a shard its own rows."""
        whole = None
        if self._error is None:
            parts = [part[shard] for part in self._answers]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        start = 0
        for job in self._jobs[shard]:
            job.error = self._error
            if whole is not None:
                job.answer = whole[start : start + len(job.rows)]
            start += len(job.rows)
            job.done()
