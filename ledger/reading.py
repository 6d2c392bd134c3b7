"""What a ledger's file says: an account, its statement, one object with its certificate, a peer's offences, all of it.

Works on the file, read-only, beside a daemon or without one. Nothing here judges a whole ledger (``verify``); what is
shown as proved was checked on the spot. Amounts are microcredits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from config.errors import ConfigError, IntegrityError, RequestError
from ledger.book import restore, snapshot_of, start_from_base
from ledger.core.certificate import Verifier
from ledger.core.checkpoint import adopt_committees
from ledger.core.committee import CommitteeChain
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import (
    AMOUNT_MAX,
    SMALL_BYTES_MAX,
    Certificate,
    Claim,
    Entry,
    Item,
    Op,
    Open,
    Signed,
    Votes,
    channel_id,
    parse,
)
from ledger.core.state import State
from ledger.shelf import shown
from ledger.statement import Line, Statement
from ledger.store import Store
from p2p.core import codec
from p2p.core.identity import peer_id_of, public_key_of, verify

OFFENCES_MAX = 1000


@contextmanager
def opened(path: Path | str, genesis: Genesis) -> Iterator[Store]:
    """The file, read-only."""
    store = Store(path, genesis.net, read_only=True)
    try:
        yield store
    finally:
        store.close()


def state_of(store: Store, genesis: Genesis) -> State:
    """The state as the file has it; what stands in a node's own file was verified before it was written."""
    state = State(genesis)
    start_from_base(store, state)
    for item in store.items():
        restore(state, item)
    return state


def committees_of(store: Store, genesis: Genesis) -> CommitteeChain:
    """Every epoch's committee: they stand on the root account's chain, and are not pruned with it."""
    chain = CommitteeChain(genesis)
    for item in store.committee_entries(genesis.root):
        try:
            adopt_committees(chain, [item])
        except RuleError:
            break  # one before it is not here yet: what follows waits, as it does in the state
    return chain


# --- accounts


def balance(state: State, account: bytes) -> dict[str, Any]:
    """What an account has, and what it has locked in channels."""
    locked = sum(c.lock - c.paid for c in state.channels.values() if c.payer == account and c.closed_at is None)
    known = state.accounts.get(account)
    return {
        "account": peer_id_of(account),
        "balance": state.balance(account),
        "locked": locked,
        "seq": known.seq if known else 0,
    }


def balance_in(path: Path | str, genesis: Genesis, account: bytes) -> dict[str, Any]:
    """The same, out of a file."""
    with opened(path, genesis) as store:
        return balance(state_of(store, genesis), account)


def statement(path: Path | str, genesis: Genesis, account: bytes) -> list[Line]:
    """Everything that moved an account's free balance, in the order this node learned it (claims last)."""
    book = Statement(account)
    with opened(path, genesis) as store:
        if (base := store.shelf.base()) is not None:
            book.carry(snapshot_of(store, base), base.summary.state_root)
        for item, _, seen_ms in store.finals(proofs=False):
            if not book.is_below(item):
                book.take(item, seen_ms)
    return book.lines


# --- one object


def entry(path: Path | str, genesis: Genesis, name: str) -> dict[str, Any]:
    """One entry or claim with its certificate. ``name``: the id of an entry, of a claim or of a channel (its highest
    claim) in hex, or ``ACCOUNT:SEQ``.

    Raises ConfigError ``usage`` for what names nothing, RequestError ``not_found`` if it is not here.
    """
    with opened(path, genesis) as store:
        found = _by_slot(store, name) if ":" in name else _by_id(store, name)
        if found is None:
            pending = _unfinished(store, genesis, name)
            if pending is not None:
                return pending
            raise RequestError("not_found", f"{name[:100]} is not in this ledger", "does another node have it?")
        return _shown(Verifier(genesis, committees_of(store, genesis)), *found)


Found = tuple[Certificate, int]


def _by_slot(store: Store, name: str) -> Found | None:
    account, seq = _slot(name)
    certificate = store.entry_certificate(account, seq)
    return (certificate, store.entry_seen_ms(account, seq)) if certificate else None


def _slot(name: str) -> tuple[bytes, int]:
    peer_id, _, number = name.rpartition(":")
    decimal = number.isdecimal() and number.isascii() and len(number) <= 19
    if not decimal or int(number) > AMOUNT_MAX:
        raise ConfigError("usage", f"{number[:40]!r} is not the number of an entry", "e.g. 12D3KooW...:7")
    try:
        return public_key_of(peer_id), int(number)
    except IntegrityError as error:
        raise ConfigError("usage", error.message, "e.g. 12D3KooW...:7") from error


