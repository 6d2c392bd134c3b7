"""A nursery in which a fault ends the one task that has it: what a peer sends must never end the process.

Parts map every error they expect; this is for the ones that nobody expected, a bug here or in a library. Such a task is
logged with its traceback. One that is meant to run as long as the node (:meth:`Guarded.keep`) is started again.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

log = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0


class Nursery(Protocol):
    """What parts need of a nursery."""

    def start_soon(self, task: Callable[..., Awaitable[Any]], /, *args: Any) -> None:  # noqa: ANN401 - passed on
        """Run a task."""


class Guarded:
    """Guards every task that it starts in ``nursery``."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.faults = 0

    def start_soon(self, task: Callable[..., Awaitable[Any]], /, *args: Any) -> None:  # noqa: ANN401 - passed on
        """Run a task once."""
        self._nursery.start_soon(self._run, task, args)

    def keep(self, task: Callable[..., Awaitable[Any]], /, *args: Any) -> None:  # noqa: ANN401 - passed on
        """Run a task, and again after each fault, until it returns."""
        self._nursery.start_soon(self._keep, task, args)

    async def _run(self, task: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> bool:
        """Whether it went well."""
        try:
            await task(*args)
            return True
        except Exception:
            self.faults += 1
            log.exception("a background task failed; the node goes on without it: please report this")
            return False

    async def _keep(self, task: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        while True:
            if await self._run(task, args):
                return
            await trio.sleep(AGAIN_SECONDS)
