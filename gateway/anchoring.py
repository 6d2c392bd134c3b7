"""The audit log's head, put where whoever changes the log cannot change it: once a day, if something was added.

What was anchored is itself a row of the log, so several gateways on one database do it once (twice at worst), and
whoever checks the log knows where to look. Where that is, the node decides (``gateway/ports.py``).

Fails with a line in the log and tries again at the next look: a ledger that is out of reach stops nobody.
"""

import logging

import sqlalchemy as sa
import trio

from config.errors import RiosError
from gateway import audit
from gateway.db.audit import audit_head, audit_log
from gateway.db.session import Database
from gateway.db.stamps import now_ms
from gateway.ports import Anchor
from gateway.till import Till

EVERY_MS = 24 * 3600 * 1000
_LOOK_SECONDS = 3600.0
_SETTLE_SECONDS = 60.0
"""After the start: the node finds its peers first."""
ACTION = "audit.anchored"
_logger = logging.getLogger("rios.gateway")


class Anchoring:
    """Anchors the log of one database."""

    def __init__(self, till: Till, anchor: Anchor) -> None:
        self._till = till
        self._anchor = anchor

    async def run(self) -> None:
        """Anchor daily. Ends when it is cancelled."""
        await trio.sleep(_SETTLE_SECONDS)
        while True:
            try:
                await self.anchor_if_due()
            except RiosError as error:
                _logger.warning("the audit log is not anchored yet: %s", error)
            await trio.sleep(_LOOK_SECONDS)

    async def anchor_if_due(self) -> bool:
        """Anchor the head if a day is over and something was added; whether it was done. Raises RiosError."""
        head = await self._till.in_thread(due, self._till.database, now_ms())
        if head is None:
            return False
        place, digest = head
        where = await self._anchor.anchor(place, digest)
        await self._till.in_thread(_note, self._till.database, place, digest, where)
        return True


def due(database: Database, now: int) -> tuple[int, bytes] | None:
    """Place and hash of the head if it is time to anchor it."""
    newest = sa.select(audit_log.c.place, audit_log.c.created_at_ms).where(audit_log.c.action == ACTION)
    with database.read() as connection:
        place, digest = connection.execute(sa.select(audit_head.c.place, audit_head.c.hash)).one()
        last = connection.execute(newest.order_by(audit_log.c.place.desc()).limit(1)).first()
    if not place or (last is not None and (last.place == place or now - last.created_at_ms < EVERY_MS)):
        return None
    return int(place), bytes(digest)


def _note(database: Database, place: int, digest: bytes, where: dict[str, str]) -> None:
    with database.write() as connection:
        audit.record(connection, audit.GATEWAY, ACTION, digest.hex(), detail={"place": place, **where})
