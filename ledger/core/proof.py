"""Answers under receipts: what a receipt must cover, and the proof that one answer stands under it.

Owns: the leaves a payer waits for, the check of a receipt against the answers that arrived, the check of a proof.
Does not own: what a leaf says (``dmoe/core/calls``), receipts and vouchers of a channel (``core/channel``).

Invariants:
1. A receipt that comes with leaves has their root as ``use_root``, and most of them are answers that arrived.
2. Every table is bounded; what is forgotten can no longer be proved, nothing else.
3. A proof needs nobody's word but the worker's signature.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ledger.core import merkle
from ledger.core.errors import RuleError
from ledger.core.objects import Receipt, Signed, open_signed
from p2p.core.identity import public_key_of

LEAF_BYTES = 32
LEAVES_MAX = 1 << 16
WATCHED_MAX = 1024
PROVED_MAX = 1024
FOREIGN_FROM = 32
"""From so many leaves on, more than half of them must be answers that arrived here."""
PATH_MAX = 16


@dataclass(frozen=True, slots=True)
class Proof:
    """A signed receipt and the way from a leaf to its root."""

    receipt: bytes
    signature: bytes
    index: int
    path: tuple[bytes, ...]


class Answers:
    """The answers of one channel as its payer knows them."""

    __slots__ = ("_arrived", "_last", "_proved", "_watched")

    def __init__(self) -> None:
        self._last: list[bytes] = []
        """The answers under the newest receipt: if its voucher was lost, the next one begins with them again."""
        self._arrived: dict[bytes, int] = {}
        self._watched: dict[bytes, None] = {}
        self._proved: dict[bytes, Proof] = {}

    def arrived(self, leaf: bytes) -> None:
        """An answer came."""
        self._arrived[leaf] = self._arrived.get(leaf, 0) + 1  # the same work done twice has one leaf
        if len(self._arrived) > LEAVES_MAX:
            del self._arrived[next(iter(self._arrived))]

    def watch(self, leaf: bytes) -> None:
        """Keep the proof of this answer when its receipt comes."""
        self._watched[leaf] = None
        if len(self._watched) > WATCHED_MAX:
            del self._watched[next(iter(self._watched))]

    def proof(self, leaf: bytes) -> Proof | None:
        """The proof of a watched answer, once there is one."""
        return self._proved.get(leaf)

    def forget(self, leaf: bytes) -> None:
        """Nobody needs the proof of this answer."""
        self._watched.pop(leaf, None)
        self._proved.pop(leaf, None)

    def foreign(self, leaves: list[bytes]) -> int:
        """How many of these never came, if they are most of many; else 0: a few are answers that were given up."""
        fresh = self._fresh(leaves)
        if len(distinct := set(fresh)) == len(fresh) and distinct <= self._arrived.keys():
            return 0  # nearly every receipt
        unknown = sum(max(0, count - self._arrived.get(leaf, 0)) for leaf, count in Counter(fresh).items())
        return unknown if len(fresh) >= FOREIGN_FROM and unknown * 2 > len(fresh) else 0

    def _fresh(self, leaves: list[bytes]) -> list[bytes]:
        """Those that the receipt before did not cover."""
        count = len(self._last)
        return leaves[count:] if leaves[:count] == self._last else leaves

    def check(self, receipt: Receipt, leaves: list[bytes], *, all_known: bool = True) -> None:
        """Raise RuleError ``use_root`` or ``leaves`` if a receipt is not over these leaves, or (where ``all_known``)
        most of them are not answers that arrived."""
        if merkle.root_of(leaves) != receipt.use_root:
            raise RuleError("use_root", f"the receipt's root is not that of its {len(leaves)} answers")
        if all_known and (unknown := self.foreign(leaves)):
            raise RuleError("leaves", f"of {len(leaves)} answers under the receipt {unknown} never came")

    def covered(self, signed: Signed, leaves: list[bytes]) -> None:
        """A checked receipt covers these answers: they are done with; the watched ones can be proved from now on."""
        wanted = [index for index, leaf in enumerate(leaves) if leaf in self._watched]
        levels = merkle.build(leaves) if wanted else []
        for index in wanted:
            leaf = leaves[index]
            self._watched.pop(leaf, None)
            path = merkle.path_of(levels, index)
            self._proved[leaf] = Proof(signed.body, signed.signature, index, path)
            if len(self._proved) > PROVED_MAX:
                del self._proved[next(iter(self._proved))]
        fresh, self._last = self._fresh(leaves), leaves
        arrived = self._arrived
        for leaf in fresh:
            left = arrived.pop(leaf, 0) - 1
            if left > 0:
                arrived[leaf] = left


def split(data: bytes | bytearray | memoryview) -> list[bytes]:
    """Leaves as they travel. Raises RuleError if they are malformed or too many."""
    if len(data) % LEAF_BYTES or len(data) > LEAVES_MAX * LEAF_BYTES:
        raise RuleError("leaves", f"{len(data)} bytes are not at most {LEAVES_MAX} leaves of {LEAF_BYTES} bytes")
    whole = bytes(data)
    return [whole[at : at + LEAF_BYTES] for at in range(0, len(whole), LEAF_BYTES)]


def check(worker: str, leaf: bytes, receipt: bytes, signature: bytes, index: int, path: Sequence[bytes]) -> Receipt:
    """The receipt, if ``worker`` signed it and ``leaf`` stands under it.

    Raises RuleError ``signature`` or ``path``, IntegrityError if something is malformed.
    """
    if len(signature) != 64:
        raise RuleError("signature", "the receipt's signature is malformed")
    found = open_signed(Receipt, Signed(receipt, signature), public_key_of(worker))
    if found is None:
        raise RuleError("signature", f"the receipt is not signed by {worker}")
    fits = len(path) <= PATH_MAX and all(len(part) == LEAF_BYTES for part in path) and 0 <= index < 1 << len(path)
    if not fits or merkle.climb(leaf, index, path) != found.use_root:
        raise RuleError("path", "the answer does not stand under the receipt")
    return found
