"""Asks the witnesses, before the wallet signs, for an entry of its own that it does not know (rule 9).

Strictly after a restoration (every witness, or a change of the committee); in passing, without holding anybody up,
after an ordinary start: that is how a copy of the whole data folder is noticed.
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

    @property
    def due(self) -> bool:
        """Whether anything must be asked before a new entry is signed."""
        return bool(self._lineage.wallet_unsure) or not self._glanced

    async def next_entry(self, timeout_s: float) -> Signed | None:
        """An entry to complete first (it is durable then), or None: a new one may be signed.

        Raises RemoteError ``unavailable`` when too few witnesses answer to be sure.
        """
        if not self._lineage.wallet_unsure:
            return await self._glance()
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
        raise RemoteError(
            "unavailable",
            f"this wallet may have signed an entry that it does not know: {recovery.answers} of "
            f"{len(committee.keys)} witnesses said that they have none",
            "a wallet from a backup waits for all witnesses, or for the next committee",
        )

    async def _glance(self) -> Signed | None:
        recovery = Recovery(self._book.state, self._account)
        with trio.move_on_after(GLANCE_S):
            await self._ask_all(recovery, heal=False)
        self._glanced = True
        found = recovery.to_complete()
        return await self._adopt(recovery, found) if found is not None else None

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
        try:
            if heal and peer_id != self._network.identity.peer_id:
                await self._heal(peer_id)
            seq = recovery.slot
            ask = {"account": self._account, "seq": seq}
            reply = await self._network.call(peer_id, "ledger.next", ask, deadline_ms=DEADLINE_MS)
            epoch, head, entry = (reply.header.get(name) for name in ("epoch", "head", "entry"))
            signed = codec.decode(Signed, entry, bytes_max=CERTIFICATE_BYTES_MAX) if isinstance(entry, bytes) else None
        except RiosError:
            return  # no answer
        if type(epoch) is int and type(head) is int and head < seq:
            recovery.add(witness, epoch, seq, signed)
