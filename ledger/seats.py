"""This node's seats in the committees: from taking one to erasing its key.

Owns the :class:`~ledger.core.witness.Witness` of every epoch in which this node holds a key, brings it back after a
restart, has handovers fetched (``collecting``) and serves them, stops and hands over when the next committee is final,
erases the epoch's key. ``voting`` serves the votes of whichever seat is the present one.

Invariants: a handover leaves only when it and the stop are durable, and its key is erased after that. A seat that may
have forgotten promises (a database from a backup) stays silent for its epoch: noticed by the mark outside the database
(``mark``), by peers that know later batches of it, which are asked before the first vote after every start, and by
certificates that come in later.
"""

import logging
import math
import random
from contextlib import suppress
from functools import partial

import trio

from config.errors import RemoteError, RiosError
from config.vocabulary import PeerId
from ledger.book import Book
from ledger.collecting import DEADLINE_MS, PIECE_BYTES, Collecting
from ledger.core.errors import RuleError
from ledger.core.objects import (
    Certificate,
    Claim,
    Item,
    Seat,
    Signed,
    Votes,
    open_signed,
    sign,
)
from ledger.core.witness import COLLECTING, HANDED_OVER, HandedOver, Witness
from ledger.keys import EpochKeys
from ledger.lineage import Lineage
from ledger.notes import Notes
from ledger.promises import Handed, Listed, Standing, recall
from p2p.face import Call, Network, Reply

log = logging.getLogger(__name__)

CHECKS = 64
"""Signatures of a handover checked before other tasks get a turn (about 5 ms)."""
PAUSE_S = 1.0
RETRY_S = 5.0
TOO_LARGE_PAUSE_S = 300.0
LATE_PAUSE_S = 30.0
"""Between rounds for handovers that are not needed to begin."""


