"""Checkpoints that peers show: who proves which one, and its pages.

Owns what is asked of peers about checkpoints and its bounds: a peer's committees are followed as long as they rise, its
pages are checked one by one as they come, all of it within a time. A peer whose pages came to nothing is left out for a
while, so that one that shows more than it has does not keep the others' checkpoints away.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from config.errors import IntegrityError, RemoteError, RiosError
from config.vocabulary import PeerId
from ledger.core import certificate as certificates
from ledger.core import checkpoint
from ledger.core.certificate import Verifier
from ledger.core.checkpoint import PAGE_BYTES_MAX, Page, Proof, Snapshot, Summary
from ledger.core.committee import CommitteeChain
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import Certificate, Entry
from ledger.shelf import PROOF_BYTES_MAX
from p2p.core import codec
from p2p.face import Call, Network, Reply

log = logging.getLogger("rios.ledger")

ASKED_MAX = 8
PAGES_MAX = 1 << 16
PAGES_BYTES_MAX = 512 << 20
"""Of the state a fresh node takes over: about six million accounts. Nothing that is signed says how many there are."""
COMMITTEES_PER_ANSWER = 64
DEADLINE_MS = 20_000
OFFER_S = 60.0
FETCH_S = 900.0
SHUN_S = 600.0

Aside = Callable[..., Any]
"""Runs work out of the way of everything else: ``await aside(work, *args)``."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a peer shows: its newest checkpoint, and the committees since the genesis."""

    peer_id: PeerId
    proof: Proof
    pages: int
    committees: tuple[Certificate, ...]
    chain: CommitteeChain


