"""Multiaddrs as adverts carry them: TCP, or TCP to a relay and from there on.

Checks shape only; dialling and resolving names belong to the adapters. Accepted are
``/(ip4|ip6|dns|dns4|dns6)/<host>/tcp/<port>[/p2p/<peer>]`` and, through a relay,
``<such an address>/p2p/<relay>/p2p-circuit[/p2p/<peer>]``.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

_PEER = r"/p2p/([1-9A-HJ-NP-Za-km-z]{20,80})"
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?", re.ASCII)
"""Stricter than it must be for dialling: the resolver raises for empty and overlong labels, instead of not finding."""
NAME_CHARS_MAX = 253
_SHAPE = re.compile(
    rf"/(ip4|ip6|dns|dns4|dns6)/([0-9A-Za-z_:.-]{{1,254}})/tcp/(\d{{1,5}})(?:{_PEER})?(/p2p-circuit(?:{_PEER})?)?",
    re.ASCII,
)
_OURS = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/[^/]*/tcp/[^/]*(?:/p2p(?:-circuit)?(?:/.*)?)?", re.DOTALL)
_ANY = re.compile(r"(?:/[!-.0-~]+)+")


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """``relay`` is the peer id of the relay that ``host`` and ``port`` belong to, empty for a direct address."""

    kind: str
    host: str
    port: int
    peer_id: str
    relay: str

    @property
    def is_ip(self) -> bool:
        """Whether the host is a number rather than a name."""
        return self.kind in ("ip4", "ip6")


def parse(text: str) -> TcpAddress | None:
    """The address in ``text``, or None for anything that is no TCP multiaddr."""
    match = _SHAPE.fullmatch(text)
    if match is None or not 0 < int(match[3]) <= 65535:
        return None
    kind, host, circuit = match[1], match[2], match[5]
    try:
        if kind in ("ip4", "ip6"):
            (IPv4Address if kind == "ip4" else IPv6Address)(host)
    except ValueError:
        return None
    if kind not in ("ip4", "ip6") and (len(host) > NAME_CHARS_MAX or not _NAME.fullmatch(host)):
        return None
    if circuit is None:
        return TcpAddress(kind, host, int(match[3]), match[4] or "", "")
    return TcpAddress(kind, host, int(match[3]), match[6] or "", match[4]) if match[4] else None


def is_later_kind(text: str) -> bool:
    """Whether this is a multiaddr of a kind that this version does not know: to be passed over, not to be refused."""
    return _ANY.fullmatch(text) is not None and _OURS.fullmatch(text) is None


def subnet(address: TcpAddress) -> str:
    """What stands for the network an address is in: /24 of IPv4, /48 of IPv6, a name itself."""
    if address.kind == "ip4":
        return address.host.rpartition(".")[0]
    if address.kind == "ip6":
        return IPv6Address(address.host).exploded[:14]
    return address.host.lower()