class Seats:
    """The witnesses that this node is."""

    def __init__(
        self, network: Network, book: Book, notes: Notes, keys: EpochKeys, lineage: Lineage, *, active: bool
    ) -> None:
        self._network = network
        self._book = book
        self._notes = notes
        self._keys = keys
        self._lineage = lineage
        self._active = active
        self._seats: dict[int, Witness] = {}
        self._vouched: set[int] = set()
        self._too_large: dict[int, float] = {}
        """Epochs whose handover has no room, and when it is tried again."""
        self._handing = trio.Lock()
        self._changed = trio.Event()
        self._joined = trio.Event()
        self._random = random.Random()
        self._collecting = Collecting(network, book.genesis.net)
        self._seen_epoch = -1
        if active:
            self._sit()
            self._changed.set()  # what was collected before the restart may be enough
        book.listeners.append(self._on_final)
        network.serve("ledger.handover", self._serve_handover)
        network.serve("ledger.batches", self._serve_batches)

    # accessors

    @property
    def witness(self) -> Witness | None:
        """The witness of the newest epoch, if this node is one."""
        return self._seats.get(self._book.state.committees.epoch)

    def present(self) -> Witness:
        """The same. Raises :class:`RuleError`: ``epoch`` (waits) if this node has no seat, or the reason to wait."""
        epoch, witness = self._book.state.committees.epoch, self.witness
        if witness is None:
            raise RuleError("epoch", f"this node is no witness of epoch {epoch}", wait=True)
        if epoch not in self._vouched:
            raise RuleError("restart", "this witness asks its peers whether it has forgotten anything", wait=True)
        return witness

    async def allow(self, entry_id: bytes) -> None:
        """The operator agrees to a change of the committee or the issuer (rule 6)."""
        await self._book.writer.commit([Listed(entry_id)])
        for witness in self._seats.values():
            witness.listed.add(entry_id)

    async def trust_again(self) -> None:
        """The operator of the only witness vouches for a database that came from a backup.

        Raises RuleError where others could be harmed: with f > 0 the committee goes on without this witness.
        """
        witness = self.witness
        if witness is None or not witness.restored:
            raise RuleError("restored", "no witness of this node was restored from a backup")
        if self._book.state.committees.of(witness.epoch).f:
            raise RuleError("restored", "it may have voted for other entries; the others go on until the next epoch")
        await self._book.writer.commit(
            [
                self._lineage.trust(witness.key),
                Standing(witness.epoch, witness.key, witness.phase, False),
            ]
        )
        self._lineage.trusted(witness.key)
        witness.restored = False

    # taking seats

    def _sit(self) -> None:
        """Take every seat there is a key for, old ones too while they have not handed over."""
        committees = self._book.state.committees
        for committee in committees.epochs[self._seen_epoch + 1 :]:
            for key in committee.keys:
                standing = self._book.store.promises.standing(committee.epoch, key)
                if standing is not None and standing.phase == HANDED_OVER:
                    self._keys.erase(key)  # if the last run ended between the two
                    continue
                identity = self._keys.find(key)
                if identity is not None:
                    self._seats[committee.epoch] = self._recall(Witness(identity, self._book.state, committee.epoch))
                    if not committee.f:
                        self._vouched.add(committee.epoch)  # alone: nobody to ask
        self._seen_epoch = committees.epoch

    def _recall(self, witness: Witness) -> Witness:
        store = self._book.store
        recall(store.promises, witness, store.voted(witness.epoch), store.final_claims())
        witness.restored = witness.restored or self._lineage.has_forgotten(witness.key)
        return witness

    # what is going on

    def _on_final(self, item: Item, certificate: Certificate) -> None:
        for witness in self._seats.values():
            if isinstance(item.object, Claim):
                witness.saw_voucher(item.object.voucher, item.object.voucher_signature)
            witness.forget_slot(item)
            if certificate.epoch == witness.epoch:
                self._compare(witness, certificate)
        begins = self._book.state.committees.epoch != self._seen_epoch
        if self._active and (begins or any(_waits(w) for w in self._seats.values())):
            self._changed.set()

    def _compare(self, witness: Witness, certificate: Certificate) -> None:
        for vote in certificate.votes:
            number = self._book.verifier.batch_no(vote, witness.key, witness.epoch)
            if number is not None and witness.notice(number):
                self._vouched.discard(witness.epoch)  # the next round makes it durable

    async def run(self) -> None:
        """Take seats, collect handovers, hand over, until cancelled."""
        if self._active:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_steps)
                nursery.start_soon(self._run_rounds)

    async def _run_steps(self) -> None:
        while True:
            with trio.move_on_after(TOO_LARGE_PAUSE_S if self._too_large else math.inf):
                await self._changed.wait()
            self._changed = trio.Event()
            try:
                await self.advance()
            except RiosError as error:
                log.error("this node's witness cannot go on: %s", error)
                await trio.sleep(RETRY_S)
                self._changed.set()

    async def _run_rounds(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                for witness in list(self._seats.values()):
                    try:
                        await self._tend(witness, nursery)
                    except RiosError as error:
                        log.error("the witness of epoch %d: %s", witness.epoch, error)
                with trio.move_on_after(self._pause_s()):
                    await self._joined.wait()
                self._joined = trio.Event()

    def _pause_s(self) -> float:
        busy = any(w.epoch not in self._vouched or w.phase == COLLECTING for w in self._seats.values())
        return (PAUSE_S if busy else LATE_PAUSE_S) * self._random.uniform(0.5, 1.5)

    async def _tend(self, witness: Witness, nursery: trio.Nursery) -> None:
        if witness.epoch not in self._vouched and await self._ask_about(witness):
            self._vouched.add(witness.epoch)
        if witness.key != self._network.identity.public_key:
            await self._announce(witness)
        if witness.inheritance is not None:
            await self._collect(witness, nursery)

    # handing over

    async def advance(self) -> None:
        """Every step that is due after a change of the state."""
        async with self._handing:
            if self._active and self._book.state.committees.epoch != self._seen_epoch:
                self._sit()
                self._joined.set()
            for witness in list(self._seats.values()):
                if trio.current_time() < self._too_large.get(witness.epoch, 0.0):
                    continue
                try:
                    effect = await self._step(witness)
                except RuleError as error:  # of this one; the node's next witness may be what the network waits for
                    log.error("the witness of epoch %d cannot hand over: %s", witness.epoch, error)
                    self._too_large[witness.epoch] = trio.current_time() + TOO_LARGE_PAUSE_S
                    continue
                if effect is not None:
                    await self._hand_over(witness, effect)
                    self._too_large.pop(witness.epoch, None)

    async def _step(self, witness: Witness) -> HandedOver | None:
        effect = witness.advance(CHECKS)
        while witness.is_weighing:
            await trio.lowlevel.checkpoint()
            effect = witness.advance(CHECKS)
        return effect

    async def _hand_over(self, witness: Witness, effect: HandedOver) -> None:
        standing = Standing(effect.epoch, effect.witness, HANDED_OVER, False)
        handed = Handed(effect.epoch, effect.witness, effect.signed)
        # a promise like a vote: an older copy that does not know of it would vote on, where the key cannot be erased
        promise = self._lineage.promise()
        await self._book.writer.commit([standing, handed, promise])
        self._lineage.promised(promise)
        witness.confirm_handover()
        del self._seats[effect.epoch]
        self._keys.erase(effect.witness)

    async def _announce(self, witness: Witness) -> None:
        """Tell where this witness is found, as long as it holds its key."""
        identity = self._keys.find(witness.key)
        if identity is None or self._notes.peer_of(witness.epoch, witness.key) == self._network.identity.peer_id:
            return
        net, node = self._book.genesis.net, self._network.identity.public_key
        seat = sign(identity, Seat(net, witness.epoch, witness.key, node))
        await self._notes.add_seat(seat, announce=True)

    # collecting

    async def _collect(self, witness: Witness, nursery: trio.Nursery) -> None:
        """Begin to fetch what is missing; whatever comes is taken as it comes."""
        inheritance = witness.inheritance
        assert inheritance is not None
        old, committees = inheritance.old, self._book.state.committees
        others = self._notes.witnesses(witness.epoch)
        for key in [key for key in old.keys if key not in inheritance.received]:
            own = self._book.store.promises.handover(old.epoch, key)
            if own is not None:
                with suppress(RiosError):  # a full disk: the next round tries again
                    await self.receive(witness, own)
                continue
            first, f = self._notes.peer_of(old.epoch, key), max(old.f, committees.of(witness.epoch).f)
            self._collecting.begin(nursery, old.epoch, key, first, others, f, partial(self._take, witness, key))

    async def _take(self, witness: Witness, key: bytes, signed: Signed) -> bool:
        await self.receive(witness, signed)
        return witness.inheritance is not None and key in witness.inheritance.received

    async def receive(self, witness: Witness, signed: Signed) -> None:
        """Take a handover for ``witness``. Raises IntegrityError for a wrong one."""
        author = witness.author_of(signed)
        if author is not None:
            # durable first: what a full disk refused is not received, and the next round asks for it again
            await self._book.writer.commit([Handed(witness.epoch - 1, author, signed)])
            witness.receive(signed)
            self._changed.set()

    async def _serve_handover(self, call: Call) -> Reply:
        self._check_net(call)
        epoch, key, offset = (call.header.get(name) for name in ("epoch", "witness", "offset"))
        if type(epoch) is not int or not isinstance(key, bytes) or type(offset) is not int or offset < 0:
            raise RiosError("invalid_request", "'epoch', 'witness' and 'offset' are needed")
        found = self._book.store.handover_piece(epoch, key, offset, PIECE_BYTES)
        if found is None:
            raise RiosError("not_found", f"no handover of {key.hex()[:16]} of epoch {epoch} is here (yet)")
        size, piece, signature = found
        return Reply({"bytes": size, "signature": signature}, [piece])

    def _check_net(self, call: Call) -> None:
        if call.header.get("net") != self._book.genesis.net:
            raise RiosError("conflict", "this node belongs to another ledger network", "compare the genesis files")

    # has this witness forgotten anything?

    async def _ask_about(self, witness: Witness) -> bool:
        """Ask the committee for later batches of this witness; whether enough answered: f + 1, one of them honest.

        Who knows a newer epoch does not count: this copy of the ledger has to catch up first.
        """
        committee = self._book.state.committees.of(witness.epoch)
        answered: list[PeerId] = []

        async def ask(peer_id: PeerId) -> None:
            try:
                await self._ask_batches(witness, peer_id)
                answered.append(peer_id)
            except RiosError:
                return  # who is not up cannot warn; enough others must

        async with trio.open_nursery() as nursery:
            for key in committee.keys:
                if key != witness.key:
                    nursery.start_soon(ask, self._notes.peer_of(witness.epoch, key))
        if witness.restored:
            await self._book.writer.commit([Standing(witness.epoch, witness.key, witness.phase, True)])
        return len(answered) > committee.f or not committee.f

    async def _ask_batches(self, witness: Witness, peer_id: PeerId) -> None:
        ask = {"net": self._book.genesis.net, "epoch": witness.epoch, "witness": witness.key}
        reply = await self._network.call(peer_id, "ledger.batches", ask, deadline_ms=DEADLINE_MS)
        newest = reply.header.get("newest")
        if type(newest) is not int or newest > self._book.state.committees.epoch:
            raise RemoteError("conflict", f"{peer_id} knows a newer committee")
        header, signature = reply.header.get("header"), reply.header.get("signature")
        if isinstance(header, bytes) and isinstance(signature, bytes) and len(signature) == 64:
            votes = open_signed(Votes, Signed(header, signature), witness.key)
            if votes is not None and (votes.witness, votes.epoch) == (witness.key, witness.epoch):
                witness.notice(votes.batch_no)

    async def _serve_batches(self, call: Call) -> Reply:
        self._check_net(call)
        epoch, key = call.header.get("epoch"), call.header.get("witness")
        if type(epoch) is not int or not isinstance(key, bytes):
            raise RiosError("invalid_request", "'epoch' and 'witness' are needed")
        known = {"newest": self._book.state.committees.epoch}
        batch = self._book.newest_batch(epoch, key)
        return Reply(known | ({"header": batch.body, "signature": batch.signature} if batch is not None else {}))


def _waits(witness: Witness) -> bool:
    """Whether news may let it begin, or let one more handover count (rule 8: also long after it has begun)."""
    inheritance = witness.inheritance
    return witness.phase == COLLECTING or (inheritance is not None and len(inheritance.received) > inheritance.counted)
