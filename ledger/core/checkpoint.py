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
BEHIND_MAX = 200_000
"""A witness undoes so many entries at most for whoever asks: seconds of work."""
STEP_ENTRIES = 256


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


class Summing:
    """The summary of a state, page by page."""

    def __init__(self, committees: CommitteeChain, supply: int, entries: int) -> None:
        head = codec.encode(_Head(committees.net, supply, entries, committee_digest(committees)))
        self._epoch, self._supply, self._entries = committees.epoch, supply, entries
        self._lines = [head]
        self._frontier = sha256(b"rios/frontier/1\0")
        self._last = [b"", b""]

    def add(self, page: Page) -> None:
        """The next page. Raises IntegrityError if its lines are out of order."""
        last = self._last
        for kind, part in enumerate(_parts(page)):
            for line in part:
                if line.key <= last[kind] or (kind == 0 and last[1]):
                    raise IntegrityError("integrity", "the lines of a checkpoint are not in order")
                last[kind] = line.key
                self._lines.append(codec.encode(line))
                self._frontier.update(_frontier_line(line))

    def summary(self) -> Summary:
        """What the pages come to."""
        root = merkle.root_of(self._lines)
        return Summary(self._epoch, self._frontier.digest(), root, self._supply, self._entries)


def summarise(all_pages: Iterable[Page], committees: CommitteeChain, supply: int, entries: int) -> Summary:
    """The summary of a state in pages. Raises IntegrityError if lines are out of order."""
    summing = Summing(committees, supply, entries)
    for page in all_pages:
        summing.add(page)
    return summing.summary()


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
        add_lines(found, page)
    return found


def add_lines(snapshot: Snapshot, page: Page) -> None:
    """Read one more page."""
    snapshot.accounts.update((line.key, line) for line in page.accounts)
    snapshot.channels.update((line.key, line) for line in page.channels)


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


def pages_max(state: State) -> int:
    """How many pages a proposal may have that this state can prove."""
    return (len(state.accounts) + len(state.channels)) // PAGE_LINES + 2


def check_page(state: State, page: Page) -> None:
    """Whether a page of a proposal speaks of what is known here only. Raises :class:`RuleError` ``frontier``, which
    waits."""
    accounts, channels = state.accounts, state.channels
    unknown = any(line.key not in accounts or accounts[line.key].seq < line.seq for line in page.accounts)
    if unknown or any(line.key not in channels for line in page.channels):
        raise RuleError("frontier", "an entry of the proposed checkpoint is not applied here", wait=True)


def check_distance(state: State, summary: Summary) -> None:
    """Whether a proposal lies neither above this state nor so far below it that undoing what came since is too much
    work. Raises :class:`RuleError` ``frontier``."""
    if summary.entries > state.applied:
        raise RuleError("frontier", "an entry of the proposed checkpoint is not applied here", wait=True)
    if summary.entries < state.applied - BEHIND_MAX:
        raise RuleError("frontier", f"the proposed checkpoint lies more than {BEHIND_MAX} entries back")


def check_proposal(state: State, summary: Summary, proposed: Snapshot, history: History) -> None:
    """Whether ``proposed``, whose root was checked, is this state with what came after it undone.

    Work and memory go with the number of accounts and with what came after. Raises :class:`RuleError` ``frontier``,
    which waits where this state lacks something that the proposal has.
    """
    for _ in proposal_steps(state, summary, proposed, history):
        pass


def proposal_steps(state: State, summary: Summary, proposed: Snapshot, history: History) -> Iterator[None]:
    """:func:`check_proposal` in steps of a few milliseconds. It is about the state at the first: that may go on."""
    undone = _Undo(state)
    for position, (key, line) in enumerate(proposed.accounts.items()):
        if position % PAGE_LINES == 0:
            yield
        yield from undone.account(key, line.seq, line.head, history)
    for key, seq in undone.seqs.items():
        if seq and key not in proposed.accounts:
            yield from undone.account(key, 0, b"", history)
    undone.claims(proposed.channels)
    undone.compare(proposed, summary)


class _Undo:
    """Takes entries off a copy of a state's amounts."""

    def __init__(self, state: State) -> None:
        self.seqs = {key: account.seq for key, account in state.accounts.items()}
        self._heads = {key: account.head for key, account in state.accounts.items()}
        self._balances = {key: account.balance for key, account in state.accounts.items()}
        self._channels = state.channels
        """Of those that were there at first only what does not change any more is read."""
        self._locks = {key: channel.lock for key, channel in state.channels.items()}
        self._paid = {key: channel.paid for key, channel in state.channels.items()}
        self._closed = {key for key, channel in state.channels.items() if channel.closed_at is not None}
        self._opened: set[bytes] = set()
        self._supply = state.supply
        self._entries = state.applied

    def account(self, key: bytes, seq: int, head: bytes, history: History) -> Iterator[None]:
        """Undo what an account did after ``seq``, where its head was ``head``; stops after every few entries."""
        known = self.seqs.get(key, -1)
        if known < seq:
            raise RuleError("frontier", "an entry of the proposed checkpoint is not applied here", wait=True)
        if known == seq:
            if seq and self._heads[key] != head:
                raise RuleError("frontier", "the proposed checkpoint names another head of a chain")
            return
        for first in range(max(1, seq), known + 1, STEP_ENTRIES):
            last = min(known, first + STEP_ENTRIES - 1)
            items = list(history(key, first, last))
            if len(items) != last - first + 1:
                raise RuleError(
                    "frontier", "what came after the proposed checkpoint is not all on this disk", wait=True
                )
            for item in items:
                assert isinstance(item.object, Entry)
                if item.object.seq > seq:
                    self._entry(item, item.object)
                elif item.id != head:
                    raise RuleError("frontier", "the proposed checkpoint names another head of a chain")
            yield
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
            balances[owner] -= self._channels[op.channel].lock - op.total
            self._closed.discard(op.channel)
        elif isinstance(op, Committee | Issuer):
            raise RuleError("frontier", "the proposed checkpoint is older than a change of committee or issuer")

    def claims(self, proposed: Mapping[bytes, ChannelLine]) -> None:
        """Set every channel back to what the proposal says was paid: final claims stand for all lower amounts."""
        for key in self._locks:
            if key in self._closed:
                continue
            line = proposed.get(key)
            if (line is None) != (key in self._opened):
                raise RuleError("frontier", "the proposed checkpoint has other open channels")
            paid = line.paid if line is not None else 0
            if paid > self._paid[key]:
                raise RuleError("frontier", "a claim of the proposed checkpoint is not applied here", wait=True)
            self._balances[self._channels[key].payout] -= self._paid[key] - paid

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
            if key not in self._locks:
                raise RuleError("frontier", "the proposed checkpoint has other open channels", wait=True)
            known = self._channels[key]
            mine = ChannelLine(
                *(key, known.payer, known.signer, known.payout, self._locks[key]),
                *(known.expiry_ms, known.seq, known.op_index, open_line.paid),
            )
            if key in self._closed or mine != open_line:
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
