"""The node's copy of the ledger: verified final objects in memory (``State``) and on disk (``Store``).

Owns the only way in: :meth:`Book.learn` verifies, applies, persists, then tells the listeners. What a peer sends is
never trusted; what the own disk says was verified before it was written (``verify`` checks it again).
"""

from collections.abc import Callable, Sequence

import trio

from config.errors import RiosError
from ledger.core.certificate import Verifier
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import SMALL_BYTES_MAX, Certificate, Item, Signed, Votes
from ledger.core.state import State
from ledger.store import Final, Store, Writer
from p2p.core import codec

Listener = Callable[[Item, Certificate], None]
CHUNK = 64
"""Certificates verified before other tasks get a turn (about 5 ms)."""
HEADERS_SEARCHED = 4096


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
        self._unsaved: list[Final] = []
        """Applied, but not on the disk (it was full): written with whatever comes next."""
        for item in store.items():
            self.state.add(item)
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
