"""What a gateway does about money beside requests: tells of budgets that run out, closes months.

Any number of gateways may: an alert is taken by one of them, a month is closed once.
"""

import logging

import trio

from config.errors import RiosError
from gateway import audit
from gateway.billing import budgets, invoices
from gateway.billing.budgets import Alert
from gateway.till import Till

_logger = logging.getLogger("rios.gateway")

_TELL_SECONDS = 1.0
_CLOSE_TICKS = 600


def _log_alert(alert: Alert) -> None:
    """Tell the operator; whoever listens to events was told in the transaction that took it."""
    text = "the budget of %s reached %d %% of %d microcredits in %s"
    _logger.warning(text, alert.subject, alert.percent, alert.limit, alert.month)


class Keeper:
    """What a gateway does now and then, with its till's database."""

    def __init__(self, till: Till) -> None:
        self._till = till

    async def run(self) -> None:
        """Until cancelled; a database that is away is asked again later."""
        count = 0
        while True:
            try:
                if count % _CLOSE_TICKS == 0:
                    await self._till.in_thread(invoices.close_months, self._till.database, audit.GATEWAY)
                for alert in await self._till.in_thread(budgets.take_alerts, self._till.database):
                    _log_alert(alert)
            except RiosError as error:
                _logger.error("billing: %s", error)
            count += 1
            await trio.sleep(_TELL_SECONDS)
