"""A witness of one epoch: votes for entries and claims, freezes, hands over; sans-IO.

Owns what a witness has promised. ``consider_*`` decides and remembers; :meth:`Witness.seal` turns what was decided
into one signed batch. The caller persists every effect (:class:`Batch`, :class:`FrozenChannel`, :class:`HandedOver`,
vouchers of :meth:`take_shown`, handovers before :meth:`receive`) durably (synchronous FULL) *before* it sends
anything of it, and hands everything persisted back to :meth:`restore_*` after a restart.

Life: ``collecting`` (epochs after the first) -> ``voting`` once ready -> ``stopped`` when the state knows the next
committee -> ``handed_over`` once the handover is durable; then the key is erased. :meth:`advance` makes the steps; call
it after every change of the state and every handover. A handover includes what was promised but not sealed yet, so a
vote that is still on its way to the disk when its witness stops is no danger.

Invariants (numbers of LEDGER.md, "Witness rules"):
2. At most one id is ever voted for in a slot (account, seq). 4. No vote for a claim above the own freeze.
5. A freeze is given only after expiry and never changes. 6. Nothing is signed after the stop but the handover.
7, 8. A slot or channel that the old committee may have decided is decided no other way. 9. Restored: silent.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ledger.core import merkle
from ledger.core.checkpoint import Summary, is_of_committees, sign_checkpoint
from ledger.core.errors import RuleError
from ledger.core.handover import Inheritance, Slot, frontier_of
from ledger.core.objects import (
    HANDOVER_BYTES_MAX,
    VOTES_PER_BATCH_MAX,
    Claim,
    Committee,
    Entry,
    Freeze,
    Grant,
    Handover,
    Held,
    Issuer,
    Item,
    Shown,
    Signed,
    Vote,
    Votes,
    Voucher,
    sign,
)
from ledger.core.rules import (
    check_claim,
    check_claim_signatures,
    check_entry,
    check_entry_signature,
    check_freezes,
    check_grants_now,
)
from ledger.core.state import State
from ledger.core.unfinished import Unfinished
from p2p.core import codec
from p2p.core.identity import Identity

FIRST_PREV = bytes(32)
COLLECTING, VOTING, STOPPED, HANDED_OVER = "collecting", "voting", "stopped", "handed_over"


@dataclass(frozen=True, slots=True)
class Batch:
    """A signed batch and, per item, its vote. ``batch_no`` and ``head`` continue the witness's own chain."""

    batch_no: int
    head: bytes
    items: tuple[Item, ...]
    votes: tuple[Vote, ...]


