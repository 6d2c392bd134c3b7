"""Checkpoints between nodes: proposing, signing, fetching one, starting from one, dropping what lies below one.

Owns the methods ``ledger.checkpoint`` (the newest proof and the committees up to it), ``ledger.page`` and
``ledger.attest`` (a witness's signature). What a checkpoint *is* stands in ``core/checkpoint``, how peers are asked for
theirs in ``offers``.

Invariants: a witness signs only what its own state proves; a new node starts only from a checkpoint of the newest epoch
that :data:`PROVERS_MIN` peers prove, and follows the committees from the genesis itself; nothing is dropped before the
checkpoint it stands below is on this disk. One proposal of a witness's node and one of somebody else are looked at at a
time, and none whose pages speak of more than the own state.
"""

import logging
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import trio

from config.errors import RemoteError, RequestError, RiosError
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.core import certificate as certificates
from ledger.core import checkpoint
from ledger.core.checkpoint import Page, Proof, Snapshot, Summary, is_of_committees
from ledger.core.errors import RuleError
from ledger.core.objects import SMALL_BYTES_MAX, Certificate, Entry, Item, Signed
from ledger.notes import Notes
from ledger.offers import COMMITTEES_PER_ANSWER, PAGES_MAX, Offers, field
from ledger.quorum import Heal
from ledger.seats import Seats
from p2p.core import codec
from p2p.face import Call, Network, Reply

log = logging.getLogger("rios.ledger")

PROVERS_MIN = 2
ATTEST_DEADLINE_MS = 120_000
LOOK_S = ATTEST_DEADLINE_MS / 1000
STRANGERS_REST = 9
PROPOSE_S = 180.0
DUE_TICK_S = 10.0
"""How often a witness looks whether a checkpoint is due; so long a witness leaves to the one whose turn is before."""
RETRY_S = 0.5
FRESH_ENTRIES_MAX = 1000
HELD_MAX = 6
"""Rounds that a fresh node waits for a second peer to prove a checkpoint; then it begins with the genesis."""
LOOK_AGAIN_S = 600.0
"""Between two tries of a node that was away: what it lacks may have been pruned by all, and no checkpoint fit."""