class Offers:
    """Asks peers for their checkpoints."""

    def __init__(self, network: Network, genesis: Genesis, aside: Aside) -> None:
        self._network, self._genesis, self._aside = network, genesis, aside
        self._shunned: dict[PeerId, float] = {}
        self.provers = 0
        """How many peers proved a checkpoint of the newest epoch when they were asked last."""

    async def newest(self, provers_min: int, entries_max: int | None = None) -> Offer | None:
        """The checkpoint with the most entries (up to ``entries_max``) that peers show; None if there is none.

        It is of the newest epoch that any of them proves, and ``provers_min`` of them prove a checkpoint of it.
        """
        now = trio.current_time()
        self._shunned = {peer: until for peer, until in self._shunned.items() if until > now}
        peers = [peer for peer in self._network.peers() if peer not in self._shunned][:ASKED_MAX]
        offers: list[Offer] = []
        chains: list[CommitteeChain] = []

        async def ask(peer_id: PeerId) -> None:
            try:
                with trio.move_on_after(OFFER_S):
                    chain, offer = await self._offer_of(peer_id)
                    chains.append(chain)
                    if offer is not None:
                        offers.append(offer)
            except RiosError as error:
                log.info("checkpoint of %s: %s", peer_id, error.message)

        async with trio.open_nursery() as nursery:
            for peer_id in peers:
                nursery.start_soon(ask, peer_id)
        newest = max((chain.epoch for chain in chains), default=0)
        provers = [offer for offer in offers if offer.chain.epoch == newest]
        self.provers = len(provers)
        if len(provers) < provers_min:
            return None
        fitting = [o for o in provers if entries_max is None or o.proof.summary.entries <= entries_max]
        return max(fitting, key=lambda offer: offer.proof.summary.entries, default=None)

    async def _offer_of(self, peer_id: PeerId) -> tuple[CommitteeChain, Offer | None]:
        """A peer's committees, followed from the genesis, and the checkpoint that it proves."""
        chain = CommitteeChain(self._genesis)
        verifier = Verifier(self._genesis, chain)
        followed: list[Certificate] = []
        seq = 0
        while True:
            header = {"net": self._genesis.net, "since": len(followed)}
            reply = await self._network.call(peer_id, "ledger.checkpoint", header, deadline_ms=DEADLINE_MS)
            for data in reply.buffers[:COMMITTEES_PER_ANSWER]:
                certificate = certificates.decode(bytes(data))
                seq = self._follow(chain, verifier, certificate, seq)
                followed.append(certificate)
            if len(reply.buffers) < COMMITTEES_PER_ANSWER:
                break
        if reply.header.get("proof") is None:
            return chain, None
        proof = codec.decode(Proof, field(reply, "proof"), bytes_max=PROOF_BYTES_MAX)
        checkpoint.check_proof(chain, proof)
        pages = reply.header.get("pages")
        if type(pages) is not int or not 0 <= pages <= PAGES_MAX:
            raise IntegrityError("integrity", f"{peer_id} sent a malformed checkpoint")
        return chain, Offer(peer_id, proof, pages, tuple(followed), chain)

    def _follow(self, chain: CommitteeChain, verifier: Verifier, certificate: Certificate, seq: int) -> int:
        """One more change of committee or issuer. They rise: there is an end to what a peer can show."""
        item = verifier.open(certificate)
        entry = item.object
        if not isinstance(entry, Entry) or entry.account != self._genesis.root:
            raise RuleError("root", "a committee is not named by the network's root")
        if entry.seq <= seq or not checkpoint.is_of_committees(entry):
            raise RuleError("root", "what should be the next change of committee or issuer is none")
        checkpoint.adopt_committees(chain, [item])
        return entry.seq

    async def fetch(self, offer: Offer, check: Callable[[Page], None], pages_max: int) -> tuple[list[bytes], Snapshot]:
        """The pages of a checkpoint, as they travel and as they read; who cannot show them is left out for a while.

        Raises RiosError.
        """
        try:
            if offer.pages > pages_max:
                raise IntegrityError("integrity", f"{offer.peer_id} shows a checkpoint of too many pages")
            return await self.pages(offer.peer_id, offer.proof.summary, offer.chain, offer.pages, check, FETCH_S)
        except RiosError as error:
            if isinstance(error, RuleError) and error.wait:
                raise  # this node lacks something
            self._shunned[offer.peer_id] = trio.current_time() + SHUN_S
            raise

    async def pages(
        self,
        peer_id: PeerId,
        summary: Summary,
        committees: CommitteeChain,
        count: int,
        check: Callable[[Page], None],
        seconds: float,
    ) -> tuple[list[bytes], Snapshot]:
        """The pages that lead to a summary. ``check`` is shown each at once and raises RiosError if it is wrong."""
        summing = checkpoint.Summing(committees, summary.supply, summary.entries)
        encoded: list[bytes] = []
        snapshot = Snapshot({}, {})
        left = PAGES_BYTES_MAX
        with trio.move_on_after(seconds) as scope:
            for number in range(count):
                encoded.append(await self._page(peer_id, summary.state_root, number))
                left -= len(encoded[-1])
                page = codec.decode(Page, encoded[-1], bytes_max=PAGE_BYTES_MAX)
                if left < 0 or not (page.accounts or page.channels):
                    raise IntegrityError("integrity", f"{peer_id} sent an empty page, or too many of them")
                check(page)
                await self._aside(summing.add, page)
                checkpoint.add_lines(snapshot, page)
        if scope.cancelled_caught:
            raise RemoteError("deadline", f"the pages of a checkpoint did not come in {seconds:g} s", peer_id=peer_id)
        if await self._aside(summing.summary) != summary:
            raise RuleError("checkpoint", "the pages of a checkpoint do not lead to its root")
        return encoded, snapshot

    async def _page(self, peer_id: PeerId, root: bytes, number: int) -> bytes:
        header = {"net": self._genesis.net, "root": root, "number": number}
        reply = await self._network.call(peer_id, "ledger.page", header, deadline_ms=DEADLINE_MS, bulk=True)
        if len(reply.buffers) != 1 or len(reply.buffers[0]) > PAGE_BYTES_MAX:
            raise IntegrityError("integrity", f"{peer_id} sent no page of a checkpoint")
        return bytes(reply.buffers[0])


def field(message: Call | Reply, name: str) -> bytes:
    """Bytes out of a header. Raises IntegrityError."""
    value = message.header.get(name)
    if not isinstance(value, bytes):
        raise IntegrityError("integrity", f"the message lacks {name!r}")
    return value