def _by_id(store: Store, name: str) -> Found | None:
    try:
        wanted = bytes.fromhex(name)
    except ValueError:
        wanted = b""
    if len(wanted) != 32:
        raise ConfigError("usage", f"{name[:100]!r} is neither an id nor ACCOUNT:SEQ", "an id has 64 hex digits")
    found = store.entry_slot(wanted)
    if found is not None:
        certificate = store.entry_certificate(*found)
        return (certificate, store.entry_seen_ms(*found)) if certificate else None
    for item, certificate, seen_ms in store.claims():
        assert isinstance(item.object, Claim)
        if wanted in (item.id, item.object.voucher.channel) and certificate is not None:
            return certificate, seen_ms
    return None


def _unfinished(store: Store, genesis: Genesis, name: str) -> dict[str, Any] | None:
    """An entry that this node signed or voted for and whose certificate is not here."""
    epochs = range(committees_of(store, genesis).epoch + 1)
    for what, signed in (
        *(("signed here", s) for s in store.wallet()),
        *(("voted for", i.signed) for epoch in epochs for i in store.voted(epoch)),
    ):
        item = parse(signed)
        body = item.object
        slot = f"{peer_id_of(body.account)}:{body.seq}" if isinstance(body, Entry) else ""
        if name in (item.id.hex(), slot):
            return {**describe(item), "state": _uncertified(store, item, what), "certificate": None}
    return None


def _uncertified(store: Store, item: Item, what: str) -> str:
    """In what state an object without a certificate is: of what lies below the checkpoint none are kept."""
    base, body = store.shelf.base(), item.object
    line = snapshot_of(store, base).accounts.get(body.account) if base is not None else None
    if line is None or not isinstance(body, Entry) or body.seq > line.seq:
        return f"{what}, no certificate yet"
    if item.id in _ends_in(store, line.head):
        return "final, below the checkpoint"
    return f"{what}, another one may be final below the checkpoint"


def _ends_in(store: Store, head: bytes) -> set[bytes]:
    """The ids of the own entries that lead up to ``head``."""
    found = set()
    for signed in reversed(store.wallet()):
        item = parse(signed)
        assert isinstance(item.object, Entry)
        if item.id == head:
            found.add(head)
            head = item.object.prev
    return found


def _shown(verifier: Verifier, certificate: Certificate, seen_ms: int) -> dict[str, Any]:
    item = parse(certificate.object)
    problem = ""
    try:
        verifier.check(item, certificate)
    except IntegrityError as error:
        problem = error.message
    votes = []
    for vote in certificate.votes:
        header = codec.decode(Votes, vote.header, bytes_max=SMALL_BYTES_MAX)
        votes.append(
            {
                "witness": peer_id_of(header.witness),
                "epoch": header.epoch,
                "batch": header.batch_no,
                "place": vote.index,
                "root": header.root.hex(),
                "signature": vote.signature.hex(),
            }
        )
    shown = {"epoch": certificate.epoch, "votes": votes, "valid": not problem, "problem": problem}
    return {**describe(item), "state": "final", "seen_ms": seen_ms, "certificate": shown}


_KEYS = {"to", "signer", "payout", "key"}


def describe(item: Item) -> dict[str, Any]:
    """An object, JSON-able: keys as peer ids, ids in hex."""
    body = item.object
    common = {"id": item.id.hex(), "signature": item.signed.signature.hex(), "body": item.signed.body.hex()}
    if isinstance(body, Claim):
        return {
            "kind": "claim",
            **common,
            "account": peer_id_of(body.account),
            "seq": body.seq,
            "op_index": body.op_index,
            "channel": body.voucher.channel.hex(),
            "cumulative": body.voucher.cumulative,
        }
    ops = [_op_shown(item.id, index, op) for index, op in enumerate(body.ops)]
    account = peer_id_of(body.account)
    return {"kind": "entry", **common, "account": account, "seq": body.seq, "prev": body.prev.hex(), "ops": ops}


def _op_shown(entry_id: bytes, index: int, op: Op) -> dict[str, Any]:
    shown: dict[str, Any] = {"op": type(op).__name__.lower()}
    if isinstance(op, Open):
        shown["channel"] = channel_id(entry_id, index).hex()
    for field in op.__struct_fields__:
        value = getattr(op, field)
        if field == "freezes":
            value = len(value)
        elif field == "keys":
            value = [peer_id_of(key) for key in value]
        elif isinstance(value, bytes):
            value = peer_id_of(value) if field in _KEYS else value.hex()
        shown[field] = value
    return shown


# --- channels


