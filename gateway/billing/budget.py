"""What a budget allows. Pure: the books read and write it under the lock of its account.

A charge counts in the month (UTC) in which its request ended, as on invoices; what running requests hold back counts
until they end. So ``spent + reserved`` never passes the limit, unless the limit was lowered below it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

PERCENTS = (50, 75, 90)
"""At these shares of a limit somebody is told, once a month each."""


def month_of(now_ms: int) -> str:
    """The calendar month, ``2026-11``."""
    return datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%Y-%m")


def month_begins_ms(month: str) -> int:
    """Unix milliseconds of a month's first moment. Raises ValueError for what is no month."""
    return int(datetime.strptime(month, "%Y-%m").replace(tzinfo=UTC).timestamp() * 1000)


def next_month(month: str) -> str:
    """The month after."""
    year, number = map(int, month.split("-"))
    return f"{year + number // 12:04d}-{number % 12 + 1:02d}"


@dataclass(slots=True)
class Budget:
    """A limit and how much of it is used."""

    id: str
    subject: str
    key_id: str | None
    limit: int
    month: str
    spent: int
    reserved: int
    alerted: int
    late: bool = False
    """What is booked now belongs to a month before ``month``: it waited while the first of the new one went by."""
    changed: bool = False

    @classmethod
    def of(cls, row: Mapping[Any, Any], month: str) -> "Budget":
        """From its row, as it is in a month."""
        found = cls(
            id=row["id"],
            subject=row["subject"],
            key_id=row["key_id"],
            limit=row["microcredits"],
            month=row["month"],
            spent=row["spent"],
            reserved=row["reserved"],
            alerted=row["alerted"],
        )
        found.late = month < found.month
        if month > found.month:
            found.month, found.spent, found.alerted = month, 0, 0
        return found

    @property
    def room(self) -> int:
        """What a new request may cost."""
        return self.limit - self.spent - self.reserved

    def covers(self, key_id: str | None) -> bool:
        """Whether it limits what this key of its user asks for."""
        return self.key_id is None or self.key_id == key_id

    def allows(self, needed: int) -> bool:
        """Whether a request that may cost so much fits in. What costs nothing always does."""
        return needed == 0 or needed <= self.room

    def hold(self, amount: int) -> None:
        """A request began."""
        self.reserved += amount
        self.changed |= amount != 0

    def settle(self, held: int, charge: int) -> Sequence[int]:
        """A request ended. Returns the shares of the limit, in percent, that are reached with it."""
        self.reserved -= held
        self.changed |= held != 0
        if self.late:
            return ()
        self.spent += charge
        reached = [p for p in PERCENTS if p > self.alerted and charge and self.spent * 100 >= self.limit * p]
        self.alerted = max([self.alerted, *reached])
        return reached
