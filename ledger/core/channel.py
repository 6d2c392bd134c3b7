"""Vouchers and receipts of one channel, both sides; sans-IO and cheap enough for every call.

Money is counted as an exact sum of ``kflop * microcredits_per_tflop``, a *nano* amount (1e-9 microcredits), and
rounded down once, on the cumulative.

Invariants:
1. Cumulative amounts never fall, on either side, also across restarts; only the newest voucher matters.
2. A worker runs work only while it is owed at most W, and no more than 10 % of what the channel has paid or, if that
   is more, what it lends to everybody: a hundredth of what the payer has locked.
3. A payer never signs more than its own count, plus the doubt bound of each receipt (one call or 1 % of the window),
   plus what it gave up itself after it had left (some calls at a time, or 1 % of everything), plus at most ``W0``
   ahead, and never above the lock. To a worker that lends it promises nothing ahead: vouchers stay behind by the last
   ``lag_calls`` calls (half of what is lent at most) until these had time to be audited.
"""

from collections import deque
from typing import Protocol

from config.errors import RemoteError
from config.vocabulary import KFLOP_PER_TFLOP
from ledger.core import merkle
from ledger.core.errors import RuleError
from ledger.core.objects import Receipt, Voucher

NANO = KFLOP_PER_TFLOP
RECEIPT_CALLS = 32
RECEIPT_MS = 100
LEAVES_MAX = 1 << 16
LOST_CALLS_MAX = 16
"""Of the largest ones: so many may be given up by the payer between two receipts, and be counted by the worker."""
LENDING_SHARE = 100
"""A payer can run away with a hundredth of what it had to lock."""
STOP_BEFORE_EXPIRY_MS = 3600 * 1000


class Price(Protocol):
    """What a quote looks like from here."""

    @property
    def number(self) -> int:
        """What the advert calls it."""

    @property
    def microcredits_per_tflop(self) -> int:
        """Price of work."""

    @property
    def microcredits_per_kv_unit(self) -> int:
        """Price of cache memory."""


