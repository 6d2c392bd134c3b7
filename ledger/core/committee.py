"""Who decides, epoch by epoch: the committees since the genesis and the issuers.

Owns the committee chain: epoch 0 is the genesis, every further epoch a final entry of the root account that the
epoch before certified. The chain only grows: certificates and freezes of every epoch stay checkable, and valid.

Why old certificates never lapse (rules 6 to 8): an epoch's witnesses stop before they hand over, and erase their keys
afterwards, so no new votes of that epoch come into being; whatever a quorum of them voted or froze before is known to
every ready witness of the next epoch, as applied (frontier) or as a lock or ban that survives the counting. So a
certificate of epoch e that turns up late never contradicts one of e + 1, and no clock is needed to outlaw it.

Issuers: a final grant counts whoever was issuer then (state must not depend on order), but witnesses vote only for the
present one. One change per epoch, so that a witness's own unfinished votes bound the supply that two chains may grant.
"""

from dataclasses import dataclass, field

from ledger.core import quorums
from ledger.core.errors import RuleError
from ledger.core.genesis import Genesis, tolerance_of
from ledger.core.objects import Committee, Issuer
from p2p.core.identity import is_valid_key


@dataclass(frozen=True, slots=True)
class EpochCommittee:
    """The witnesses of one epoch: their epoch keys, how many may lie, the entry that named them (genesis: zeros)."""

    epoch: int
    keys: tuple[bytes, ...]
    f: int
    entry_id: bytes = bytes(32)
    members: frozenset[bytes] = field(init=False, repr=False, compare=False)
    quorum: int = field(init=False)

    def __post_init__(self) -> None:
        """Fill in what follows from the rest."""
        object.__setattr__(self, "members", frozenset(self.keys))
        object.__setattr__(self, "quorum", quorums.quorum_of(self.f))

    @property
    def tolerance(self) -> str:
        """What the committee withstands, for people."""
        return tolerance_of(len(self.keys), self.f)


class CommitteeChain:
    """All committees and issuers up to now."""

    __slots__ = ("_epochs", "genesis", "issuer", "issuer_changed", "issuers", "net")

    def __init__(self, genesis: Genesis) -> None:
        self.genesis = genesis
        self.net = genesis.net
        self._epochs = [EpochCommittee(0, tuple(genesis.witnesses), genesis.f)]
        self.issuer: bytes = genesis.issuer
        self.issuers: set[bytes] = {genesis.issuer}
        """Everybody who is or was the issuer."""
        self.issuer_changed = False
        """Whether this epoch has had its change of issuer."""

    # accessors

    @property
    def epoch(self) -> int:
        """The number of the newest epoch."""
        return len(self._epochs) - 1

    @property
    def current(self) -> EpochCommittee:
        """The committee of the newest epoch."""
        return self._epochs[-1]

    @property
    def epochs(self) -> tuple[EpochCommittee, ...]:
        """All of them, genesis first."""
        return tuple(self._epochs)

    def of(self, epoch: int) -> EpochCommittee:
        """The committee of an epoch. Raises :class:`RuleError` ``epoch`` (waits) for one that is not known yet."""
        if not 0 <= epoch < len(self._epochs):
            raise RuleError("epoch", f"no committee of epoch {epoch} is known", wait=epoch >= 0)
        return self._epochs[epoch]

    # predicates

    def check_committee(self, op: Committee) -> None:
        """Rules 1 and 6: the next epoch, distinct valid keys, n = 3f + 1."""
        if op.epoch != self.epoch + 1:
            raise RuleError("epoch", f"epoch {op.epoch} does not follow {self.epoch}")
        check_keys(op)

    def check_issuer(self, op: Issuer) -> None:
        """A valid key that never was issuer, and the first change of this epoch."""
        if not is_valid_key(op.key) or op.key in self.issuers:
            raise RuleError("issuer", "the new issuer's key is invalid or was issuer before")
        if self.issuer_changed:
            raise RuleError("issuer", "the issuer changed in this epoch already; change the committee first")

    # transitions

    def adopt(self, op: Committee, entry_id: bytes) -> None:
        """Begin the next epoch."""
        self._epochs.append(EpochCommittee(op.epoch, op.keys, op.f, entry_id))
        self.issuer_changed = False

    def replace_issuer(self, op: Issuer) -> None:
        """From now on another account grants."""
        self.issuer = op.key
        self.issuers.add(op.key)
        self.issuer_changed = True

    def lines(self) -> list[bytes]:
        """What a digest of the state covers: nothing for a network as it was founded."""
        lines = [
            b"epoch" + c.epoch.to_bytes(4, "big") + c.f.to_bytes(1, "big") + c.entry_id + b"".join(c.keys)
            for c in self._epochs[1:]
        ]
        if len(self.issuers) > 1:
            lines.append(b"issuer" + self.issuer + b"".join(sorted(self.issuers)))
        return lines


def check_keys(op: Committee) -> None:
    """Rule 1 for a committee op."""
    if len(set(op.keys)) != len(op.keys) or not all(is_valid_key(key) for key in op.keys):
        raise RuleError("keys", "a committee's keys must be distinct, valid Ed25519 keys")
    if not quorums.is_exact(len(op.keys), op.f):
        raise RuleError("committee", f"f = {op.f} needs exactly {3 * op.f + 1} witnesses, not {len(op.keys)}")
