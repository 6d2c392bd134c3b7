"""What a gateway does about money beside requests: tells of budgets that run out, closes months.

Any number of gateways may: an alert is taken by one of them, a month is closed once.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict

import trio

from config.errors import RiosError
from gateway import audit
from gateway.billing import budgets, invoices
from gateway.billing.budgets import Alert
from gateway.events import Bus
from gateway.till import Till

_logger = logging.getLogger("rios.gateway")

_TELL_SECONDS = 1.0
_CLOSE_TICKS = 600


def log_alert(alert: Alert) -> None:
    """Tell the operator."""
    text = "the budget of %s reached %d %% of %d microcredits in %s"
    _logger.warning(text, alert.subject, alert.percent, alert.limit, alert.month)


def tell_alert(bus: Bus, alert: Alert) -> None:
    """In the log, and to whoever listens to events."""
    log_alert(alert)
    bus.publish("budget.alert", alert.user_id, asdict(alert))


class Keeper:
    """``tell`` gets every alert that falls to this gateway."""

    def __init__(self, till: Till, tell: Callable[[Alert], None] = log_alert) -> None:
        self._till = till
        self._tell = tell

    async def run(self) -> None:
        """Until cancelled; a database that is away is asked again later."""
        count = 0
        while True:
            try:
                if count % _CLOSE_TICKS == 0:
                    await self._till.in_thread(invoices.close_months, self._till.database, audit.GATEWAY)
                for alert in await self._till.in_thread(budgets.take_alerts, self._till.database):
                    self._tell(alert)
            except RiosError as error:
                _logger.error("billing: %s", error)
            count += 1
            await trio.sleep(_TELL_SECONDS)
