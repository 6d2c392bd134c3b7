"""What this node pays for work, for the gateway's books: as it happens, and as the ledger's file has it.

The ledger counts per channel, and keeps its count with each voucher; what is counted after it is lost if the node dies.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from config.accountbook import PaidChannel, Spent
from config.settings import LedgerSettings
from config.vocabulary import KFLOP_PER_TFLOP as NANO
from dmoe.bills import Bills
from ledger.core.channel import LENDING_SHARE
from ledger.core.genesis import Genesis
from ledger.core.objects import SMALL_BYTES_MAX, Voucher
from ledger.reading import state_of
from ledger.records import ChannelRow
from ledger.store import Store
from p2p.core import codec


@dataclass(frozen=True, slots=True)
class NodeSpending:
    """The gateway's ``Spending``."""

    bills: Bills
    channels: Sequence[PaidChannel]

    def opening(self) -> Sequence[PaidChannel]:
        """See the Protocol."""
        return self.channels

    def has_changed(self) -> bool:
        """See the Protocol."""
        return bool(self.bills.changed)

    def take(self, names: Collection[str] | None = None) -> Sequence[Spent]:
        """See the Protocol."""
        return self.bills.take(names)


def opening_of(store: Store) -> Sequence[PaidChannel]:
    """The channels as a node that starts now finds them."""
    return [_channel(row, 0, 0) for row in store.channels("buy")]


def paid_of(store: Store, genesis: Genesis, settings: LedgerSettings) -> Sequence[PaidChannel]:
    """The channels with their bounds: what a voucher may be ahead of, and behind, the count it was signed at."""
    locks = {key: known.lock for key, known in state_of(store, genesis).channels.items()}
    return [_bounded(row, locks.get(row.channel, 0), settings) for row in store.channels("buy")]


def _bounded(row: ChannelRow, lock: int, settings: LedgerSettings) -> PaidChannel:
    """``ahead``: what is given before work is done, what a worker counts for answers that were lost, and the work of
    one credit, for which no receipt has come yet. ``behind``: what is held back until it was audited (half of what the
    worker lends at most) and the same credit; all of it where payments are stopped."""
    counted = row.microcredits
    credit = settings.credit + settings.prepay
    ahead = credit + max(0, row.receipt_cumulative - counted)
    behind = counted if row.stopped else credit + lock // LENDING_SHARE // 2
    return _channel(row, ahead, behind)


def _channel(row: ChannelRow, ahead: int, behind: int) -> PaidChannel:
    return PaidChannel(
        channel=row.channel.hex(),
        peer_id=row.peer_id,
        calls=row.calls,
        nano=row.microcredits * NANO + row.nano,
        promised=codec.decode(Voucher, row.voucher, bytes_max=SMALL_BYTES_MAX).cumulative,
        ahead=ahead,
        behind=behind,
    )