def channels(path: Path | str, genesis: Genesis, account: bytes) -> list[dict[str, Any]]:
    """An account's channels: what the ledger says, and what this node holds of vouchers."""
    with opened(path, genesis) as store:
        held = {(side, row.channel): row for side in ("sell", "buy") for row in store.channels(side)}
        rows = []
        for key, known in sorted(state_of(store, genesis).channels.items()):
            if account not in (known.payer, known.signer, known.payout):
                continue
            row = held.get(("buy" if known.payer == account else "sell", key))
            rows.append(
                {
                    "channel": key.hex(),
                    "side": "buy" if known.payer == account else "sell",
                    "payer": peer_id_of(known.payer),
                    "payee": peer_id_of(known.signer),
                    "payout": peer_id_of(known.payout),
                    "lock": known.lock,
                    "promised": _promised(row.voucher) if row else known.paid,
                    "paid": known.paid,
                    "expiry_ms": known.expiry_ms,
                    "closed": known.closed_at is not None,
                    "calls": row.calls if row else 0,
                    "stopped": row.stopped if row else "",
                }
            )
        return rows


def _promised(voucher: bytes) -> int:
    from_disk: int = msgspec.msgpack.decode(voucher)[4]
    return from_disk


def checkpoint(path: Path | str, genesis: Genesis) -> dict[str, Any]:
    """The newest checkpoint on this disk, and the one below which nothing is kept."""
    with opened(path, genesis) as store:
        return {"newest": shown(store.shelf.newest()), "base": shown(store.shelf.base())}


# --- offences


def offences(path: Path | str, genesis: Genesis, peer_id: str) -> dict[str, Any]:
    """What is held against a peer here. Every proof was checked just now: two signatures of one key."""
    key = public_key_of(peer_id)
    with opened(path, genesis) as store:
        rows = [row for side in ("sell", "buy") for row in store.channels(side)]
        return {
            "peer_id": peer_id,
            "witness": any(key in epoch.members for epoch in committees_of(store, genesis).epochs),
            "equivocations": _equivocations(store, key),
            "double_batches": _double_batches(store, key),
            "stopped_channels": [
                {"channel": row.channel.hex(), "side": row.side, "why": row.stopped}
                for row in rows
                if row.peer_id == peer_id and row.stopped
            ],
        }


def _equivocations(store: Store, key: bytes) -> list[dict[str, Any]]:
    found = []
    for seq, a, b in store.proofs(key)[:OFFENCES_MAX]:
        items = [parse(a), parse(b)]
        signed = all(verify(key, b"", item.id, item.signed.signature) for item in items)
        same_slot = all(isinstance(i.object, Entry) and (i.object.account, i.object.seq) == (key, seq) for i in items)
        found.append(
            {
                "seq": seq,
                "proved": signed and same_slot and items[0].id != items[1].id,
                "entries": [describe(item) for item in items],
            }
        )
    return found


def _double_batches(store: Store, key: bytes) -> list[dict[str, Any]]:
    """Two batches of votes that a witness signed under one number: it keeps two histories."""
    first: dict[tuple[int, int], Signed] = {}
    found: list[dict[str, Any]] = []
    for signed in store.headers():
        header = codec.decode(Votes, signed.body, bytes_max=SMALL_BYTES_MAX)
        if header.witness != key:
            continue
        known = first.setdefault((header.epoch, header.batch_no), signed)
        if known.body != signed.body and len(found) < OFFENCES_MAX:
            both = (known, signed)
            found.append(
                {
                    "epoch": header.epoch,
                    "batch": header.batch_no,
                    "proved": all(verify(key, b"", codec.digest(Votes.TAG, s.body), s.signature) for s in both),
                    "headers": [s.body.hex() for s in both],
                    "signatures": [s.signature.hex() for s in both],
                }
            )
    return found


# --- everything


def newest(path: Path | str, genesis: Genesis, count: int, before: int | None = None) -> list[dict[str, Any]]:
    """The entries that became known last, newest first, each with its ``place`` in that order and the number of votes
    in its certificate; ``before``: only places below it."""
    with opened(path, genesis) as store:
        return [
            {
                **describe(item),
                "place": place,
                "seen_ms": seen_ms,
                "epoch": certificate.epoch,
                "votes": len(certificate.votes),
            }
            for place, item, certificate, seen_ms in store.newest_entries(count, before)
        ]


def rows(path: Path | str, genesis: Genesis, account: bytes | None = None) -> Iterator[Mapping[str, Any]]:
    """Every final object as the file has it, oldest first, claims last; ``account``: only what it signed."""
    with opened(path, genesis) as store:
        for item, certificate, seen_ms in store.finals():
            assert certificate is not None
            if account is None or item.object.account == account:
                data = codec.encode(certificate).hex()
                yield {**describe(item), "epoch": certificate.epoch, "seen_ms": seen_ms, "certificate": data}
