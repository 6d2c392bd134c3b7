"""The worker's side of metering: admits calls, sends receipts, takes vouchers, claims them.

Implements the seller's port of the worker (structurally). :meth:`Selling.admit` and :meth:`Selling.served` run for
every call and only touch memory; a task sends a receipt for every channel that moved, after 100 ms or 32 calls, under
many calls every 250 ms, and before half of what is lent is used up.

Owns the tasks; what is kept of each channel is ``sold``'s.

Invariants: a voucher counts only after it is durable; work is done only on a channel whose ``open`` this node has
verified to be final; one exchange per channel at a time. A full disk ends no task: what could not be written is
written later, what could not be taken is asked for again.
"""

import logging
from collections.abc import Sequence
from typing import Any

import trio

from config.errors import RemoteError, RiosError
from config.settings import LedgerSettings
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core.channel import RECEIPT_MS, Price
from ledger.core.errors import RuleError
from ledger.core.objects import (
    SMALL_BYTES_MAX,
    Certificate,
    Claim,
    Committee,
    Entry,
    Item,
    Open,
    Signed,
    Voucher,
    channel_id,
    open_signed,
    parse,
    sign,
)
from ledger.core.rules import ChannelState, check_entry_signature
from ledger.healing import Healing
from ledger.notes import Notes
from ledger.quorum import Heal, Quorum
from ledger.sold import OFFENDER_HINT, Sold, SoldChannels
from ledger.voting import read_certificates, read_signed
from p2p.core import codec
from p2p.core.identity import peer_id_of
from p2p.face import Call, Network, Reply

log = logging.getLogger("rios.ledger")

