"""The worker's side of metering: admits calls, sends receipts, takes vouchers, claims them.

Implements the seller's port of the worker (structurally). :meth:`Selling.admit` and :meth:`Selling.served` run for
every call and only touch memory; a task sends a receipt for every channel that moved, every 100 ms or 32 calls.

Invariants: a voucher counts only after it is durable; work is done only on a channel whose ``open`` this node has
verified to be final; one exchange per channel at a time.
"""

from typing import Any

import trio

from config.errors import RemoteError, RiosError
from config.settings import LedgerSettings
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core.channel import NANO, RECEIPT_MS, STOP_BEFORE_EXPIRY_MS, Price, SellerChannel
from ledger.core.errors import RuleError
from ledger.core.objects import (
    SMALL_BYTES_MAX,
    Certificate,
    Claim,
    Committee,
    Entry,
    Item,
    Signed,
    Voucher,
    open_signed,
    sign,
)
from ledger.core.rules import ChannelState
from ledger.notes import Notes
from ledger.quorum import Heal, Quorum
from ledger.records import ChannelRow
from ledger.voting import read_certificates, read_signed
from p2p.core import codec
from p2p.core.identity import peer_id_of
from p2p.face import Call, Network, Reply

RECEIPT_DEADLINE_MS = 10_000
BETWEEN_S = 0.1
"""Under many calls receipts of one channel do not follow faster, unless the money that is lent runs out."""
RETRY_S = 1.0
RETRY_MAX_S = 60.0
CHANNELS_MAX = 65536
TICK_S = 30.0
OFFENDER_HINT = "an account that equivocates gets no new service: rios ledger audit shows the evidence"


