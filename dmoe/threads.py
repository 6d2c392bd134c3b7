"""Compute threads beside the event loop: cheap to hand work to, and their results come back as callbacks.

``trio.to_thread`` makes a task wait per piece of work; here nobody waits, which costs a quarter.

Invariants:
1. ``done`` runs on the event loop, once per piece of work that was submitted, unless the loop has ended.
2. At most ``count`` pieces run at a time; the threads start with the first one.
"""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

import trio

from config.errors import RiosError

log = logging.getLogger(__name__)

Work = Callable[[], None]
T = TypeVar("T")


async def here_or_aside(work: Callable[[], T]) -> T:
    """Short work, on the event loop; what fails there (a cell that is late holds nobody up for long) has its time in a
    thread, and its error is told from there. It may be done twice."""
    try:
        return work()
    except RiosError:
        return await trio.to_thread.run_sync(work)


class Threads:
    """A fixed number of threads that run what :meth:`submit` gives them. ``free`` of them are idle."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = count
        self._queue: SimpleQueue[tuple[Work, Work] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._token: trio.lowlevel.TrioToken | None = None

    def submit(self, work: Work, done: Work) -> None:
        """Run ``work`` in a thread, then ``done`` on the loop. Neither may raise. Only with a thread free."""
        assert self.free > 0, "every thread is busy"
        self.free -= 1
        if not self._threads:
            self._token = trio.lowlevel.current_trio_token()
            self._threads = [
                threading.Thread(target=self._run, name=f"experts-{n}", daemon=True) for n in range(self.count)
            ]
            for thread in self._threads:
                thread.start()
        self._queue.put((work, done))

    def close(self) -> None:
        """Wait for what runs and end the threads."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _run(self) -> None:
        assert self._token is not None
        while (piece := self._queue.get()) is not None:
            work, done = piece
            try:
                work()
            except Exception:
                log.exception("a fault in a compute thread")
            try:
                self._token.run_sync_soon(self._finish, done)
            except trio.RunFinishedError:
                return

    def _finish(self, done: Work) -> None:
        self.free += 1
        try:
            done()
        except Exception:
            log.exception("a fault after a compute thread")
