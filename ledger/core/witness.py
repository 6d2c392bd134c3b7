"""A witness: votes for entries and claims, freezes; sans-IO.

Owns what a witness has promised. ``consider_*`` decides and remembers; :meth:`Witness.seal` turns what was decided
into one signed batch. The caller persists a :class:`Batch` or :class:`FrozenChannel` durably (synchronous FULL)
*before* it sends anything of it, and hands everything persisted back to :meth:`restore_*` after a restart.

Invariants (numbers of LEDGER.md, "Witness rules"):
2. At most one id is ever voted for in a slot (account, seq). 4. No vote for a claim above the own freeze.
5. A freeze is given only after expiry and never changes.
"""

from dataclasses import dataclass

from ledger.core import merkle
from ledger.core.errors import RuleError
from ledger.core.objects import (
    VOTES_PER_BATCH_MAX,
    Claim,
    Entry,
    Freeze,
    Item,
    Signed,
    Vote,
    Votes,
    Voucher,
    sign,
)
from ledger.core.rules import check_claim, check_claim_signatures, check_entry, check_entry_signature, check_freezes
from ledger.core.state import State
from p2p.core import codec
from p2p.core.identity import Identity

FIRST_PREV = bytes(32)


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


class Witness:
    """The state of one witness in epoch 0."""

    def __init__(self, identity: Identity, state: State) -> None:
        assert identity.public_key in state.genesis.witnesses
        self._identity = identity
        self._state = state
        self._voted: dict[tuple[bytes, int], Item] = {}
        self._frozen: dict[bytes, FrozenChannel] = {}
        self._frozen_total: dict[bytes, int] = {}
        self._best: dict[bytes, tuple[Voucher, bytes]] = {}
        self._pending: dict[bytes, Item] = {}
        self._batch_no = 0
        self._head = FIRST_PREV
        self.proofs: dict[tuple[bytes, int], tuple[Signed, Signed]] = {}
        """Equivocations seen: slot -> the two signed bodies."""

    # decisions

    def consider_entry(self, item: Item) -> None:
        """Promise a vote for an entry; it is in the next batch.

        Raises :class:`RuleError` with the rule that forbids it.
        """
        entry = item.object
        assert isinstance(entry, Entry)
        slot = (entry.account, entry.seq)
        voted = self._voted.get(slot)
        if voted is not None and voted.id == item.id:
            self._queue(item)
            return
        if voted is None:
            state = self._state
            check_entry(state.genesis, state.accounts, state.channels, state.supply, entry)
        check_entry_signature(item, entry)
        if voted is not None:
            self.proofs.setdefault(slot, (voted.signed, item.signed))
            raise RuleError("equivocation", f"another entry {entry.seq} of this account was voted for already")
        check_freezes(self._state.genesis, entry)
        self._room()
        self._voted[slot] = item
        self._queue(item)

    def consider_claim(self, item: Item) -> None:
        """Promise a vote for a claim (rule 4)."""
        claim = item.object
        assert isinstance(claim, Claim)
        genesis, key, total = self._state.genesis, claim.voucher.channel, claim.voucher.cumulative
        if claim.voucher.net != genesis.net:
            raise RuleError("network", "the claim belongs to another network")
        channel = self._state.channels.get(key)
        if channel is None:
            raise RuleError("channel", "the claim's channel is not known", wait=True)
        check_claim(channel, key, claim)
        if channel.closed_at is not None:
            raise RuleError("closed", "the channel is closed")
        if total > channel.lock:
            raise RuleError("lock", f"claim of {total} exceeds the lock of {channel.lock}", wait=True)
        if total < channel.paid + genesis.min_claim_step:
            raise RuleError("step", f"claim of {total} is less than {genesis.min_claim_step} above {channel.paid}")
        if total > self._frozen_total.get(key, total):
            raise RuleError("frozen", f"the channel is frozen at {self._frozen_total[key]}")
        check_claim_signatures(channel, item)
        self._room()
        self.saw_voucher(claim.voucher, claim.voucher_signature)
        self._queue(item)

    def saw_voucher(self, voucher: Voucher, signature: bytes) -> None:
        """Remember the highest voucher of a channel whose signature was checked: a later freeze honours it."""
        best = self._best.get(voucher.channel)
        if best is None or voucher.cumulative > best[0].cumulative:
            self._best[voucher.channel] = (voucher, signature)

    def freeze(self, key: bytes, now_ms: int) -> FrozenChannel:
        """Freeze an expired channel at the highest voucher known; the same freeze again if it was frozen before."""
        done = self._frozen.get(key)
        if done is not None:
            return done
        channel = self._state.channels.get(key)
        if channel is None:
            raise RuleError("channel", "the channel is not known", wait=True)
        if now_ms < channel.expiry_ms:
            raise RuleError("expiry", f"the channel expires in {channel.expiry_ms - now_ms} ms", wait=True)
        voucher, signature = self._best.get(key, (None, None))
        total = voucher.cumulative if voucher is not None else 0
        if total < channel.paid:
            raise RuleError("voucher", "the voucher of the channel's last claim is not known yet", wait=True)
        body = Freeze(self._state.genesis.net, 0, self._identity.public_key, key, total, voucher, signature)
        frozen = FrozenChannel(key, sign(self._identity, body))
        self._frozen[key] = frozen
        self._frozen_total[key] = total
        return frozen

    # batches

    def _room(self) -> None:
        if len(self._pending) >= VOTES_PER_BATCH_MAX * 16:
            raise RuleError("rate", "too many votes wait to be signed", wait=True)

    def _queue(self, item: Item) -> None:
        self._pending[item.id] = item

    @property
    def pending(self) -> int:
        """How many promised votes wait for :meth:`seal`."""
        return len(self._pending)

    def seal(self) -> Batch | None:
        """Sign up to 256 promised votes under one root; None if there are none."""
        if not self._pending:
            return None
        items = tuple(self._pending.values())[:VOTES_PER_BATCH_MAX]
        levels = merkle.build([item.id for item in items])
        header = Votes(
            self._state.genesis.net,
            0,
            self._identity.public_key,
            self._batch_no,
            self._head,
            levels[-1][0],
        )
        signed = sign(self._identity, header)
        votes = tuple(Vote(signed.body, signed.signature, i, merkle.path_of(levels, i)) for i in range(len(items)))
        for item in items:
            del self._pending[item.id]
        self._batch_no += 1
        self._head = codec.digest(Votes.TAG, signed.body)
        return Batch(header.batch_no, self._head, items, votes)

    # restart

    def restore_entry_vote(self, item: Item) -> None:
        """A vote persisted before the restart."""
        assert isinstance(item.object, Entry)
        self._voted[item.object.account, item.object.seq] = item

    def restore_freeze(self, signed: Signed) -> None:
        """A freeze persisted before the restart."""
        body = codec.decode(Freeze, signed.body, bytes_max=len(signed.body))
        self._frozen[body.channel] = FrozenChannel(body.channel, signed)
        self._frozen_total[body.channel] = body.total

    def restore_chain(self, batch_no: int, head: bytes) -> None:
        """Where the chain of batches stood."""
        self._batch_no, self._head = batch_no + 1, head

    def forget_slot(self, item: Item) -> None:
        """An object became final: its slot needs no vote in memory any more."""
        if isinstance(item.object, Entry):
            slot = (item.object.account, item.object.seq)
            known = self._state.accounts.get(slot[0])
            if known is not None and slot[1] <= known.seq and slot not in self.proofs:
                self._voted.pop(slot, None)

    def forget_final(self) -> None:
        """Drop from memory the votes in slots that are final (the state itself refuses those slots now)."""
        accounts = self._state.accounts
        final = [s for s in self._voted if (known := accounts.get(s[0])) is not None and s[1] <= known.seq]
        for slot in final:
            if slot not in self.proofs:
                del self._voted[slot]
