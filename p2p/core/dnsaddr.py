"""dnsaddr: multiaddrs behind a DNS name (https://github.com/multiformats/multiaddr/blob/master/protocols/DNSADDR.md).

``/dnsaddr/<name>[/p2p/<peer>]`` stands for the addresses in the TXT records ``dnsaddr=<multiaddr>`` of
``_dnsaddr.<name>``, which may be dnsaddrs again. Owns: which names to ask for, what answers mean. Does not own: DNS.

Invariants:
1. Every name is asked for once; at most :data:`NAMES_MAX` in all, :data:`DEPTH_MAX` deep; at most :data:`ADDRESSES_MAX`
   addresses come out. A loop ends.
2. Only TCP addresses with a peer id come out, and only of the peer the dnsaddr names, if it names one.
"""

import re
from collections.abc import Iterable

from p2p.core import addresses

DEPTH_MAX = 4
NAMES_MAX = 16
ADDRESSES_MAX = 64
_SHAPE = re.compile(r"/dnsaddr/([A-Za-z0-9_.-]{1,200})(?:/p2p/([1-9A-HJ-NP-Za-km-z]{20,80}))?", re.ASCII)


def parse(text: str) -> tuple[str, str] | None:
    """Name and peer id (maybe empty) of a dnsaddr, or None for anything else."""
    match = _SHAPE.fullmatch(text)
    return (match[1], match[2] or "") if match else None


class Expansion:
    """One dnsaddr on its way to addresses: ask for :meth:`next`, hand the TXT records to :meth:`answered`."""

    def __init__(self, dnsaddr: str) -> None:
        self.found: list[str] = []
        self._pending: list[tuple[str, str, int]] = []
        self._seen: set[tuple[str, str]] = set()
        self._add(dnsaddr, "", 0)
        assert self._pending, dnsaddr

    def next(self) -> tuple[str, str, int] | None:
        """The next name (without ``_dnsaddr.``), the peer wanted of it, and how deep it lies; None: that is all."""
        return self._pending.pop(0) if self._pending else None

    def answered(self, wanted: str, depth: int, texts: Iterable[str]) -> None:
        """TXT records of a name."""
        for text in texts:
            key, _, value = text.partition("=")
            if key == "dnsaddr":
                self._add(value, wanted, depth + 1)

    def _add(self, text: str, wanted: str, depth: int) -> None:
        named = parse(text)
        if named is not None:
            name, peer_id = named[0].lower().rstrip("."), named[1]
            if wanted and peer_id not in ("", wanted):
                return
            ask = (name, peer_id or wanted)
            if depth <= DEPTH_MAX and ask not in self._seen and len(self._seen) < NAMES_MAX:
                self._seen.add(ask)
                self._pending.append((*ask, depth))
            return
        address = addresses.parse(text)
        usable = (
            address is not None
            and address.peer_id
            and not address.relay
            and address.peer_id == (wanted or address.peer_id)
        )
        if usable and text not in self.found and len(self.found) < ADDRESSES_MAX:
            self.found.append(text)
