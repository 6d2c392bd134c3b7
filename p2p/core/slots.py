"""Who gives up a place when every place is taken.

Identities cost nothing, so a crowd of fresh ones must not push out, or keep out, the peers a node has known for long.
The rule follows Bitcoin Core's eviction (net: AttemptToEvictConnection): protect what an attacker cannot make quickly
(time, a good score, another network), then take from the most crowded subnet.

Invariants:
1. Peers that this node dialled and peers that the operator pinned keep their place.
2. A newcomer displaces somebody only from a subnet more crowded than its own would be, or somebody worth less.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seat:
    """A connected peer. ``worth`` joins score and tenure; ``subnet`` is empty where subnets do not count."""

    peer_id: str
    subnet: str
    worth: float
    since: float
    keeps: bool
    """Dialled from here, or pinned."""


def choose_victim(seats: Sequence[Seat], newcomer: Seat) -> Seat | None:
    """Who leaves for the newcomer; None if nobody should."""
    crowds = Counter(seat.subnet for seat in seats if seat.subnet)
    candidates = [seat for seat in seats if not seat.keeps]
    if not candidates:
        return None

    def crowd(seat: Seat) -> int:
        return crowds[seat.subnet] if seat.subnet else 1

    worst = max(candidates, key=lambda seat: (crowd(seat), -seat.worth, seat.since))
    own = crowds[newcomer.subnet] + 1 if newcomer.subnet else 1
    if crowd(worst) > own or newcomer.keeps:
        return worst
    least = min(candidates, key=lambda seat: (seat.worth, -seat.since))
    return least if least.worth < newcomer.worth else None