class Selling:
    """Every channel on which this node is paid."""

    def __init__(
        self,
        network: Network,
        book: Book,
        quorum: Quorum,
        heal: Heal,
        settings: LedgerSettings,
        payout: bytes,
        notes: Notes,
    ) -> None:
        self._network = network
        self._book = book
        self._quorum = quorum
        self._heal = heal
        self._settings = settings
        self._payout = payout
        self._notes = notes
        self._me = network.identity.public_key
        self._channels: dict[bytes, SellerChannel] = {}
        self._dirty: dict[bytes, SellerChannel] = {}
        self._busy: set[bytes] = set()
        self._failures: dict[bytes, int] = {}
        self._next_at: dict[bytes, float] = {}
        self._asking: dict[bytes, trio.Lock] = {}
        self._pausing: dict[bytes, trio.Event] = {}
        """Between two receipts of a channel; set when the money that is lent runs out."""
        self._taking: dict[bytes, trio.Lock] = {}
        self._greeting: dict[bytes, trio.Lock] = {}
        self._credited = trio.Event()
        """Set, and replaced, with every voucher."""
        self._wake = trio.Event()
        self._urgent = trio.Event()
        self._claim_now = trio.Event()
        self._claimed_ms: dict[bytes, int] = {}
        self.receipts = 0
        for row in book.store.channels("sell"):
            self._restore(row)
        notes.listeners.append(self._refuse)
        book.listeners.append(self._on_final)
        network.serve("ledger.terms", self._terms)
        network.serve("ledger.channel", self._hello)

    def _restore(self, row: ChannelRow) -> None:
        known = self._book.state.channels.get(row.channel)
        if known is None or known.closed_at is not None:
            return
        voucher = codec.decode(Voucher, row.voucher, bytes_max=SMALL_BYTES_MAX)
        # a voucher was taken only under a final lock: where it lies above, the top-up did not reach this disk. Nothing
        # is lent on top of such a lock, so that no work goes beyond what the voucher can claim
        lock = max(known.lock, voucher.cumulative)
        channel = SellerChannel(self._book.genesis.net, row.channel, known.payer, lock, self._settings.credit)
        channel.calls, channel.kflop, channel.kv_units = row.calls, row.kflop, row.kv_units
        channel.nano = row.microcredits * NANO + row.nano
        channel.receipt_n = row.receipt_n
        channel.accept(voucher, row.signature)
        channel.due_calls += channel.calls
        channel.stopped = row.stopped or self._expired(known)
        if self._notes.is_offender(known.payer):
            channel.stopped = OFFENDER_HINT
        self._channels[row.channel] = channel

    def _refuse(self, account: bytes) -> None:
        """No new service for an account that is proven to equivocate; what it promised is claimed as ever."""
        for channel in self._channels.values():
            if channel.payer == account:
                channel.stopped = OFFENDER_HINT

    def _on_final(self, item: Item, _certificate: Certificate) -> None:
        """A new committee: what the old one did not pay is claimed as soon as the new one votes."""
        body = item.object
        if isinstance(body, Entry) and isinstance(body.ops[0], Committee) and self._channels:
            self._claimed_ms = dict.fromkeys(self._channels, 0)
            self._claim_now.set()

    def _expired(self, known: ChannelState) -> str:
        if known.closed_at is not None:
            return "the channel is closed"
        left_ms = known.expiry_ms - self._book.now_ms()
        return "" if left_ms > STOP_BEFORE_EXPIRY_MS else "the channel expires in less than an hour: open another"

    # the hot path

    def admit(self, payer: PeerId, channel: bytes, quote: Price) -> None:
        """May this payer's channel run one more call?

        Raises RemoteError ``payment_required`` with a hint that says why not.
        """
        known = self._channels.get(channel)
        if known is None or peer_id_of(known.payer) != payer:
            raise RemoteError(
                "payment_required",
                f"channel {channel.hex()[:16]} is not known here",
                "open a channel to this worker and show its certificate",
            )
        known.admit()

    async def credited(self, channel: bytes, seconds: float) -> None:
        """Wait while nothing but a newer voucher is missing for the next call."""
        known = self._channels.get(channel)
        if known is not None and known.owed:
            with trio.move_on_after(max(0.0, seconds)):
                while known.owed:
                    await self._credited.wait()

    def served(self, payer: PeerId, channel: bytes, quote: Price, kflop: int, leaf: bytes) -> None:
        """Count an answered call."""
        known = self._channels.get(channel)
        if known is None:
            return
        due = known.served(quote, kflop, leaf)
        if channel in self._busy:  # its exchange looks again when it is through
            if known.nano >= known.urgent_nano and channel in self._pausing:
                self._pausing[channel].set()
            return
        if due:
            self._urgent.set()
        if channel not in self._dirty:
            self._dirty[channel] = known
            self._wake.set()

    # a payer introduces its channel

    async def _terms(self, call: Call) -> Reply:
        terms = {"net": self._book.genesis.net, "signer": self._me, "payout": self._payout}
        return Reply({**terms, "lends": self._settings.credit})

    async def _hello(self, call: Call) -> Reply:
        key = call.header.get("channel")
        if not isinstance(key, bytes):
            raise RiosError("invalid_request", "'channel' is needed")
        certificates = read_certificates(call.header.get("certificates"))
        try:
            await self._book.learn(certificates)
        except RuleError as error:
            if error.rule != "epoch" or not error.wait:
                raise
            await self._heal(call.peer_id)  # the payer knows of a committee that this node does not
            await self._book.learn(certificates)
        known = self._book.state.channels.get(key)
        voucher, signature = self._read_voucher(call, key)
        if known is None or voucher.cumulative > known.lock:
            await self._heal(call.peer_id)
            known = self._book.state.channels.get(key)
        self._check_hello(call.peer_id, key, known)
        assert known is not None
        self._failures.pop(key, None)
        # two first hellos at once are about one channel: the later one finds what the earlier made
        async with self._greeting.setdefault(key, trio.Lock()):
            channel = self._channels.get(key)
            if channel is None:
                if len(self._channels) >= CHANNELS_MAX:
                    raise RiosError("busy", "too many channels", "try another worker")
                channel = SellerChannel(self._book.genesis.net, key, known.payer, known.lock, self._settings.credit)
            await self._take(channel, voucher, signature)
            self._channels[key] = channel
        assert channel.voucher is not None
        held = Signed(codec.encode(channel.voucher), channel.voucher_signature)
        return Reply({"voucher": codec.encode(held), "stopped": channel.stopped, "lends": channel.lends})

    def _check_hello(self, payer: PeerId, key: bytes, known: ChannelState | None) -> None:
        if known is None:
            raise RuleError("channel", "the entry that opens the channel is not final here", wait=True)
        if known.signer != self._me or (known.payout != self._payout and key not in self._channels):
            # one that was accepted stays good when the operator names another account to be paid
            raise RuleError("terms", "the channel pays somebody else", "ask for this worker's terms first")
        if peer_id_of(known.payer) != payer:
            raise RuleError("payer", "the channel belongs to another payer")
        reason = self._expired(known)
        if reason:
            raise RemoteError("payment_required", "the channel cannot be used", reason)
        if self._notes.is_offender(known.payer):
            raise RemoteError("forbidden", "the payer signed two entries for one place of its chain", OFFENDER_HINT)

    def _read_voucher(self, call: Call, channel: bytes) -> tuple[Voucher, bytes]:
        from_peer = read_signed(call.header.get("voucher"))
        voucher = codec.decode(Voucher, from_peer.body, bytes_max=SMALL_BYTES_MAX)
        if voucher.channel != channel or voucher.net != self._book.genesis.net:
            raise RuleError("channel", "the voucher belongs to another channel or network")
        return voucher, from_peer.signature

    async def _take(self, channel: SellerChannel, voucher: Voucher, signature: bytes, *, leaves: int = 0) -> None:
        """Check a voucher, make it durable, then let it count. One that a newer voucher overtook changes nothing."""
        if open_signed(Voucher, Signed(codec.encode(voucher), signature), channel.payer) is None:
            raise RuleError("signature", "the voucher is not signed by the channel's payer")
        known = self._book.state.channels[channel.id]
        async with self._taking.setdefault(channel.id, trio.Lock()):
            if channel.voucher is not None and voucher.cumulative < channel.promised:
                return
            channel.lock = max(known.lock, channel.promised)
            channel.check_voucher(voucher)
            await self._book.writer.commit([self._row(channel, voucher, signature)])
            channel.accept(voucher, signature, leaves)
            self._credited.set()
            self._credited = trio.Event()
        if voucher.cumulative - known.paid >= known.lock // 2:
            self._claim_now.set()

    def _row(self, channel: SellerChannel, voucher: Voucher, signature: bytes) -> ChannelRow:
        return ChannelRow(
            side="sell",
            channel=channel.id,
            peer_id=peer_id_of(channel.payer),
            voucher=codec.encode(voucher),
            signature=signature,
            receipt_n=channel.receipt_n,
            receipt_cumulative=channel.earned,
            calls=channel.calls,
            kflop=channel.kflop,
            kv_units=channel.kv_units,
            microcredits=channel.nano // NANO,
            nano=channel.nano % NANO,
            stopped="" if channel.stopped == "no voucher yet" else channel.stopped,
        )

    # receipts

    async def run(self) -> None:
        """Send receipts and claims until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_receipts)
            nursery.start_soon(self._run_claims)

    async def _run_receipts(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await self._wake.wait()
                with trio.move_on_after(RECEIPT_MS / 1000):
                    await self._urgent.wait()
                self._wake, self._urgent = trio.Event(), trio.Event()
                moved, self._dirty = self._dirty, {}
                for key, channel in moved.items():
                    if key not in self._busy:
                        self._busy.add(key)
                        nursery.start_soon(self._exchange, channel)

    async def _exchange(self, channel: SellerChannel) -> None:
        """Receipts of one channel until nothing new is left."""
        try:
            paid_calls = -1
            while paid_calls < channel.calls and not channel.stopped:
                await self._pace(channel)
                paid_calls = channel.calls
                await self._receipt(channel)
                if channel.calls < channel.due_calls:
                    break
        except RiosError as error:
            if error.code == "payment_required":
                await self._stop(channel, f"the payer disputes the receipt: {error.message}")
            else:
                failures = self._failures[channel.id] = min(16, self._failures.get(channel.id, 0) + 1)
                await trio.sleep(min(RETRY_MAX_S, RETRY_S * 2 ** (failures - 1)))
                self._mark(channel)
        finally:
            self._busy.discard(channel.id)
        if channel.leaves and not channel.stopped:
            self._mark(channel)

    async def _pace(self, channel: SellerChannel) -> None:
        """Wait until a receipt may follow the last one: for a while, or until half of what is lent is used up."""
        left_s = self._next_at.get(channel.id, 0.0) - trio.current_time()
        if left_s > 0 and channel.nano < channel.urgent_nano:
            hurry = self._pausing[channel.id] = trio.Event()
            try:
                with trio.move_on_after(left_s):
                    await hurry.wait()
            finally:
                del self._pausing[channel.id]
        self._next_at[channel.id] = trio.current_time() + BETWEEN_S

    def _mark(self, channel: SellerChannel) -> None:
        self._dirty[channel.id] = channel
        self._wake.set()

    async def _receipt(self, channel: SellerChannel) -> None:
        async with self._asking.setdefault(channel.id, trio.Lock()):
            leaves = len(channel.leaves)
            receipt = sign(self._network.identity, channel.receipt())
            reply = await self._network.call(
                peer_id_of(channel.payer),
                "ledger.receipt",
                {"receipt": codec.encode(receipt)},
                (b"".join(channel.leaves),),
                deadline_ms=RECEIPT_DEADLINE_MS,
            )
            self.receipts += 1
            self._failures.pop(channel.id, None)
            signed = read_signed(reply.header.get("voucher"))
            voucher = codec.decode(Voucher, signed.body, bytes_max=SMALL_BYTES_MAX)
            await self._take(channel, voucher, signed.signature, leaves=leaves)

    async def _stop(self, channel: SellerChannel, reason: str) -> None:
        channel.stopped = reason[:300]
        if channel.voucher is not None:
            await self._book.writer.commit([self._row(channel, channel.voucher, channel.voucher_signature)])

    # claims

    async def _run_claims(self) -> None:
        while True:
            with trio.move_on_after(min(TICK_S, self._settings.claim_seconds)):
                await self._claim_now.wait()
            early, self._claim_now = self._claim_now.is_set(), trio.Event()
            for key, channel in list(self._channels.items()):
                known = self._book.state.channels[key]
                reason = self._expired(known)
                if reason and not channel.stopped:
                    channel.stopped = reason
                if not channel.leaves and not channel.stopped and self._lags(channel):
                    self._mark(channel)  # what was held back is asked for once it is paid without new work
                if self._claim_due(key, channel, known, early=early, last_chance=bool(reason)):
                    try:
                        await self.settle(key)
                    except RiosError:
                        continue  # no quorum now: the voucher is kept and claimed at a later tick

    def _lags(self, channel: SellerChannel) -> bool:
        return channel.promised < min(channel.earned, channel.lock)

    def _claim_due(
        self, key: bytes, channel: SellerChannel, known: ChannelState, *, early: bool, last_chance: bool
    ) -> bool:
        open_amount = channel.promised - known.paid
        if known.closed_at is not None or open_amount < self._book.genesis.min_claim_step:
            return False
        since_ms = self._book.now_ms() - self._claimed_ms.setdefault(key, self._book.now_ms())
        over = early and open_amount >= known.lock // 2
        return last_chance or over or since_ms >= self._settings.claim_seconds * 1000

    async def settle(self, key: bytes) -> int:
        """Put a channel's newest voucher on the ledger; the microcredits that were paid out by it."""
        channel, known = self._channels[key], self._book.state.channels[key]
        voucher = channel.voucher
        before = known.paid
        if voucher is None or known.closed_at is not None:
            return 0
        if voucher.cumulative < before + self._book.genesis.min_claim_step:
            return 0
        claim = Claim(known.payer, known.seq, known.op_index, voucher, channel.voucher_signature)
        await self._quorum.certify(sign(self._network.identity, claim))
        self._claimed_ms[key] = self._book.now_ms()
        return max(0, known.paid - before)

    async def settle_all(self) -> int:
        """Collect what is served but not promised yet, then claim every channel; microcredits paid out."""
        total = 0
        for key, channel in list(self._channels.items()):
            # also where an exchange pauses between two receipts; not where the payer was not reached of late
            if (channel.leaves or self._lags(channel)) and not channel.stopped and key not in self._failures:
                try:
                    await self._receipt(channel)
                except RiosError:
                    self._mark(channel)  # the payer is gone for now: claim what was promised so far
            total += await self.settle(key)
        return total

    # looking in

    def channels(self) -> list[dict[str, Any]]:
        """Every channel, for people."""
        return [
            {
                "side": "sell",
                "channel": key.hex(),
                "peer_id": peer_id_of(channel.payer),
                "lock": channel.lock,
                "earned": channel.earned,
                "promised": channel.promised,
                "paid": self._book.state.channels[key].paid,
                "calls": channel.calls,
                "kflop": channel.kflop,
                "stopped": channel.stopped,
            }
            for key, channel in self._channels.items()
        ]
