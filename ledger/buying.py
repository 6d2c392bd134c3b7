"""The caller's side of metering: opens and tops up channels, counts answers, signs vouchers.

Implements the buyer's port of the caller (structurally). :meth:`Buying.channel` and :meth:`Buying.used` run for every
call and only touch memory.

Invariants: a voucher is durable before it is sent and never lower than an earlier one; nothing is signed above the
own count but for the bounds in ``core/channel``; one task at a time opens, tops up or introduces a worker's channel;
a receipt is paid only if it is over the answers that came (``core/proof``), so that each of them can be proved; what
is closed leaves memory, and a count whose channel is not known yet is kept aside for it.
"""

import logging
from collections.abc import Sequence
from typing import Any, NoReturn

import trio

from config.errors import IntegrityError, RemoteError, RequestError, RiosError
from config.settings import LedgerSettings
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core import proof
from ledger.core.channel import NANO, STOP_BEFORE_EXPIRY_MS, PayerChannel, Price, lent
from ledger.core.errors import RuleError
from ledger.core.objects import (
    SMALL_BYTES_MAX,
    Freeze,
    Open,
    Receipt,
    Reclaim,
    Signed,
    TopUp,
    Voucher,
    channel_id,
    open_signed,
    sign,
)
from ledger.core.proof import Answers, Proof
from ledger.core.rules import ChannelState
from ledger.quorum import Quorum
from ledger.records import ChannelRow
from ledger.voting import read_signed
from ledger.wallet import Wallet
from p2p.core import codec
from p2p.core.identity import is_valid_key, public_key_of
from p2p.face import Call, Header, Network, Reply

log = logging.getLogger("rios.ledger")

HELLO_DEADLINE_MS = 15_000
GRACE_S = 2.0
"""How long a receipt waits for answers that are still under way before the difference counts."""
AUDITED_S = 20.0
"""So long after the last call on a channel its answers were audited, if they are at all: then all of it is paid."""
EXPIRY_MARGIN_MS = 10 * 60 * 1000
TICK_S = 30.0


