"""Asks the witnesses, before the wallet signs, for an entry of its own that it does not know (rule 9).

Strictly after a restoration (every witness, or a change of the committee); in passing, without holding anybody up,
after an ordinary start: that is how a copy of the whole data folder is noticed.

Invariant: no entry is signed while a witness says that it has more of the own chain, unless a quorum answers that the
slot is free: f + 1 honest ones are among it, and one of them voted for whatever is final there. Whether the entries can
be fetched proves nothing (peers prune, links fail). Of more than f that say so one is honest: an older copy.
"""

import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core.objects import CERTIFICATE_BYTES_MAX, Signed
from ledger.core.recovery import Recovery
from ledger.lineage import FOUND, FRESH, Lineage
from ledger.quorum import Heal, Quorum
from ledger.records import Meta, Own, Record
from p2p.core import codec
from p2p.face import Network

DEADLINE_MS = 5_000
GLANCE_S = 2.0
PAUSE_S = 1.0


class Recovering:
    """The questions of one wallet."""

    def __init__(self, network: Network, book: Book, quorum: Quorum, lineage: Lineage, heal: Heal) -> None:
        self._network = network
        self._book = book
        self._quorum = quorum
        self._lineage = lineage
        self._heal = heal
        self._account = network.identity.public_key
        self._glanced = False
        self._known = max(book.store.last_own(), self._applied())
        """Up to where this database knew the own chain when it was opened."""
        self._heads: dict[bytes, int] = {}
        """Every witness's last word on how long the own chain is; it stands while the witness is away."""
        self._failure = ""
        """Why something could not be fetched."""

    @property
    def due(self) -> bool:
        """Whether anything must be asked before a new entry is signed."""
        return bool(self._lineage.wallet_unsure) or not self._glanced

    async def next_entry(self, timeout_s: float) -> Signed | None:
        """An entry to complete first (it is durable then), or None: a new one may be signed, if nothing is due.

        Raises RemoteError ``unavailable`` when too few witnesses answer to be sure.
        """
        self._failure = ""
        if not self._lineage.wallet_unsure:
            return await self._glance(timeout_s)
        fresh, since = self._lineage.wallet_unsure == FRESH, self._lineage.unsure_since
        recovery = Recovery(self._book.state, self._account, fresh=fresh, began=since)
        with trio.move_on_after(timeout_s):
            while True:
                await self._ask_all(recovery, heal=True)
                if recovery.began != self._lineage.unsure_since and not fresh:
                    await self._keep(self._lineage.unsure(FOUND, recovery.began))
                found = recovery.to_complete()
                if found is not None:
                    return await self._adopt(recovery, found)
                if recovery.may_sign_anew():
                    await self._keep(self._lineage.unsure(b""))
                    self._glanced = True
                    return None
                await trio.sleep(PAUSE_S)
        committee = self._quorum.committee
        if self._say_more_than(recovery.slot - 1) > committee.f:
            raise self._lacking(recovery)
        raise RemoteError(
            "unavailable",
            f"this wallet may have signed an entry that it does not know: {recovery.answers} of "
            f"{len(committee.keys)} witnesses said that they have none",
            "a wallet from a backup waits for all witnesses, or for the next committee",
        )

    async def _glance(self, timeout_s: float) -> Signed | None:
        recovery = Recovery(self._book.state, self._account)
        with trio.move_on_after(GLANCE_S):
            await self._ask_all(recovery, heal=False)
        with trio.move_on_after(timeout_s):
            while self._may_lack(recovery) and not self._is_older_copy():
                await self._ask_all(recovery, heal=True)
                if self._may_lack(recovery):
                    await trio.sleep(PAUSE_S)
        if self._is_older_copy():
            await self._keep(self._lineage.unsure(FOUND, recovery.began))
            return None
        if self._may_lack(recovery):
            raise self._lacking(recovery)
        self._glanced = True
        found = recovery.to_complete()
        return await self._adopt(recovery, found) if found is not None else None

    def _may_lack(self, recovery: Recovery) -> bool:
        return self._say_more_than(recovery.slot - 1) > 0 and not recovery.quorum_answered()

    def _is_older_copy(self) -> bool:
        """Whether the own key signed more than is remembered: it is here, or an honest witness says so."""
        return self._head() > self._known or self._say_more_than(self._known) > self._quorum.committee.f

    def _say_more_than(self, seq: int) -> int:
        """How many witnesses say that the own chain is longer."""
        return sum(self._heads.get(witness, 0) > seq for witness in self._quorum.committee.keys)

    def _lacking(self, recovery: Recovery) -> RemoteError:
        more, witnesses = self._say_more_than(recovery.slot - 1), len(self._quorum.committee.keys)
        why = f"; fetching them failed: {self._failure}" if self._failure else ""
        return RemoteError(
            "unavailable",
            f"this wallet may lack entries of its own: {more} of {witnesses} witnesses say that they have more{why}",
            "this database may be an older copy: try again once this node reaches one that keeps the whole ledger "
            "(ledger.archive = true)",
        )

    def _applied(self) -> int:
        known = self._book.state.accounts.get(self._account)
        return known.seq if known is not None else 0

    def _head(self) -> int:
        """Up to where the own chain is here, though what some of it builds on may be missing."""
        waiting = self._book.state.waiting_entries.get(self._account, {})
        return max(self._applied(), max(waiting, default=0))

    async def _adopt(self, recovery: Recovery, found: Signed) -> Signed:
        seq = recovery.slot
        await self._keep(self._lineage.unsure(FOUND, recovery.began), Own(seq, found))
        self._lineage.signed(seq)
        return found

    async def _keep(self, unsure: Meta, *records: Record) -> None:
        await self._book.writer.commit([*records, unsure])
        self._lineage.became(unsure)

    async def _ask_all(self, recovery: Recovery, *, heal: bool) -> None:
        committee = self._quorum.committee
        async with trio.open_nursery() as nursery:
            for key in committee.keys:
                nursery.start_soon(self._ask, recovery, key, self._quorum.peer_of(key, committee.epoch), heal)

    async def _ask(self, recovery: Recovery, witness: bytes, peer_id: PeerId, heal: bool) -> None:
        if heal and peer_id != self._network.identity.peer_id:
            try:
                await self._heal(peer_id)
            except RiosError as error:
                self._failure = error.message  # what it voted for it can say all the same
        try:
            seq = recovery.slot
            ask = {"account": self._account, "seq": seq}
            reply = await self._network.call(peer_id, "ledger.next", ask, deadline_ms=DEADLINE_MS)
            epoch, head, entry = (reply.header.get(name) for name in ("epoch", "head", "entry"))
            signed = codec.decode(Signed, entry, bytes_max=CERTIFICATE_BYTES_MAX) if isinstance(entry, bytes) else None
        except RiosError:
            return  # no answer
        if type(epoch) is not int or type(head) is not int:
            return
        self._heads[witness] = head
        if head < seq:
            recovery.add(witness, epoch, seq, signed)
