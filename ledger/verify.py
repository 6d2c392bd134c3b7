"""Checks a ledger file again from the genesis on: every signature, every certificate, every invariant.

Works on a file that no daemon uses, and beside one that runs (read-only).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config.errors import IntegrityError
from ledger.book import committees_below
from ledger.core import checkpoint
from ledger.core.certificate import Verifier
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis
from ledger.core.objects import Claim, Entry, Item
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
    below_checkpoint: int = 0
    """Entries that are not here: a checkpoint, checked instead of them, stands for them."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


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


def _base(store: Store, state: State, verifier: Verifier, problems: list[str]) -> tuple[int, Mapping[bytes, int]]:
    """Start from the checkpoint that the file starts from, checked again; how many entries lie below it, and up to
    which seq each account's do."""
    base = store.shelf.base()
    frontier: dict[bytes, int] = {}
    if base is None:
        return 0, frontier
    try:
        snapshot = checkpoint.read(store.shelf.pages(base.summary.state_root))
        for item in committees_below(store, state.genesis, snapshot):
            certificate = store.entry_certificate(item.object.account, item.object.seq)
            assert certificate is not None
            verifier.check(item, certificate)
            checkpoint.adopt_committees(state.committees, [item])
        checkpoint.check_quorum(state.committees, base)
        found = checkpoint.summarise(
            store.shelf.pages(base.summary.state_root), state.committees, base.summary.supply, base.summary.entries
        )
        if found != base.summary:
            raise IntegrityError("integrity", "its pages do not lead to its root")
        checkpoint.load(state, snapshot, base.summary)
        frontier = {line.key: line.seq for line in snapshot.accounts.values()}
    except IntegrityError as error:
        problems.append(f"checkpoint {base.summary.state_root.hex()}: {error.message}")
    return base.summary.entries, frontier


def _is_left_over(item: Item, error: IntegrityError, frontier: Mapping[bytes, int]) -> bool:
    """A good claim whose channel is closed below the checkpoint: what it paid stands in there."""
    body, closed = item.object, isinstance(error, RuleError) and error.rule == "closed"
    return closed and isinstance(body, Claim) and body.seq <= frontier.get(body.account, 0)


def _verify(store: Store, genesis: Genesis) -> Report:
    state = State(genesis)
    verifier = Verifier(genesis, state.committees)
    entries = claims = certificates = 0
    problems: list[str] = []
    below, frontier = _base(store, state, verifier, problems)
    for item, certificate, _ in store.finals():
        assert certificate is not None
        try:
            verifier.check(item, certificate)
            certificates += 1
            state.add(item)
        except IntegrityError as error:
            if not _is_left_over(item, error, frontier):
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
        below_checkpoint=below,
        tolerance=state.committees.current.tolerance,
        problems=tuple(problems[:PROBLEMS_MAX]),
    )
