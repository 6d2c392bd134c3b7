"""The node's copy of the ledger: verified final objects in memory (``State``) and on disk (``Store``).

Owns the only way in: :meth:`Book.learn` verifies, applies, persists, then tells the listeners. What a peer sends is
never trusted; what the own disk says was verified before it was written (``verify`` checks it again).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

import trio

from config.errors import LocalError, RiosError
from ledger.core import checkpoint
from ledger.core.certificate import Verifier
from ledger.core.checkpoint import PAGE_BYTES_MAX, Page, Proof, Snapshot
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import SMALL_BYTES_MAX, Certificate, Claim, Item, Signed, Votes, parse
from ledger.core.rules import ChannelState
from ledger.core.state import State
from ledger.records import Final
from ledger.shelf import Rows
from ledger.store import Store
from ledger.writer import Writer
from p2p.core import codec

Listener = Callable[[Item, Certificate], None]
CHUNK = 64
"""Certificates verified before other tasks get a turn (about 5 ms)."""
HEADERS_SEARCHED = 4096


def start_from_base(store: Store, state: State) -> dict[bytes, int]:
    """Give a fresh state the checkpoint that the file starts from, if there is one; accounts and up to which seq their
    entries lie below it."""
    base = store.shelf.base()
    if base is None:
        return {}
    snapshot = snapshot_of(store, base)
    checkpoint.adopt_committees(state.committees, committees_below(store, state.genesis, snapshot))
    checkpoint.load(state, snapshot, base.summary)
    return {line.key: line.seq for line in snapshot.accounts.values()}


def snapshot_of(store: Store, proof: Proof) -> Snapshot:
    """The lines of a checkpoint on the shelf."""
    return checkpoint.read(store.shelf.pages(proof.summary.state_root))


def committees_below(store: Store, genesis: Genesis, snapshot: Snapshot) -> list[Item]:
    """The changes of committee and issuer that lie below a checkpoint."""
    line = snapshot.accounts.get(genesis.root)
    below = line.seq if line is not None else 0
    return [item for item in store.committee_entries(genesis.root) if item.object.seq <= below]


def restore(state: State, item: Item) -> bool:
    """Add what stands on the own disk, where it was verified before; whether it is still of use there."""
    try:
        state.add(item)
    except RuleError as error:
        # signature: a claim that came before its channel, with another one; peers have it, and it replaces this one
        # closed: a claim that came first as well, or stayed; its channel is closed below the base
        if error.rule not in ("signature", "closed"):
            raise
        return error.rule != "closed"
    return True


class Book:
    """State, store and verifier together."""

    def __init__(self, genesis: Genesis, store: Store, writer: Writer, now_ms: Callable[[], int]) -> None:
        self.genesis = genesis
        self.store = store
        self.writer = writer
        self.now_ms = now_ms
        self.state = State(genesis)
        self.verifier = Verifier(genesis, self.state.committees)
        self.listeners: list[Listener] = []
        self.announcer: Callable[[Sequence[Certificate]], None] | None = None
        self.refused = 0
        self._batches: dict[tuple[int, bytes], tuple[int, Signed]] = {}
        self._headers_seen = 0
        self._changed = trio.Event()
        self.replaced: list[Callable[[], None]] = []
        """Told when the state was replaced as a whole."""
        self.pruned_below: Mapping[bytes, int] = start_from_base(store, self.state)
        self._learning = 0
        self._learned = trio.lowlevel.ParkingLot()
        self._replacing: trio.Event | None = None
        """Set once the state is the one of a checkpoint: until then nobody learns anything."""
        self._unsaved: list[Final] = []
        """Applied, but not on the disk (it was full): written with whatever comes next."""
        self._gone: list[tuple[bytes]] = []
        """Channels closed below the base of which a claim is still on the disk: it does no harm there."""
        for item in store.items():
            restore(self.state, item)
        self.state.touched.clear()

    async def learn(self, certificates: Sequence[Certificate], *, announce: bool = False) -> list[Certificate]:
        """Take in certificates from anywhere; returns the new ones, durable and applied (or waiting).

        ``announce`` hands the new ones to the announcer (gossip): for certificates that were formed here. Bad ones
        are counted and skipped, unless there is only one: then its error is raised.
        """
        while self._replacing is not None:
            await self._replacing.wait()
        self._learning += 1
        try:
            return await self._learn(certificates, announce=announce)
        finally:
            self._learning -= 1
            if not self._learning:
                self._learned.unpark_all()

    async def _learn(self, certificates: Sequence[Certificate], *, announce: bool) -> list[Certificate]:
        fresh: list[Final] = []
        try:
            await self._take_all(certificates, fresh)
        except BaseException:
            self._unsaved += fresh
            raise
        fresh, self._unsaved = self._unsaved + fresh, []
        if not fresh:
            return []
        try:
            await self.writer.commit(fresh)
        except BaseException:
            self._unsaved = fresh + self._unsaved
            raise
        self._tell(fresh)
        new = [final.certificate for final in fresh]
        if announce and self.announcer is not None:
            self.announcer(new)
        return new

    def _tell(self, finals: Sequence[Final]) -> None:
        for final in finals:
            for listener in self.listeners:
                listener(final.item, final.certificate)
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def retry(self) -> None:
        """Write what a full disk refused, if it can be written now; who listens hears of it then."""
        with suppress(LocalError):
            if self._unsaved:
                await self.learn(())
            await self._clean_up()

    async def _take_all(self, certificates: Sequence[Certificate], fresh: list[Final]) -> None:
        early: list[Certificate] = []
        for position, certificate in enumerate(certificates):
            if position % CHUNK == CHUNK - 1:
                await trio.lowlevel.checkpoint()
            try:
                self._take(certificate, fresh)
            except RiosError as error:
                if isinstance(error, RuleError) and error.rule == "epoch" and error.wait and len(certificates) > 1:
                    early.append(certificate)
                    continue
                self.refused += 1
                if len(certificates) == 1 or (isinstance(error, RuleError) and error.rule == "fork"):
                    raise
        self._take_early(early, fresh)

    def _take(self, certificate: Certificate, fresh: list[Final]) -> None:
        item = self.verifier.open(certificate)
        if self.state.add(item):
            fresh.append(Final(item, certificate, self.now_ms()))

    def _take_early(self, early: list[Certificate], fresh: list[Final]) -> None:
        """Certificates of epochs that were not known: whoever sent them may have sent the committees as well."""
        known = -1
        while early and known < self.state.committees.epoch:
            known = self.state.committees.epoch
            again, early = early, []
            for certificate in again:
                try:
                    self._take(certificate, fresh)
                except RuleError as error:
                    if error.rule == "epoch" and error.wait:
                        early.append(certificate)
                    elif error.rule == "fork":
                        raise
                    else:
                        self.refused += 1
                except RiosError:
                    self.refused += 1

    async def start_from(self, committees: Sequence[Certificate], proof: Proof, pages: Sequence[bytes]) -> None:
        """Make this book the one of a checkpoint. The caller has checked all three.

        Final objects that are here and build on it are applied again, and nothing becomes final meanwhile: what the
        wallet signed and what a witness promised since then finds its place filled, never free again. Raises RuleError
        ``frontier`` (waits) for a checkpoint with which an account would fall back.
        """
        while self._replacing is not None:
            await self._replacing.wait()
        self._replacing = trio.Event()
        try:
            while self._learning:
                await self._learned.park()
            await self._replace(committees, proof, pages)
        finally:
            self._replacing.set()
            self._replacing = None
        with suppress(LocalError):
            await self._clean_up()

    async def _replace(self, committees: Sequence[Certificate], proof: Proof, pages: Sequence[bytes]) -> None:
        now = self.now_ms()
        finals = [Final(parse(each.object), each, now) for each in committees]
        if self.state.accounts:
            self._check_reach([final.item for final in finals], proof, pages)
        rows = self.store.shelf.keep(proof, pages)
        before = {**self.state.channels}
        frontier = {key: account.seq for key, account in self.state.accounts.items()}
        waiting = {*self.state.waiting_entries}
        await self.writer.commit([*finals, *rows, self.store.shelf.start_from(proof.summary.state_root)])
        self.pruned_below = start_from_base(self.store, self.state)
        for item in self._above({*frontier, *waiting}, self.pruned_below):
            with suppress(RuleError):
                if not restore(self.state, item) and isinstance(item.object, Claim):
                    self._gone.append((item.object.voucher.channel,))
        self._close(before)
        for told in self.replaced:
            told()
        self._tell([f for f in finals if f.item.object.seq > frontier.get(self.genesis.root, 0)])

    def _above(self, accounts: Iterable[bytes], frontier: Mapping[bytes, int]) -> Iterator[Item]:
        """What is on the disk of these accounts and the root above a frontier, and every claim."""
        for key in {*accounts, self.genesis.root}:
            yield from self.store.entry_items(key, frontier.get(key, 0) + 1)
        yield from self.store.final_claims()

    def _check_reach(self, changes: Sequence[Item], proof: Proof, pages: Sequence[bytes]) -> None:
        """Whether a checkpoint, and what is on the disk above it, come to no less than the present state."""
        if self._unsaved:
            raise LocalError("disk_full", "the disk lacks what became known last", "free some space")
        snapshot = checkpoint.read(codec.decode(Page, page, bytes_max=PAGE_BYTES_MAX) for page in pages)
        frontier = {line.key: line.seq for line in snapshot.accounts.values()}
        if self._is_paid_less(snapshot) or not self._follows(changes, frontier.get(self.genesis.root, 0)):
            raise RuleError("frontier", "the checkpoint lacks something of which only the result is here", wait=True)
        state = State(self.genesis)
        below = [item for item in changes if item.object.seq <= frontier.get(self.genesis.root, 0)]
        checkpoint.adopt_committees(state.committees, below)
        checkpoint.load(state, snapshot, proof.summary)
        for item in self._above({*self.state.accounts, *self.state.waiting_entries}, frontier):
            restore(state, item)
        for key, account in self.state.accounts.items():
            found = state.account(key)
            if found.seq < account.seq or (found.seq == account.seq and found.head != account.head):
                raise RuleError("frontier", f"with the checkpoint account {key.hex()[:16]} falls back", wait=True)

    def _is_paid_less(self, snapshot: Snapshot) -> bool:
        """Claims below the present base are not here any more: what they paid must stand in the checkpoint."""
        base = self.store.shelf.base()
        old = snapshot_of(self.store, base).channels if base is not None else {}
        return any(line.paid > snapshot.channels[key].paid for key, line in old.items() if key in snapshot.channels)

    def _follows(self, changes: Sequence[Item], below: int) -> bool:
        """Whether all changes of committee and issuer that were adopted here lie below: they are adopted once."""
        shown = {item.id for item in changes}
        root = self.state.accounts.get(self.genesis.root)
        known = [
            item for item in self.store.committee_entries(self.genesis.root) if root and item.object.seq <= root.seq
        ]
        return all(item.id in shown and item.object.seq <= below for item in known)

    def _close(self, before: Mapping[bytes, ChannelState]) -> None:
        """Whoever holds a channel that was closed meanwhile finds it closed, until the next start; at what is not known
        here, so that no claim looks too high."""
        for key, channel in before.items():
            if key not in self.state.channels:
                if channel.closed_at is None:
                    channel.closed_at = channel.lock
                self.state.channels[key] = channel

    async def _clean_up(self) -> None:
        gone, self._gone = self._gone, []
        if gone:
            try:
                await self.writer.commit([Rows("DELETE FROM claims WHERE channel = ?", gone)])
            except BaseException:
                self._gone += gone
                raise

    def newest_batch(self, epoch: int, witness: bytes) -> Signed | None:
        """The header of the latest batch of votes of a witness that is known here."""
        # each header is looked at once: whoever asks again and again costs nothing
        found = self.store.newest_headers(self._headers_seen, HEADERS_SEARCHED)
        for row, signed in found:
            votes = codec.decode(Votes, signed.body, bytes_max=SMALL_BYTES_MAX)
            best = self._batches.get((votes.epoch, votes.witness))
            if best is None or votes.batch_no > best[0]:
                self._batches[votes.epoch, votes.witness] = votes.batch_no, signed
            self._headers_seen = max(self._headers_seen, row)
        newest = self._batches.get((epoch, witness))
        return newest[1] if newest is not None else None

    async def wait_change(self) -> None:
        """Return after the next new final object."""
        await self._changed.wait()
