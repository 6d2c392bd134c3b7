"""Whom to dial among many known peers: rather where one has nobody yet (against eclipse by one network's many peers).

A preference, not a limit: a swarm on one LAN or one machine stands in one subnet and is dialled all the same.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from config.vocabulary import PeerId
from p2p.core import addresses
from p2p.core.advert import Advert


def subnets(advert: Advert) -> frozenset[str]:
    """The networks a peer says it is in (a relay's for an address through one)."""
    parsed = (addresses.parse(text) for text in advert.addresses)
    return frozenset(addresses.subnet(address) for address in parsed if address is not None)


def choose(
    candidates: Mapping[PeerId, Advert], linked: Iterable[Advert], count: int, dice: Callable[[], float]
) -> list[PeerId]:
    """At most ``count`` of the candidates, one after another from the networks of which there are fewest so far.

    A peer that claims many networks counts with the one that is there most: claims make nobody rarer.
    """
    there: Counter[str] = Counter()
    for advert in linked:
        there.update(subnets(advert))
    left = {peer: (subnets(advert), dice()) for peer, advert in candidates.items()}
    chosen: list[PeerId] = []
    while left and len(chosen) < count:
        best = min(left, key=lambda peer: (max((there[net] for net in left[peer][0]), default=0), left[peer][1]))
        there.update(left.pop(best)[0])
        chosen.append(best)
    return chosen
