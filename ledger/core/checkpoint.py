"""Checkpoints (rule 10): the state at a frontier, signed by a quorum, so that nobody needs what lies below it.

Owns: the pages a state is written down in, their root, the check of a proposal against a state that has gone on since,
the proof, the way back from pages to a state. Does not own: who is asked, files (``checkpoints``).

Invariants:
1. ``state_root`` is the Merkle root over a head line (network, supply, entries, committee chain), every account in the
   order of the keys, every *open* channel in the order of the ids. How lines are cut into pages changes nothing.
2. A witness signs only if its own state, with everything above the frontier undone, is the proposed one to the last
   microcredit. So a signed state follows from final objects alone, whoever proposed it.
3. Of closed channels nothing is kept: an applied entry without the channel it opened means that it is closed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, ClassVar

from msgspec import Meta

from config.errors import IntegrityError
from ledger.core import merkle
from ledger.core.committee import CommitteeChain
from ledger.core.errors import RuleError
from ledger.core.objects import (
    SMALL_BYTES_MAX,
    Amount,
    Committee,
    Count,
    Entry,
    Epoch,
    Grant,
    Hash,
    Issuer,
    Item,
    Key,
    Net,
    Op,
    Open,
    OpIndex,
    Reclaim,
    Seq,
    Signed,
    TopUp,
    Transfer,
    _Array,
    channel_id,
)
from ledger.core.quorums import COMMITTEE_MAX
from ledger.core.rules import AccountState, ChannelState
from ledger.core.state import State
from p2p.core import codec
from p2p.core.identity import Identity, verify

PAGE_LINES = 4096
PAGE_BYTES_MAX = 2 << 20


class AccountLine(_Array, frozen=True):
    """An account at the frontier."""

    key: Key
    seq: Count
    head: Hash
    balance: Amount


class ChannelLine(_Array, frozen=True):
    """An open channel at the frontier."""

    key: Hash
    payer: Key
    signer: Key
    payout: Key
    lock: Amount
    expiry_ms: Count
    seq: Seq
    op_index: OpIndex
    paid: Amount


class Page(_Array, frozen=True):
    """A part of a state: accounts first, then channels."""

    accounts: Annotated[tuple[AccountLine, ...], Meta(max_length=PAGE_LINES)]
    channels: Annotated[tuple[ChannelLine, ...], Meta(max_length=PAGE_LINES)]


class _Head(_Array, frozen=True):
    net: Net
    supply: Amount
    entries: Count
    committees: Hash


class Checkpoint(_Array, tag=8, frozen=True):
    """What a witness signs. ``frontier`` covers (account, seq, head) and (channel, paid), ``state_root`` everything."""

    TAG: ClassVar[bytes] = b"rios/checkpoint/1\0"

    net: Net
    epoch: Epoch
    witness: Key
    frontier: Hash
    state_root: Hash
    supply: Amount


class Summary(_Array, frozen=True):
    """A proposal: what the witnesses' signatures will be over, and how many entries lie below it."""

    epoch: Epoch
    frontier: Hash
    state_root: Hash
    supply: Amount
    entries: Count


class Proof(_Array, frozen=True):
    """A checkpoint with the signatures of a quorum."""

    summary: Summary
    signatures: Annotated[tuple[Signed, ...], Meta(min_length=1, max_length=COMMITTEE_MAX)]


@dataclass(slots=True)
class Snapshot:
    """A whole state at a frontier, read from pages."""

    accounts: dict[bytes, AccountLine]
    channels: dict[bytes, ChannelLine]


# --- writing a state down


def pages(state: State) -> Iterator[Page]:
    """A state's lines, in order."""
    lines = [
        AccountLine(key, account.seq, account.head, account.balance)
        for key in sorted(state.accounts)
        if (account := state.accounts[key]).seq or account.balance
    ]
    for start in range(0, len(lines), PAGE_LINES):
        yield Page(tuple(lines[start : start + PAGE_LINES]), ())
    open_lines = [
        ChannelLine(key, c.payer, c.signer, c.payout, c.lock, c.expiry_ms, c.seq, c.op_index, c.paid)
        for key in sorted(state.channels)
        if (c := state.channels[key]).closed_at is None
    ]
    for start in range(0, len(open_lines), PAGE_LINES):
        yield Page((), tuple(open_lines[start : start + PAGE_LINES]))


def committee_digest(committees: CommitteeChain) -> bytes:
    """A hash over the committee chain."""
    return sha256(b"".join(committees.lines())).digest()


def summarise(all_pages: Iterable[Page], committees: CommitteeChain, supply: int, entries: int) -> Summary:
    """The summary of a state in pages. Raises IntegrityError if lines are out of order."""
    head = codec.encode(_Head(committees.net, supply, entries, committee_digest(committees)))
    lines, frontier = [head], sha256(b"rios/frontier/1\0")
    last = [b"", b""]
    for page in all_pages:
        for kind, part in enumerate(_parts(page)):
            for line in part:
                if line.key <= last[kind] or (kind == 0 and last[1]):
                    raise IntegrityError("integrity", "the lines of a checkpoint are not in order")
                last[kind] = line.key
                lines.append(codec.encode(line))
                frontier.update(_frontier_line(line))
    return Summary(committees.epoch, frontier.digest(), merkle.root_of(lines), supply, entries)


