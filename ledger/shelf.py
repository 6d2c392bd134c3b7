"""Checkpoints on disk: their proofs and pages, and the one this node's state starts from.

Every write is a list of rows that the caller commits together with what it belongs to; only the newest
:data:`KEPT` checkpoints and the base stay.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ledger.core.checkpoint import PAGE_BYTES_MAX, Checkpoint, Page, Proof
from p2p.core import codec
from p2p.core.identity import peer_id_of

KEPT = 2
PROOF_BYTES_MAX = 64 << 10

Query = Callable[..., list[tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows for one statement, as a record of the store."""

    sql: str
    params: Sequence[tuple[Any, ...]]


def shown(proof: Proof | None) -> dict[str, Any] | None:
    """A checkpoint, JSON-able. Amounts are microcredits."""
    if proof is None:
        return None
    summary = proof.summary
    signers = [codec.decode(Checkpoint, s.body, bytes_max=PROOF_BYTES_MAX).witness for s in proof.signatures]
    return {
        "root": summary.state_root.hex(),
        "frontier": summary.frontier.hex(),
        "epoch": summary.epoch,
        "entries": summary.entries,
        "supply": summary.supply,
        "witnesses": [peer_id_of(key) for key in signers],
    }


class Shelf:
    """The checkpoints of one database."""

    def __init__(self, query: Query) -> None:
        self._query = query

    def newest(self) -> Proof | None:
        """The checkpoint with the most entries."""
        return self._proof("ORDER BY entries DESC LIMIT 1")

    def base(self) -> Proof | None:
        """The checkpoint the state starts from; None if everything since the genesis is here."""
        return self._proof("WHERE base = 1")

    def _proof(self, clause: str) -> Proof | None:
        rows = self._query(f"SELECT proof FROM checkpoints {clause}")
        return codec.decode(Proof, rows[0][0], bytes_max=PROOF_BYTES_MAX) if rows else None

    def count(self, root: bytes) -> int:
        """How many pages a checkpoint has here."""
        return int(self._query("SELECT count(*) FROM pages WHERE root = ?", (root,))[0][0])

    def page(self, root: bytes, number: int) -> bytes | None:
        """One page as it travels."""
        rows = self._query("SELECT body FROM pages WHERE root = ? AND number = ?", (root, number))
        return rows[0][0] if rows else None

    def pages(self, root: bytes) -> Iterator[Page]:
        """All pages of a checkpoint."""
        for number in range(self.count(root)):
            body = self.page(root, number)
            assert body is not None
            yield codec.decode(Page, body, bytes_max=PAGE_BYTES_MAX)

    # writing

    def keep(self, proof: Proof, pages: Sequence[bytes]) -> list[Rows]:
        """Put a checkpoint on the shelf; older ones go."""
        root, entries = proof.summary.state_root, proof.summary.entries
        old = self._query("SELECT root FROM checkpoints WHERE base = 0 AND root != ? ORDER BY entries DESC", (root,))
        gone = [row for row in old[KEPT - 1 :]]
        return [
            Rows("DELETE FROM pages WHERE root = ?", gone),
            Rows("DELETE FROM checkpoints WHERE root = ?", gone),
            Rows("INSERT OR IGNORE INTO checkpoints VALUES (?, ?, ?, 0)", [(root, entries, codec.encode(proof))]),
            Rows("INSERT OR IGNORE INTO pages VALUES (?, ?, ?)", [(root, n, page) for n, page in enumerate(pages)]),
        ]

    @staticmethod
    def start_from(root: bytes) -> Rows:
        """From now on the state starts from this checkpoint."""
        return Rows("UPDATE checkpoints SET base = (root = ?)", [(root,)])
