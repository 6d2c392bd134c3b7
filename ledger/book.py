"""The node's copy of the ledger: verified final objects in memory (``State``) and on disk (``Store``).

Owns the only way in: :meth:`Book.learn` verifies, applies, persists, then tells the listeners. What a peer sends is
never trusted; what the own disk says was verified before it was written (``verify`` checks it again).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import trio

from config.errors import LocalError, RiosError
from ledger.core import checkpoint
from ledger.core.certificate import Verifier
from ledger.core.checkpoint import Proof, Snapshot
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import SMALL_BYTES_MAX, Certificate, Claim, Item, Signed, Votes, parse
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
        self._unsaved: list[Final] = []
        """Applied, but not on the disk (it was full): written with whatever comes next."""
        for item in store.items():
            restore(self.state, item)
        self.state.touched.clear()

    async def learn(self, certificates: Sequence[Certificate], *, announce: bool = False) -> list[Certificate]:
        """Take in certificates from anywhere; returns the new ones, durable and applied (or waiting).

        ``announce`` hands the new ones to the announcer (gossip): for certificates that were formed here. Bad ones
        are counted and skipped, unless there is only one: then its error is raised.
        """
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
        for final in fresh:
            for listener in self.listeners:
                listener(final.item, final.certificate)
        event, self._changed = self._changed, trio.Event()
        event.set()
        new = [final.certificate for final in fresh]
        if announce and self.announcer is not None:
            self.announcer(new)
        return new

    async def retry(self) -> None:
        """Write what a full disk refused, if it can be written now; who listens hears of it then."""
        if self._unsaved:
            with suppress(LocalError):
                await self.learn(())

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
        """Make this fresh book the one of a checkpoint. The caller has checked all three.

        Objects that came meanwhile and build on it are applied; one that is just being written comes back by
        anti-entropy.
        """
        now = self.now_ms()
        finals = [Final(parse(each.object), each, now) for each in committees]
        rows = self.store.shelf.keep(proof, pages)
        root = proof.summary.state_root
        await self.writer.commit([*finals, *rows, self.store.shelf.start_from(root)])
        self.pruned_below = start_from_base(self.store, self.state)
        gone: list[tuple[bytes]] = []
        for item in self.store.items():  # the few that gossip was faster with
            with suppress(RuleError):
                if not restore(self.state, item) and isinstance(item.object, Claim):
                    gone.append((item.object.voucher.channel,))
        if gone:
            await self.writer.commit([Rows("DELETE FROM claims WHERE channel = ?", gone)])
        for told in self.replaced:
            told()

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
