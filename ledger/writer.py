"""Group commit for tasks: whoever comes first commits what all have brought meanwhile."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from config.errors import IntegrityError, LocalError
from ledger.records import Record
from ledger.store import Store

GROUP_RECORDS_MAX = 1000

T = TypeVar("T")


class Writer:
    """Group commit for tasks: whoever comes first commits what all have brought meanwhile.

    ``in_thread`` runs SQLite in a worker thread (the daemon); without, inline (deterministic tests).
    """

    def __init__(self, store: Store, *, in_thread: bool) -> None:
        self._store = store
        self._in_thread = in_thread
        self._lock = trio.Lock()
        self._queue: list[_Waiting] = []
        self.commits = 0

    async def commit(self, records: Sequence[Record]) -> None:
        """Return when the records are durable. Records of one call are never split over transactions."""
        if not records:
            return
        mine = _Waiting(records)
        self._queue.append(mine)
        # shielded: a cancelled task must not take the records of others with it
        with trio.CancelScope(shield=True):
            async with self._lock:
                while not mine.done:
                    await self._commit_group()
        if mine.error is not None:
            raise mine.error

    async def run(self, work: Callable[[], T]) -> T:
        """Do something else with the store, alone with it."""
        async with self._lock:
            with trio.CancelScope(shield=True):
                done: T = await trio.to_thread.run_sync(work) if self._in_thread else work()
            return done

    async def flush(self) -> None:
        """Return when everything handed in so far is durable (the lock is fair)."""
        async with self._lock:
            pass

    async def _commit_group(self) -> None:
        group: list[_Waiting] = []
        records: list[Record] = []
        while self._queue and (not group or len(records) + len(self._queue[0].records) <= GROUP_RECORDS_MAX):
            group.append(self._queue.pop(0))
            records += group[-1].records
        error: Exception | None = None
        try:
            if self._in_thread:
                await trio.to_thread.run_sync(self._store.commit, records)
            else:
                self._store.commit(records)
            self.commits += 1
        except (LocalError, IntegrityError) as failure:
            error = failure
        for waiting in group:
            waiting.error = error
            waiting.done = True


class _Waiting:
    __slots__ = ("done", "error", "records")

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.done = False
        self.error: Exception | None = None