RECEIPT_DEADLINE_MS = 10_000
BETWEEN_S = 0.25
"""Under many calls receipts of one channel do not follow faster, unless the money that is lent runs out: what a worker
may lose is bounded in money, not in time, and an exchange costs both sides a signature and a commit."""
RETRY_S = 1.0
RETRY_MAX_S = 60.0
TICK_S = 30.0


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
        self._heal = Healing(heal)
        self._settings = settings
        self._payout = payout
        self._notes = notes
        self._me = network.identity.public_key
        self._sold = SoldChannels(book, notes, settings)
        self._channels = self._sold.by_id  # for every call: one look-up
        self._dirty: dict[bytes, Sold] = {}
        self._credited = trio.Event()
        """Set, and replaced, with every voucher."""
        self._wake = trio.Event()
        self._urgent = trio.Event()
        self._claim_now = trio.Event()
        self.receipts = 0
        notes.listeners.append(self._refuse)
        book.listeners.append(self._on_final)
        network.serve("ledger.terms", self._terms)
        network.serve("ledger.channel", self._hello)

    def _refuse(self, account: bytes) -> None:
        """No new service for an account that is proven to equivocate; what it promised is claimed as ever."""
        for channel in self._channels.values():
            if channel.payer == account:
                channel.stopped = OFFENDER_HINT

    def _on_final(self, item: Item, _certificate: Certificate) -> None:
        """A new committee: what the old one did not pay is claimed as soon as the new one votes."""
        body = item.object
        if isinstance(body, Entry) and isinstance(body.ops[0], Committee) and self._channels:
            for channel in self._channels.values():
                channel.claimed_ms = 0
            self._claim_now.set()

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
        if known.busy:  # its exchange looks again when it is through
            if known.hurry is not None and known.nano >= known.urgent_nano:
                known.hurry.set()
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
        voucher, signature = self._read_voucher(call, key)
        known = await self._learn(call.peer_id, key, certificates, voucher, signature)
        channel = self._sold.find(key)
        self._check_hello(call.peer_id, key, known)
        assert known is not None
        self._check_signature(voucher, signature, known.payer)
        channel = channel or self._sold.add(key, known)
        channel.failures = 0
        await self._take(channel, voucher, signature)
        assert channel.voucher is not None
        held = Signed(codec.encode(channel.voucher), channel.voucher_signature)
        return Reply({"voucher": codec.encode(held), "stopped": channel.stopped, "lends": channel.lends})

    async def _learn(
        self, payer: PeerId, key: bytes, shown: Sequence[Certificate], voucher: Voucher, signature: bytes
    ) -> ChannelState | None:
        """The channel that a payer shows. What it builds on is fetched from the payer, but only for a channel that is
        this payer's and pays this node, as far as that can be told before."""
        early: RuleError | None = None
        try:
            await self._book.learn(shown)
        except RuleError as error:
            if error.rule != "epoch" or not error.wait:
                raise
            early = error  # the payer knows of a committee that this node does not
        known = self._book.state.channels.get(key)
        if known is not None and voucher.cumulative <= known.lock:
            return known
        opened = self._opening(key, shown) if known is None else None
        if known is not None and known.signer == self._me and known.closed_at is None:
            account = known.payer  # it signed for more than was locked: the top-up is not here
        else:
            account = opened.object.account if opened is not None else b""
        if account and peer_id_of(account) == payer:
            self._check_signature(voucher, signature, account)
            await self._heal(payer, certified=opened is None or self._is_waiting(opened))
            if early is not None:
                await self._book.learn(shown)
        elif early is not None:
            raise early
        return self._book.state.channels.get(key)

    def _opening(self, key: bytes, shown: Sequence[Certificate]) -> Item | None:
        """The entry among those shown, signed by its account, that opens this channel and lets this node sign."""
        for certificate in shown:
            item = parse(certificate.object)
            if isinstance(item.object, Entry):
                for index, op in enumerate(item.object.ops):
                    if isinstance(op, Open) and op.signer == self._me and channel_id(item.id, index) == key:
                        check_entry_signature(item, item.object)
                        return item
        return None

    def _is_waiting(self, item: Item) -> bool:
        """Whether an entry was found final, and waits here for what it builds on."""
        waiting = self._book.state.waiting_entries.get(item.object.account, {}).get(item.object.seq)
        return waiting is not None and waiting.id == item.id

    def _check_hello(self, payer: PeerId, key: bytes, known: ChannelState | None) -> None:
        if known is None:
            raise RuleError("channel", "the entry that opens the channel is not final here", wait=True)
        if known.signer != self._me or (known.payout != self._payout and key not in self._channels):
            # one that was accepted stays good when the operator names another account to be paid
            raise RuleError("terms", "the channel pays somebody else", "ask for this worker's terms first")
        if peer_id_of(known.payer) != payer:
            raise RuleError("payer", "the channel belongs to another payer")
        reason = self._sold.expired(known)
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

    def _check_signature(self, voucher: Voucher, signature: bytes, payer: bytes) -> None:
        if open_signed(Voucher, Signed(codec.encode(voucher), signature), payer) is None:
            raise RuleError("signature", "the voucher is not signed by the channel's payer")

    async def _take(self, channel: Sold, voucher: Voucher, signature: bytes, *, leaves: int = 0) -> None:
        """Check a voucher whose signature is good, make it durable, then let it count. One that a newer voucher
        overtook changes nothing."""
        known = self._book.state.channels.get(channel.id)
        if known is None:
            raise RuleError("channel", "the channel is not known any more", wait=True)
        async with channel.taking:
            if channel.voucher is not None and voucher.cumulative < channel.promised:
                return
            channel.lock = max(known.lock, channel.promised)
            channel.check_voucher(voucher)
            await self._book.writer.commit([channel.row(voucher, signature)])
            channel.unsaved = False
            channel.accept(voucher, signature, leaves)
            self._credited.set()
            self._credited = trio.Event()
        if voucher.cumulative - known.paid >= known.lock // 2:
            self._claim_now.set()

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
                for channel in moved.values():
                    if not channel.busy:
                        channel.busy = True
                        nursery.start_soon(self._exchange, channel)

    async def _exchange(self, channel: Sold) -> None:
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
                channel.failures = min(16, channel.failures + 1)
                await trio.sleep(min(RETRY_MAX_S, RETRY_S * 2 ** (channel.failures - 1)))
                self._mark(channel)
        finally:
            channel.busy = False
        if channel.leaves and not channel.stopped:
            self._mark(channel)

    async def _pace(self, channel: Sold) -> None:
        """Wait until a receipt may follow the last one: for a while, or until half of what is lent is used up."""
        left_s = channel.next_at - trio.current_time()
        if left_s > 0 and channel.nano < channel.urgent_nano:
            channel.hurry = trio.Event()
            with trio.move_on_after(left_s):
                await channel.hurry.wait()
            channel.hurry = None
        channel.next_at = trio.current_time() + BETWEEN_S

    def _mark(self, channel: Sold) -> None:
        self._dirty[channel.id] = channel
        self._wake.set()

    async def _receipt(self, channel: Sold) -> None:
        async with channel.asking:
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
            channel.failures = 0
            signed = read_signed(reply.header.get("voucher"))
            voucher = codec.decode(Voucher, signed.body, bytes_max=SMALL_BYTES_MAX)
            self._check_signature(voucher, signed.signature, channel.payer)
            await self._take(channel, voucher, signed.signature, leaves=leaves)

    async def _stop(self, channel: Sold, reason: str) -> None:
        channel.stopped = reason[:300]
        channel.unsaved = True
        await self._save_stop(channel)

    async def _save_stop(self, channel: Sold) -> None:
        """Write that a channel is stopped. It is stopped all the same where that cannot be written: the next tick tries
        again, and every voucher's row says it as well."""
        try:
            async with channel.taking:  # a voucher that is just being written must not be followed by an older one
                if channel.voucher is not None and channel.unsaved:
                    await self._book.writer.commit([channel.row(channel.voucher, channel.voucher_signature)])
                channel.unsaved = False
        except RiosError as error:
            log.warning("that channel %s is stopped cannot be written: %s", channel.id.hex()[:16], error.message)

    # claims

    async def _run_claims(self) -> None:
        while True:
            with trio.move_on_after(min(TICK_S, self._settings.claim_seconds)):
                await self._claim_now.wait()
            early, self._claim_now = self._claim_now.is_set(), trio.Event()
            self._sold.take_in()
            self._sold.forget_closed()
            for key, channel in list(self._channels.items()):
                known = self._book.state.channels.get(key)
                if known is None:
                    continue
                if channel.unsaved:
                    await self._save_stop(channel)
                reason = self._sold.expired(known)
                if reason and not channel.stopped:
                    channel.stopped = reason
                if not channel.leaves and not channel.stopped and self._lags(channel):
                    self._mark(channel)  # what was held back is asked for once it is paid without new work
                if self._claim_due(channel, known, early=early, last_chance=bool(reason)):
                    try:
                        await self.settle(key)
                    except RiosError:
                        continue  # no quorum now: the voucher is kept and claimed at a later tick

    def _lags(self, channel: Sold) -> bool:
        return channel.promised < min(channel.earned, channel.lock)

    def _claim_due(self, channel: Sold, known: ChannelState, *, early: bool, last_chance: bool) -> bool:
        open_amount = channel.promised - known.paid
        if known.closed_at is not None or open_amount < self._book.genesis.min_claim_step:
            return False
        if channel.claimed_ms is None:
            channel.claimed_ms = self._book.now_ms()
        since_ms = self._book.now_ms() - channel.claimed_ms
        over = early and open_amount >= known.lock // 2
        return last_chance or over or since_ms >= self._settings.claim_seconds * 1000

    async def settle(self, key: bytes) -> int:
        """Put a channel's newest voucher on the ledger; the microcredits that were paid out by it."""
        channel, known = self._channels.get(key), self._book.state.channels.get(key)
        if channel is None or channel.voucher is None or known is None or known.closed_at is not None:
            return 0
        voucher, before = channel.voucher, known.paid
        if voucher.cumulative < before + self._book.genesis.min_claim_step:
            return 0
        claim = Claim(known.payer, known.seq, known.op_index, voucher, channel.voucher_signature)
        await self._quorum.certify(sign(self._network.identity, claim))
        channel.claimed_ms = self._book.now_ms()
        return max(0, known.paid - before)

    async def settle_all(self) -> int:
        """Collect what is served but not promised yet, then claim every channel; microcredits paid out."""
        total = 0
        self._sold.take_in()
        for key, channel in list(self._channels.items()):
            # also where an exchange pauses between two receipts; not where the payer was not reached of late
            if (channel.leaves or self._lags(channel)) and not channel.stopped and not channel.failures:
                try:
                    await self._receipt(channel)
                except RiosError:
                    self._mark(channel)  # the payer is gone for now: claim what was promised so far
            total += await self.settle(key)
        return total

    # looking in

    def channels(self) -> list[dict[str, Any]]:
        """Every channel, for people."""
        return self._sold.lines()