def lent(credit: int, lock: int) -> int:
    """What a worker lends: its own limit, or a hundredth of the lock."""
    return min(credit, lock // LENDING_SHARE)


class SellerChannel:
    """The worker's side."""

    __slots__ = (
        "calls",
        "credit",
        "due_calls",
        "id",
        "kflop",
        "kv_units",
        "leaves",
        "limit_nano",
        "lock",
        "nano",
        "net",
        "payer",
        "receipt_n",
        "stopped",
        "urgent_nano",
        "voucher",
        "voucher_signature",
    )

    def __init__(self, net: bytes, channel: bytes, payer: bytes, lock: int, credit: int) -> None:
        self.net = net
        self.id = channel
        self.payer = payer
        self.lock = lock
        self.credit = credit
        self.calls = self.kflop = self.kv_units = self.nano = 0
        self.receipt_n = 0
        self.due_calls = RECEIPT_CALLS
        self.leaves: list[bytes] = []
        self.voucher: Voucher | None = None
        self.voucher_signature = b""
        self.limit_nano = -1
        self.urgent_nano = 0
        self.stopped = "no voucher yet"

    @property
    def earned(self) -> int:
        """Microcredits for all work so far."""
        return self.nano // NANO

    @property
    def promised(self) -> int:
        """Microcredits of the newest voucher."""
        return self.voucher.cumulative if self.voucher else 0

    @property
    def lends(self) -> int:
        """Microcredits of work that are done before anything is paid."""
        return lent(self.credit, self.lock)

    @property
    def owed(self) -> bool:
        """Whether work stands still until a voucher comes that the lock still covers."""
        return not self.stopped and self.nano > self.limit_nano and self.promised < self.lock

    def admit(self) -> None:
        """Refuse (``payment_required``) when stopped or out of credit. The hint says which."""
        if self.stopped:
            raise RemoteError("payment_required", f"channel {self.id.hex()[:16]} is stopped", self.stopped)
        if self.nano > self.limit_nano:
            owed = self.earned - self.promised
            raise RemoteError(
                "payment_required",
                f"channel {self.id.hex()[:16]} owes {owed} microcredits",
                "credit exhausted: send a voucher" if self.promised < self.lock else "lock used up: top the channel up",
            )

    def served(self, quote: Price, kflop: int, leaf: bytes) -> bool:
        """Count an answered call; whether a receipt is due at once."""
        self.calls += 1
        self.kflop += kflop
        self.nano += kflop * quote.microcredits_per_tflop
        self.leaves.append(leaf)
        if len(self.leaves) >= LEAVES_MAX:
            self.stopped = "receipts are not answered"
        return self.calls >= self.due_calls or self.nano >= self.urgent_nano

    def held(self, quote: Price, kv_units: int) -> None:
        """Count a lease of cache memory (position-seconds)."""
        self.kv_units += kv_units
        self.nano += kv_units * quote.microcredits_per_kv_unit * NANO

    def receipt(self) -> Receipt:
        """The receipt of everything so far; its ``use_root`` covers the answers since the last one that was paid."""
        self.receipt_n += 1
        self.due_calls = self.calls + RECEIPT_CALLS
        root = merkle.root_of(self.leaves)
        return Receipt(self.net, self.id, self.receipt_n, self.earned, self.calls, self.kflop, self.kv_units, root)

    def check_voucher(self, voucher: Voucher) -> None:
        """The voucher may replace the one held (its signature is the caller's business)."""
        if voucher.net != self.net or voucher.channel != self.id:
            raise RuleError("channel", "the voucher belongs to another channel or network")
        if voucher.cumulative < self.promised:
            raise RuleError("voucher", f"the voucher fell from {self.promised} to {voucher.cumulative}")
        if voucher.cumulative > self.lock:
            raise RuleError("lock", f"the voucher of {voucher.cumulative} exceeds the lock of {self.lock}", wait=True)

    def accept(self, voucher: Voucher, signature: bytes, leaves_paid: int = 0) -> None:
        """Take a checked (and persisted) voucher: work goes on. ``leaves_paid`` answers are under its receipt."""
        self.check_voucher(voucher)
        self.voucher = voucher
        self.voucher_signature = signature
        del self.leaves[:leaves_paid]
        paid = voucher.cumulative
        credit = min(self.credit, max(paid // 10, self.lends))
        self.limit_nano = min(paid + credit, max(self.lock, paid)) * NANO
        self.urgent_nano = self.nano + max(0, self.limit_nano - self.nano) // 2
        if self.stopped == "no voucher yet":
            self.stopped = ""


class PayerChannel:
    """The caller's side."""

    __slots__ = (
        "allowance_nano",
        "calls",
        "doubt_nano",
        "id",
        "kflop",
        "lag_calls",
        "largest_nano",
        "lends",
        "lock",
        "lost_nano",
        "nano",
        "net",
        "prepay",
        "receipt_cumulative",
        "receipt_n",
        "recent",
        "recent_nano",
        "stopped",
        "voucher",
    )

    def __init__(self, net: bytes, channel: bytes, lock: int, prepay: int, lag_calls: int = 0) -> None:
        self.net = net
        self.id = channel
        self.lock = lock
        self.prepay = prepay
        self.lag_calls = lag_calls
        self.calls = self.kflop = self.nano = 0
        self.largest_nano = 0
        self.doubt_nano = 0
        self.allowance_nano = 0
        self.lost_nano = 0
        self.lends = 0
        self.recent: deque[int] = deque()
        self.recent_nano = 0
        self.receipt_n = 0
        self.receipt_cumulative = 0
        self.voucher: Voucher | None = None
        self.stopped = ""

    @property
    def spent(self) -> int:
        """Microcredits for all work counted here."""
        return self.nano // NANO

    @property
    def promised(self) -> int:
        """Microcredits of the newest voucher."""
        return self.voucher.cumulative if self.voucher else 0

    @property
    def counted_there(self) -> int:
        """Microcredits that the worker may count: what is in doubt included. To be kept as ``receipt_cumulative``."""
        return max(self.receipt_cumulative, (self.nano + self.doubt_nano) // NANO)

    def used(self, quote: Price, kflop: int) -> None:
        """Count a call whose answer arrived."""
        nano = kflop * quote.microcredits_per_tflop
        self.calls += 1
        self.kflop += kflop
        self.nano += nano
        if nano > self.largest_nano:
            self.largest_nano = nano
        self.recent.append(nano)
        self.recent_nano += nano
        if len(self.recent) > self.lag_calls:
            self.recent_nano -= self.recent.popleft()

    def lost(self, quote: Price, kflop: int) -> None:
        """A call was given up here that the worker may have answered."""
        nano = kflop * quote.microcredits_per_tflop
        self.lost_nano += nano
        most = max(LOST_CALLS_MAX * max(self.largest_nano, nano), self.nano // 100)
        self.lost_nano = min(self.lost_nano, most)

    @property
    def holds_back(self) -> bool:
        """Whether vouchers stay behind instead of running ahead."""
        return self.lends > 0 and self.lag_calls > 0

    @property
    def lag(self) -> int:
        """Microcredits by which vouchers stay behind: what a worker loses that turns out to have cheated."""
        return min(-(-self.recent_nano // NANO), self.lends // 2)

    def at_rest(self) -> None:
        """The last calls have had time to be audited: nothing is held back any more."""
        self.recent.clear()
        self.recent_nano = 0

    def excess(self, receipt: Receipt) -> int:
        """Microcredits by which a receipt exceeds the own count and what may be doubtful (0: pay it)."""
        window = max(0, receipt.cumulative - self.receipt_cumulative) * NANO
        # of a worker whose first answers were lost nothing is known, but W0 is promised to it in any case: within a
        # third of that no receipt raises the promise
        first = 0 if self.calls else max(0, self.prepay // 3 * NANO - self.doubt_nano)
        bound = max(self.largest_nano, window // 100, first) + self.allowance_nano + self.lost_nano
        return max(0, receipt.cumulative - (self.nano + self.doubt_nano + bound) // NANO)

    def first_voucher(self) -> Voucher:
        """The newest voucher, or the one that prepays W0 (nothing where the worker lends)."""
        if self.voucher is None:
            ahead = 0 if self.holds_back else min(self.prepay, self.lock)
            self.voucher = Voucher(self.net, self.id, 0, ahead, merkle.EMPTY_ROOT)
        return self.voucher

    def catch_up(self) -> Voucher:
        """The newest voucher, raised to the own count: for a worker that lost touch or ran out of credit."""
        voucher, due = self.first_voucher(), self.spent - self.lag
        if due > voucher.cumulative:
            cumulative = max(voucher.cumulative, min(self.lock, due))
            self.voucher = Voucher(self.net, self.id, voucher.n, cumulative, voucher.use_root)
        return self.first_voucher()

    def pay(self, receipt: Receipt) -> Voucher:
        """The voucher for a receipt without excess; the caller persists it before it sends it.

        It runs ahead of the receipt by twice what this one added, at most W0, so that a worker that is kept busy does
        not wait for vouchers; or, where the worker lends, behind it.
        """
        assert not self.excess(receipt)
        step = max(0, receipt.cumulative - self.receipt_cumulative)
        # never less again: answers that came after the receipt was written hide the gap, they do not close it
        grown = max(0, receipt.cumulative * NANO - self.nano - self.doubt_nano)
        self.doubt_nano += grown
        self.lost_nano = max(0, self.lost_nano - grown)
        # used up bit by bit: a receipt from before the restart may come first and show only a part of what is lost
        self.allowance_nano = max(0, self.allowance_nano - grown)
        self.receipt_n = max(self.receipt_n, receipt.n)
        self.receipt_cumulative = max(self.receipt_cumulative, receipt.cumulative)
        target = receipt.cumulative - self.lag
        if not self.holds_back:
            target = max(self.prepay, receipt.cumulative + min(self.prepay, 2 * step))
        cumulative = max(self.promised, min(self.lock, target))
        self.voucher = Voucher(self.net, self.id, max(self.receipt_n, receipt.n), cumulative, receipt.use_root)
        return self.voucher

    def adopt(self, voucher: Voucher) -> None:
        """A newer voucher of one's own, shown by the worker after this side was restored from an older state."""
        if voucher.channel == self.id and voucher.net == self.net and voucher.cumulative > self.promised:
            self.voucher = voucher
            self.receipt_n = max(self.receipt_n, voucher.n)

    def resume(self, credit: int) -> None:
        """After a restart: up to ``credit`` microcredits of calls may be missing from the own count, once, and what
        was in doubt before still is."""
        self.allowance_nano = credit * NANO
        self.doubt_nano = max(0, self.receipt_cumulative * NANO - self.nano)
