"""Checkpoints that peers show: who proves which one, and its pages.

Owns what is asked of peers about checkpoints and its bounds: a peer's committees are followed as long as they rise, its
pages are checked one by one as they come, all of it within a time. Peers are asked in groups, by chance, and the nodes
of witnesses first: whoever has the oldest links, or many, does not choose who is heard. Pages come from a second peer
as well if the first takes long. A peer whose pages came to nothing is left out for a while, so that one that shows more
than it has does not keep the others' checkpoints away.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
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
from ledger.core.objects import Certificate, Entry
from ledger.shelf import PROOF_BYTES_MAX
from p2p.core import codec
from p2p.face import Call, Network, Reply

log = logging.getLogger("rios.ledger")

ASKED_MAX = 8
"""Peers that are asked together."""
GROUPS_MAX = 4
NEXT_AFTER_S = 10.0
"""Peers that take longer are not waited for any more before the next ones are asked as well."""
CONFIRMED_MIN = 2
PAGES_MAX = 1 << 16
PAGES_BYTES_MAX = 512 << 20
"""Of the state a fresh node takes over: about six million accounts. Nothing that is signed says how many there are."""
COMMITTEES_PER_ANSWER = 64
DEADLINE_MS = 20_000
OFFER_S = 60.0
FETCH_S = 900.0
BESIDE_MAX = 2
"""Peers of whom pages are held at once, each up to PAGES_BYTES_MAX."""
BESIDE_AFTER_S = 60.0
"""Pages that take longer are fetched from the next peer as well."""
SHUN_S = 600.0
SHUN_TIMES = 4
"""A peer is left out for so many times what it took, at least for SHUN_S."""

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

    def __init__(
        self, network: Network, committees: CommitteeChain, peer_of: Callable[[int, bytes], PeerId], aside: Aside
    ) -> None:
        """``committees`` as far as they are known here; ``peer_of`` an epoch and a witness tells its node."""
        self._network, self._committees, self._peer_of, self._aside = network, committees, peer_of, aside
        self._genesis = committees.genesis
        self._random = random.Random()
        self._shunned: dict[PeerId, float] = {}
        self.undecided = True
        """Whether the last asking found that there is a checkpoint, or nobody who answered: the next one may get it."""

    async def best(
        self, provers_min: int, *, above: int, up_to: int | None = None, anyhow: bool = False
    ) -> list[Offer]:
        """The checkpoints of more than ``above`` entries (up to ``up_to``) that peers show, the best first.

        They are of the newest epoch that any of the peers proves; none unless ``provers_min`` prove one. Who is left
        out still proves that there is one. ``anyhow``: if all are left out, try the one that would be back first; it
        may have been the own link that failed.
        """
        now = trio.current_time()
        self._shunned = {peer: until for peer, until in self._shunned.items() if until > now}
        asked = {self._network.identity.peer_id}
        chains: list[CommitteeChain] = [self._committees]
        offers: list[Offer] = []
        told, heard = trio.open_memory_channel[None](ASKED_MAX * GROUPS_MAX)
        under_way = 0

        async def ask(peer_id: PeerId) -> None:
            try:
                with trio.move_on_after(OFFER_S):
                    chain, offer = await self._offer_of(peer_id)
                    chains.append(chain)
                    if offer is not None:
                        offers.append(offer)
            except RiosError as error:
                log.info("checkpoint of %s: %s", peer_id, error.message)
            told.send_nowait(None)

        def proven() -> list[Offer]:
            newest = [offer for offer in offers if offer.chain.epoch == _newest(chains).epoch]
            newest = [offer for offer in newest if offer.proof.summary.entries > above]
            return [offer for offer in newest if up_to is None or offer.proof.summary.entries <= up_to]

        def usable() -> list[Offer]:
            return [offer for offer in self._ranked(proven(), _newest(chains)) if offer.peer_id not in self._shunned]

        async with trio.open_nursery() as nursery:
            for _ in range(GROUPS_MAX):
                group = self._group(asked, _newest(chains))
                asked.update(group)
                under_way += len(group)
                for peer_id in group:
                    nursery.start_soon(ask, peer_id)
                with trio.move_on_after(NEXT_AFTER_S):
                    while under_way:
                        await heard.receive()
                        under_way -= 1
                if len(proven()) >= provers_min and usable():
                    nursery.cancel_scope.cancel()
                    break
        self.undecided = bool(proven()) or len(chains) == 1
        if len(proven()) < provers_min:
            return []
        return usable() or (self._back_first(self._ranked(proven(), _newest(chains))) if anyhow else [])

    def _back_first(self, offers: list[Offer]) -> list[Offer]:
        return sorted(offers, key=lambda offer: self._shunned[offer.peer_id])[:1]

    def _nodes_of(self, chain: CommitteeChain) -> list[PeerId]:
        """Where the witnesses of a chain's newest epoch are, as far as is known here."""
        return [*dict.fromkeys(self._peer_of(chain.epoch, key) for key in chain.current.keys)]

    def _group(self, asked: set[PeerId], chain: CommitteeChain) -> list[PeerId]:
        """Whom to ask next: by chance, half of them nodes of witnesses. Those make the checkpoints, linked or not; but
        where a witness is may be known here no more, so they do not take all the places."""
        nodes = [peer for peer in self._nodes_of(chain) if peer not in asked]
        others = [peer for peer in self._network.peers() if peer not in asked and peer not in nodes]
        self._random.shuffle(nodes)
        self._random.shuffle(others)
        half = ASKED_MAX // 2
        return [*nodes[:half], *others, *nodes[half:]][:ASKED_MAX]

    def _ranked(self, offers: list[Offer], chain: CommitteeChain) -> list[Offer]:
        """First what so many witnesses show that one of them is honest, then what is not the word of one peer alone,
        then by the number of entries: that is not signed, anybody can show a higher one. What most peers show would be
        an old one: ordinary nodes keep the one that they began with. Of those that show the same, nodes of witnesses
        come first: as many others as somebody likes can repeat it, and let its pages trickle."""
        peers: defaultdict[Summary, set[PeerId]] = defaultdict(set)
        for offer in offers:
            peers[offer.proof.summary].add(offer.peer_id)
        nodes = {*self._nodes_of(chain)}

        def rank(offer: Offer) -> tuple[bool, bool, int, bool]:
            summary = offer.proof.summary
            who = peers[summary]
            known = len(who & nodes) > chain.current.f
            return known, len(who) >= CONFIRMED_MIN, summary.entries, offer.peer_id in nodes

        self._random.shuffle(offers)
        return sorted(offers, key=rank, reverse=True)

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

    async def fetch(
        self, offers: Sequence[Offer], check: Callable[[Page], None], pages_max: int
    ) -> tuple[Offer, list[bytes], Snapshot]:
        """The first of the best checkpoints whose pages are all there: as they travel, and as they read.

        Raises RiosError.
        """
        whole: list[tuple[Offer, list[bytes], Snapshot]] = []
        errors: list[RiosError] = []
        async with trio.open_nursery() as nursery:

            async def fetch(offer: Offer, failed: trio.Event) -> None:
                try:
                    whole.append((offer, *await self._fetch(offer, check, pages_max)))
                    nursery.cancel_scope.cancel()
                except RiosError as error:
                    errors.append(error)
                    failed.set()

            for offer in offers[:BESIDE_MAX]:
                failed = trio.Event()
                nursery.start_soon(fetch, offer, failed)
                with trio.move_on_after(BESIDE_AFTER_S):
                    await failed.wait()
        if not whole:
            raise errors[0]
        return whole[0]

    async def _fetch(self, offer: Offer, check: Callable[[Page], None], pages_max: int) -> tuple[list[bytes], Snapshot]:
        """Who cannot show the pages of its checkpoint is left out for a while, however that shows: also if another was
        faster, or the caller gave up."""
        start, to_blame = trio.current_time(), True
        try:
            if offer.pages > pages_max:
                raise IntegrityError("integrity", f"{offer.peer_id} shows a checkpoint of too many pages")
            found = await self.pages(offer.peer_id, offer.proof.summary, offer.chain, offer.pages, check, FETCH_S)
            to_blame = False
            return found
        except RuleError as error:
            to_blame = not error.wait  # this node lacks something
            raise
        finally:
            if to_blame:
                now = trio.current_time()
                self._shunned[offer.peer_id] = now + max(SHUN_S, SHUN_TIMES * (now - start))

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


def _newest(chains: Iterable[CommitteeChain]) -> CommitteeChain:
    return max(chains, key=lambda chain: chain.epoch)


def field(message: Call | Reply, name: str) -> bytes:
    """Bytes out of a header. Raises IntegrityError."""
    value = message.header.get(name)
    if not isinstance(value, bytes):
        raise IntegrityError("integrity", f"the message lacks {name!r}")
    return value
