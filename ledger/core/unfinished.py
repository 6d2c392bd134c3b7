"""Entries that a witness voted for and that are not final yet: what it must hand over as locks; sans-IO.

Owns how many bytes of them there may be. A handover has a limit, and whatever a payer had voted for and never finishes
stands in it: without a bound, dust on many accounts would keep a witness from ever handing over.

Invariant: an entry goes only once its slot is final, whichever entry fills it.
"""

from collections.abc import ItemsView

from ledger.core.errors import RuleError
from ledger.core.objects import HANDOVER_BYTES_MAX, Entry, Item
from ledger.core.state import State

LOCKS_BYTES_MAX = HANDOVER_BYTES_MAX // 2
FRAME_BYTES = 80
"""Of a lock in a handover, beside the entry: its signature, and how long both are."""
SWEEP_SHARE = 16
Slot = tuple[bytes, int]


class Unfinished:
    """The entries of one witness by their slots."""

    __slots__ = ("_bytes", "_items", "_state", "_swept")

    def __init__(self, state: State) -> None:
        self._state = state
        self._items: dict[Slot, Item] = {}
        self._bytes = 0
        self._swept = state.applied

    def __len__(self) -> int:
        return len(self._items)

    def get(self, slot: Slot) -> Item | None:
        """What was voted for there."""
        return self._items.get(slot)

    def items(self) -> ItemsView[Slot, Item]:
        """All of them; slots that were filled out of order may still be among them."""
        return self._items.items()

    def keep(self, slot: Slot, item: Item) -> None:
        """A vote was promised, or was given before the restart."""
        self._forget(slot)
        self._items[slot] = item
        self._bytes += _size(item)

    def forget(self, entry: Entry) -> None:
        """An entry became final: where it is applied its slot needs no vote any more."""
        if self._is_filled(entry.account, entry.seq):
            self._forget((entry.account, entry.seq))

    def sweep(self) -> None:
        """Forget every slot that is filled: entries that had to wait are applied without being told."""
        self._swept = self._state.applied
        for slot in [slot for slot in self._items if self._is_filled(*slot)]:
            self._forget(slot)

    def check_room(self) -> None:
        """Refuse (``rate``, waits) where too much is unfinished already."""
        # as many entries must have been applied since as make the look at all slots worth it
        if self._bytes > LOCKS_BYTES_MAX and (self._state.applied - self._swept) * SWEEP_SHARE >= len(self._items):
            self.sweep()
        if self._bytes > LOCKS_BYTES_MAX:
            raise RuleError("rate", "too many entries that were voted for are not final yet", wait=True)

    def _is_filled(self, account: bytes, seq: int) -> bool:
        known = self._state.accounts.get(account)
        return known is not None and seq <= known.seq

    def _forget(self, slot: Slot) -> None:
        item = self._items.pop(slot, None)
        if item is not None:
            self._bytes -= _size(item)


def _size(item: Item) -> int:
    return len(item.signed.body) + FRAME_BYTES