def _parts(page: Page) -> tuple[tuple[AccountLine | ChannelLine, ...], ...]:
    return page.accounts, page.channels


def _frontier_line(line: AccountLine | ChannelLine) -> bytes:
    if isinstance(line, AccountLine):
        return b"a" + line.key + line.seq.to_bytes(8, "big") + line.head
    return b"c" + line.key + line.paid.to_bytes(8, "big")


def read(all_pages: Iterable[Page]) -> Snapshot:
    """The lines by key."""
    found = Snapshot({}, {})
    for page in all_pages:
        found.accounts.update((line.key, line) for line in page.accounts)
        found.channels.update((line.key, line) for line in page.channels)
    return found


# --- signing and proving


def body(net: bytes, witness: bytes, summary: Summary) -> Checkpoint:
    """What ``witness`` signs for a summary."""
    return Checkpoint(net, summary.epoch, witness, summary.frontier, summary.state_root, summary.supply)


def sign_checkpoint(identity: Identity, net: bytes, summary: Summary) -> Signed:
    """A witness's signature; the caller checked the summary first (:func:`check_proposal`)."""
    data = codec.encode(body(net, identity.public_key, summary))
    return Signed(data, identity.sign(b"", codec.digest(Checkpoint.TAG, data)))


def check_signature(committees: CommitteeChain, summary: Summary, signed: Signed) -> bytes:
    """The witness that signed a summary. Raises :class:`RuleError` ``checkpoint``, ``witness`` or ``signature``."""
    found = codec.decode(Checkpoint, signed.body, bytes_max=SMALL_BYTES_MAX)
    if found != body(committees.net, found.witness, summary):
        raise RuleError("checkpoint", "a signature is over another checkpoint")
    if found.witness not in committees.of(summary.epoch).members:
        raise RuleError("witness", "a checkpoint is not signed by a witness of its epoch")
    if not verify(found.witness, b"", codec.digest(Checkpoint.TAG, signed.body), signed.signature):
        raise RuleError("signature", "a checkpoint is not signed by its witness")
    return found.witness


def check_proof(committees: CommitteeChain, proof: Proof) -> None:
    """A quorum of distinct witnesses of the newest epoch signed it.

    Raises :class:`RuleError` ``epoch`` for an older epoch: keys of old committees must not be able to rewrite history.
    """
    if proof.summary.epoch != committees.epoch:
        raise RuleError("epoch", f"a checkpoint of epoch {proof.summary.epoch}; the newest is {committees.epoch}")
    check_quorum(committees, proof)


def check_quorum(committees: CommitteeChain, proof: Proof) -> None:
    """A quorum of distinct witnesses of its epoch signed it: enough for what stands on the own disk."""
    witnesses = {check_signature(committees, proof.summary, signed) for signed in proof.signatures}
    quorum = committees.of(proof.summary.epoch).quorum
    if len(witnesses) < quorum:
        raise RuleError("quorum", f"{len(witnesses)} distinct witnesses signed the checkpoint, {quorum} are needed")


# --- a witness's check

History = Callable[[bytes, int, int], Iterable[Item]]
"""An account's final entries from one seq to another, in order."""


def check_proposal(state: State, summary: Summary, proposed: Snapshot, history: History) -> None:
    """Whether ``proposed``, whose root was checked, is this state with what came after it undone.

    Work and memory go with the number of accounts and with what came after. Raises :class:`RuleError` ``frontier``,
    which waits where this state lacks something that the proposal has.
    """
    undone = _Undo(state)
    for key, line in proposed.accounts.items():
        undone.account(key, line.seq, line.head, history)
    for key, account in state.accounts.items():
        if key not in proposed.accounts and account.seq:
            undone.account(key, 0, b"", history)
    undone.claims(proposed.channels)
    undone.compare(proposed, summary)


