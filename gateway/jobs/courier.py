"""The task that delivers webhooks on this gateway, beside those of the other gateways of the database.

A webhook has one delivery at a time here, a user's together have few, and all at most ``AT_ONCE``: who hangs holds up
nobody else.
"""

import logging
import time
from random import Random

import trio

from config.errors import RiosError
from gateway.identity.vault import Vault
from gateway.jobs import posting, webhooks
from gateway.jobs.addresses import Rules, target_of
from gateway.jobs.posting import Resolve
from gateway.jobs.webhooks import Due
from gateway.till import Till

_logger = logging.getLogger("rios.gateway")

AT_ONCE = 16
_POLL_SECONDS = 0.5
_BROKEN_SECONDS = 2.0
_SWEEP_SECONDS = 600.0


class Courier:
    """:meth:`run` must be running."""

    def __init__(
        self, till: Till, vault: Vault, rules: Rules, *, resolve: Resolve = posting.resolve, version: str = ""
    ) -> None:
        self.rules = rules
        self.resolve = resolve
        self._till = till
        self._vault = vault
        self._random = Random()
        self._agent = f"RiOS/{version}" if version else "RiOS"
        self._busy: set[str] = set()
        self._news = trio.Event()

    def wake(self) -> None:
        """There is something to deliver."""
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._sweep)
            while True:
                self._news = trio.Event()
                try:
                    more = await self._round(nursery)
                except RiosError as error:
                    _logger.error("webhooks: %s", error)
                    await trio.sleep(_BROKEN_SECONDS)
                    continue
                if not more:
                    with trio.move_on_after(_POLL_SECONDS):
                        await self._news.wait()

    async def _round(self, nursery: trio.Nursery) -> bool:
        database, room = self._till.database, AT_ONCE - len(self._busy)
        looked = await self._till.in_thread(webhooks.spread, database)
        if room <= 0:
            return False

        def claim() -> list[Due]:
            return list(webhooks.claim(database, self._till.instance, limit=room, busy=frozenset(self._busy)))

        found = await self._till.in_thread(claim)
        for due in found:
            self._busy.add(due.webhook_id)
            nursery.start_soon(self._deliver, due)
        return bool(found or looked)

    async def _deliver(self, due: Due) -> None:
        try:
            answered, problem = await self._try(due)
            database, holder = self._till.database, self._till.instance
            if problem:
                await self._till.in_thread(webhooks.failed, database, holder, due, answered, problem, self._random)
            else:
                await self._till.in_thread(webhooks.succeeded, database, holder, due, answered)
        except RiosError as error:
            _logger.error("the delivery %s is tried again later: %s", due.id, error)  # when its lease is over
        except Exception:
            _logger.exception("the delivery %s failed", due.id)
        finally:
            self._busy.discard(due.webhook_id)
            self._news.set()

    async def _try(self, due: Due) -> tuple[int, str]:
        """The status of the answer (0: none), and why it is not good enough."""
        try:
            target = target_of(due.url, self.rules)
            secret = self._vault.unseal(due.secret, webhooks.purpose(due.webhook_id))
            body = due.body.encode()
            headers = {"content-type": "application/json", "user-agent": self._agent}
            headers |= webhooks.signed(due.id, body, secret, int(time.time()))
            status = await posting.post(target, body, headers, self.rules, self.resolve)
        except RiosError as error:
            return 0, error.message
        return status, "" if 200 <= status < 300 else f"the answer was {status}"

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(_SWEEP_SECONDS)
            try:
                await self._till.in_thread(webhooks.sweep, self._till.database)
            except RiosError as error:
                _logger.error("webhooks: %s", error)