class Checkpoints:
    """The checkpoints of one node."""

    def __init__(
        self,
        network: Network,
        book: Book,
        notes: Notes,
        seats: Seats,
        heal: Heal,
        *,
        archive: bool,
        every: int,
        in_thread: bool,
    ) -> None:
        self._network, self._book, self._notes, self._seats, self._heal = network, book, notes, seats, heal
        self._archive, self._every, self._in_thread = archive, every, in_thread
        self._proposing, self._starting, self._checking = trio.Lock(), trio.Lock(), trio.Lock()
        self._offers = Offers(network, book.state.committees, notes.peer_of, self._aside)
        self._looking: set[bool] = set()
        self._rests: dict[PeerId, float] = {}
        self._offered: dict[bytes, list[bytes]] = {}
        self._changes: list[int] = []
        """Where in the root's chain the changes of committee and issuer stand."""
        self._find_changes()
        book.replaced.append(self._find_changes)
        book.listeners.append(self._on_final)
        self._empty = book.state.applied <= len(self._changes)
        """Whether this node began with nothing but what nobody ever drops."""
        self._fresh = self._empty
        self._pruned: set[PeerId] = set()
        self._look_at = -math.inf
        self._held = 0
        network.serve("ledger.checkpoint", self._serve_newest)
        network.serve("ledger.page", self._serve_page)
        network.serve("ledger.attest", self._serve_attest)

    def _find_changes(self) -> None:
        self._changes = [item.object.seq for item in self._book.store.committee_entries(self._book.genesis.root)]

    def _on_final(self, item: Item, _certificate: Certificate) -> None:
        entry = item.object
        if isinstance(entry, Entry) and entry.account == self._book.genesis.root and is_of_committees(entry):
            self._changes = sorted({*self._changes, entry.seq})

    async def _aside(self, work: Any, *args: Any) -> Any:  # noqa: ANN401 - any function's result
        """Hashing of megabytes, out of the way of everything else."""
        return await trio.to_thread.run_sync(work, *args) if self._in_thread else work(*args)

    # proposing

    async def propose(self) -> Proof:
        """Let the witnesses sign the state of this node as it is now; the checkpoint is on disk when this returns.

        Raises RemoteError ``unavailable`` if too few of them agree in time, or with what they object to.
        """
        async with self._proposing:  # two of one state would take each other's pages away
            return await self._propose()

    async def _propose(self) -> Proof:
        state = self._book.state
        await self._book.writer.flush()
        pages = list(checkpoint.pages(state))
        committees, supply, entries = state.committees, state.supply, state.applied
        summary: Summary = await self._aside(checkpoint.summarise, pages, committees, supply, entries)
        encoded: list[bytes] = await self._aside(lambda: [codec.encode(page) for page in pages])
        root = summary.state_root
        self._offered[root] = encoded
        try:
            signatures = await self._collect(summary, len(encoded))
        finally:
            del self._offered[root]
        proof = Proof(summary, signatures)
        checkpoint.check_proof(committees, proof)
        await self._book.writer.commit(self._book.store.shelf.keep(proof, encoded))
        return proof

    async def _collect(self, summary: Summary, pages: int) -> tuple[Signed, ...]:
        committee = self._book.state.committees.of(summary.epoch)
        found: dict[bytes, Signed] = {}
        errors: dict[PeerId, RiosError] = {}
        with trio.move_on_after(PROPOSE_S):
            async with trio.open_nursery() as nursery:

                async def ask(peer_id: PeerId) -> None:
                    signed = await self._ask(peer_id, summary, pages, errors)
                    if signed is not None:
                        found[checkpoint.check_signature(self._book.state.committees, summary, signed)] = signed
                    if len(found) >= committee.quorum:
                        nursery.cancel_scope.cancel()

                for key in committee.keys:
                    nursery.start_soon(ask, self._notes.peer_of(summary.epoch, key))
        if len(found) < committee.quorum:
            why = "; ".join(f"{peer}: {error.message}" for peer, error in errors.items()) or "no answer"
            what = f"{len(found)} of {committee.quorum} witnesses signed the checkpoint ({why})"[:500]
            raise RemoteError("unavailable", what, "are enough witnesses running and reachable?")
        return tuple(found.values())

    async def _ask(
        self, peer_id: PeerId, summary: Summary, pages: int, errors: dict[PeerId, RiosError]
    ) -> Signed | None:
        """A witness's signature, or None once it has refused for good. What it lacks is brought to it first."""
        header = {"net": self._book.genesis.net, "summary": codec.encode(summary), "pages": pages}
        while True:
            try:
                reply = await self._network.call(peer_id, "ledger.attest", header, deadline_ms=ATTEST_DEADLINE_MS)
                signed = codec.decode(Signed, field(reply, "signature"), bytes_max=2 * SMALL_BYTES_MAX)
                checkpoint.check_signature(self._book.state.committees, summary, signed)
                return signed
            except RiosError as error:
                errors[peer_id] = error
                if error.code in ("integrity", "forbidden", "not_found", "invalid_request"):
                    return None
            try:
                if peer_id != self._network.identity.peer_id:
                    await self._heal(peer_id)
            except RiosError as error:
                errors[peer_id] = error
            await trio.sleep(RETRY_S)

    # on its own

    async def run(self) -> None:
        """Make a checkpoint after every so many entries while this node is a witness, until cancelled."""
        if not self._every:
            return
        ticks = 0
        while True:
            await trio.sleep(DUE_TICK_S)
            ticks = ticks + 1 if self._is_due() else 0
            if ticks > self._place():
                await self._make()

    def _is_due(self) -> bool:
        newest = self._book.store.shelf.newest()
        return self._book.state.applied - (newest.summary.entries if newest else 0) >= self._every

    def _place(self) -> int:
        """How many witnesses of the epoch come before this one, from one checkpoint to the next another is the first:
        all at once would only get in each other's way, and the others find what the first made."""
        committee = self._book.state.committees.of(self._book.state.committees.epoch)
        witness = self._seats.witness
        if witness is None or witness.key not in committee.keys:
            return 1 << 62
        first = self._book.state.applied // self._every
        return (committee.keys.index(witness.key) - first) % len(committee.keys)

    async def _make(self) -> None:
        try:
            await self.obtain()
        except RiosError as error:  # whoever shows one that is none keeps nobody from making one
            log.info("checkpoint of a peer: %s", error.message)
        try:
            if self._is_due():
                proof = await self.propose()
                log.info("made a checkpoint of %d entries", proof.summary.entries)
        except RiosError as error:
            log.warning("could not make a checkpoint, trying again: %s", error.message)

    # signing

    async def _serve_attest(self, call: Call) -> Reply:
        self._check_net(call)
        summary = codec.decode(Summary, field(call, "summary"), bytes_max=SMALL_BYTES_MAX)
        witness, state = self._seats.present(), self._book.state
        count = call.header.get("pages")
        if type(count) is not int or not 0 <= count <= PAGES_MAX:
            raise RiosError("invalid_request", f"'pages' must be a number up to {PAGES_MAX}")
        if summary.epoch != witness.epoch:
            raise RuleError("epoch", f"a checkpoint of epoch {summary.epoch}; this witness votes in {witness.epoch}")
        with self._turn(call.peer_id, witness.epoch):
            checkpoint.check_distance(state, summary)
            if count > checkpoint.pages_max(state):
                raise RuleError("frontier", "the proposed checkpoint has more pages than is known here", wait=True)
            check = partial(checkpoint.check_page, state)
            _, snapshot = await self._offers.pages(call.peer_id, summary, state.committees, count, check, LOOK_S)
            async with self._checking:
                await self._check_state(summary, snapshot)
        return Reply({"signature": codec.encode(witness.attest(summary))})

    @contextmanager
    def _turn(self, peer_id: PeerId, epoch: int) -> Iterator[None]:
        """Strangers have one turn together, so that they do not stand in the way of the witnesses, which make the
        checkpoints of themselves; after it they rest nine times as long. A witness that had one for nothing rests for
        as long as it took."""
        known = peer_id in self._notes.witnesses(epoch)
        who = peer_id if known else PeerId("")
        start = trio.current_time()
        if known in self._looking or start < self._rests.get(who, 0.0):
            raise RemoteError("busy", "another checkpoint is being looked at", "try again")
        self._looking.add(known)
        signed = False
        try:
            yield
            signed = known
        finally:
            self._looking.discard(known)
            now = trio.current_time()
            self._rests[who] = now if signed else now + (now - start) * (1 if known else STRANGERS_REST)

    async def _check_state(self, summary: Summary, snapshot: Snapshot) -> None:
        """The own state says the same (rule 10)."""
        await self._book.writer.flush()
        for _ in checkpoint.proposal_steps(self._book.state, summary, snapshot, self._book.store.entry_items):
            await trio.lowlevel.checkpoint()

    # fetching

    async def start(self) -> Proof | None:
        """Start this node, which is fresh or was away for long, from the newest checkpoint of its peers; None if they
        prove none, or all is wanted."""
        async with self._starting:
            if not self._is_fresh() and not self._is_behind():
                return None
            offers = await self._offers.best(PROVERS_MIN, above=self._book.state.applied, anyhow=True)
            if not offers:
                return None
            offer, encoded, _ = await self._offers.fetch(offers, _anything, PAGES_MAX)
            async with self._checking:  # which compares proposals with the state as it is
                await self._book.start_from(offer.committees, offer.proof, encoded)
            self._fresh = self._empty = False
            self._pruned.clear()
        log.info("started from a checkpoint of %d entries of %s", offer.proof.summary.entries, offer.peer_id)
        return offer.proof

    def _is_fresh(self) -> bool:
        """Whether this node began with nothing, and has nothing yet but what gossip brought."""
        return self._fresh and not self._archive and self._book.state.applied < FRESH_ENTRIES_MAX

    def _is_behind(self) -> bool:
        """Whether what this node lacks next was pruned, as more than one peer says."""
        return len(self._pruned) >= PROVERS_MIN and not self._archive

    async def before_round(self, pruned: Collection[PeerId]) -> bool:
        """What a fresh node does before it asks for single objects; False: not yet, more peers may come that prove the
        checkpoint that one of them shows. ``pruned``: these keep not all from the genesis on, so a node that went on
        without a checkpoint, or was away while they pruned, looks for one (again)."""
        self._fresh = self._fresh or (bool(pruned) and self._empty)
        self._pruned.update(pruned)
        if self._is_fresh():
            await self._try_start()
            self._held += 1
            self._fresh = self._fresh and self._offers.undecided and self._held <= HELD_MAX
            return not self._fresh
        if len(self._pruned) >= PROVERS_MIN and trio.current_time() >= self._look_at:
            if not await self._try_start():
                log.warning(
                    "%d peers say that they pruned what this node lacks, and it could not start from a checkpoint: "
                    "its copy of the ledger stays behind until one of them has everything, or a newer "
                    "checkpoint",
                    len(self._pruned),
                )
            self._look_at = trio.current_time() + LOOK_AGAIN_S
            self._pruned.clear()
        return True

    async def _try_start(self) -> bool:
        try:
            return await self.start() is not None
        except RiosError as error:
            log.warning("could not start from a checkpoint: %s", error.message)
            return False

    async def obtain(self) -> Proof | None:
        """Keep the newest checkpoint of the peers, checked against the own state; None if none is newer."""
        state, mine = self._book.state, self._book.store.shelf.newest()
        offers = await self._offers.best(1, above=mine.summary.entries if mine else 0, up_to=state.applied)
        if not offers:
            return None
        check = partial(checkpoint.check_page, state)
        offer, encoded, snapshot = await self._offers.fetch(offers, check, checkpoint.pages_max(state))
        async with self._checking:
            await self._check_state(offer.proof.summary, snapshot)
        await self._book.writer.commit(self._book.store.shelf.keep(offer.proof, encoded))
        return offer.proof

    # pruning

    async def prune(self) -> tuple[Proof, int]:
        """Drop what lies below the newest checkpoint on this disk; it and the bytes that became free.

        Raises RequestError for an archive, or where there is no checkpoint.
        """
        if self._archive:
            raise RequestError(
                "forbidden", "this node is an archive: it keeps everything", "set ledger.archive = false"
            )
        async with self._checking:  # and not while the state becomes the one of another checkpoint
            return await self._prune()

    async def _prune(self) -> tuple[Proof, int]:
        store = self._book.store
        proof = store.shelf.newest()
        if proof is None:
            hint = "make one: rios ledger checkpoint --new"
            raise RequestError("not_found", "there is no checkpoint on this disk", hint)
        root = proof.summary.state_root
        snapshot = checkpoint.read(store.shelf.pages(root))
        frontier = {line.key: line.seq for line in snapshot.accounts.values()}
        keep = store.committee_entries(self._book.genesis.root)
        base = store.shelf.start_from(root)
        freed = await self._book.writer.run(lambda: store.prune(base, keep, frontier.items(), snapshot.channels))
        self._book.pruned_below = frontier
        return proof, freed

    # serving

    def _check_net(self, call: Call) -> None:
        if call.header.get("net") != self._book.genesis.net:
            raise RiosError("conflict", "this node belongs to another ledger network", "compare the genesis files")

    async def _serve_newest(self, call: Call) -> Reply:
        self._check_net(call)
        since = call.header.get("since", 0)
        if type(since) is not int or since < 0:
            raise RiosError("invalid_request", "'since' must be a number")
        store, root = self._book.store, self._book.genesis.root
        buffers = []
        for seq in self._changes[since : since + COMMITTEES_PER_ANSWER]:
            certificate = store.entry_certificate(root, seq)
            assert certificate is not None
            buffers.append(certificates.encode(certificate))
        proof = store.shelf.newest()
        if proof is None:
            return Reply({}, buffers)
        pages = store.shelf.count(proof.summary.state_root)
        return Reply({"proof": codec.encode(proof), "pages": pages}, buffers)

    async def _serve_page(self, call: Call) -> Reply:
        self._check_net(call)
        root, number = call.header.get("root"), call.header.get("number")
        if not isinstance(root, bytes) or type(number) is not int or not 0 <= number < PAGES_MAX:
            raise RiosError("invalid_request", "'root' and 'number' are needed")
        offered = self._offered.get(root)
        if offered is not None:
            page = offered[number] if number < len(offered) else None
        else:
            page = self._book.store.shelf.page(root, number)
        if page is None:
            raise RiosError("not_found", "this node has no such page")
        return Reply({}, [page])


def _anything(_page: Page) -> None:
    """A fresh node has nothing to compare a page with."""