class Buying:
    """Every channel on which this node pays."""

    def __init__(self, network: Network, book: Book, wallet: Wallet, quorum: Quorum, settings: LedgerSettings) -> None:
        self._network = network
        self._book = book
        self._wallet = wallet
        self._quorum = quorum
        self._settings = settings
        self._by_id: dict[bytes, PayerChannel] = {}
        self._open: dict[PeerId, PayerChannel] = {}
        self._worker_of: dict[bytes, PeerId] = {}
        self._opening: dict[PeerId, trio.Lock] = {}
        self._paying: dict[bytes, trio.Lock] = {}
        self._moved: dict[bytes, trio.Event] = {}
        self._reclaiming = trio.Lock()
        self._answers: dict[bytes, Answers] = {}
        self._covered = trio.Event()
        self._seen: dict[bytes, tuple[int, float]] = {}
        """Calls of a channel when a receipt came, and since when there were no more."""
        self._unsaved: set[bytes] = set()
        """Stopped, but not on the disk (it was full)."""
        self._low: set[PeerId] = set()
        self._wake = trio.Event()
        self.vouchers = 0
        self.failed_reclaims = 0
        self._aside: set[bytes] = set()
        """Channels with a row that are not known here: closed long ago, or a part of the disk was lost."""
        for row in book.store.channels("buy"):
            self._restore(row)
        network.serve("ledger.receipt", self._receipt)

    def _take_in(self) -> None:
        for key in list(self._aside):
            self._held(key)

    def _held(self, key: bytes) -> PayerChannel | None:
        """A channel with its count, also if what opened it has become known just now."""
        if key in self._aside and key in self._book.state.channels:
            row = self._book.store.channel("buy", key)
            if row is not None:
                self._restore(row)
        return self._by_id.get(key)

    def _restore(self, row: ChannelRow) -> None:
        known = self._book.state.channels.get(row.channel)
        if known is None:
            self._aside.add(row.channel)
            return
        self._aside.discard(row.channel)
        if known.closed_at is not None:
            return
        channel = self._new(PeerId(row.peer_id), row.channel, known)
        channel.calls, channel.kflop = row.calls, row.kflop
        self._seen[channel.id] = row.calls, 0.0
        channel.nano = row.microcredits * NANO + row.nano
        channel.receipt_n, channel.receipt_cumulative = row.receipt_n, row.receipt_cumulative
        channel.adopt(codec.decode(Voucher, row.voucher, bytes_max=SMALL_BYTES_MAX))
        channel.stopped = row.stopped
        channel.resume(self._settings.credit + self._settings.prepay)

    def _new(self, worker: PeerId, key: bytes, known: ChannelState) -> PayerChannel:
        channel = PayerChannel(self._book.genesis.net, key, known.lock, self._settings.prepay, self._settings.lag_calls)
        self._by_id[key] = channel
        self._worker_of[key] = worker
        self._answers.setdefault(key, Answers())
        self._seen[key] = 0, 0.0
        return channel

    # the hot path

    def channel(self, worker: PeerId) -> bytes | None:
        """The channel to this worker if it can be used at once."""
        channel = self._open.get(worker)
        if channel is None or channel.stopped or channel.nano >= channel.lock * NANO:
            return None
        return channel.id

    def used(self, worker: PeerId, channel: bytes, quote: Price, kflop: int, leaf: bytes) -> None:
        """Count an answer that arrived."""
        known = self._by_id.get(channel)
        if known is None:
            return
        known.used(quote, kflop)
        self._answers[channel].arrived(leaf)
        if self._moved and channel in self._moved:
            self._moved[channel].set()
        if known.nano * 4 > known.lock * (3 * NANO) and worker not in self._low:
            self._low.add(worker)
            self._wake.set()

    def lost(self, worker: PeerId, channel: bytes, quote: Price, kflop: int) -> None:
        """A call was given up here after it had left: a receipt may count it."""
        known = self._by_id.get(channel)
        if known is not None:
            known.lost(quote, kflop)

    # opening

    async def open_channel(self, worker: PeerId) -> bytes:
        """The usable channel to this worker: opened, topped up and introduced where needed.

        Raises RiosError: ``payment_required`` (own account too low, or the channel was stopped), ``unavailable`` (no
        quorum, or the worker does not answer).
        """
        async with self._opening.setdefault(worker, trio.Lock()):
            channel = self._find(worker) or await self._create(worker)
            if channel.stopped:
                raise RemoteError(
                    "payment_required", f"payments to {worker} are stopped: {channel.stopped}", peer_id=worker
                )
            if self._is_low(channel):
                await self._top_up(channel)
            await self._introduce(worker, channel)
            self._open[worker] = channel
            return channel.id

    def _is_low(self, channel: PayerChannel) -> bool:
        return max(channel.nano, channel.promised * NANO) * 4 > channel.lock * (3 * NANO)

    def _usable(self, known: ChannelState) -> bool:
        until_ms = known.expiry_ms - STOP_BEFORE_EXPIRY_MS - EXPIRY_MARGIN_MS
        return known.closed_at is None and self._book.now_ms() < until_ms

    def _find(self, worker: PeerId) -> PayerChannel | None:
        """The channel that lives longest of those this account has open to the worker."""
        signer, me = public_key_of(worker), self._wallet.account
        fitting = [
            (known.expiry_ms, key)
            for key, known in self._book.state.channels.items()
            if known.payer == me and known.signer == signer and self._usable(known)
        ]
        if not fitting:
            return None
        key = max(fitting)[1]
        channel = self._held(key) or self._new(worker, key, self._book.state.channels[key])
        channel.lock = self._book.state.channels[key].lock
        return channel

    async def _create(self, worker: PeerId) -> PayerChannel:
        terms = (await self._network.call(worker, "ledger.terms", {}, deadline_ms=HELLO_DEADLINE_MS)).header
        payout = terms.get("payout")
        if terms.get("net") != self._book.genesis.net:
            raise RemoteError(
                "conflict", f"{worker} belongs to another ledger network", "compare the genesis files", peer_id=worker
            )
        if not isinstance(payout, bytes) or not is_valid_key(payout):
            raise RemoteError("protocol", f"{worker} wants to be paid to something that is no account", peer_id=worker)
        amount = self._affordable(self._settings.channel_lock, self._book.genesis.min_lock)
        expiry_ms = self._book.now_ms() + self._settings.channel_hours * 3600 * 1000
        item = await self._wallet.append([Open(public_key_of(worker), payout, amount, expiry_ms)])
        key = channel_id(item.id, 0)
        channel = self._by_id.get(key) or self._new(worker, key, self._book.state.channels[key])
        channel.lends = _lends(terms, channel.lock)
        return channel

    def _affordable(self, wanted: int, minimum: int) -> int:
        amount = min(max(wanted, minimum), self._wallet.balance)
        if amount < minimum:
            raise RequestError(
                "payment_required",
                f"a channel needs at least {minimum} microcredits, this node's account has {self._wallet.balance}",
                "ask the network's issuer for a grant (rios ledger grant), or somebody for a transfer",
            )
        return amount

    async def _top_up(self, channel: PayerChannel) -> None:
        try:
            amount = self._affordable(self._settings.channel_lock, self._book.genesis.min_amount)
        except RequestError:
            if channel.nano < channel.lock * NANO and channel.promised < channel.lock:
                return  # what is left in the lock can still be used
            raise
        await self._wallet.append([TopUp(channel.id, amount)])
        channel.lock = self._book.state.channels[channel.id].lock

    async def _introduce(self, worker: PeerId, channel: PayerChannel) -> None:
        """Show the worker the channel and the newest voucher; learn the one it holds."""
        async with self._paying.setdefault(channel.id, trio.Lock()):
            signed = await self._persist(worker, channel, channel.catch_up())
        known = self._book.state.channels[channel.id]
        shown = self._book.store.entry_certificate(known.payer, known.seq)
        header = {
            "channel": channel.id,
            "certificates": [certificates.encode(shown)] if shown else [],
            "voucher": codec.encode(signed),
        }
        reply = await self._network.call(worker, "ledger.channel", header, deadline_ms=HELLO_DEADLINE_MS)
        held = open_signed(Voucher, read_signed(reply.header.get("voucher")), self._wallet.account)
        if held is None:
            raise IntegrityError("integrity", f"{worker} showed a voucher this node never signed")
        channel.adopt(held)
        channel.lends = _lends(reply.header, channel.lock)

    # paying

    async def _persist(self, worker: PeerId, channel: PayerChannel, voucher: Voucher) -> Signed:
        signed = sign(self._network.identity, voucher)
        await self._book.writer.commit([self._row(worker, channel, signed)])
        self.vouchers += 1
        return signed

    def _row(self, worker: PeerId, channel: PayerChannel, signed: Signed) -> ChannelRow:
        return ChannelRow(
            side="buy",
            channel=channel.id,
            peer_id=worker,
            voucher=signed.body,
            signature=signed.signature,
            receipt_n=channel.receipt_n,
            receipt_cumulative=channel.counted_there,
            calls=channel.calls,
            kflop=channel.kflop,
            kv_units=0,
            microcredits=channel.nano // NANO,
            nano=channel.nano % NANO,
            stopped=channel.stopped,
        )

    async def _receipt(self, call: Call) -> Reply:
        signed = read_signed(call.header.get("receipt"))
        receipt = open_signed(Receipt, signed, public_key_of(call.peer_id))
        if receipt is None or receipt.net != self._book.genesis.net:
            raise IntegrityError("integrity", "the receipt is not signed by its sender for this network")
        channel = self._held(receipt.channel)
        if channel is None or self._worker_of[receipt.channel] != call.peer_id:
            raise RiosError("not_found", "this node pays no such channel to you")
        async with self._paying.setdefault(channel.id, trio.Lock()):
            if channel.stopped:
                raise RiosError("payment_required", channel.stopped)
            try:
                leaves = proof.split(call.buffers[0]) if call.buffers else []
            except RuleError as error:
                await self._end(call.peer_id, channel, error.message)
            await self._await_answers(channel, receipt, leaves)
            excess = channel.excess(receipt)
            if excess:
                await self._dispute(call.peer_id, channel, receipt, excess)
            if call.buffers:  # a worker of an older version lists no answers: nothing of it can be proved
                await self._check_answers(call.peer_id, channel, signed, receipt, leaves)
            if self._rests(channel):
                channel.at_rest()
            voucher = await self._persist(call.peer_id, channel, channel.pay(receipt))
        return Reply({"voucher": codec.encode(voucher)})

    def _rests(self, channel: PayerChannel) -> bool:
        """Whether there was no call for so long that the answers were audited; looked at with every receipt."""
        now = trio.current_time()
        calls, since = self._seen[channel.id]
        if channel.calls != calls:
            since = now
            self._seen[channel.id] = channel.calls, now
        return now - since > AUDITED_S

    async def _check_answers(
        self, worker: PeerId, channel: PayerChannel, signed: Signed, receipt: Receipt, leaves: list[bytes]
    ) -> None:
        answers = self._answers[channel.id]
        try:
            # after a restart of this node the answers before it are not known any more
            answers.check(receipt, leaves, all_known=not channel.allowance_nano)
        except RuleError as error:
            await self._end(worker, channel, error.message)
        answers.covered(signed, leaves)
        self._covered.set()
        self._covered = trio.Event()

    async def _await_answers(self, channel: PayerChannel, receipt: Receipt, leaves: list[bytes]) -> None:
        answers = self._answers[channel.id]
        with trio.move_on_after(GRACE_S):
            while channel.excess(receipt) or (answers.foreign(leaves) and not channel.allowance_nano):
                moved = self._moved[channel.id] = trio.Event()
                await moved.wait()
        self._moved.pop(channel.id, None)

    async def _dispute(self, worker: PeerId, channel: PayerChannel, receipt: Receipt, excess: int) -> NoReturn:
        reason = (
            f"the worker counts {receipt.cumulative} microcredits in {receipt.calls} calls, "
            f"this node {channel.spent} in {channel.calls}: {excess} more than can be in doubt"
        )
        await self._end(worker, channel, reason)

    async def _end(self, worker: PeerId, channel: PayerChannel, reason: str) -> NoReturn:
        await self._stop(worker, channel, reason)
        raise RiosError("payment_required", channel.stopped, "compare both nodes' channels: rios ledger channels")

    async def _stop(self, worker: PeerId, channel: PayerChannel, reason: str) -> None:
        channel.stopped = reason[:300]
        self._open.pop(worker, None)
        await self._save_stop(worker, channel)

    async def _save_stop(self, worker: PeerId, channel: PayerChannel) -> None:
        """Write that a channel is stopped. It is stopped all the same where that cannot be written: the next tick tries
        again."""
        signed = sign(self._network.identity, channel.first_voucher())
        try:
            await self._book.writer.commit([self._row(worker, channel, signed)])
            self._unsaved.discard(channel.id)
        except RiosError as error:
            if channel.id in self._by_id:  # it may have been closed, and have left, meanwhile
                self._unsaved.add(channel.id)
            log.warning("that channel %s is stopped cannot be written: %s", channel.id.hex()[:16], error.message)

    # proofs

    def watch(self, channel: bytes, leaf: bytes) -> None:
        """Keep the proof of an answer on this channel when the worker signs for it."""
        if channel in self._answers:
            self._answers[channel].watch(leaf)

    def forget(self, channel: bytes, leaf: bytes) -> None:
        """Nobody needs the proof of that answer."""
        if channel in self._answers:
            self._answers[channel].forget(leaf)

    async def proof(self, channel: bytes, leaf: bytes, seconds: float) -> Proof | None:
        """The proof of a watched answer; None if no receipt comes that covers it in this time."""
        with trio.move_on_after(seconds):
            while channel in self._answers:
                found = self._answers[channel].proof(leaf)
                if found is not None:
                    return found
                await self._covered.wait()
        return None

    def check(
        self, worker: PeerId, leaf: bytes, receipt: bytes, signature: bytes, index: int, path: Sequence[bytes]
    ) -> None:
        """Raise RiosError naming the rule unless ``worker`` signed for the answer."""
        proof.check(worker, leaf, receipt, signature, index, path)

    async def stop(self, worker: PeerId, reason: str) -> None:
        """Pay a worker no more: it was proved to be wrong about its work."""
        for key, channel in list(self._by_id.items()):
            if self._worker_of.get(key) == worker and not channel.stopped:
                await self._stop(worker, channel, reason)

    # upkeep

    async def run(self) -> None:
        """Top up channels that run low and drop those that expire, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_reclaims)
            await self._run_top_ups()

    async def _run_reclaims(self) -> None:
        """Apart from the rest: witnesses that hang make it wait."""
        while True:
            await trio.sleep(TICK_S)
            try:
                await self.reclaim_expired()
            except RiosError:
                self.failed_reclaims += 1  # tried again at the next tick

    async def _run_top_ups(self) -> None:
        while True:
            with trio.move_on_after(TICK_S):
                await self._wake.wait()
            self._wake = trio.Event()
            await self._tidy()
            low, self._low = self._low, set()
            for worker in low:
                try:
                    await self.open_channel(worker)
                except RiosError:
                    continue  # the next call that needs this worker gets the reason

    async def _tidy(self) -> None:
        """Drop what cannot be used any more, write what found no room, take in what has become known."""
        channels = self._book.state.channels
        for worker, channel in list(self._open.items()):
            known = channels.get(channel.id)
            if known is None or not self._usable(known):
                del self._open[worker]
        self._take_in()
        for key in list(self._by_id):
            known = channels.get(key)
            if known is not None and known.closed_at is not None:
                self._forget(key)
        for key in list(self._unsaved):
            if key in self._unsaved:
                await self._save_stop(self._worker_of[key], self._by_id[key])

    def _forget(self, key: bytes) -> None:
        """Let go of a closed channel, unless a receipt of it is being looked at; its row stays, for the books."""
        lock = self._paying.get(key)
        if lock is not None and lock.locked():
            return
        self._unsaved.discard(key)
        for table in (self._by_id, self._worker_of, self._answers, self._seen, self._paying):
            table.pop(key, None)

    async def reclaim_expired(self) -> int:
        """Take back what is left in own channels that expired; microcredits returned.

        The witnesses freeze each channel at the newest voucher that this node signed, so that the worker is paid. Who
        comes meanwhile waits, and finds the rest. A channel that cannot be reclaimed yet keeps no other waiting; its
        RiosError is raised when all were tried.
        """
        async with self._reclaiming:
            return await self._reclaim_expired()

    async def _reclaim_expired(self) -> int:
        returned, failure = 0, None
        for key, known in list(self._book.state.channels.items()):
            if not self._is_due(known):
                continue
            try:
                returned += await self._reclaim(key, known)
            except RiosError as error:
                failure = error
        if failure is not None:
            raise failure
        return returned

    def _is_due(self, known: ChannelState) -> bool:
        if known.payer != self._wallet.account or known.closed_at is not None:
            return False
        return self._book.now_ms() >= known.expiry_ms + EXPIRY_MARGIN_MS

    async def _reclaim(self, key: bytes, known: ChannelState) -> int:
        channel = self._held(key)
        voucher = sign(self._network.identity, channel.voucher) if channel and channel.voucher else None
        freezes = await self._quorum.freezes(key, self._wallet.account, voucher)
        total = max(codec.decode(Freeze, f.body, bytes_max=SMALL_BYTES_MAX).total for f in freezes)
        await self._wallet.append([Reclaim(key, total, freezes)])
        return known.lock - total

    # looking in

    def channels(self) -> list[dict[str, Any]]:
        """Every channel, for people."""
        state = self._book.state.channels
        return [
            {
                "side": "buy",
                "channel": key.hex(),
                "peer_id": self._worker_of[key],
                "lock": channel.lock,
                "spent": channel.spent,
                "promised": channel.promised,
                "paid": state[key].paid,
                "closed": state[key].closed_at is not None,
                "calls": channel.calls,
                "kflop": channel.kflop,
                "stopped": channel.stopped,
            }
            for key, channel in self._by_id.items()
            if key in state
        ]


def _lends(header: Header, lock: int) -> int:
    """What a worker says it lends, as far as it can mean it; an older version lends nothing."""
    lends = header.get("lends", 0)
    return lent(lends, lock) if type(lends) is int and lends > 0 else 0