@dataclass(frozen=True, slots=True)
class FrozenChannel:
    """A freeze to persist and send."""

    channel: bytes
    signed: Signed


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The stop and the handover, to persist in one transaction; then :meth:`Witness.confirm_handover`."""

    epoch: int
    witness: bytes
    signed: Signed


class Witness:
    """The state of one witness in one epoch; ``identity`` is its key of that epoch."""

    def __init__(self, identity: Identity, state: State, epoch: int = 0) -> None:
        committee = state.committees.of(epoch)
        assert identity.public_key in committee.members
        self._identity: Identity | None = identity
        self._state = state
        self.key: bytes = identity.public_key
        self.epoch = epoch
        self.phase = COLLECTING if epoch else VOTING
        self.restored = False
        """Whether this is a copy from a backup: silent for the rest of the epoch (rule 9)."""
        self.listed: set[bytes] = set()
        """Ids of changes of the committee or the issuer that the operator agreed to (rule 6)."""
        self.handover: Signed | None = None
        self.inheritance = Inheritance(state, epoch) if epoch else None
        self._voted = Unfinished(state)
        self._frozen: dict[bytes, FrozenChannel] = {}
        self._held: dict[bytes, Held] = {}
        self._best: dict[bytes, tuple[Voucher, bytes]] = {}
        self._unsaved: dict[bytes, Shown] = {}
        self._pending: dict[bytes, Item] = {}
        self._batch_no = 0
        self._head = FIRST_PREV
        self.proofs: dict[Slot, tuple[Signed, Signed]] = {}
        """Equivocations seen: slot -> the two signed bodies, until the caller takes them."""

    # predicates: what a rule forbids

    def may_vote(self) -> bool:
        """Rules 6, 7, 9: ready, not stopped, not restored."""
        return self.phase == VOTING and not self.is_restored()

    def may_freeze(self) -> bool:
        """Rules 6, 7, 9: the stop covers freezes as well."""
        return self.phase == VOTING and not self.is_restored()

    def is_restored(self) -> bool:
        """Rule 9: a copy from a backup has forgotten promises."""
        return self.restored

    def may_hand_over(self) -> bool:
        """Rules 7, 9: only a witness that is ready knows what there is to hand over, and only if it forgot nothing."""
        return self.phase == VOTING and not self.is_restored()

    def must_stop(self) -> bool:
        """Rule 6: the next committee is final."""
        return self._state.committees.epoch > self.epoch

    def is_listed(self, item: Item) -> bool:
        """Rule 6: whether the operator agreed to this change of the committee or the issuer."""
        return item.id in self.listed

    def is_banned(self, channel: bytes) -> bool:
        """Rule 8: whether the old committee may have frozen the channel."""
        return self.inheritance is not None and channel in self.inheritance.bans

    def locked_to(self, slot: Slot) -> dict[bytes, Item]:
        """Rule 8: the ids that the old committee may have certified in a slot."""
        return self.inheritance.locks.get(slot, {}) if self.inheritance is not None else {}

    # decisions

    def consider_entry(self, item: Item) -> None:
        """Promise a vote for an entry; it is in the next batch.

        Raises :class:`RuleError` with the rule that forbids it.
        """
        entry = item.object
        assert isinstance(entry, Entry)
        self._check_phase(self.may_vote())
        slot = (entry.account, entry.seq)
        voted = self._voted.get(slot)
        if voted is not None and voted.id == item.id:
            if voted.signed != item.signed:  # an id covers the body only: anybody may send it with another signature
                check_entry_signature(item, entry)
            self._queue(voted)
            return
        if voted is None:
            state = self._state
            supply = state.supply + self._promised_grants(entry)
            check_entry(state.committees, state.accounts, state.channels, supply, entry)
        check_entry_signature(item, entry)
        if voted is not None:
            self.proofs.setdefault(slot, (voted.signed, item.signed))
            raise RuleError("equivocation", f"another entry {entry.seq} of this account was voted for already")
        self._check_lock(slot, item)
        self._check_change(item, entry)
        check_freezes(self._state.committees, entry)
        self._room()
        if not is_of_committees(entry):  # those are listed, so they are few, and what waits may need them
            self._voted.check_room()
        self._voted.keep(slot, item)
        self._queue(item)

    def _check_phase(self, allowed: bool) -> None:
        if allowed:
            return
        if self.is_restored():
            message = f"this witness was restored from a backup in epoch {self.epoch} and is silent for the rest of it"
            raise RuleError(
                "restored", message, "where it is the only one its operator may say: rios ledger trust-backup"
            )
        if self.phase == COLLECTING:
            raise RuleError("ready", f"epoch {self.epoch} begins once the old committee has handed over", wait=True)
        raise RuleError("epoch", f"epoch {self.epoch} is over, a new committee decides", wait=True)

    def _check_lock(self, slot: Slot, item: Item) -> None:
        locked = self.locked_to(slot)
        if not locked or locked.keys() == {item.id}:
            return
        other = next(each for key, each in locked.items() if key != item.id)
        self.proofs.setdefault(slot, (other.signed, item.signed))
        raise RuleError("locked", "the committee before this one may have certified another entry here", wait=True)

    def _check_change(self, item: Item, entry: Entry) -> None:
        """Rule 6, and who grants now."""
        if type(entry.ops[0]) in (Committee, Issuer) and not self.is_listed(item):
            raise RuleError("listed", f"the operator of this witness has not listed {item.id.hex()}", wait=True)
        check_grants_now(self._state.committees, entry)

    def _promised_grants(self, entry: Entry) -> int:
        """Grants of other issuers that may become final without this witness seeing them first."""
        issuers = self._state.committees.issuers
        if len(issuers) == 1 or entry.account not in issuers:
            return 0
        total = 0
        for issuer in issuers - {entry.account}:
            account = self._state.accounts.get(issuer)
            slot = (issuer, account.seq + 1 if account is not None else 1)
            voted = self._voted.get(slot)
            items = [*self.locked_to(slot).values(), *([voted] if voted is not None else [])]
            total += max((_granted(item) for item in items), default=0)
        return total

    def consider_claim(self, item: Item) -> None:
        """Promise a vote for a claim (rule 4). Where the old committee may have frozen, its voucher is kept only."""
        claim = item.object
        assert isinstance(claim, Claim)
        self._check_phase(self.may_vote())
        genesis, key, total = self._state.genesis, claim.voucher.channel, claim.voucher.cumulative
        if claim.voucher.net != genesis.net:
            raise RuleError("network", "the claim belongs to another network")
        channel = self._state.channels.get(key)
        if channel is None and self._state.is_gone(claim):
            raise RuleError("closed", "the claim's channel is closed, or was never opened")
        if channel is None:
            raise RuleError("channel", "the claim's channel is not known", wait=True)
        check_claim(channel, key, claim)
        if channel.closed_at is not None:
            raise RuleError("closed", "the channel is closed")
        if total > channel.lock:
            raise RuleError("lock", f"claim of {total} exceeds the lock of {channel.lock}", wait=True)
        if total < channel.paid + genesis.min_claim_step:
            raise RuleError("step", f"claim of {total} is less than {genesis.min_claim_step} above {channel.paid}")
        held = self._held.get(key)
        if held is not None and total > held.total:
            raise RuleError("frozen", f"the channel is frozen at {held.total}")
        check_claim_signatures(channel, item)
        if self.is_banned(key):
            self.record_voucher(claim.voucher, claim.voucher_signature)
            raise RuleError("frozen", "the committee before this one may have frozen the channel", wait=True)
        self._room()
        self.saw_voucher(claim.voucher, claim.voucher_signature)
        self._queue(item)

    def saw_voucher(self, voucher: Voucher, signature: bytes) -> bool:
        """Remember the highest voucher of a channel whose signature was checked: a later freeze honours it.

        Whether it is the highest.
        """
        best = self._best.get(voucher.channel)
        if best is not None and voucher.cumulative <= best[0].cumulative:
            return False
        self._best[voucher.channel] = (voucher, signature)
        return True

    def record_voucher(self, voucher: Voucher, signature: bytes) -> None:
        """The same for a voucher that no vote or freeze keeps: :meth:`take_shown` gives it out to be persisted."""
        if self.saw_voucher(voucher, signature):
            self._unsaved[voucher.channel] = Shown(voucher, signature)

    def take_shown(self) -> list[Shown]:
        """Vouchers to persist."""
        unsaved, self._unsaved = self._unsaved, {}
        return list(unsaved.values())

    def put_back(self, shown: Iterable[Shown]) -> None:
        """They could not be persisted: :meth:`take_shown` gives them out again."""
        for each in shown:
            self._unsaved.setdefault(each.voucher.channel, each)

    def freeze(self, key: bytes, now_ms: int) -> FrozenChannel:
        """Freeze an expired channel at the highest voucher known; the same freeze again if it was frozen before."""
        done = self._frozen.get(key)
        if done is not None:
            return done
        self._check_phase(self.may_freeze())
        assert self._identity is not None
        channel = self._state.channels.get(key)
        if channel is None:
            raise RuleError("channel", "the channel is not known", wait=True)
        if now_ms < channel.expiry_ms:
            raise RuleError("expiry", f"the channel expires in {channel.expiry_ms - now_ms} ms", wait=True)
        voucher, signature = self._best.get(key, (None, None))
        total = voucher.cumulative if voucher is not None else 0
        if total < channel.paid:
            raise RuleError("voucher", "the voucher of the channel's last claim is not known yet", wait=True)
        body = Freeze(self._state.genesis.net, self.epoch, self.key, key, total, voucher, signature)
        done = FrozenChannel(key, sign(self._identity, body))
        self._remember_freeze(done, body)
        return done

    def _remember_freeze(self, done: FrozenChannel, body: Freeze) -> None:
        self._frozen[body.channel] = done
        voucher, signature = body.voucher, body.voucher_signature
        shown = Shown(voucher, signature) if voucher is not None and signature is not None else None
        self._held[body.channel] = Held(body.channel, body.total, shown)

    def next_of(self, account: bytes, seq: int) -> Signed | None:
        """Rule 9: the entry this witness voted for in a slot, or is locked to, for a wallet that lost it."""
        self._check_phase(self.may_vote())
        voted = self._voted.get((account, seq))
        if voted is not None:
            return voted.signed
        locked = self.locked_to((account, seq))
        return next(iter(locked.values())).signed if locked else None

    # batches

    def _queue(self, item: Item) -> None:
        self._pending[item.id] = item

    def _room(self) -> None:
        if len(self._pending) >= VOTES_PER_BATCH_MAX * 16:
            raise RuleError("rate", "too many votes wait to be signed", wait=True)

    def attest(self, summary: Summary) -> Signed:
        """Sign a checkpoint that was checked against the own state (rule 10)."""
        self._check_phase(self.may_vote())
        assert self._identity is not None
        if summary.epoch != self.epoch:
            raise RuleError("epoch", f"a checkpoint of epoch {summary.epoch}; this witness votes in {self.epoch}")
        return sign_checkpoint(self._identity, self._state.committees.net, summary)

    @property
    def pending(self) -> int:
        """How many promised votes wait for :meth:`seal`."""
        return len(self._pending)

    def seal(self) -> Batch | None:
        """Sign up to 256 promised votes under one root; None if there are none (or none may be given any more)."""
        if not self.may_vote():
            self._pending.clear()
        if not self._pending:
            return None
        assert self._identity is not None
        items = tuple(self._pending.values())[:VOTES_PER_BATCH_MAX]
        levels = merkle.build([item.id for item in items])
        header = Votes(self._state.genesis.net, self.epoch, self.key, self._batch_no, self._head, levels[-1][0])
        signed = sign(self._identity, header)
        votes = tuple(Vote(signed.body, signed.signature, i, merkle.path_of(levels, i)) for i in range(len(items)))
        for item in items:
            del self._pending[item.id]
        self._batch_no += 1
        self._head = codec.digest(Votes.TAG, signed.body)
        return Batch(header.batch_no, self._head, items, votes)

    # the epoch's end and beginning

    def author_of(self, signed: Signed) -> bytes | None:
        """Whose handover of the epoch before this is, if it is new and still of use: persist it, then :meth:`receive`.

        Raises :class:`config.errors.IntegrityError` for a wrong one.
        """
        if self.inheritance is None or not self._is_collecting():
            return None
        return self.inheritance.author_of(signed)

    def receive(self, signed: Signed) -> None:
        """Take a handover that is durable; then :meth:`advance`. Raises as :meth:`author_of`."""
        if self.inheritance is not None and self._is_collecting():
            self.inheritance.receive(signed)

    @property
    def is_weighing(self) -> bool:
        """Whether :meth:`advance` was cut short by its limit."""
        return self._is_collecting() and self.inheritance is not None and self.inheritance.is_weighing

    def _is_collecting(self) -> bool:
        return self.inheritance is not None and self.phase in (COLLECTING, VOTING)

    def advance(self, checks: int | None = None) -> HandedOver | None:
        """Make the steps that are due; a handover to persist (again until :meth:`confirm_handover`).

        Raises :class:`RuleError` ``handover`` where it would be larger than anybody may read: the witness then does not
        stop and keeps its key; what becomes final, or one more handover that counts, may make room.
        ``checks`` limits the signatures checked in one go; call it again while :attr:`is_weighing`.
        """
        if self.inheritance is not None and self._is_collecting() and self.inheritance.settle(checks):
            for shown in self.inheritance.shown():
                self.saw_voucher(shown.voucher, shown.signature)
            if self.inheritance.ready:
                self.phase = VOTING
        if self.may_hand_over() and self.must_stop():
            self.handover = self._hand_over()
            self.phase = STOPPED
            self._pending.clear()
        if self.phase != STOPPED:
            return None
        if self.handover is None:
            self.handover = self._hand_over()
        return HandedOver(self.epoch, self.key, self.handover)

    def confirm_handover(self) -> None:
        """The handover is durable: it may be sent, and the key goes."""
        assert self.handover is not None
        self.phase = HANDED_OVER
        self._identity = None

    def _hand_over(self) -> Signed:
        assert self._identity is not None
        state = self._state
        locks = {item.id: item for item in (*self.own_locks(), *self.inherited_locks())}
        freezes = {held.channel: held for held in (*self.inherited_freezes(), *self._held.values())}
        shown = [Shown(*best) for key, best in sorted(self._best.items()) if self._is_open(key, best[0].cumulative)]
        body = Handover(
            state.genesis.net,
            self.epoch,
            self.key,
            frontier_of(state),
            tuple(locks[key].signed for key in sorted(locks)),
            tuple(shown),
            tuple(freezes[key] for key in sorted(freezes) if self._is_open(key, -1)),
        )
        signed = sign(self._identity, body)
        if len(signed.body) > HANDOVER_BYTES_MAX:
            what = f"the handover of epoch {self.epoch} has {len(signed.body)} bytes, {HANDOVER_BYTES_MAX} may be read"
            raise RuleError("handover", what, "this witness keeps its key; a rios that reads more can go on", wait=True)
        return signed

    def own_locks(self) -> Iterator[Item]:
        """Entries this witness voted for that are not final."""
        yield from (item for slot, item in self._voted.items() if not self._is_filled(slot))

    def inherited_locks(self) -> Iterator[Item]:
        """Rule 7: what may have been certified before is handed on, voted for here or not."""
        for slot, ids in (self.inheritance.locks if self.inheritance is not None else {}).items():
            if not self._is_filled(slot):
                yield from ids.values()

    def inherited_freezes(self) -> Iterator[Held]:
        """Rule 7: what may have been frozen before."""
        yield from (self.inheritance.bans if self.inheritance is not None else {}).values()

    def _is_filled(self, slot: Slot) -> bool:
        known = self._state.accounts.get(slot[0])
        return known is not None and slot[1] <= known.seq

    def _is_open(self, key: bytes, above: int) -> bool:
        channel = self._state.channels.get(key)
        return channel is not None and channel.closed_at is None and (above < 0 or above > channel.paid)

    def notice(self, batch_no: int) -> bool:
        """Rule 9: somebody shows a batch of this witness in this epoch; whether it is one that was forgotten here.

        The caller checked its signature and persists that this witness is restored.
        """
        if batch_no >= self._batch_no and not self.restored:
            self.restored = True
            self._pending.clear()
            return True
        return False

    # restart

    def restore_entry_vote(self, item: Item) -> None:
        """A vote persisted before the restart."""
        assert isinstance(item.object, Entry)
        self._voted.keep((item.object.account, item.object.seq), item)

    def restore_freeze(self, signed: Signed) -> None:
        """A freeze persisted before the restart."""
        body = codec.decode(Freeze, signed.body, bytes_max=len(signed.body))
        self._remember_freeze(FrozenChannel(body.channel, signed), body)

    def restore_chain(self, batch_no: int, head: bytes) -> None:
        """Where the chain of batches stood."""
        self._batch_no, self._head = batch_no + 1, head

    def restore_phase(self, phase: str, *, restored: bool, handover: Signed | None = None) -> None:
        """How far this epoch's life had come."""
        self.phase, self.restored, self.handover = phase, restored, handover
        if phase == HANDED_OVER:
            self._identity = None

    def forget_slot(self, item: Item) -> None:
        """An object became final: its slot needs no vote in memory any more."""
        if isinstance(item.object, Entry):
            self._voted.forget(item.object)

    def forget_final(self) -> None:
        """Drop from memory the votes in slots that are final (the state itself refuses those slots now)."""
        self._voted.sweep()


def _granted(item: Item) -> int:
    entry = item.object
    return sum(op.amount for op in entry.ops if type(op) is Grant) if isinstance(entry, Entry) else 0