class _Undo:
    """Takes entries off a copy of a state's amounts."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._balances = {key: account.balance for key, account in state.accounts.items()}
        self._locks = {key: channel.lock for key, channel in state.channels.items()}
        self._paid: dict[bytes, int] = {}
        self._opened: set[bytes] = set()
        self._reopened: set[bytes] = set()
        self._supply = state.supply
        self._entries = state.applied

    def account(self, key: bytes, seq: int, head: bytes, history: History) -> None:
        """Undo what an account did after ``seq``, where its head was ``head``."""
        known = self._state.accounts.get(key)
        if known is None or known.seq < seq:
            raise RuleError("frontier", "an entry of the proposed checkpoint is not applied here", wait=True)
        if known.seq == seq:
            if seq and known.head != head:
                raise RuleError("frontier", "the proposed checkpoint names another head of a chain")
            return
        first = max(1, seq)
        items = list(history(key, first, known.seq))
        if len(items) != known.seq - first + 1:
            raise RuleError("frontier", "what came after the proposed checkpoint is not all on this disk", wait=True)
        for item in items:
            assert isinstance(item.object, Entry)
            if item.object.seq > seq:
                self._entry(item, item.object)
            elif item.id != head:
                raise RuleError("frontier", "the proposed checkpoint names another head of a chain")
        if head and not seq and head != bytes(32):
            raise RuleError("frontier", "the proposed checkpoint names a head of an empty chain")

    def _entry(self, item: Item, entry: Entry) -> None:
        self._entries -= 1
        for index, op in enumerate(entry.ops):
            self._op(item.id, index, entry.account, op)

    def _op(self, entry_id: bytes, index: int, owner: bytes, op: Op) -> None:
        balances = self._balances
        if isinstance(op, Grant | Transfer):
            balances[op.to] -= op.amount
            if isinstance(op, Grant):
                self._supply -= op.amount
            else:
                balances[owner] += op.amount
        elif isinstance(op, Open):
            balances[owner] += op.amount
            self._opened.add(channel_id(entry_id, index))
        elif isinstance(op, TopUp):
            balances[owner] += op.amount
            self._locks[op.channel] -= op.amount
        elif isinstance(op, Reclaim):
            balances[owner] -= self._state.channels[op.channel].lock - op.total
            self._reopened.add(op.channel)
        elif isinstance(op, Committee | Issuer):
            raise RuleError("frontier", "the proposed checkpoint is older than a change of committee or issuer")

    def claims(self, proposed: Mapping[bytes, ChannelLine]) -> None:
        """Set every channel back to what the proposal says was paid: final claims stand for all lower amounts."""
        for key, channel in self._state.channels.items():
            if channel.closed_at is not None and key not in self._reopened:
                continue
            line = proposed.get(key)
            if (line is None) != (key in self._opened):
                raise RuleError("frontier", "the proposed checkpoint has other open channels")
            paid = line.paid if line is not None else 0
            if paid > channel.paid:
                raise RuleError("frontier", "a claim of the proposed checkpoint is not applied here", wait=True)
            self._balances[channel.payout] -= channel.paid - paid

    def compare(self, proposed: Snapshot, summary: Summary) -> None:
        """Everything that is left must be the proposal, line by line."""
        if (self._supply, self._entries) != (summary.supply, summary.entries):
            raise RuleError("frontier", "the proposed checkpoint has another supply or number of entries")
        for key, amount in self._balances.items():
            line = proposed.accounts.get(key)
            if amount != (line.balance if line is not None else 0):
                raise RuleError("frontier", "the proposed checkpoint has another balance of an account")
        if any(key not in self._balances for key in proposed.accounts):
            raise RuleError("frontier", "the proposed checkpoint has an account that is not known here", wait=True)
        for key, open_line in proposed.channels.items():
            known = self._state.channels.get(key)
            if known is None:
                raise RuleError("frontier", "the proposed checkpoint has other open channels", wait=True)
            mine = ChannelLine(
                *(key, known.payer, known.signer, known.payout, self._locks[key]),
                *(known.expiry_ms, known.seq, known.op_index, open_line.paid),
            )
            closed = known.closed_at is not None and key not in self._reopened
            if closed or mine != open_line:
                raise RuleError("frontier", "the proposed checkpoint has another state of a channel")


# --- starting from a checkpoint


def load(state: State, snapshot: Snapshot, summary: Summary) -> None:
    """Make a state, whose committee chain is complete, the one of a checkpoint; whatever it held is forgotten."""
    for held in (state.accounts, state.channels, state.waiting_entries, state.waiting_claims, state.broken):
        held.clear()
    for line in snapshot.accounts.values():
        state.accounts[line.key] = AccountState(line.seq, line.head, line.balance)
    state.channels.update(channels(snapshot))
    state.supply, state.applied = summary.supply, summary.entries


def channels(snapshot: Snapshot) -> dict[bytes, ChannelState]:
    """The open channels of a checkpoint as a state holds them."""
    return {
        key: ChannelState(c.payer, c.signer, c.payout, c.lock, c.expiry_ms, c.seq, c.op_index, paid=c.paid)
        for key, c in snapshot.channels.items()
    }


def adopt_committees(committees: CommitteeChain, items: Iterable[Item]) -> None:
    """Follow the chain of committees and issuers; each item's certificate was checked by the committee before it."""
    for item in items:
        assert isinstance(item.object, Entry)
        for op in item.object.ops:
            if isinstance(op, Committee) and op.epoch > committees.epoch:
                committees.check_committee(op)
                committees.adopt(op, item.id)
            elif isinstance(op, Issuer) and op.key not in committees.issuers:
                committees.check_issuer(op)
                committees.replace_issuer(op)


def is_of_committees(entry: Entry) -> bool:
    """Whether an entry changes committee or issuer: such are never pruned."""
    return any(isinstance(op, Committee | Issuer) for op in entry.ops)
