"""The arithmetic of quorums: every number that safety hangs on, each in one place.

n = 3f + 1 witnesses, at most f of them lie. Two quorums of 2f + 1 share f + 1 witnesses, so an honest one. Of m
handovers at least m - f come from any old quorum that certified or froze something, and at most f of those omit it:
what fewer than m - 2f report was never certified (exhaustive for f = 1, 2: no other threshold is safe and live).
"""

from collections.abc import Collection, Iterable

F_MAX = 16
COMMITTEE_MAX = 3 * F_MAX + 1


def is_exact(n: int, f: int) -> bool:
    """Rule 1: exactly 3f + 1 witnesses. With more, two quorums may share only liars; with fewer, none may form."""
    return 0 <= f <= F_MAX and n == 3 * f + 1


def quorum_of(f: int) -> int:
    """How many distinct witnesses make an object final, a set of freezes whole, a new witness ready."""
    return 2 * f + 1


def distinct(witnesses: Iterable[bytes]) -> Collection[bytes]:
    """Rule 1: whoever signs twice counts once."""
    return set(witnesses)


def survives(reports: int, received: int, f: int) -> bool:
    """Rule 8: whether what ``reports`` of ``received`` handovers say may have been certified (f of the old set)."""
    return reports >= max(1, received - 2 * f)
