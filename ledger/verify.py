"""Checks a ledger file again from the genesis on: every signature, every certificate, every invariant.

Works on a file that no daemon uses, and beside one that runs (read-only).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config.errors import IntegrityError
from ledger.core.certificate import Verifier
from ledger.core.genesis import Genesis
from ledger.core.objects import Claim, Entry, Grant, Item, Open, Reclaim, TopUp, Transfer, channel_id
from ledger.core.rules import ChannelState
from ledger.core.state import State
from ledger.store import Store
from p2p.core.identity import peer_id_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a check found. Amounts are microcredits; ``balances`` go by peer id."""

    verified: bool
    sum_ok: bool
    entries: int
    certificates: int
    claims: int
    waiting: int
    supply: int
    locked: int
    balances: Mapping[str, int]
    digest: str
    tolerance: str
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of an account's statement; ``amount`` is what it added to (or took from) the free balance."""

    seen_ms: int
    kind: str
    amount: int
    peer_id: str
    reference: str


PROBLEMS_MAX = 20


def verify_file(path: Path | str, genesis: Genesis) -> Report:
    """Check a ledger file.

    Raises IntegrityError if the file itself is damaged, LocalError or ConfigError if it cannot be used.
    """
    store = Store(path, genesis.net, read_only=True)
    try:
        store.quick_check()
        return _verify(store, genesis)
    finally:
        store.close()


def _verify(store: Store, genesis: Genesis) -> Report:
    state = State(genesis)
    verifier = Verifier(genesis, state.committees)
    entries = claims = certificates = 0
    problems: list[str] = []
    for item, certificate, _ in store.finals():
        assert certificate is not None
        try:
            verifier.check(item, certificate)
            certificates += 1
            state.add(item)
        except IntegrityError as error:
            problems.append(f"{item.id.hex()}: {error.message}")
        entries += isinstance(item.object, Entry)
        claims += isinstance(item.object, Claim)
    problems += [f"{key.hex()}: {why}" for key, why in state.broken.items()]
    sum_ok = True
    try:
        state.check_invariants()
    except IntegrityError as error:
        problems.append(error.message)
        sum_ok = False
    locked = sum(c.lock - c.paid for c in state.channels.values() if c.closed_at is None)
    return Report(
        verified=not problems,
        sum_ok=sum_ok,
        entries=entries,
        certificates=certificates,
        claims=claims,
        waiting=state.waiting(),
        supply=state.supply,
        locked=locked,
        balances={peer_id_of(key): a.balance for key, a in sorted(state.accounts.items()) if a.balance or a.seq},
        digest=state.digest().hex(),
        tolerance=state.committees.current.tolerance,
        problems=tuple(problems[:PROBLEMS_MAX]),
    )


def statement(path: Path | str, genesis: Genesis, account: bytes) -> list[Line]:
    """Everything that moved an account's free balance, in the order this node learned it (claims last)."""
    store = Store(path, genesis.net, read_only=True)
    try:
        channels: dict[bytes, ChannelState] = {}
        lines: list[Line] = []
        for item, _, seen_ms in store.finals(proofs=False):
            lines += _lines(item, seen_ms, account, channels)
        return lines
    finally:
        store.close()


def _lines(item: Item, seen_ms: int, account: bytes, channels: dict[bytes, ChannelState]) -> list[Line]:
    body = item.object
    lines: list[Line] = []

    def add(kind: str, amount: int, other: bytes) -> None:
        lines.append(
            Line(seen_ms=seen_ms, kind=kind, amount=amount, peer_id=peer_id_of(other), reference=item.id.hex())
        )

    if isinstance(body, Claim):
        channel = channels.get(body.voucher.channel)
        if channel is not None:
            _settled(channel, body.voucher.cumulative, account, add)
        return lines
    own = body.account == account
    for index, op in enumerate(body.ops):
        if isinstance(op, Grant | Transfer):
            kind = "grant" if isinstance(op, Grant) else "transfer"
            if own and kind == "transfer":
                add(kind, -op.amount, op.to)
            if op.to == account:
                add(kind, op.amount, body.account)
        elif isinstance(op, Open):
            channels[channel_id(item.id, index)] = ChannelState(
                body.account, op.signer, op.payout, op.amount, op.expiry_ms, body.seq, index
            )
            if own:
                add("open", -op.amount, op.signer)
        elif isinstance(op, TopUp):
            channel = channels.get(op.channel)
            if channel is not None:
                channel.lock += op.amount
                if own:
                    add("topup", -op.amount, channel.signer)
        elif isinstance(op, Reclaim):
            channel = channels.get(op.channel)
            if channel is not None:
                _settled(channel, op.total, account, add)
                if own:
                    add("reclaim", channel.lock - op.total, channel.signer)
    return lines


def _settled(channel: ChannelState, total: int, account: bytes, add: Any) -> None:  # noqa: ANN401 - local function
    if channel.payout == account and total > channel.paid:
        add("claim", total - channel.paid, channel.payer)
    channel.paid = max(channel.paid, total)
